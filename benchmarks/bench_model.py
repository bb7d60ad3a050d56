"""One step of both stages of a real model in its published configuration, with random weights: time, memory, kernels.

    python benchmarks/bench_model.py [RECIPE] [a.b=c ...] [--out FILE.json] [--quick]

Nothing is downloaded: shapes, precision and switches are the recipe's, values are random, and prompts' embeddings stand in for
the text encoder. Per part: seconds (the second run of it, and the first), the peak of the device's memory beside what ``ldo.check`` says
of the stage, and where the time goes: kernels launched, the share of the time in which the GPU ran any, the ten costliest, attention's own.
A part's operations give the share of this device's own matmul rate (MFU). The file is written after every part.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import common, profiled
from ldo import align, generator, lora, memory, meta, reinforce, run
from ldo.check import Checked, check
from ldo.config import read
from ldo.data import PromptLine
from ldo.distributed import join
from ldo.encode import Clips
from ldo.generator import Text
from ldo.generator.published import configs
from ldo.rng import torch_rng
from ldo.teacher import make_target
from ldo.update import apply
from ldo.world_model import WorldModel

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "wan2.1-1.3b.yaml"


# ---------------------------------------------------------------------------------------------- models with random weights


def random_model(config: dict, dtype: torch.dtype, device: torch.device, cls: str | None = None) -> torch.nn.Module:
    """A model as its class initialises it, on ``device``, each weight in the type that from_pretrained would give it."""
    types = {name: p.dtype for name, p in meta.build(config, dtype, cls).named_parameters()}
    with torch.device(device):
        model = meta.construct(config, cls)
    for name, p in model.named_parameters():
        p.data = p.data.to(types[name])
        if not p.any() and p.ndim > 1:  # output layers start at zero: a model that answers nothing is no test
            torch.nn.init.normal_(p.data, std=0.02)
    return model.eval().requires_grad_(False)


def random_text(config: dict, length: int, rng: torch.Generator) -> Text:
    """One prompt's embeddings, of the shapes that the family's transformer takes."""
    tensors = {"embeds": torch.randn(1, length, meta.text_width(config), generator=rng), "mask": torch.ones(1, length, dtype=torch.bool)}
    if "pooled_projection_dim" in config:
        tensors["pooled"] = torch.randn(1, config["pooled_projection_dim"], generator=rng)
    return Text(tensors)


def random_run(checked: Checked) -> run.Run:
    """A run whose models have the configurations of the recipe's, and random weights."""
    import diffusers

    recipe = checked.recipe
    world = join(recipe.device)
    device, dtype = world.device, run.DTYPES[recipe.model.dtype]
    parts, judged = configs(checked.model), configs(checked.world_model)
    if parts is None or judged is None:
        raise SystemExit(f"no configuration of {recipe.model.path if parts is None else recipe.world_model.path} is known here")
    index, scheduler = parts["model_index"], parts["scheduler"]
    kind = getattr(diffusers, index["_class_name"])
    given = {name: random_model(parts[name], dtype, device) for name in ("transformer", "transformer_2", "vae") if name in parts}
    given["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    given |= {k: index[k] for k in ("boundary_ratio", "expand_timesteps") if index.get(k) is not None}
    pipeline = kind(
        **{name: given.get(name) for name in inspect.signature(kind.__init__).parameters if (name != "self" and name in given) or _part(name)}
    )
    model = generator.adapter(recipe.model.family)(pipeline, run.options(recipe))
    judge = WorldModel(random_model(judged["config"], run.DTYPES[recipe.world_model.dtype], device, "VJEPA2Model"))
    parameters = lora.add(model.transformers, recipe.lora.rank, recipe.lora.alpha, model.lora_targets, recipe.seed)
    run.configure(recipe, model, judge, device)
    prompts = [PromptLine(f"prompt {i}") for i in range(recipe.rl.prompts)]
    here = run.Run(recipe, world, model, judge, parameters, lora.snapshot(parameters), prompts, checked.model)
    known = {p.text: random_text(parts["transformer"], model.text_length, torch_rng(0, "text", i)) for i, p in enumerate(prompts)}
    known[""] = random_text(parts["transformer"], model.text_length, torch_rng(0, "text"))
    here.__dict__["texts"] = lambda texts: Text.cat([known[t] for t in texts]).to(device)
    return here


def _part(name: str) -> bool:
    return name.startswith(("text_encoder", "tokenizer"))


# ---------------------------------------------------------------------------------------------- what is measured


def _baddbmm_flop(_: Any, a: Sequence[int], b: Sequence[int], *__: Any, **___: Any) -> int:
    """Of shapes. torch's own count does not know the form that names the result's type."""
    return 2 * a[0] * a[1] * a[2] * b[2]


class Meter:
    """Runs parts twice and keeps their figures; ``written`` is called with all of them after each."""

    def __init__(self, device: torch.device, once: bool, written: Callable[[dict[str, Any]], None] = lambda _: None):
        self.device, self.once, self.written = device, once, written
        self.found: dict[str, Any] = {"parts": {}, "kernels": {}}

    def part(self, name: str, work: Callable[[], Any], profile: bool = False) -> Any:
        """Figures of ``work()``, with ``profile`` those of one more run under the profiler; returns what it returned last."""
        gpu, each = self.device.type == "cuda", []
        for _ in range(1 if self.once else 2):
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            result = work()
            if gpu:
                torch.cuda.synchronize()
            each.append(time.perf_counter() - began)
        row = {"seconds": each[-1], "first_seconds": each[0], "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None}
        self.found["parts"][name] = row
        peak = f"{row['peak_bytes'] / 2**30:8.1f} GiB" if gpu else ""
        print(f"{name:52} {row['seconds']:9.2f} s {peak}", flush=True)
        self.written(self.found)
        if profile:
            self._profile(name, work)
        return result

    def _profile(self, name: str, work: Callable[[], Any]) -> None:
        seen = profiled.profile(work, self.device)
        self.found["parts"][name]["profile"] = seen.record()
        what = "kernels, the GPU busy" if self.device.type == "cuda" else "operators, busy"
        print(f"{'':52} {seen.kernels:9} {what} {seen.busy:.0%} of {seen.wall_s:.2f} s", flush=True)
        for kernel, ran in list(seen.top.items())[:5]:
            print(f"{'':54} {1e3 * ran.seconds:9.1f} ms {ran.count:6} x {kernel[:70]}", flush=True)
        self.found["kernels"][name] = {kernel: ran.seconds for kernel, ran in list(seen.attention.items())[:8]}
        self.written(self.found)

    def operations(self, name: str, work: Callable[[], Any], rate: float) -> None:
        """Count the operations of ``work`` and hold them against ``rate`` (FLOP/s); needs the part's seconds."""
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm: _baddbmm_flop}) as counter:
            work()
        row = self.found["parts"][name]
        row["flop"] = counter.get_total_flops()
        row["mfu"] = row["flop"] / row["seconds"] / rate
        print(f"{'':52} {row['flop'] / 1e12:9.1f} TFLOP, {row['mfu']:.1%} of this device's matmul rate", flush=True)
        self.written(self.found)


def clips_of(here: run.Run, meter: Meter) -> Clips:
    """Random clips, encoded one by one as the cache does it."""
    d, count = here.recipe.data, here.recipe.align.batch
    frames = torch.rand((1, d.frames, 3, d.height, d.width), generator=torch_rng(0, "frames")).to(here.world.device)
    z = meter.part("encode a clip (VAE)", lambda: here.generator.encode_video(frames)).cpu()
    target = meter.part("forecast a clip (teacher)", lambda: make_target(here.judge, frames, here.recipe.teacher)).to(torch.device("cpu"))

    def rows(index: torch.Tensor) -> dict[str, torch.Tensor]:
        n = len(index)
        whole = {"latents": z, "y": target.y_BNE, "weight": target.weight_BN, "grid": torch.tensor([[*target.grid, target.skip]])}
        return {k: v.expand(n, *v.shape[1:]) for k, v in whole.items()}

    size = (d.frames, d.height, d.width)
    return Clips([here.prompts[i % len(here.prompts)].text for i in range(count)], [size] * count, [Path("random")] * count, rows)


def measure(checked: Checked, quick: bool, written: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """All figures of a recipe; ``written`` is called with those known so far after every part."""
    here, recipe = random_run(checked), checked.recipe
    device, config = here.world.device, recipe.align
    meter = Meter(device, quick, written)
    rate = common.matmul_tflops(device, run.DTYPES[recipe.model.dtype]) * 1e12
    meter.found["matmul_tflops"] = rate / 1e12
    clips = clips_of(here, meter)
    aligner = align.make_aligner(here)
    rows = torch.arange(config.batch)
    shape = align.latent_shape(here, clips, rows)
    noise = torch.randn((config.batch, *shape), generator=torch_rng(0, "noise"))
    t_B = here.generator.training_times(torch.rand(config.batch, generator=torch_rng(0, "times")), shape)
    optimizer = torch.optim.AdamW(here.parameters.values(), lr=1e-5)
    parts = align.micro_batches(list(range(config.batch)), config.micro_batch)

    def forward_backward(part: list[int]) -> None:
        flow_loss, pda = align.losses(here, aligner, clips, rows[part], noise[part], t_B[part])
        (flow_loss + recipe.teacher.weight * pda).backward()

    def stage1() -> None:
        for part in parts:
            forward_backward(part)
        apply(optimizer, list(here.parameters.values()), here.world, 1.0, 1e-5, "bench")

    name = f"align: a step on {config.batch} clips, {len(parts[0])} at a time"
    meter.part(name, stage1)
    one = f"align: forward and backward of {len(parts[0])}"
    meter.part(one, lambda: forward_backward(parts[0]), profile=True)
    if not recipe.model.gradient_checkpointing or device.type == "cuda":
        meter.operations(one, lambda: forward_backward(parts[0]), rate)
    frames = torch.rand((1, recipe.critic.window, 3, here.judge.crop, here.judge.crop), device=device)
    meter.part("score: encode a window (world model)", lambda: here.judge.encode(frames), profile=True)
    optimizer.zero_grad(set_to_none=True)

    rl = recipe.rl
    lora.restore(here.parameters, here.fresh)
    videos = rl.prompts * rl.group_size
    rollout, figures = meter.part(f"reinforce: sample and score {videos} videos", lambda: reinforce.collect(here, 1, here.fresh))
    # a random world model's skill is the same whatever it sees, and an update passes over groups whose videos are all alike
    rollout = dataclasses.replace(rollout, advantage_N=torch.tensor([1.0, -1.0], device=device).repeat(-(-videos // 2))[:videos])

    def update() -> dict[str, float]:
        lora.restore(here.parameters, here.fresh)  # the rollout's own policy, as its ratio of 1 is asserted
        return reinforce.learn(here, rollout, 1, optimizer, here.fresh, aligner)

    learnt = meter.part(f"reinforce: {rl.minibatches} optimizer steps", update, profile=True)
    assert learnt.get("grad_norm"), "the update had no gradient: its time is none"
    return meter.found | {"figures": figures | learnt}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default=str(RECIPE))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="each part once")
    args = parser.parse_intermixed_args()
    if "=" in args.recipe:
        args.recipe, args.overrides = str(RECIPE), [args.recipe, *args.overrides]
    # two groups are enough to see an update's cost, and each of them its own optimizer step
    checked = check(read(args.recipe, ["rl.prompts=2", "rl.minibatches=2", "align.batch=4", *args.overrides, "stages=[align,reinforce]"]))
    recipe = checked.recipe
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    plan = memory.plan(recipe, checked.model, checked.world_model)
    predicted = {stage.name: {phase.name: phase.total for phase in stage.phases} for stage in plan.stages()} if plan else {}
    device = torch.device("cuda" if torch.cuda.is_available() and recipe.device != "cpu" else "cpu")
    head = {**common.record(device), "recipe": dataclasses.asdict(recipe), "predicted_bytes": predicted}

    def written(found: dict[str, Any]) -> None:
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            part = args.out.with_suffix(".tmp")
            part.write_text(json.dumps(head | found, indent=1, default=str) + "\n")
            part.replace(args.out)

    for name, phases in predicted.items():
        print(f"ldo.check says of {name}: {max(phases.values()) / 2**30:.1f} GiB at {max(phases, key=phases.get)}")
    found = measure(checked, args.quick, written)
    for part, rows in found["kernels"].items():
        print(f"attention of {part}: " + (", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in rows.items()) or "none found"))
    written(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
