"""Everything that can be known of a recipe before a model loads: ``python -m ldo.check RECIPE [a.b=c ...] [--gpus N --memory 80G]``.

``check`` takes a second and is what ``ldo.train`` runs first; the command adds the memory table, which takes some tens of them.

Each rule raises a ``RecipeError`` of one line: what, where, and the mend.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch

from ldo import attention, data, hub, loggers, switches, video
from ldo.config import STAGES, Recipe, RecipeError, read
from ldo.generator.folder import FAMILIES, Geometry, geometry_of, read_geometry
from ldo.generator.published import configs
from ldo.sandbox import dataset as sandbox

_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Checked:
    """A recipe found sound. ``clips`` is None where they are yet to be made; geometry where a Hub model is yet to come."""

    recipe: Recipe
    model: str
    world_model: str
    geometry: Geometry | None
    clips: list[data.Clip] | None
    prompts: list[data.PromptLine] | None


def check(recipe: Recipe) -> Checked:
    """Validate a recipe's values, its model folders and its data. RecipeError on the first thing wrong."""
    _values(recipe)
    _buckets(recipe)
    model, geometry = _generator(recipe)
    _windows(recipe)
    world_model = _world_model(recipe)
    switches.check(recipe.model)
    _attention(recipe, model)
    clips = _clips(recipe)
    prompts = None if recipe.data.prompts == "sandbox" else data.read_prompts(Path(recipe.data.prompts))
    if recipe.evaluate.prompts != "sandbox":
        data.read_prompts(Path(recipe.evaluate.prompts), "evaluate.prompts")
    return Checked(recipe, model, world_model, geometry, clips, prompts)


def _clips(r: Recipe) -> list[data.Clip] | None:
    """The user's own clips, every one of them probed; None where there are none or no stage needs them."""
    d, needed = r.data, {"sft", "align"} & set(r.stages) or ("reinforce" in r.stages and (r.rl.align_weight or r.rl.flow_weight))
    own = d.source == "videos" and d.videos != "sandbox"
    _require(own or not d.buckets, "data.buckets sorts videos of your own; without data.videos=FOLDER leave it out")
    _require(d.decoder == "pyav" or video.have_torchcodec(), "data.decoder is torchcodec, which cannot be imported here; install it, or use pyav")
    if not own or not needed:
        return None
    folder = hub.clips_folder(d.videos, d.caption, r.cache) if hub.is_dataset(d.videos) else Path(d.videos)
    return data.read_folder(folder, d, r.cache, r.run / "clips-report.jsonl")


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise RecipeError(message)


def _values(r: Recipe) -> None:
    """Rules that need no file."""
    _require(bool(re.fullmatch(r"[\w.-]+", r.name)), f"name is {r.name!r}; use letters, digits, '.', '_' and '-'")
    loggers.check(r.log)
    _require(r.device in ("auto", "cpu", "cuda"), f"device is {r.device!r}; choose auto, cpu or cuda")
    unknown = [s for s in r.stages if s not in STAGES]
    _require(not unknown, f"stages: {', '.join(unknown)} unknown; choose among {', '.join(STAGES)}")
    _require(list(r.stages) == [s for s in STAGES if s in r.stages], f"stages: the order is {', '.join(STAGES)}, each at most once")
    _require(r.model.family in FAMILIES, f"model.family is {r.model.family!r}; choose one of {', '.join(FAMILIES)}")
    positive = (
        "data.frames data.fps data.clips data.prompt_count lora.rank lora.alpha align.steps align.batch align.lr rl.updates rl.prompts rl.epochs "
        "rl.minibatches rl.lr rl.clip rl.guard_clip rl.window_range rl.train_times rl.ema_every evaluate.count evaluate.seeds evaluate.batch "
        "evaluate.steps gate.pairs gate.prompts gate.samples critic.kappa critic.stride critic.motion_ceiling teacher.stride"
    )
    for name in positive.split():
        value = attrgetter(name)(r)
        _require(value > 0, f"{name} is {value}; it must be above 0")
    for name in ("critic.horizon", "critic.plain_horizon", "critic.plain_weight", "model.text_length", "model.guidance", "align.micro_batch"):
        value = attrgetter(name)(r)
        _require(value >= 0, f"{name} is {value}; it must not be below 0")
    _require(r.save_every > 0, f"save_every is {r.save_every}; it must be above 0")
    for key, value in {"teacher.block": r.teacher.block, "rl.ema": r.rl.ema, "critic.top": r.critic.top}.items():
        _require(0 <= value < 1 or (key == "critic.top" and value == 1), f"{key} is {value}; it must be in [0, 1)")
    rl = r.rl
    _require(rl.group_size >= 2, f"rl.group_size is {rl.group_size}; a group needs at least 2 samples to compare, 8 or more to learn well")
    _require(
        not rl.micro_batch or (rl.micro_batch > 0 and rl.group_size % rl.micro_batch == 0),
        f"rl.micro_batch is {rl.micro_batch}; it must divide rl.group_size ({rl.group_size}), so that all forward passes have one shape",
    )
    _require(
        r.model.family != "cogvideox" or not r.align.time_shift,
        f"align.time_shift is {r.align.time_shift}; cogvideox is trained on its own discrete schedule: leave it at 0",
    )
    _require(rl.prompts % rl.minibatches == 0, f"rl.minibatches is {rl.minibatches}; it must divide rl.prompts ({rl.prompts})")
    last = rl.window_start + rl.window + rl.window_range - 1
    _require(
        rl.window >= 1 and last <= rl.steps - 1,
        f"rl.window: steps {rl.window_start}..{last - 1} can be stochastic, but of {rl.steps} the last must be the ODE's; make the window smaller",
    )
    _require(rl.sampler != "cps" or 0 < rl.eta < 1, f"rl.eta is {rl.eta}; cps takes a value in (0, 1)")
    _require(
        rl.objective == "grpo" or rl.guidance == 1.0,
        f"rl.guidance is {rl.guidance}; {rl.objective} trains the unguided velocity on the samples: set it to 1",
    )
    _require(rl.eta > 0, f"rl.eta is {rl.eta}; without noise a group has nothing to compare")
    _require(
        r.teacher.projector == "none" or not rl.align_weight or "reinforce" not in r.stages or "align" in r.stages,
        f"teacher.projector is {r.teacher.projector} and rl.align_weight {rl.align_weight:g}, but stages has no align to train that projector: "
        "add align to stages, or set teacher.projector=none",
    )
    total = r.evaluate.count * r.evaluate.seeds
    _require(
        total % r.evaluate.batch == 0,
        f"evaluate.batch is {r.evaluate.batch}; it must divide count x seeds ({total}), so that all batches have one shape",
    )


def _buckets(r: Recipe) -> None:
    """Buckets are sizes, each named once."""
    for size in r.data.buckets:
        _require(len(size) == 3 and min(size) > 0, f"data.buckets: {list(size)} is not a size; write [frames, height, width]")
    _require(len(set(r.data.buckets)) == len(r.data.buckets), "data.buckets names a size twice; leave one out")


def _windows(r: Recipe) -> None:
    """Windows fit into clips, contexts into windows."""
    teacher, critic, left = r.teacher, r.critic, r.data.frames - 1
    rate = critic.fps or r.data.fps
    judged = int(left * rate / r.data.fps)  # frames after the first at the critic's rate
    _require(
        critic.window <= judged,
        f"critic.window is {critic.window}; data.frames = {left + 1} at {rate:g} fps leaves {judged} after the first: use at most {judged}"
        + (", or another critic.fps" if critic.fps else ""),
    )
    for size in r.data.buckets:
        _require(
            teacher.window <= size[0] - 1,
            f"data.buckets: {list(size)} leaves {size[0] - 1} frames after the first and teacher.window is {teacher.window}; use longer clips",
        )
    _require(len(critic.contexts) > 0, "critic.contexts is empty; give at least one, e.g. [4, 8]")
    for key, window, contexts in (("teacher.context", teacher.window, (teacher.context,)), ("critic.contexts", critic.window, critic.contexts)):
        for context in contexts:
            _require(0 < context < window, f"{key}: a context of {context} frames is not shorter than the window of {window}; make it smaller")
    _require(
        teacher.window <= left, f"teacher.window is {teacher.window}; data.frames = {left + 1} leaves {left} after the first: use at most {left}"
    )
    _require(
        teacher.mode == "encode" or teacher.stride <= teacher.window - teacher.context,
        f"teacher.stride is {teacher.stride}; above window - context = {teacher.window - teacher.context} some frames are never forecast",
    )


def _folder(where: str, path: str, shipped: Path) -> Path | None:
    """The folder a model path names; None for a Hub name."""
    if path == "sandbox":
        return shipped
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    _require(
        bool(_HUB.fullmatch(path)) and not path.startswith("."),
        f"{where}: folder {path} does not exist; give a checkpoint folder, a Hub name (owner/name), or sandbox",
    )
    return None


def _generator(r: Recipe) -> tuple[str, Geometry | None]:
    folder = _folder("model.path", r.model.path, sandbox.GENERATOR)
    try:
        if folder is not None:
            family, geometry = read_geometry(folder)
        elif (parts := configs(r.model.path)) is None:
            return r.model.path, None
        else:
            family, geometry = geometry_of(r.model.path, parts)
    except ValueError as error:
        raise RecipeError(f"model.path: {error}") from None
    model = str(folder or r.model.path)
    _require(family == r.model.family, f"model.family is {r.model.family!r}, but {model} holds a {family} model; set model.family={family}")
    for where, size in [("data", (r.data.frames, r.data.height, r.data.width)), *((f"data.buckets {list(b)}", b) for b in r.data.buckets)]:
        problem = geometry.problem(*size)
        _require(problem is None, f"{where}: {problem}")
    return model, geometry


def world_model_folder(path: str, where: str = "world_model.path") -> tuple[str, dict | None]:
    """What ``WorldModel.load`` takes for a path of a recipe, and the model's config.json; None for that of a Hub name that is not known here."""
    folder = _folder(where, path, sandbox.WORLD_MODEL)
    if folder is None:
        return path, (configs(path) or {}).get("config")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise RecipeError(f"{where}: {folder} is not a V-JEPA 2 folder: it has no readable config.json") from None
    _require(config.get("model_type") == "vjepa2", f"{where}: {folder} holds a {config.get('model_type')} model; a vjepa2 model is needed")
    return str(folder), config


def _world_model(r: Recipe) -> str:
    folder, config = world_model_folder(r.world_model.path)
    if config is None:
        return folder
    tubelet = config.get("tubelet_size", 2)
    sizes = {"teacher.window": r.teacher.window, "teacher.context": r.teacher.context, "teacher.stride": r.teacher.stride}
    sizes |= {"critic.window": r.critic.window, **{f"critic.contexts ({c})": c for c in r.critic.contexts}}
    for key, value in sizes.items():
        _require(value % tubelet == 0, f"{key} is {value}; it must be a multiple of the world model's tubelets of {tubelet} frames")
    for where, frames in [("data.frames", r.data.frames), *((f"data.buckets {list(b)}", b[0]) for b in r.data.buckets)]:
        _require((frames - 1) % tubelet == 0, f"{where}: {frames} frames; without its first a clip must be a multiple of {tubelet}")
    return folder


def _attention(r: Recipe, model: str) -> None:
    """Explicit attention backends exist here and take the models' precision and masks."""
    cuda = r.device == "cuda" or (r.device == "auto" and torch.cuda.is_available())
    place = torch.device("cuda" if cuda else "cpu")
    transformer = (configs(model) or {}).get("transformer", {}).get("_class_name", "")
    attention.check("model.attention", r.model.attention, getattr(torch, r.model.dtype), place, transformer)
    attention.check("world_model.attention", r.world_model.attention, getattr(torch, r.world_model.dtype), place)


def check_processes(recipe: Recipe, count: int) -> None:
    """RecipeError where the work of a step does not divide evenly among ``count`` processes."""
    sizes = {"align.batch": recipe.align.batch, "rl.prompts / rl.minibatches": recipe.rl.prompts // recipe.rl.minibatches}
    for key, value in sizes.items():
        if value % count:
            raise RecipeError(f"{key} is {value}; with {count} processes it must be a multiple of {count}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ldo.check",
        description="Check a recipe without loading a model, and print what it needs of memory.",
        epilog="Exit code: 0 sound (and fits, where the memory is known), 1 does not fit, 2 a mistake in the recipe.",
    )
    parser.add_argument("recipe", nargs="?", default="recipes/sandbox.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that share the work (default 1)")
    parser.add_argument("--memory", metavar="80G", help="memory of one GPU; default: that of the GPU here, if there is one")
    parser.add_argument("--no-models", action="store_true", help="leave the memory table out: a second instead of some tens")
    args = parser.parse_intermixed_args(argv)
    try:
        checked = check(read(args.recipe, args.overrides))
        check_processes(checked.recipe, args.gpus)
        if not args.no_models:
            from ldo import budget, memory  # these import the model libraries

            limit = budget.parse_memory(args.memory) if args.memory else memory.here()
            clips = None if checked.clips is None else len(checked.clips)
            plan = memory.plan(checked.recipe, checked.model, checked.world_model, args.gpus, clips)
            table = budget.table(plan) if plan else "memory       unknown: these models' configurations are neither here nor shipped; give a folder"
    except RecipeError as error:
        print(f"ldo: {error}", file=sys.stderr)
        return 2
    g, d = checked.geometry, checked.recipe.data
    print(f"generator    {checked.model}")
    if g:
        latent = g.latents(d.frames, d.height, d.width)
        print(f"             {d.frames} x {d.height} x {d.width} pixels -> latents {latent} -> {g.tokens(latent)} tokens")
        print(f"             {g.blocks} blocks of width {g.width}")
    print(f"world model  {checked.world_model}")
    print(f"clips        {'made when the run starts' if checked.clips is None else len(checked.clips)}")
    print(f"prompts      {'made when the run starts' if checked.prompts is None else len(checked.prompts)}")
    r = checked.recipe
    chosen = " (auto: chosen on the device, proven and logged)" if "auto" in (r.model.attention, r.world_model.attention) else ""
    print(f"attention    generator {r.model.attention}, world model {r.world_model.attention}{chosen}")
    fits = True
    if not args.no_models:
        print(table)
        if plan and limit:
            fits, words = budget.verdict(plan, limit)
            print(words)
    print("The recipe is sound." if fits else "The recipe is sound, but too large.")
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
