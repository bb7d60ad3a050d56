"""Tiny models with random weights in the real formats: a pipeline folder of each family and a V-JEPA 2 folder."""

from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
    VJEPA2Config,
    VJEPA2Model,
)

from ldo.models import lora
from ldo.models.generator.protocol import Generator
from ldo.sandbox.simulate import NAMES

WORDS = sorted(
    {
        *NAMES,
        *[
            "a",
            "and",
            "ball",
            "rolls",
            "slowly",
            "quickly",
            "to",
            "the",
            "right",
            "left",
            "up",
            "down",
            "is",
            "thrown",
            "dropped",
        ],
    }
)


# what every tiny transformer of a family is made of
_SIZE = dict(num_attention_heads=2, attention_head_dim=16)
_FOUR = dict(in_channels=4, out_channels=4)
WAN = dict(
    **_SIZE, **_FOUR, num_layers=2, patch_size=(1, 2, 2), text_dim=16, freq_dim=16, ffn_dim=64, rope_max_seq_len=32
)
COGVIDEOX = dict(**_SIZE, **_FOUR, num_layers=2, time_embed_dim=16, text_embed_dim=16, sample_width=4, sample_height=4)
HUNYUAN = dict(**_SIZE, **_FOUR, num_refiner_layers=1, text_embed_dim=16, rope_axes_dim=(4, 6, 6))
LTX = dict(**_SIZE, num_layers=2, cross_attention_dim=32, caption_channels=16)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is ``WORDS``: one token a word."""
    inner = Tokenizer(
        models.WordLevel(
            {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}, unk_token="<unk>"
        )
    )
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def write_wan(folder: Path, seed: int = 0, experts: int = 1, expand: bool = False) -> Path:
    """A Wan pipeline of some 50,000 weights: VAE 4x in time and space, 2 blocks of width 32.

    ``experts`` = 2 is the form of Wan2.2-A14B; ``expand`` that of the 5B: a time for each token, a patched residual
    VAE.
    """
    torch.manual_seed(seed)
    words = tokenizer()
    text = UMT5Config(
        vocab_size=len(words),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    )
    vae_config = dict(
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
    if expand:
        vae_config |= dict(
            is_residual=True,
            dim_mult=[1, 2, 2],
            patch_size=2,
            in_channels=12,
            out_channels=12,
            decoder_base_dim=4,
            scale_factor_spatial=8,
        )
    vae = AutoencoderKLWan(**vae_config)
    transformers = [WanTransformer3DModel(**WAN) for _ in range(experts)]
    for transformer in transformers:
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.25)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    pipeline = WanPipeline(
        tokenizer=words,
        text_encoder=UMT5EncoderModel(text),
        vae=vae,
        scheduler=scheduler,
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
        expand_timesteps=expand,
    )
    pipeline.save_pretrained(folder)
    return folder


def _t5(words: PreTrainedTokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(words),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            dropout_rate=0.0,
        )
    )


def write_cogvideox(folder: Path, seed: int = 0, rotary: bool = True) -> Path:
    """CogVideoX, the 5B's form with rotary positions or the 2B's with a table of them; VAE 4x in time, 8x in space."""
    torch.manual_seed(seed)
    words = tokenizer()
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.7,
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        **COGVIDEOX, sample_frames=17, max_text_seq_length=16, use_rotary_positional_embeddings=rotary
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.25)
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0 if rotary else 3.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=words, text_encoder=_t5(words), vae=vae, transformer=transformer, scheduler=scheduler
    )
    pipeline.save_pretrained(folder)
    return folder


def write_hunyuan(folder: Path, seed: int = 0) -> Path:
    """HunyuanVideo: one double- and one single-stream block; VAE 4x in time, 8x in space."""
    torch.manual_seed(seed)
    words = tokenizer()
    llama = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    clip = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=2,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.5,
    )
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **HUNYUAN, num_layers=1, num_single_layers=1, pooled_projection_dim=8
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.25)
    pipeline = diffusers.HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama),
        tokenizer=words,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(clip),
        tokenizer_2=words,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_ltx(folder: Path, seed: int = 0) -> Path:
    """LTX-Video; VAE 8x in time, 16x in space."""
    torch.manual_seed(seed)
    words = tokenizer()
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(4, 4, 4, 8),
        decoder_block_out_channels=(4, 4, 4, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=2,
    )
    vae.latents_mean.normal_(std=0.1)
    vae.latents_std.uniform_(0.7, 1.3)
    transformer = diffusers.LTXVideoTransformer3DModel(**LTX, in_channels=8, out_channels=8)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.25)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=1024,
        base_shift=0.95,
        max_image_seq_len=4096,
        max_shift=2.05,
        shift_terminal=0.1,
    )
    pipeline = diffusers.LTXPipeline(
        scheduler=scheduler, vae=vae, text_encoder=_t5(words), tokenizer=words, transformer=transformer
    )
    pipeline.save_pretrained(folder)
    return folder


FAMILIES = {
    "wan": write_wan,
    "wan2.2-5b": lambda folder: write_wan(folder, expand=True),
    "wan2.2-a14b": lambda folder: write_wan(folder, experts=2),
    "cogvideox-2b": lambda folder: write_cogvideox(folder, rotary=False),
    "cogvideox-5b": write_cogvideox,
    "hunyuan": write_hunyuan,
    "ltx": write_ltx,
}


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


# ---------------------------------------------------------------------------------------------- single transformers


def transformer(family: str, seed: int = 0) -> tuple[torch.nn.Module, dict]:
    """A tiny transformer of a family and inputs for one call: two samples of 2 x 4 x 4 latents, a text of 6 tokens.

    Where the family masks its text, the second sample's ends two tokens early.
    """
    torch.manual_seed(seed)
    text, time = torch.randn(2, 6, 16), torch.tensor([300.0, 700.0])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    if family == "wan":
        model = WanTransformer3DModel(**WAN)
        call = {"hidden_states": torch.randn(2, 4, 2, 4, 4), "timestep": time}
    elif family == "cogvideox":
        model = diffusers.CogVideoXTransformer3DModel(
            **COGVIDEOX, sample_frames=5, max_text_seq_length=6, use_rotary_positional_embeddings=True
        )
        angle = torch.randn(8, 16)
        call = {
            "hidden_states": torch.randn(2, 2, 4, 4, 4),
            "timestep": time,
            "image_rotary_emb": (angle.cos(), angle.sin()),
        }
    elif family == "ltx":
        model = diffusers.LTXVideoTransformer3DModel(**LTX, in_channels=4, out_channels=4)
        call = {"hidden_states": torch.randn(2, 32, 4), "timestep": time[:, None], "encoder_attention_mask": mask}
        call |= {"num_frames": 2, "height": 4, "width": 4}
    else:
        assert family == "hunyuan"
        model = diffusers.HunyuanVideoTransformer3DModel(
            **HUNYUAN, num_layers=2, num_single_layers=2, pooled_projection_dim=16, guidance_embeds=False
        )
        call = {
            "hidden_states": torch.randn(2, 4, 2, 4, 4),
            "timestep": time,
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(2, 16),
        }
    return model.eval(), {**call, "encoder_hidden_states": text, "return_dict": False}


# ---------------------------------------------------------------------------------------------- adapters


def adapter(generator: Generator, rank: int = 4, alpha: float = 8.0) -> dict[str, torch.nn.Parameter]:
    """Put an adapter with random weights on a generator."""
    parameters = lora.add(generator.transformers, rank, alpha, generator.lora_targets, seed=0)
    rng = torch.Generator().manual_seed(1)
    # a fresh adapter changes nothing, and so would hide one that is ignored
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(0, 0.3, generator=rng)
    return parameters
