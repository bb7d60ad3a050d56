"""Every attention backend that is installed: which kernels really ran, how fast they are, and what ``auto`` picks.

    python benchmarks/bench_attention.py [--quick] [--variants native,sdpa_cudnn] [--sizes 4096,8192] [--out FILE.json]
    python benchmarks/bench_attention.py --model        the layers' shapes and operations; runs nothing

The models are Wan2.1-1.3B and a ViT-L V-JEPA 2 in their published configurations, two blocks of each, random weights.
First each model runs forward and backward with each backend of ldo.models.attention, and the profiler's kernel names
are kept: one line says where they are not of the family that the backend promises. Then the attention of single layers
is timed through the functions that the trainer calls, with q, k, v in the memory layouts of the models: "wan self",
"wan cross" (to 512 text tokens), "encoder", "predictor". The error is that of the output (fwd) or the worst of dq, dk,
dv (fwd+bwd) against fp64 on two heads of one sample.

Operations: 4 B H N M D forward, 3.5 times that with the backward, which multiplies q by k again. ``share``: of the
measured matmul rate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import attention_layers, flags, profiled, show, timing
from benchmarks.attention_layers import Layer
from benchmarks.bench_model import random_model
from benchmarks.harness import Bench, Case, relative_error
from ldo.core.errors import RecipeError
from ldo.memory.meta_models import pipeline_geometry, text_width
from ldo.models.attention import Effect, attend, refusal, set_generator_attention, set_world_model_attention
from ldo.models.attention_backends import BACKENDS, Backend
from ldo.models.generator.published import model_configs
from ldo.models.world_model import WorldModel

# of each model: kernels repeat with every block, so two of them show all
BLOCKS = 2
# a relative difference that is no reason to change the order of backends
EVEN = 0.02


@dataclass(frozen=True)
class Models:
    """Both models and, by backend, the function that a layer of each calls with q, k, v.

    ``picked``: the backend that ``auto`` chooses.
    """

    generator: torch.nn.Module
    judge: WorldModel
    functions: dict[str, dict[str, Callable[..., Tensor]]]  # model -> backend -> function
    picked: dict[str, str]


@dataclass(frozen=True)
class Work:
    """A forward of one model on one clip, whose result can be differentiated, and the largest layer within."""

    model: str
    size: str
    layer: Layer
    forward: Callable[[], Tensor]


# ---------------------------------------------------------------------------------------------- the models


def models(bench: Bench) -> Models:
    """Build both models, and set every backend once.

    A backend that is not installed, or fails its probe, is named in one line and left out.
    """
    device, dtype = bench.device, bench.dtype
    # random weights, the same in every run
    torch.manual_seed(0)
    config = model_configs(attention_layers.GENERATOR)["transformer"] | {"num_layers": BLOCKS}
    generator = random_model(config, dtype, device)
    few_blocks = {"num_hidden_layers": BLOCKS, "pred_num_hidden_layers": BLOCKS}
    config = model_configs(attention_layers.WORLD)["config"] | few_blocks
    world_model = WorldModel(random_model(config, dtype, device, "VJEPA2Model")).to(device)
    functions: dict[str, dict[str, Callable[..., Tensor]]] = {"generator": {}, "world model": {}}
    left_out: dict[str, str] = {}
    for backend_name, backend in BACKENDS.items():
        if bench.args.variants and backend_name not in bench.args.variants:
            continue
        reasons = []
        missing = refusal(backend, dtype, device)
        if missing:
            reasons.append(missing)
        for model, model_functions in functions.items():
            if missing:
                break
            try:
                choose(generator, world_model, model, backend_name, dtype, device)
            except RecipeError as problem:
                reasons.append(str(problem))
                continue
            # now: the function of a world model's layer is that of the backend set last
            model_functions[backend_name] = layer_function(world_model, model, backend)
        if reasons:
            left_out[backend_name] = "; ".join(reasons)
            print(f"{backend_name}: left out, {left_out[backend_name]}", flush=True)
    picked = {model: choose(generator, world_model, model, "auto", dtype, device).backend for model in functions}
    bench.result["left_out"] = left_out
    return Models(generator, world_model, functions, picked)


def choose(
    generator: torch.nn.Module, world_model: WorldModel, model: str, name: str, dtype: torch.dtype, device: torch.device
) -> Effect:
    """Set a backend as the trainer does."""
    if model == "generator":
        return set_generator_attention(generator, name, dtype, device)
    return set_world_model_attention(world_model.model, name, dtype, device)


def layer_function(world_model: WorldModel, model: str, backend: Backend) -> Callable[..., Tensor]:
    """What a layer calls with q, k, v; it returns [B, N, H, D].

    For the world model it is the function that is registered now, so set ``backend`` first.
    """
    if model == "generator":
        return lambda q, k, v: attend(backend.dense, q, k, v)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layer = world_model.model.encoder.layer[0].attention
    registered = ALL_ATTENTION_FUNCTIONS[world_model.model.config._attn_implementation]

    def attend_registered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        return registered(layer, q, k, v, None, is_causal=False, scaling=scale, dropout=0.0)[0]

    return attend_registered


# ---------------------------------------------------------------------------------------------- which kernels ran


def works(bench: Bench, loaded: Models) -> Iterator[Work]:
    """The work of each model on each clip.

    The generator's covers self- and cross-attention, with gradients in both; V-JEPA's covers its encoder on the whole
    clip and a forecast of the second half from the first.
    """
    device, dtype, kind = bench.device, bench.dtype, bench.device.type
    rng = torch.Generator(device).manual_seed(1)
    published = model_configs(attention_layers.GENERATOR)
    geometry = pipeline_geometry(published)
    ascending = sorted(attention_layers.layers(kind), key=lambda layer: layer.h * layer.m)
    largest = {(layer.model, layer.n): layer for layer in ascending}
    limit = 1 if bench.args.quick else None

    def leaf(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=rng, device=device).to(dtype).requires_grad_()

    for frames, height, width, _ in attention_layers.CLIPS[kind][:limit]:
        latent = geometry.latents(frames, height, width)
        arguments = {
            "hidden_states": leaf(*latent),
            "timestep": torch.full((1,), 500.0, device=device),
            "encoder_hidden_states": leaf(attention_layers.TEXT, text_width(published["transformer"])),
        }

        def generate(arguments: dict[str, Tensor] = arguments) -> Tensor:
            return loaded.generator(**arguments, return_dict=False)[0]

        tokens = latent[1] * latent[2] * latent[3] // (geometry.patch[1] * geometry.patch[2])
        yield Work("generator", f"{frames}x{height}x{width}", largest["generator", tokens], generate)
    world_model = loaded.judge
    for frames, _ in attention_layers.WINDOWS[kind][:limit]:
        clip = torch.rand(1, frames, 3, world_model.crop, world_model.crop, generator=rng, device=device)
        clip.requires_grad_()

        def forecast(clip: Tensor = clip, frames: int = frames) -> Tensor:
            encoded = world_model.encode(clip).x_BND
            predicted = world_model.forecast(clip, frames // 2)[1].x_BND
            return encoded.mean() + predicted.square().mean()

        tokens = frames // world_model.tubelet * world_model.side**2
        size = f"{frames}x{world_model.crop}x{world_model.crop}"
        yield Work("world model", size, largest["world model", tokens], forecast)


def kernels_of(work: Work, device: torch.device) -> dict[str, dict[str, profiled.Ran]]:
    """The attention kernels of a work's forward and of its backward, by pass."""
    # The first call of a shape may try several kernels: not under the profiler.
    work.forward().float().square().mean().backward()
    kept = []
    forward = profiled.ran(lambda: kept.append(work.forward()), device)
    backward = profiled.ran(lambda: kept[0].float().square().mean().backward(), device)
    return {"fwd": forward, "bwd": backward}


def name_kernels(bench: Bench, loaded: Models) -> None:
    """Run every model with every backend under the profiler; rows go to the result's "kernels"."""
    rows = bench.result["kernels"] = []
    for work in works(bench, loaded):
        for backend in loaded.functions[work.model]:
            effect = choose(loaded.generator, loaded.judge, work.model, backend, bench.dtype, bench.device)
            try:
                if backend == "sdpa_math":
                    attention_layers.fits(work.layer, "fwd+bwd", bench.device)
                kernels = kernels_of(work, bench.device)
            except Exception as problem:
                # A foreign kernel may raise anything at this size, and the names of the others are still wanted.
                reason = " ".join(str(problem).split())[:160]
                print(f"kernels {work.model} {work.size} {backend}: left out, {reason}", flush=True)
                continue
            reached = f"{effect.reached} of {effect.layers}"
            for kind, ran in kernels.items():
                wrong = profiled.wrong(backend, ran, [kind])
                families = sorted(profiled.families(ran, kind))
                names = {kernel[:200]: {"count": each.count, "ms": 1e3 * each.seconds} for kernel, each in ran.items()}
                rows.append(
                    {
                        "model": work.model,
                        "size": work.size,
                        "backend": backend,
                        "pass": kind,
                        "layers": reached,
                        "families": families,
                        "wrong": wrong,
                        "names": names,
                    }
                )
                verdict = f"NOT AS PROMISED: {wrong}" if wrong else ", ".join(families)
                print(f"kernels {work.model:11} {work.size:11} {backend:14} {kind} {reached:8} {verdict}", flush=True)
                for kernel, each in ran.items():
                    print(f"    {each.count:3} x {1e3 * each.seconds:9.3f} ms  {kernel[:110]}", flush=True)


# ---------------------------------------------------------------------------------------------- how fast


def variant(
    function: Callable[..., Tensor], name: str, layer: Layer, kind: str, device: torch.device
) -> Callable[..., Any]:
    """A pass of one layer: the output without autograd, or (dq, dk, dv)."""

    def forward(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> Tensor:
        with torch.no_grad():
            return function(q, k, v)

    def both(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        return torch.autograd.grad(function(*leaves), leaves, upstream)

    direction = forward if kind == "fwd" else both

    def guarded(*inputs: Tensor) -> Any:
        attention_layers.fits(layer, kind, device)
        return direction(*inputs)

    return guarded if name == "sdpa_math" else direction


def measure(bench: Bench, layer: Layer, functions: dict[str, Callable[..., Tensor]]) -> None:
    """Both passes of one layer; rows of a forward keep ``output_error``, those with a backward ``grad_error``."""
    device = bench.device
    rng = torch.Generator(device).manual_seed(layer.n + layer.d)
    input_sets = [layer.inputs(rng, device, bench.dtype)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in input_sets[0])
    input_sets += [layer.inputs(rng, device, bench.dtype) for _ in range(timing.rotation(size, device) - 1)]
    # in fp64 two heads of one sample are all that there is time and memory for
    heads = [0, layer.h - 1]

    def sample(tensor: Tensor, heads_first: bool) -> Tensor:
        """[heads, N, D] of the first sample."""
        first = tensor[0] if heads_first else tensor[0].transpose(0, 1)
        return first[heads]

    heads_first = layer.model == "world model"
    query, key, value, upstream = input_sets[0]
    exact_output, *exact_gradients = attention_layers.exact(
        sample(query, heads_first), sample(key, heads_first), sample(value, heads_first), sample(upstream, False)
    )

    def output_error(output: Tensor) -> float:
        return relative_error(sample(output, False), exact_output)

    def worst_gradient_error(gradients: tuple[Tensor, ...]) -> float:
        pairs = zip(gradients, exact_gradients, strict=True)
        return max(relative_error(sample(gradient, heads_first), exact) for gradient, exact in pairs)

    for kind, error in (("fwd", output_error), ("fwd+bwd", worst_gradient_error)):
        case = Case(
            op="attention",
            kind=kind,
            shape=layer.shape,
            dtype=bench.dtype,
            inputs=input_sets,
            variants={
                backend: variant(function, backend, layer, kind, device) for backend, function in functions.items()
            },
            floor_ms=bench.floor_ms(layer.flops(kind)),
            flops=layer.flops(kind),
            error=error,
            extra={"case": layer.name, "model": layer.model},
        )
        for row in bench.measure(case):
            if row["ms"]:
                row["share"] = 1 / row["ratio_to_floor"]
            if kind == "fwd":
                row["output_error"] = row["grad_error"]
                row["grad_error"] = None


def judge_auto(rows: list[dict[str, Any]], picked: dict[str, str]) -> list[dict[str, Any]]:
    """For each comparison: the fastest backend, and how many times longer the choice of ``auto`` takes.

    Within ``EVEN`` or the noise it counts as the fastest.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["ms"]:
            groups.setdefault((row["model"], row["case"], row["pass"], tuple(row["shape"].items())), []).append(row)
    verdicts = []
    for (model, case, kind, shape), members in groups.items():
        best = min(members, key=lambda row: row["ms"])
        auto = next((row for row in members if row["variant"] == picked[model]), None)
        slower = auto["ms"] / best["ms"] if auto else None
        verdicts.append(
            {
                "model": model,
                "case": case,
                "pass": kind,
                "shape": dict(shape),
                "auto": picked[model],
                "fastest": best["variant"],
                "ms": best["ms"],
                "tflops": best["tflops"],
                "share": best["share"],
                "slower": slower,
                "was_fastest": slower is not None and slower <= 1 + max(EVEN, best["spread"]),
            }
        )
    return verdicts


# ---------------------------------------------------------------------------------------------- all of it


def main() -> int:
    arguments = flags.arguments(__doc__).parse_args()
    chosen = attention_layers.plan(torch.device(arguments.device).type, arguments.quick, arguments.sizes)
    if arguments.model:
        for layer in chosen:
            shape = f"B{layer.b} H{layer.h} N{layer.n} M{layer.m} D{layer.d}"
            forward, both = (f"{layer.flops(kind) / 1e12:9.4f}" for kind in ("fwd", "fwd+bwd"))
            print(f"{layer.name:9} {shape:30} {forward} TFLOP forward, {both} with the backward")
        return 0
    bench = Bench(arguments)
    loaded = models(bench)
    name_kernels(bench, loaded)
    bench.write()
    for layer in chosen:
        bench.attempt(lambda bench, layer: measure(bench, layer, loaded.functions[layer.model]), layer)
    bench.result["auto"] = judge_auto(bench.rows, loaded.picked)
    show.print_auto(bench.result)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
