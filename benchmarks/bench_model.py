"""One step of both stages of a real model in its published configuration, with random weights: time, memory, kernels.

    python benchmarks/bench_model.py [RECIPE] [a.b=c ...] [--out FILE.json] [--quick]

Nothing is downloaded: shapes, precision and switches are those of the recipe, values are random, and random embeddings
replace the text encoder. Per part: seconds (of its second run, and of its first), the peak of the device's memory next
to what ``ldo.check`` predicts for the stage, and where the time goes: kernels launched, the share of the time in which
the GPU ran any, the ten costliest, those of attention. A part's operations give the share of this device's measured
matmul rate (MFU). The file is written after every part.
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

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import profiled, provenance, timing
from ldo.core.config import to_plain
from ldo.core.distributed import join_processes
from ldo.core.optimizer import optimizer_step
from ldo.core.recipe_file import read_recipe
from ldo.core.rng import torch_rng
from ldo.data.captions import PromptLine
from ldo.memory.meta_models import build_meta, construct_model, text_width
from ldo.memory.plan import plan_memory
from ldo.method.teacher import make_target
from ldo.models import lora
from ldo.models.generator.families import family_adapter
from ldo.models.generator.protocol import Text
from ldo.models.generator.published import model_configs
from ldo.models.world_model import WorldModel
from ldo.run.load import DTYPES, configure_models, generator_options
from ldo.run.state import Run
from ldo.run.validate import ValidatedRecipe, validate
from ldo.stages.align import clip_losses, clips_latent_shape, make_alignment, micro_batches
from ldo.stages.collect import collect_rollout
from ldo.stages.encoded_clips import EncodedClips
from ldo.stages.reinforce import learn_from_rollout

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "wan2.1-1.3b.yaml"


# -------------------------------------------------------------------------------- models with random weights


def random_model(config: dict, dtype: torch.dtype, device: torch.device, cls: str | None = None) -> torch.nn.Module:
    """A model on ``device`` as its class initialises it, each weight in the type that from_pretrained would give it."""
    types = {name: parameter.dtype for name, parameter in build_meta(config, dtype, cls).named_parameters()}
    with torch.device(device):
        model = construct_model(config, cls)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types[name])
        # output layers start at zero, and a model whose output is zero tests nothing
        if not parameter.any() and parameter.ndim > 1:
            torch.nn.init.normal_(parameter.data, std=0.02)
    return model.eval().requires_grad_(False)


def random_text(config: dict, length: int, rng: torch.Generator) -> Text:
    """One prompt's embeddings, of the shapes that the family's transformer takes."""
    tensors = {
        "embeds": torch.randn(1, length, text_width(config), generator=rng),
        # a prompt of full length, without padding
        "mask": torch.ones(1, length, dtype=torch.bool),
    }
    if "pooled_projection_dim" in config:
        tensors["pooled"] = torch.randn(1, config["pooled_projection_dim"], generator=rng)
    return Text(tensors)


def random_run(checked: ValidatedRecipe) -> Run:
    """A run whose models have the configurations of the recipe's models and random weights."""
    recipe = checked.recipe
    processes = join_processes(recipe.device)
    device, dtype = processes.device, DTYPES[recipe.model.dtype]
    configs = model_configs(checked.model)
    judge_configs = model_configs(checked.world_model)
    if configs is None or judge_configs is None:
        unknown = recipe.model.path if configs is None else recipe.world_model.path
        raise SystemExit(f"the configuration of {unknown} is not known here; name a published model or a folder")
    pipeline = random_pipeline(configs, dtype, device)
    model = family_adapter(recipe.model.family)(pipeline, generator_options(recipe))
    judge_dtype = DTYPES[recipe.world_model.dtype]
    world_model = WorldModel(random_model(judge_configs["config"], judge_dtype, device, "VJEPA2Model"))
    parameters = lora.add(model.transformers, recipe.lora.rank, recipe.lora.alpha, model.lora_targets, recipe.seed)
    configure_models(recipe, model, world_model, device)
    prompts = [PromptLine(f"prompt {number}") for number in range(recipe.rl.prompts)]
    here = Run(recipe, processes, model, world_model, parameters, lora.snapshot(parameters), prompts, checked.model)
    embeddings = {
        prompt.text: random_text(configs["transformer"], model.text_length, torch_rng(0, "text", number))
        for number, prompt in enumerate(prompts)
    }
    embeddings[""] = random_text(configs["transformer"], model.text_length, torch_rng(0, "text"))
    # ``texts`` is a cached property of a run, which would ask the text encoder: its cache is filled here.
    here.__dict__["texts"] = lambda texts: Text.cat([embeddings[text] for text in texts]).to(device)
    return here


def random_pipeline(configs: dict[str, dict], dtype: torch.dtype, device: torch.device) -> Any:
    """The diffusers pipeline of published configurations with random weights, and without text encoders."""
    import diffusers

    model_index, scheduler = configs["model_index"], configs["scheduler"]
    pipeline_class = getattr(diffusers, model_index["_class_name"])
    given = {
        component: random_model(configs[component], dtype, device)
        for component in ("transformer", "transformer_2", "vae")
        if component in configs
    }
    given["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    given |= {
        component: model_index[component]
        for component in ("boundary_ratio", "expand_timesteps")
        if model_index.get(component) is not None
    }
    arguments = {}
    for component in inspect.signature(pipeline_class.__init__).parameters:
        # text encoders and tokenizers have no default, and None leaves them out
        if (component != "self" and component in given) or component.startswith(("text_encoder", "tokenizer")):
            arguments[component] = given.get(component)
    return pipeline_class(**arguments)


# ---------------------------------------------------------------------------------------------- what is measured


def _baddbmm_flop(_: Any, left: Sequence[int], right: Sequence[int], *__: Any, **___: Any) -> int:
    """Operations of a batched product, from shapes. torch's own count fails on the form with an output type."""
    return 2 * left[0] * left[1] * left[2] * right[2]


class Meter:
    """Runs parts twice and keeps what it measures; ``written`` is called with all of it after each part."""

    def __init__(self, device: torch.device, once: bool, written: Callable[[dict[str, Any]], None] = lambda _: None):
        self.device = device
        self.once = once
        self.written = written
        self.found: dict[str, Any] = {"parts": {}, "kernels": {}}

    def part(self, name: str, work: Callable[[], Any], profile: bool = False) -> Any:
        """Measure ``work()``, with ``profile`` also one more run under the profiler; return what it returned last."""
        gpu = self.device.type == "cuda"
        times = []
        for _ in range(1 if self.once else 2):
            if gpu:
                torch.cuda.synchronize()
                # the peak of this part, not of those before it
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            result = work()
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        row = {
            "seconds": times[-1],
            "first_seconds": times[0],
            "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        }
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
        unit = "kernels, the GPU busy" if self.device.type == "cuda" else "operators, busy"
        print(f"{'':52} {seen.kernels:9} {unit} {seen.busy:.0%} of {seen.wall_s:.2f} s", flush=True)
        for kernel, launches in list(seen.top.items())[:5]:
            print(f"{'':54} {1e3 * launches.seconds:9.1f} ms {launches.count:6} x {kernel[:70]}", flush=True)
        costliest = list(seen.attention.items())[:8]
        self.found["kernels"][name] = {kernel: launches.seconds for kernel, launches in costliest}
        self.written(self.found)

    def operations(self, name: str, work: Callable[[], Any], rate: float) -> None:
        """Count the operations of ``work`` and compare them with ``rate`` (FLOP/s); needs the part's seconds."""
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm: _baddbmm_flop}) as counter:
            work()
        row = self.found["parts"][name]
        row["flop"] = counter.get_total_flops()
        row["mfu"] = row["flop"] / row["seconds"] / rate
        print(f"{'':52} {row['flop'] / 1e12:9.1f} TFLOP, {row['mfu']:.1%} of this device's matmul rate", flush=True)
        self.written(self.found)


def clips_of(here: Run, meter: Meter) -> EncodedClips:
    """As many references to one random clip as a step of align needs, encoded as the cache does it."""
    settings, clip_count = here.recipe.data, here.recipe.align.batch
    shape = (1, settings.frames, 3, settings.height, settings.width)
    frames = torch.rand(shape, generator=torch_rng(0, "frames")).to(here.processes.device)
    latents = meter.part("encode a clip (VAE)", lambda: here.generator.encode_video(frames)).cpu()
    target = meter.part(
        "forecast a clip (teacher)", lambda: make_target(here.world_model, frames, here.recipe.teacher)
    ).to(torch.device("cpu"))
    clip = {
        "latents": latents,
        "y": target.y_BNE,
        "weight": target.weight_BN,
        "grid": torch.tensor([[*target.grid, target.skip]]),
    }

    def rows(index: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: value.expand(len(index), *value.shape[1:]) for name, value in clip.items()}

    texts = [here.prompts[number % len(here.prompts)].text for number in range(clip_count)]
    size = (settings.frames, settings.height, settings.width)
    return EncodedClips(texts, [size] * clip_count, [Path("random")] * clip_count, rows)


def measure(
    checked: ValidatedRecipe, quick: bool, written: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Everything that is measured of a recipe; ``written`` is called after every part with what is known so far."""
    here = random_run(checked)
    recipe = checked.recipe
    device, config = here.processes.device, recipe.align
    meter = Meter(device, quick, written)
    rate = timing.matmul_tflops(device, DTYPES[recipe.model.dtype]) * 1e12
    meter.found["matmul_tflops"] = rate / 1e12
    clips = clips_of(here, meter)
    aligner = make_alignment(here)
    rows = torch.arange(config.batch)
    shape = clips_latent_shape(here, clips, rows)
    noise = torch.randn((config.batch, *shape), generator=torch_rng(0, "noise"))
    times_B = here.generator.training_times(torch.rand(config.batch, generator=torch_rng(0, "times")), shape)
    optimizer = torch.optim.AdamW(here.parameters.values(), lr=1e-5)
    parts = micro_batches(list(range(config.batch)), config.micro_batch)

    def forward_backward(part: list[int]) -> None:
        flow_loss, pda = clip_losses(here, aligner, clips, rows[part], noise[part], times_B[part])
        (flow_loss + recipe.teacher.weight * pda).backward()

    def stage1() -> None:
        for part in parts:
            forward_backward(part)
        optimizer_step(optimizer, list(here.parameters.values()), here.processes, 1.0, 1e-5, "bench")

    name = f"align: a step on {config.batch} clips, {len(parts[0])} at a time"
    meter.part(name, stage1)
    single_part = f"align: forward and backward of {len(parts[0])}"
    meter.part(single_part, lambda: forward_backward(parts[0]), profile=True)
    if not recipe.model.gradient_checkpointing or device.type == "cuda":
        meter.operations(single_part, lambda: forward_backward(parts[0]), rate)
    frames = torch.rand((1, recipe.critic.window, 3, here.world_model.crop, here.world_model.crop), device=device)
    meter.part("score: encode a window (world model)", lambda: here.world_model.encode(frames), profile=True)
    # gradients of align must not count as memory of reinforce
    optimizer.zero_grad(set_to_none=True)

    settings = recipe.rl
    lora.restore_values(here.parameters, here.fresh)
    videos = settings.prompts * settings.group_size
    rollout, metrics = meter.part(
        f"reinforce: sample and score {videos} videos", lambda: collect_rollout(here, 1, here.fresh)
    )
    # A random world model gives every video the same skill, and an update skips groups whose videos are all equal.
    advantage_N = torch.tensor([1.0, -1.0], device=device).repeat(-(-videos // 2))[:videos]
    rollout = dataclasses.replace(rollout, advantage_N=advantage_N)

    def update() -> dict[str, float]:
        # the policy that sampled the rollout: the update asserts that the ratio starts at 1
        lora.restore_values(here.parameters, here.fresh)
        return learn_from_rollout(here, rollout, 1, optimizer, here.fresh, aligner)

    learnt = meter.part(f"reinforce: {settings.minibatches} optimizer steps", update, profile=True)
    assert learnt.get("grad_norm"), "the update had no gradient, so its time means nothing"
    return meter.found | {"metrics": metrics | learnt}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default=str(RECIPE))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="each part once")
    arguments = parser.parse_intermixed_args()
    # without a recipe argparse takes the first override for it
    if "=" in arguments.recipe:
        arguments.recipe, arguments.overrides = str(RECIPE), [arguments.recipe, *arguments.overrides]
    # two groups, each with its own optimizer step, are enough to see the cost of an update
    small = ["rl.prompts=2", "rl.minibatches=2", "align.batch=4"]
    checked = validate(read_recipe(arguments.recipe, [*small, *arguments.overrides, "stages=[align,reinforce]"]))
    recipe = checked.recipe
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    plan = plan_memory(recipe, checked.model, checked.world_model)
    predicted = {}
    for stage in plan.stages() if plan else ():
        predicted[stage.name] = {phase.name: phase.total for phase in stage.phases}
    device = torch.device("cuda" if torch.cuda.is_available() and recipe.device != "cpu" else "cpu")
    header = {**provenance.record(device), "recipe": to_plain(recipe), "predicted_bytes": predicted}

    def written(found: dict[str, Any]) -> None:
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            # in one step, so that a killed run leaves the file of the last complete part
            part = arguments.out.with_suffix(".tmp")
            part.write_text(json.dumps(header | found, indent=1, default=str) + "\n")
            part.replace(arguments.out)

    for stage_name, phases in predicted.items():
        worst = max(phases, key=phases.get)
        print(f"ldo.check predicts for {stage_name}: {phases[worst] / 2**30:.1f} GiB at {worst}")
    measured = measure(checked, arguments.quick, written)
    for part_name, kernels in measured["kernels"].items():
        cells = [f"{kernel} {seconds * 1e3:.1f} ms" for kernel, seconds in kernels.items()]
        print(f"attention of {part_name}: {', '.join(cells) or 'none found'}")
    written(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
