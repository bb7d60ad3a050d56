"""The sandbox's base generator: a tiny Wan transformer and its UMT5 text encoder, trained on the mix from scratch.

Four in ten of its clips break physics, so it has learnt to break physics. More of the same data cannot fix that.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from rich.progress import track as progress
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ldo.core.optimizer import average_keep
from ldo.core.rng import torch_rng
from ldo.models.flow import noisy, training_times
from ldo.sandbox import scenes
from ldo.sandbox.build.loop import fit
from ldo.sandbox.build.pool import pool
from ldo.sandbox.build.vae import CHANNELS

BASE_CLIPS = 60_000
LENGTH = 32  # tokens of a prompt
SHIFT = 3.0  # of sampling and of training times
TRANSFORMER = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    text_dim=64,
    freq_dim=64,
    ffn_dim=512,
    num_layers=6,
    rope_max_seq_len=64,
)


def tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the captions' words, in alphabetical order."""
    words = set()
    for caption in captions:
        words.update(caption.lower().replace(",", " ,").split())
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    # T5 was trained with </s> at the end of every prompt, and WanPipeline expects its tokenizer to add it.
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=LENGTH
    )


def text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """An untrained encoder of two layers of width 64, for ``vocabulary`` words."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config)


def embed(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings as WanPipeline makes them: zero past the prompt's end."""
    return encoder(ids, mask).last_hidden_state * mask[..., None]


def encode_clips(frames: np.ndarray, vae: AutoencoderKLWan, device: str, batch: int = 50) -> np.ndarray:
    """Normalised latents [n, 12, 5, 8, 8] fp16 of clips [n, T, 3, H, W] uint8."""
    vae = vae.to(device)
    channel_mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    channel_deviation = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    latents = np.zeros((len(frames), vae.config.z_dim, 5, 8, 8), np.float16)
    with torch.no_grad():
        for start in progress(range(0, len(frames), batch), "latents"):
            # A copy, since torch warns of memory-mapped arrays that are read-only.
            pixels = torch.from_numpy(np.array(frames[start : start + batch])).to(device).float()
            encoded = vae.encode((pixels / 127.5 - 1).transpose(1, 2)).latent_dist.mean
            latents[start : start + batch] = ((encoded - channel_mean) / channel_deviation).half().cpu().numpy()
    return latents


def mix_latents(work: Path, vae: AutoencoderKLWan, device: str) -> tuple[np.ndarray, list[str]]:
    """Normalised latents of the mix [n, C, T, H, W] fp16, made once, and the captions."""
    frames, captions = pool(work, "mix", BASE_CLIPS)
    path = work / f"latents-{scenes.WORLD_VERSION}-{BASE_CLIPS}.npy"
    if not path.exists():
        temporary = path.with_suffix(".part.npy")
        np.save(temporary, encode_clips(frames, vae, device))
        temporary.rename(path)
    return np.load(path), captions


def _new_models(captions: list[str]) -> tuple[PreTrainedTokenizerFast, dict[str, nn.Module]]:
    """The tokenizer, and the untrained models with a copy of each that holds its average."""
    torch.manual_seed(3)
    word_tokenizer = tokenizer(captions)
    trained = {"transformer": WanTransformer3DModel(**TRANSFORMER), "text": text_encoder(len(word_tokenizer))}
    averages = {f"average_{name}": copy.deepcopy(model).requires_grad_(False) for name, model in trained.items()}
    return word_tokenizer, trained | averages


def block_matrices(transformer: WanTransformer3DModel) -> list[nn.Parameter]:
    """The blocks' matrices: what Muon is made for."""
    return [parameter for parameter in transformer.blocks.parameters() if parameter.ndim == 2]


def other_parameters(parameters: list[nn.Parameter], matrices: list[nn.Parameter]) -> list[nn.Parameter]:
    """``parameters`` without ``matrices``, in their order."""
    # By identity: == would compare the tensors' values.
    left_out = {id(matrix) for matrix in matrices}
    return [parameter for parameter in parameters if id(parameter) not in left_out]


def train_base(
    work: Path,
    device: str,
    deadline: float,
    vae: AutoencoderKLWan,
    steps: int = 20_000,
    batch: int = 32,
    fast: bool = False,
) -> None:
    """Flow matching; one caption in ten is dropped. An exponential average is kept, and it is what ships.

    Muon trains the blocks' matrices and AdamW the rest: in the same time that gets further than AdamW alone (on the
    latents of an earlier VAE, loss at t = 0.2 after five minutes from nothing: 0.309 against 0.372). ``fast`` compiles
    the transformer: a sixth less time on a CPU, after a minute of compiling.
    """
    latents, captions = mix_latents(work, vae, device)
    word_tokenizer, networks = _new_models(captions)
    # All four go into the checkpoint: the averages are trained state too.
    networks = {name: part.to(device) for name, part in networks.items()}
    # The empty caption comes last: its row is the one that dropped captions get.
    tokens = word_tokenizer([*captions, ""], padding="max_length", max_length=LENGTH, return_tensors="pt")
    token_ids, attention_mask = tokens.input_ids, tokens.attention_mask
    parameters = [*networks["transformer"].parameters(), *networks["text"].parameters()]
    predict = torch.compile(networks["transformer"]) if fast else networks["transformer"]

    matrices = block_matrices(networks["transformer"])
    optimizers: list[torch.optim.Optimizer] = [
        # match_rms_adamw makes Muon's steps as long as AdamW's, so that a rate and a decay of AdamW's size suit it.
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            other_parameters(parameters, matrices), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        ),
    ]

    def step(index: int) -> dict[str, float]:
        rng = torch_rng(3, "base", index)
        rows = torch.randint(len(latents), (batch,), generator=rng)
        clean = torch.from_numpy(latents[rows.numpy()]).float().to(device)
        noise = torch.randn(clean.shape, generator=rng).to(device)
        times = training_times(torch.rand(batch, generator=rng), SHIFT).to(device)
        texts = torch.where(torch.rand(batch, generator=rng) < 0.1, len(captions), rows)
        embeddings = embed(networks["text"], token_ids[texts].to(device), attention_mask[texts].to(device))
        velocity = predict(noisy(clean, noise, times), times * 1000, embeddings, return_dict=False)[0]
        loss = (velocity - (noise - clean)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for name in ("transformer", "text"):
                averages = [*networks[f"average_{name}"].parameters()]
                torch._foreach_lerp_(averages, [*networks[name].parameters()], 1 - average_keep(0.999, index))
        return {"loss": loss.item()}

    fit(work / "base.pt", networks, optimizers, step, steps, deadline)


def base_pipeline(work: Path, vae: AutoencoderKLWan) -> WanPipeline:
    """The base as trained so far, as a stock pipeline."""
    _, captions = pool(work, "mix", BASE_CLIPS)
    word_tokenizer, networks = _new_models(captions)
    averages = torch.load(work / "base.pt", map_location="cpu", weights_only=True)["modules"]
    for name in ("transformer", "text"):
        networks[name].load_state_dict(averages[f"average_{name}"])
    # The stock scheduler of Wan, so that the folder loads and samples like a published one.
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=SHIFT
    )
    return WanPipeline(
        tokenizer=word_tokenizer,
        text_encoder=networks["text"].eval(),
        vae=vae,
        scheduler=scheduler,
        transformer=networks["transformer"].eval(),
    )


def save_half(pipeline: WanPipeline, folder: Path) -> None:
    """Write a pipeline in half precision, as it ships."""
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        part.half()
    pipeline.save_pretrained(folder)
