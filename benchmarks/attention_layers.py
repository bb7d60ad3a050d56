"""The attention layers of ``bench_attention.py``: shapes of the published models, inputs, and exact gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.variant import Unavailable
from ldo.memory.meta_models import pipeline_geometry
from ldo.models.generator.published import model_configs

GENERATOR, WORLD = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "facebook/vjepa2-vitl-fpc64-256"
# tokens of a prompt, as Wan pads them
TEXT = 512
# frames, height, width, clips timed together
CLIPS = {"cuda": [(33, 240, 416, 4), (81, 480, 832, 1)], "cpu": [(5, 64, 64, 1)]}
# frames, windows timed together
WINDOWS = {"cuda": [(16, 4), (64, 1)], "cpu": [(4, 1)]}
# N x M fp32 matrices that sdpa_math holds at its worst, about: enough to tell whether it can fit at all
MATRICES = {"fwd": 3, "fwd+bwd": 5}
# Queries at a time in fp64: the whole N x M matrix in fp64 would not fit next to the models.
ROWS = 1024
CPU_BYTES = 2**32


@dataclass(frozen=True)
class Layer:
    """The attention of one layer.

    ``b`` samples, ``h`` heads of width ``d``, ``n`` queries, ``m`` keys; ``model``: "generator" or "world model".
    """

    name: str
    model: str
    b: int
    h: int
    n: int
    m: int
    d: int

    @property
    def shape(self) -> dict[str, int]:
        """The shape as rows name it; M, the number of keys, only where it is not N."""
        shape = {"B": self.b, "H": self.h, "N": self.n}
        if self.m != self.n:
            shape["M"] = self.m
        return {**shape, "D": self.d}

    def flops(self, kind: str) -> float:
        """Operations of a pass."""
        # forward two products; backward five, with q k once more
        return 4 * self.b * self.h * self.n * self.m * self.d * (1 if kind == "fwd" else 3.5)

    def square_bytes(self, kind: str) -> int:
        """Approximate bytes that attention needs as two plain products and a softmax."""
        return MATRICES[kind] * 4 * self.b * self.h * self.n * self.m

    def inputs(self, rng: torch.Generator, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of the output, in the memory layout that the models give them.

        Those of the generator are views [B, N, H, D] of a projection. Those of V-JEPA are [B, H, N, D]: q and k are new
        tensors from the rotation, v is a view of a projection.
        """

        def draw(length: int) -> Tensor:
            return torch.randn(self.b, length, self.h, self.d, generator=rng, device=device).to(dtype)

        query = draw(self.n)
        key = draw(self.m)
        value = draw(self.m)
        upstream = draw(self.n)
        if self.model == "generator":
            return query, key, value, upstream
        return query.transpose(1, 2).contiguous(), key.transpose(1, 2).contiguous(), value.transpose(1, 2), upstream


def layers(kind: str) -> list[Layer]:
    """The layers to time on a "cuda" or "cpu" device, from the published configurations."""
    published = model_configs(GENERATOR)
    geometry = pipeline_geometry(published)
    heads = published["transformer"]["num_attention_heads"]
    width = published["transformer"]["attention_head_dim"]
    timed_layers = []
    for frames, height, across, clips in CLIPS[kind]:
        grid = geometry.tokens(geometry.latents(frames, height, across))
        tokens = grid[0] * grid[1] * grid[2]
        timed_layers.append(Layer("wan self", "generator", clips, heads, tokens, tokens, width))
        timed_layers.append(Layer("wan cross", "generator", clips, heads, tokens, TEXT, width))
    config = model_configs(WORLD)["config"]
    patches = (config["crop_size"] // config["patch_size"]) ** 2
    for frames, windows in WINDOWS[kind]:
        tokens = frames // config["tubelet_size"] * patches
        for name, prefix in (("encoder", ""), ("predictor", "pred_")):
            heads = config[f"{prefix}num_attention_heads"]
            width = config[f"{prefix}hidden_size"] // heads
            timed_layers.append(Layer(name, "world model", windows, heads, tokens, tokens, width))
    return timed_layers


def plan(kind: str, quick: bool, sizes: list[int] | None) -> list[Layer]:
    """The layers to time.

    ``sizes`` replace the tokens of self-attention, one sample at a time; ``quick``: the shorter clip of each model.
    """
    every = layers(kind)
    if sizes:
        # cross-attention has the length of a prompt, which --sizes does not replace
        once = {layer.name: layer for layer in every if layer.n == layer.m}
        return [
            Layer(layer.name, layer.model, 1, layer.h, size, size, layer.d) for layer in once.values() for size in sizes
        ]
    if quick:
        first: dict[str, Layer] = {}
        for layer in every:
            first.setdefault(layer.name, layer)
        return list(first.values())
    return every


def fits(layer: Layer, kind: str, device: torch.device) -> None:
    """Raise ``Unavailable`` where attention as plain products would not fit the device's memory."""
    needed = layer.square_bytes(kind)
    if device.type == "cuda":
        free = torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)
    else:
        free = CPU_BYTES
    if needed > 0.9 * free:
        raise Unavailable(f"its matrices of {layer.n} x {layer.m} take some {needed / 2**30:.0f} GiB")


def exact(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients dq, dk, dv of [H, N, D] in fp64, ``ROWS`` queries at a time.

    p = softmax(q k' / sqrt(D)), output = p v, and with g = the gradient of the output:

        dv = p' g,   ds = p (g v' - sum(g output)) / sqrt(D),   dq = ds k,   dk = ds' q
    """
    q, k, v, g = (tensor.double() for tensor in (q, k, v, g))
    scale = q.shape[-1] ** -0.5
    output = torch.empty_like(q)
    dq = torch.empty_like(q)
    dk = torch.zeros_like(k)
    dv = torch.zeros_like(v)
    # a query needs all keys but no other query
    for start in range(0, q.shape[1], ROWS):
        rows = slice(start, start + ROWS)
        p = (q[:, rows] @ k.mT * scale).softmax(-1)
        output[:, rows] = p @ v
        along = (g[:, rows] * output[:, rows]).sum(-1, keepdim=True)
        ds = p * (g[:, rows] @ v.mT - along) * scale
        dq[:, rows] = ds @ k
        dk += ds.mT @ q[:, rows]
        dv += p.mT @ g[:, rows]
    return output, dq, dk, dv
