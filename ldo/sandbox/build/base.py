"""The sandbox's base generator: a tiny Wan transformer and its UMT5 text encoder, trained on the mix from scratch.

Three in ten of its clips break physics, so it has learnt to break physics; more of the same data cannot mend that.
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

from ldo.flow import training_times
from ldo.rng import torch_rng
from ldo.sandbox.build.loop import fit
from ldo.sandbox.build.pool import pool

CLIPS = 100_000
ENCODED = 50_000  # of them, enough for the steps below
LENGTH = 32  # tokens of a prompt
SHIFT = 3.0
FINE_SHIFT = 2.0  # of the second phase's training times: more of them where paths become exact
TRANSFORMER = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=8,
    out_channels=8,
    text_dim=64,
    freq_dim=64,
    ffn_dim=512,
    num_layers=6,
    rope_max_seq_len=64,
)


def tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the captions' words, in alphabetical order."""
    words = sorted({w for c in captions for w in c.lower().replace(",", " ,").split()})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=LENGTH)


def text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Two layers of width 64."""
    config = UMT5Config(
        vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1, dropout_rate=0.0
    )
    return UMT5EncoderModel(config)


def embed(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings as WanPipeline makes them: zero past the prompt's end."""
    return encoder(ids, mask).last_hidden_state * mask[..., None]


def encode(frames: np.ndarray, vae: AutoencoderKLWan, device: str, batch: int = 50) -> np.ndarray:
    """Normalised latents [n, 8, 5, 8, 8] fp16 of clips [n, T, 3, H, W] uint8."""
    vae = vae.to(device)
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    out = np.zeros((len(frames), 8, 5, 8, 8), np.float16)
    with torch.no_grad():
        for i in progress(range(0, len(frames), batch), "latents"):
            x = (torch.from_numpy(np.array(frames[i : i + batch])).to(device).float() / 127.5 - 1).transpose(1, 2)
            out[i : i + batch] = ((vae.encode(x).latent_dist.mean - mean) / std).half().cpu().numpy()
    return out


def latents(work: Path, vae: AutoencoderKLWan, device: str) -> tuple[np.ndarray, list[str]]:
    """Normalised latents of the mix [n, C, T, H, W] fp16, made once, and the captions."""
    frames, captions = pool(work, "mix", CLIPS)
    path = work / f"latents-{ENCODED}.npy"
    if not path.exists():
        part = path.with_suffix(".part.npy")
        np.save(part, encode(frames[:ENCODED], vae, device))
        part.rename(path)
    return np.load(path), captions


def _models(captions: list[str]) -> tuple[PreTrainedTokenizerFast, dict[str, nn.Module]]:
    torch.manual_seed(3)
    words = tokenizer(captions)
    parts = {"transformer": WanTransformer3DModel(**TRANSFORMER), "text": text_encoder(len(words))}
    return words, parts | {f"average_{k}": copy.deepcopy(v).requires_grad_(False) for k, v in parts.items()}


def block_matrices(transformer: WanTransformer3DModel) -> list[nn.Parameter]:
    """The blocks' matrices: what Muon is made for."""
    return [p for p in transformer.blocks.parameters() if p.ndim == 2]


def train(
    work: Path, device: str, deadline: float, vae: AutoencoderKLWan, steps: int = 40_000, fine: int = 10_000, batch: int = 16, fast: bool = False
) -> None:
    """Flow matching in two phases; one caption in ten is dropped. An exponential average is kept and is what ships.

    The second phase has twice the clips in a step and Muon for the blocks' matrices, which from the same start and in
    the same time gets further than AdamW (loss at t = .2 after five minutes from nothing: .309 against .372).
    ``fast`` compiles the transformer: a sixth less time on a CPU, after a minute of compiling.
    """
    data, captions = latents(work, vae, device)
    words, parts = _models(captions)
    parts = {k: v.to(device) for k, v in parts.items()}
    tokens = words([*captions, ""], padding="max_length", max_length=LENGTH, return_tensors="pt")
    ids, mask = tokens.input_ids, tokens.attention_mask
    trained = [*parts["transformer"].parameters(), *parts["text"].parameters()]
    predict = torch.compile(parts["transformer"]) if fast else parts["transformer"]

    def step(i: int, phase: str, batch: int, optimizers: list[torch.optim.Optimizer], shift: float) -> dict[str, float]:
        rng = torch_rng(3, phase, i)
        rows = torch.randint(len(data), (batch,), generator=rng)
        x0 = torch.from_numpy(data[rows.numpy()]).float().to(device)
        noise = torch.randn(x0.shape, generator=rng).to(device)
        u = torch.rand(batch, generator=rng)
        t = training_times(u, shift).to(device)
        texts = torch.where(torch.rand(batch, generator=rng) < 0.1, len(captions), rows)
        text = embed(parts["text"], ids[texts].to(device), mask[texts].to(device))
        at = t.view(-1, 1, 1, 1, 1)
        v = predict((1 - at) * x0 + at * noise, t * 1000, text, return_dict=False)[0]
        loss = (v - (noise - x0)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        keep = min(0.9995, (1 + i) / (10 + i))
        with torch.no_grad():
            for name in ("transformer", "text"):
                torch._foreach_lerp_([*parts[f"average_{name}"].parameters()], [*parts[name].parameters()], 1 - keep)
        return {"loss": loss.item()}

    def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    every = [adamw(trained)]
    fit(work / "base.pt", parts, every, lambda i: step(i, "base", batch, every, SHIFT), steps, deadline)
    matrices = block_matrices(parts["transformer"])
    rest = [p for p in trained if all(p is not m for m in matrices)]
    both = [torch.optim.Muon(matrices, lr=1.5e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), adamw(rest)]
    fit(work / "base-fine.pt", parts, both, lambda i: step(i, "base fine", 2 * batch, both, FINE_SHIFT), fine, deadline)


def pipeline(work: Path, vae: AutoencoderKLWan) -> WanPipeline:
    """The base as trained so far, as a stock pipeline."""
    _, captions = pool(work, "mix", CLIPS)
    words, parts = _models(captions)
    state = torch.load(work / "base-fine.pt", map_location="cpu", weights_only=True)["modules"]
    for name in ("transformer", "text"):
        parts[name].load_state_dict(state[f"average_{name}"])
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=SHIFT)
    return WanPipeline(tokenizer=words, text_encoder=parts["text"].eval(), vae=vae, scheduler=scheduler, transformer=parts["transformer"].eval())


def save_half(pipeline: WanPipeline, folder: Path) -> None:
    """A pipeline in half precision, as it ships."""
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        part.half()
    pipeline.save_pretrained(folder)
