"""Every attention backend of ldo.attention that is here: which kernels really ran, how fast they are, and what ``auto`` picks.

    python benchmarks/bench_attention.py [--quick] [--variants native,sdpa_cudnn] [--sizes 4096,8192] [--out FILE.json]
    python benchmarks/bench_attention.py --model        the layers' shapes and operations; runs nothing

The models are Wan2.1-1.3B and a ViT-L V-JEPA 2 in their published configurations, two blocks of each, random weights. First each
model runs forward and backward with each backend, and the profiler's kernel names are kept: one line says where they are not of
the family that the backend promises. Then the attention of one layer alone is timed through the functions that the trainer calls, q, k, v
given in the memory layouts of the models: "wan self", "wan cross" (to 512 text tokens), "encoder", "predictor". The error is that of the
output (fwd) or the worst of dq, dk, dv (fwd+bwd) against fp64 on two heads of one sample.

Operations: 4 B H N M D forward, 3.5 times that with the backward, which multiplies q by k again. ``share``: of the measured matmul rate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import common, profiled, show
from benchmarks.bench_model import random_model
from ldo import attention, meta
from ldo.config import RecipeError
from ldo.generator.published import configs
from ldo.world_model import WorldModel

GENERATOR, WORLD = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "facebook/vjepa2-vitl-fpc64-256"
BLOCKS = 2  # of each model: kernels repeat with every block
TEXT = 512
CLIPS = {"cuda": [(33, 240, 416, 4), (81, 480, 832, 1)], "cpu": [(5, 64, 64, 1)]}  # frames, height, width, clips timed together
WINDOWS = {"cuda": [(16, 4), (64, 1)], "cpu": [(4, 1)]}  # frames, windows timed together
MATRICES = {"fwd": 3, "fwd+bwd": 5}  # N x M fp32 matrices that sdpa_math holds at its worst, about
ROWS = 1024  # of queries at a time, in fp64
CPU_BYTES = 2**32
EVEN = 0.02  # a difference that is no reason to change the order


@dataclass(frozen=True)
class Layer:
    """The attention of one layer: ``b`` samples, ``h`` heads of width ``d``, ``n`` queries, ``m`` keys, of ``model`` "generator" or "world model"."""

    name: str
    model: str
    b: int
    h: int
    n: int
    m: int
    d: int

    def flops(self, kind: str) -> float:
        """Operations of a pass."""
        return 4 * self.b * self.h * self.n * self.m * self.d * (1 if kind == "fwd" else 3.5)

    def square_bytes(self, kind: str) -> int:
        """What attention written out needs, about."""
        return MATRICES[kind] * 4 * self.b * self.h * self.n * self.m

    def inputs(self, rng: torch.Generator, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """q, k, v and the output's gradient, laid out as the models have them.

        The generator's are views [B, N, H, D] of a projection. V-JEPA's are [B, H, N, D]: q and k new from the rotation, v a view of a projection.
        """

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, device=device).to(dtype)

        q, k, v, g = (draw(self.b, length, self.h, self.d) for length in (self.n, self.m, self.m, self.n))
        if self.model == "generator":
            return q, k, v, g
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return q.contiguous(), k.contiguous(), v, g


@dataclass(frozen=True)
class Models:
    """Both models and, by backend, the function that a layer of each calls with q, k, v. ``picked``: what ``auto`` gives."""

    generator: torch.nn.Module
    judge: WorldModel
    functions: dict[str, dict[str, Callable[..., Tensor]]]  # model -> backend -> function
    picked: dict[str, str]


# ---------------------------------------------------------------------------------------------- the models


def layers(kind: str) -> list[Layer]:
    """The layers to time on a "cuda" or "cpu" device, from the published configurations."""
    wan, judge = configs(GENERATOR), configs(WORLD)["config"]
    t, geometry = wan["transformer"], meta.geometry(wan)
    area, found = (judge["crop_size"] // judge["patch_size"]) ** 2, []
    heads, width = t["num_attention_heads"], t["attention_head_dim"]
    for frames, height, across, b in CLIPS[kind]:
        grid = geometry.tokens(geometry.latents(frames, height, across))
        n = grid[0] * grid[1] * grid[2]
        found += [Layer("wan self", "generator", b, heads, n, n, width), Layer("wan cross", "generator", b, heads, n, TEXT, width)]
    for frames, b in WINDOWS[kind]:
        n = frames // judge["tubelet_size"] * area
        for name, prefix in (("encoder", ""), ("predictor", "pred_")):
            h = judge[f"{prefix}num_attention_heads"]
            found.append(Layer(name, "world model", b, h, n, n, judge[f"{prefix}hidden_size"] // h))
    return found


def models(bench: common.Bench) -> Models:
    """Build both, and set every backend once: one that is not here, or fails its probe, is named in one line and left out."""
    device, dtype = bench.device, bench.dtype
    torch.manual_seed(0)
    generator = random_model(configs(GENERATOR)["transformer"] | {"num_layers": BLOCKS}, dtype, device)
    few = {"num_hidden_layers": BLOCKS, "pred_num_hidden_layers": BLOCKS}
    judge = WorldModel(random_model(configs(WORLD)["config"] | few, dtype, device, "VJEPA2Model")).to(device)
    functions: dict[str, dict[str, Callable[..., Tensor]]] = {"generator": {}, "world model": {}}
    left_out: dict[str, str] = {}
    for name, backend in attention.BACKENDS.items():
        if bench.args.variants and name not in bench.args.variants:
            continue
        reason = attention.refuse(backend, dtype, device)
        for model, functions_of in () if reason else functions.items():
            try:
                choose(generator, judge, model, name, dtype, device)
            except RecipeError as problem:
                reason = f"{reason}; {problem}" if reason else str(problem)
                continue
            functions_of[name] = layer_function(judge, model, backend)
        if reason:
            left_out[name] = reason
            print(f"{name}: left out, {reason}", flush=True)
    picked = {model: choose(generator, judge, model, "auto", dtype, device).backend for model in functions}
    bench.result["left_out"] = left_out
    return Models(generator, judge, functions, picked)


def choose(generator: torch.nn.Module, judge: WorldModel, model: str, name: str, dtype: torch.dtype, device: torch.device) -> attention.Effect:
    """Set a backend as the trainer does."""
    if model == "generator":
        return attention.set_generator(generator, name, dtype, device)
    return attention.set_world_model(judge.model, name, dtype, device)


def layer_function(judge: WorldModel, model: str, backend: attention.Backend) -> Callable[..., Tensor]:
    """What a layer calls with q, k, v, giving [B, N, H, D]. Of the world model: what is registered now, so set ``backend`` first."""
    if model == "generator":
        return lambda q, k, v: attention.attend(backend.dense, q, k, v)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layer = judge.model.encoder.layer[0].attention
    registered = ALL_ATTENTION_FUNCTIONS[judge.model.config._attn_implementation]
    return lambda q, k, v: registered(layer, q, k, v, None, is_causal=False, scaling=q.shape[-1] ** -0.5, dropout=0.0)[0]


# ---------------------------------------------------------------------------------------------- which kernels ran


def works(bench: common.Bench, found: Models) -> Iterator[tuple[str, str, Layer, Callable[[], Tensor]]]:
    """Of each model and clip: the model, the clip's size, its largest layer, and a forward whose result can be differentiated.

    The generator's call covers self- and cross-attention, with gradients in both; V-JEPA's its encoder on the whole clip and a
    forecast of the second half from the first.
    """
    device, dtype, kind = bench.device, bench.dtype, bench.device.type
    rng = torch.Generator(device).manual_seed(1)
    wan = configs(GENERATOR)
    largest = {(layer.model, layer.n): layer for layer in sorted(layers(kind), key=lambda layer: layer.h * layer.m)}
    few = 1 if bench.args.quick else None
    for frames, height, width, _ in CLIPS[kind][:few]:
        geometry = meta.geometry(wan)
        latent = geometry.latents(frames, height, width)
        text = meta.text_width(wan["transformer"])
        x, y = (torch.randn(1, *s, generator=rng, device=device).to(dtype).requires_grad_() for s in (latent, (TEXT, text)))
        call = {"hidden_states": x, "timestep": torch.full((1,), 500.0, device=device), "encoder_hidden_states": y}
        n = latent[1] * latent[2] * latent[3] // (geometry.patch[1] * geometry.patch[2])
        yield "generator", f"{frames}x{height}x{width}", largest["generator", n], lambda call=call: found.generator(**call, return_dict=False)[0]
    for frames, _ in WINDOWS[kind][:few]:
        clip = torch.rand(1, frames, 3, found.judge.crop, found.judge.crop, generator=rng, device=device).requires_grad_()

        def forecast(clip: Tensor = clip, frames: int = frames) -> Tensor:
            return found.judge.encode(clip).x_BND.mean() + found.judge.forecast(clip, frames // 2)[1].x_BND.square().mean()

        n = frames // found.judge.tubelet * found.judge.side**2
        yield "world model", f"{frames}x{found.judge.crop}x{found.judge.crop}", largest["world model", n], forecast


def name_kernels(bench: common.Bench, found: Models) -> None:
    """Run every model with every backend under the profiler; rows go to the result's "kernels"."""
    rows = bench.result["kernels"] = []
    for model, size, layer, forward in works(bench, found):
        for name in found.functions[model]:
            effect = choose(found.generator, found.judge, model, name, bench.dtype, bench.device)
            try:
                if name == "sdpa_math":
                    fits(layer, "fwd+bwd", bench.device)
                forward().float().square().mean().backward()  # the first call of a shape may try several kernels
                kept = []
                kernels = {"fwd": profiled.ran(lambda forward=forward, kept=kept: kept.append(forward()), bench.device)}
                kernels["bwd"] = profiled.ran(lambda kept=kept: kept[0].float().square().mean().backward(), bench.device)
            except Exception as problem:  # whatever a foreign kernel raises at this size: the others' names are still wanted
                print(f"kernels {model} {size} {name}: left out, {' '.join(str(problem).split())[:160]}", flush=True)
                continue
            for kind, ran in kernels.items():
                wrong = profiled.wrong(name, ran, [kind])
                names = {key[:200]: {"count": r.count, "ms": 1e3 * r.seconds} for key, r in ran.items()}
                seen = sorted(profiled.families(ran, kind))
                row = {"model": model, "size": size, "backend": name, "pass": kind, "layers": f"{effect.reached} of {effect.layers}"}
                rows.append({**row, "families": seen, "wrong": wrong, "names": names})
                verdict = f"NOT AS PROMISED: {wrong}" if wrong else ", ".join(seen)
                print(f"kernels {model:11} {size:11} {name:14} {kind} {row['layers']:8} {verdict}", flush=True)
                for key, r in ran.items():
                    print(f"    {r.count:3} x {1e3 * r.seconds:9.3f} ms  {key[:110]}", flush=True)


# ---------------------------------------------------------------------------------------------- how fast


def fits(layer: Layer, kind: str, device: torch.device) -> None:
    """``common.Unavailable`` where attention written out would not fit the device's memory."""
    need = layer.square_bytes(kind)
    free = torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device) if device.type == "cuda" else CPU_BYTES
    if need > 0.9 * free:
        raise common.Unavailable(f"its matrices of {layer.n} x {layer.m} take some {need / 2**30:.0f} GiB")


def exact(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients dq, dk, dv of [H, N, D] in fp64, ``ROWS`` queries at a time; ``g``: the output's gradient."""
    q, k, v, g = (x.double() for x in (q, k, v, g))
    scale = q.shape[-1] ** -0.5
    out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for at in range(0, q.shape[1], ROWS):
        rows = slice(at, at + ROWS)
        p = (q[:, rows] @ k.mT * scale).softmax(-1)
        out[:, rows] = p @ v
        ds = p * (g[:, rows] @ v.mT - (g[:, rows] * out[:, rows]).sum(-1, keepdim=True)) * scale
        dq[:, rows] = ds @ k
        dk += ds.mT @ q[:, rows]
        dv += p.mT @ g[:, rows]
    return out, dq, dk, dv


def variant(function: Callable[..., Tensor], name: str, layer: Layer, kind: str, device: torch.device) -> Callable[..., Any]:
    """A pass of one layer: the output without autograd, or (dq, dk, dv)."""

    def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        with torch.no_grad():
            return function(q, k, v)

    def both(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(function(*leaves), leaves, g)

    def guarded(*inputs: Tensor) -> Any:
        fits(layer, kind, device)
        return (forward if kind == "fwd" else both)(*inputs)

    return guarded if name == "sdpa_math" else forward if kind == "fwd" else both


def measure(bench: common.Bench, layer: Layer, functions: dict[str, Callable[..., Tensor]]) -> None:
    """Both passes of one layer; rows of a forward keep ``output_error``, those with a backward ``grad_error``."""
    device = bench.device
    rng = torch.Generator(device).manual_seed(layer.n + layer.d)
    sets = [layer.inputs(rng, device, bench.dtype)]
    size = sum(x.numel() * x.element_size() for x in sets[0])
    sets += [layer.inputs(rng, device, bench.dtype) for _ in range(common.rotation(size, device) - 1)]
    heads = [0, layer.h - 1]

    def sample(x: Tensor, heads_first: bool) -> Tensor:  # [heads, N, D] of the first sample
        return (x[0] if heads_first else x[0].transpose(0, 1))[heads]

    ours = layer.model == "world model"
    q, k, v, g = sets[0]
    wanted = exact(*(sample(x, ours) for x in (q, k, v)), sample(g, False))
    error = {
        "fwd": lambda out: common.relative_error(sample(out, False), wanted[0]),
        "fwd+bwd": lambda grads: max(common.relative_error(sample(x, ours), w) for x, w in zip(grads, wanted[1:], strict=True)),
    }
    shape = {"B": layer.b, "H": layer.h, "N": layer.n, **({"M": layer.m} if layer.m != layer.n else {}), "D": layer.d}
    for kind in ("fwd", "fwd+bwd"):
        case = common.Case(
            op="attention",
            kind=kind,
            shape=shape,
            dtype=bench.dtype,
            inputs=sets,
            variants={name: variant(f, name, layer, kind, device) for name, f in functions.items()},
            floor_ms=bench.floor_ms(layer.flops(kind)),
            flops=layer.flops(kind),
            error=error[kind],
            extra={"case": layer.name, "model": layer.model},
        )
        for row in bench.measure(case):
            if row["ms"]:
                row["share"] = 1 / row["ratio_to_floor"]
            if kind == "fwd":
                row["output_error"], row["grad_error"] = row["grad_error"], None


def judge_auto(rows: list[dict[str, Any]], picked: dict[str, str]) -> list[dict[str, Any]]:
    """For each comparison: the fastest backend, and how many times longer ``auto``'s takes. Within ``EVEN`` or the noise it counts as the fastest."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["ms"]:
            groups.setdefault((row["model"], row["case"], row["pass"], tuple(row["shape"].items())), []).append(row)
    found = []
    for (model, case, kind, shape), members in groups.items():
        best = min(members, key=lambda row: row["ms"])
        auto = next((row for row in members if row["variant"] == picked[model]), None)
        slower = auto["ms"] / best["ms"] if auto else None
        fixed = {"model": model, "case": case, "pass": kind, "shape": dict(shape), "auto": picked[model], "fastest": best["variant"]}
        figures = {"ms": best["ms"], "tflops": best["tflops"], "share": best["share"], "slower": slower}
        found.append({**fixed, **figures, "was_fastest": slower is not None and slower <= 1 + max(EVEN, best["spread"])})
    return found


# ---------------------------------------------------------------------------------------------- all of it


def plan(kind: str, quick: bool, sizes: list[int] | None) -> list[Layer]:
    """The layers to time. ``sizes`` replace the tokens of self-attention, one sample at a time; ``quick``: the shorter clip of each model."""
    every = layers(kind)
    if sizes:
        once = {layer.name: layer for layer in every if layer.n == layer.m}
        return [Layer(x.name, x.model, 1, x.h, n, n, x.d) for x in once.values() for n in sizes]
    if quick:
        first: dict[str, Layer] = {}
        for layer in every:
            first.setdefault(layer.name, layer)
        return list(first.values())
    return every


def main() -> int:
    args = common.arguments(__doc__).parse_args()
    kind = torch.device(args.device).type
    chosen = plan(kind, args.quick, args.sizes)
    if args.model:
        for x in chosen:
            shape = f"B{x.b} H{x.h} N{x.n} M{x.m} D{x.d}"
            print(f"{x.name:9} {shape:30} {x.flops('fwd') / 1e12:9.4f} TFLOP forward, {x.flops('fwd+bwd') / 1e12:9.4f} with the backward")
        return 0
    bench = common.Bench(args)
    found = models(bench)
    name_kernels(bench, found)
    bench.write()
    for layer in chosen:
        bench.attempt(lambda bench, layer: measure(bench, layer, found.functions[layer.model]), layer)
    bench.result["auto"] = judge_auto(bench.rows, found.picked)
    show.print_auto(bench.result)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
