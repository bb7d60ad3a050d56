"""Tiny models with random weights in the real formats: a WanPipeline folder and a V-JEPA 2 folder."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel, VJEPA2Config, VJEPA2Model

from ldo.sandbox.simulate import NAMES

WORDS = sorted({*NAMES, *["a", "and", "ball", "rolls", "slowly", "quickly", "to", "the", "right", "left", "up", "down", "is", "thrown", "dropped"]})


def write_wan(folder: Path, seed: int = 0) -> Path:
    """A Wan pipeline of some 50,000 weights: VAE 4x in time and space, 2 blocks of width 32."""
    torch.manual_seed(seed)
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}, unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1, dropout_rate=0.0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
        latents_mean=[0.1, 0.0, -0.1, 0.2],
        latents_std=[1.0, 0.9, 1.1, 0.8],
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.25)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0)
    pipeline = WanPipeline(tokenizer=words, text_encoder=UMT5EncoderModel(text), vae=vae, scheduler=scheduler, transformer=transformer)
    pipeline.save_pretrained(folder)
    return folder


def write_vjepa(folder: Path, seed: int = 0, crop: int = 32) -> Path:
    """A V-JEPA 2 of some 60,000 weights: 16 frames, tubelets of 2, patches of 8."""
    torch.manual_seed(seed)
    config = VJEPA2Config(
        patch_size=8,
        crop_size=crop,
        frames_per_clip=16,
        tubelet_size=2,
        hidden_size=48,
        num_attention_heads=2,
        num_hidden_layers=2,
        mlp_ratio=2,
        pred_hidden_size=48,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=2,
        num_pooler_layers=1,
    )
    model = VJEPA2Model(config)
    torch.nn.init.normal_(model.predictor.embeddings.mask_tokens, std=0.02)
    model.save_pretrained(folder)
    return folder
