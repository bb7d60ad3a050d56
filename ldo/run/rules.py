"""Rules between a recipe's keys that need no file and no model: a mistake in them is reported within half a second.

Types and bounds of single keys are in ``ldo/core/config.py``. Each rule raises a ``RecipeError`` of one line: what,
where, and the fix.
"""

from __future__ import annotations

import re

from ldo.core.config import STAGES, Recipe
from ldo.core.errors import RecipeError
from ldo.core.loggers import check_loggers
from ldo.models.generator.folder import FAMILIES


def require(fine: bool, message: str) -> None:
    """RecipeError with ``message`` unless ``fine``."""
    if not fine:
        raise RecipeError(message)


def check_rules(recipe: Recipe) -> None:
    """RecipeError on the first rule that the recipe's values break."""
    _names(recipe)
    _model(recipe)
    _buckets(recipe)
    _reinforce(recipe)
    _batches(recipe)


def check_processes(recipe: Recipe, count: int) -> None:
    """RecipeError where the work of a step does not divide evenly among ``count`` processes."""
    # A rank without a group would wait in every all-reduce; uneven ranks would weight samples unevenly.
    groups = recipe.rl.prompts // recipe.rl.minibatches
    for key, value in {"align.batch": recipe.align.batch, "rl.prompts / rl.minibatches": groups}.items():
        require(value % count == 0, f"{key} is {value}; with {count} processes it must be a multiple of {count}")


def _names(recipe: Recipe) -> None:
    require(
        bool(re.fullmatch(r"[\w.-]+", recipe.name)),
        f"name is {recipe.name!r}; use letters, digits, '.', '_' and '-'",
    )
    # Before hours of training, not when the first stage opens its log.
    check_loggers(recipe.log)
    unknown = [stage for stage in recipe.stages if stage not in STAGES]
    require(not unknown, f"stages: {', '.join(unknown)} unknown; choose among {', '.join(STAGES)}")
    ordered = [stage for stage in STAGES if stage in recipe.stages]
    require(list(recipe.stages) == ordered, f"stages: the order is {', '.join(STAGES)}, each at most once")
    family = recipe.model.family
    require(family in FAMILIES, f"model.family is {family!r}; choose one of {', '.join(FAMILIES)}")


def _model(recipe: Recipe) -> None:
    """Switches that would undo each other."""
    model = recipe.model
    require(
        not model.fp8 or model.gradient_checkpointing,
        "model.fp8 saves nothing while every widened weight waits for the backward; "
        "set model.gradient_checkpointing=true, or model.fp8=false",
    )
    require(
        not (model.fp8 and model.compile),
        "model.compile is cut to pieces by the casts of model.fp8; set one of them to false",
    )


def _buckets(recipe: Recipe) -> None:
    """Buckets are sizes, each named once, of clips that are the user's own; only samples can be chosen from."""
    data = recipe.data
    own = data.source == "videos" and data.videos != "sandbox"
    for size in data.buckets:
        sound = len(size) == 3 and min(size) > 0
        require(sound, f"data.buckets: {list(size)} is not a size; write [frames, height, width]")
    require(len(set(data.buckets)) == len(data.buckets), "data.buckets names a size twice; leave one out")
    require(
        data.source == "self" or data.best_of == 1,
        "data.best_of chooses among the base model's own samples; without data.source=self leave it out",
    )
    require(own or not data.buckets, "data.buckets sorts videos of your own; without data.videos=FOLDER leave it out")


def check_window_lengths(recipe: Recipe) -> None:
    """RecipeError where windows do not fit into clips, or contexts into windows."""
    teacher, critic, data = recipe.teacher, recipe.critic, recipe.data
    # teacher and critic both drop the first frame, to which a causal VAE gives a latent of its own
    left = data.frames - 1
    rate = critic.fps or data.fps
    # At its own rate the critic sees fewer, or repeated, frames.
    judged = int(left * rate / data.fps)
    require(
        critic.window <= judged,
        f"critic.window is {critic.window}; data.frames = {data.frames} at {rate:g} fps leaves {judged} after the "
        f"first: use at most {judged}" + (", or another critic.fps" if critic.fps else ""),
    )
    for size in data.buckets:
        require(
            teacher.window < size[0],
            f"data.buckets: {list(size)} leaves {size[0] - 1} frames after the first and teacher.window is "
            f"{teacher.window}; use longer clips",
        )
    require(len(critic.contexts) > 0, "critic.contexts is empty; give at least one, e.g. [4, 8]")
    pairs = [("teacher.context", teacher.context, teacher.window)]
    pairs += [("critic.contexts", context, critic.window) for context in critic.contexts]
    for key, context, window in pairs:
        require(
            0 < context < window,
            f"{key}: a context of {context} frames is not shorter than the window of {window}; make it smaller",
        )
    require(
        teacher.window <= left,
        f"teacher.window is {teacher.window}; data.frames = {data.frames} leaves {left} after the first: "
        f"use at most {left}",
    )
    ahead = teacher.window - teacher.context
    require(
        teacher.mode == "encode" or teacher.stride <= ahead,
        f"teacher.stride is {teacher.stride}; above window - context = {ahead} some frames are never forecast",
    )


def _reinforce(recipe: Recipe) -> None:
    """The sampler, the objective and the stochastic window of stage 2 go together."""
    rl_config = recipe.rl
    # the last step must be the ODE's: its noise would stay in the video
    last = rl_config.window_start + rl_config.window + rl_config.window_range - 2
    require(
        rl_config.window >= 1 and last < rl_config.steps - 1,
        f"rl.window: steps {rl_config.window_start}..{last} can be stochastic, but of "
        f"{rl_config.steps} the last must be the ODE's; make the window smaller",
    )
    require(
        rl_config.sampler != "cps" or 0 < rl_config.eta < 1, f"rl.eta is {rl_config.eta}; cps takes a value in (0, 1)"
    )
    require(rl_config.eta > 0, f"rl.eta is {rl_config.eta}; without noise a group has nothing to compare")
    require(
        rl_config.objective == "grpo" or rl_config.guidance == 1.0,
        f"rl.guidance is {rl_config.guidance}; {rl_config.objective} trains the unguided velocity on the "
        "samples: set it to 1",
    )
    trains_projector = recipe.teacher.projector == "none" or "align" in recipe.stages
    require(
        trains_projector or not rl_config.align_weight or "reinforce" not in recipe.stages,
        f"teacher.projector is {recipe.teacher.projector} and rl.align_weight {rl_config.align_weight:g}, but "
        "stages has no align to train that projector: add align to stages, or set teacher.projector=none",
    )


def _batches(recipe: Recipe) -> None:
    """Batches divide, so that all forward passes have one shape."""
    rl_config, evaluate = recipe.rl, recipe.evaluate
    require(
        not rl_config.micro_batch or rl_config.group_size % rl_config.micro_batch == 0,
        f"rl.micro_batch is {rl_config.micro_batch}; it must divide rl.group_size ({rl_config.group_size}), so that "
        "all forward passes have one shape",
    )
    require(
        rl_config.prompts % rl_config.minibatches == 0,
        f"rl.minibatches is {rl_config.minibatches}; it must divide rl.prompts ({rl_config.prompts})",
    )
    require(
        recipe.model.family != "cogvideox" or not recipe.align.time_shift,
        f"align.time_shift is {recipe.align.time_shift}; cogvideox is trained on its own discrete schedule: "
        "leave it at 0",
    )
    total = evaluate.count * evaluate.seeds
    require(
        total % evaluate.batch == 0,
        f"evaluate.batch is {evaluate.batch}; it must divide count x seeds ({total}), so that all batches have one "
        "shape",
    )
