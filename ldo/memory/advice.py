"""The memory table of a recipe, whether it fits, and what to change if it does not.

The effect of each change is recomputed, not guessed.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from ldo.core.config import Recipe
from ldo.core.errors import RecipeError
from ldo.memory import passes
from ldo.memory.plan import MemoryPlan
from ldo.memory.stages import Phase, Stage

GIB = 2**30
# of every GPU: its context, and the workspaces of its libraries
RESERVED = GIB
# above this share of the memory, fragmentation may still break a run
TIGHT = 0.92
# share of the memory that a change must save to be named
WORTHWHILE = 0.001
ELSEWHERE = "beyond these: a smaller model, smaller data.height and data.width, or GPUs with more memory"


@dataclass(frozen=True)
class Fix:
    """A change of the recipe, the phase it helps most and the bytes it saves there.

    ``same``: it leaves the training as it is.
    """

    key: str
    value: Any
    where: str
    saves: int
    same: bool

    @property
    def text(self) -> str:
        """The change as an override on the command line."""
        if isinstance(self.value, bool):
            return f"{self.key}={str(self.value).lower()}"
        if isinstance(self.value, tuple):
            return f"{self.key}=[{','.join(self.value)}]"
        return f"{self.key}={self.value}"


def parse_memory(text: str) -> int:
    """Bytes of "80G", "79.5GiB" or "512M"; G and M are powers of 1024 with or without B or iB.

    RecipeError on anything else.
    """
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])(?:i?B)?", text.strip(), re.IGNORECASE)
    if not matched or float(matched[1]) == 0:
        raise RecipeError(f"--memory is {text!r}; give the memory of one GPU, e.g. 80G")
    unit = 2**20 if matched[2].upper() == "M" else GIB
    return int(float(matched[1]) * unit)


def peak_bytes(stages: list[Stage]) -> int:
    """The most that any stage takes of a GPU, including what is reserved."""
    return max(stage.worst.total for stage in stages) + RESERVED


def find_fixes(plan: MemoryPlan, memory: int) -> list[Fix]:
    """Changes that help where ``plan`` does not fit into ``memory`` bytes, those that save most first."""
    stages = plan.stages()
    fixes = []
    for setting, value, harmless in _candidates(plan):
        changed = _with(plan.recipe, setting, value)
        if changed is None:
            continue
        saved, helped_phase = _greatest_saving(stages, plan.with_recipe(changed).stages(), memory)
        if saved > WORTHWHILE * memory:
            fixes.append(Fix(setting, value, helped_phase, saved, harmless))
    return sorted(fixes, key=lambda fix: -fix.saves)


def _greatest_saving(before: list[Stage], after: list[Stage], memory: int) -> tuple[int, str]:
    """The most bytes saved in a phase that did not fit, and that phase; the changed recipe has the same phases."""
    greatest = (0, "")
    for old_stage, new_stage in zip(before, after, strict=True):
        for old_phase, new_phase in zip(old_stage.phases, new_stage.phases, strict=True):
            # A change that only shrinks what fits already is no help.
            if old_phase.total + RESERVED > memory:
                saved = old_phase.total - new_phase.total
                greatest = max(greatest, (saved, f"{old_stage.name}: {old_phase.name}"))
    return greatest


def with_fixes(plan: MemoryPlan, fixes: list[Fix]) -> MemoryPlan:
    """The plan with several changes made."""
    recipe = plan.recipe
    for fix in fixes:
        recipe = _with(recipe, fix.key, fix.value) or recipe
    return plan.with_recipe(recipe)


def _candidates(plan: MemoryPlan) -> list[tuple[str, Any, bool]]:
    """Changes that may help, as key, value and whether the training stays as it is."""
    recipe = plan.recipe
    candidates = [
        ("model.gradient_checkpointing", True, True),
        ("model.vae_tiling", True, True),
        ("model.vae_slicing", True, True),
        ("model.offload", ("text", "vae", "world_model"), True),
        ("align.micro_batch", 1, True),
        ("rl.micro_batch", 1, True),
        ("evaluate.batch", 1, True),
        ("model.dtype", "bfloat16", False),
        ("world_model.dtype", "bfloat16", False),
    ]
    # Without checkpointing, or with compilation, a recipe that stores weights in 8 bits is refused.
    if recipe.model.gradient_checkpointing and not recipe.model.compile:
        candidates.append(("model.fp8", True, False))
    candidates += [
        ("rl.prompts", recipe.rl.minibatches * plan.gpus, False),
        ("rl.group_size", max(recipe.rl.group_size // 2, 2), False),
        ("data.frames", _fewest_frames(plan), False),
    ]
    return candidates


def _fewest_frames(plan: MemoryPlan) -> int:
    """About half the recipe's frames, but enough for a window of the world model, as k x time + 1 for the VAE."""
    recipe = plan.recipe
    half_length = (recipe.data.frames - 1) // 2 // plan.time * plan.time
    longest_window = max(recipe.teacher.window, recipe.critic.window)
    rounded_up = -(-longest_window // plan.time) * plan.time
    return max(half_length, rounded_up) + 1


def _with(recipe: Recipe, key: str, value: Any) -> Recipe | None:
    """The recipe with one key changed; None where it has that value or less already."""
    section_name, name = key.split(".")
    section = getattr(recipe, section_name)
    current = getattr(section, name)
    if current == value:
        return None
    # Of a count, 0 stands for as many as there are, which is more than any number.
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if is_count and 0 < current < value:
        return None
    return recipe.changed(**{section_name: section.changed(**{name: value})})


# ---------------------------------------------------------------------------------------------- as text


def memory_table(plan: MemoryPlan) -> str:
    """Every phase of every stage in GiB of one GPU, the most of each stage marked, and the host's memory."""
    counts, stages = plan.counts, plan.stages()
    models = [
        f"{model_name} {parameters / 1e9:.2f} B" for model_name, parameters in counts.items() if model_name != "lora"
    ]
    targets = plan.targets if isinstance(plan.targets, str) else ", ".join(plan.targets)
    title = "memory of a GPU in GiB"
    if plan.gpus > 1:
        title += f", each of {plan.gpus} GPUs"
    lines = [
        f"models       {', '.join(models)}",
        f"LoRA         rank {plan.recipe.lora.rank} on {targets}: {counts['lora'] / 1e6:.1f} M parameters",
        "",
        f"{title:46}{'weights':>9}{'adapter':>9}{'data':>9}{'work':>9}{'total':>9}",
    ]
    for stage in stages:
        lines += [_table_line(stage, phase) for phase in stage.phases]
    activations = _activations(plan)
    if activations:
        lines += ["", activations]
    lines.append(_host_line(stages, plan.gpus))
    return "\n".join(lines)


def _table_line(stage: Stage, phase: Phase) -> str:
    line = f"  {stage.name:10} {phase.name:33}"
    for phase_bytes in (phase.weights, phase.adapter, phase.held, phase.work, phase.total):
        line += f"{phase_bytes / GIB:9.2f}"
    return f"{line} <" if phase is stage.worst else line


def _host_line(stages: list[Stage], gpus: int) -> str:
    """The most that a stage's processes take of the host's memory together."""

    def together(stage: Stage) -> int:
        return stage.host * (1 if stage.once else gpus)

    largest = max(stages, key=together)
    processes = "" if gpus == 1 or largest.once else f", {gpus} processes on one machine"
    return f"host memory  {together(largest) / GIB:.1f} GiB at its most ({largest.name}{processes})"


def _activations(plan: MemoryPlan) -> str:
    """What gradient checkpointing does to a training step of stage 1; empty without that stage."""
    if not {"sft", "align"} & set(plan.recipe.stages):
        return ""
    alignment = plan.alignment if "align" in plan.recipe.stages else None
    step = plan.step(plan.batch, True)

    def activations(checkpointing: bool) -> str:
        step_peak = passes.training_bytes(dataclasses.replace(step, checkpointing=checkpointing), alignment)
        return f"{step_peak / GIB:.2f}"

    switch = "on" if step.checkpointing else "off"
    return (
        f"activations  {activations(False)} GiB a step of {step.batch}; "
        f"{activations(True)} with model.gradient_checkpointing ({switch})"
    )


def memory_verdict(plan: MemoryPlan, memory: int) -> tuple[bool, str]:
    """Does the plan fit into GPUs of ``memory`` bytes? In words, with what to change if it does not."""
    needed = peak_bytes(plan.stages())
    summary = f"{needed / GIB:.1f} of {memory / GIB:.1f} GiB, {RESERVED / GIB:.0f} of them for the GPU's context"
    if needed <= memory:
        tight = "; tight: fragmentation may still break it" if needed > TIGHT * memory else ""
        return True, f"fits: {summary}{tight}"
    fixes, fixed_peak = _choose_fixes(plan, memory)
    lines = [f"does not fit: {summary}"]
    for fix in fixes:
        effect = "" if fix.same else " (changes the training)"
        lines.append(f"  {fix.text:34} saves {fix.saves / GIB:8.1f} GiB of {fix.where}{effect}")
    if fixes:
        which = "all of these" if len(fixes) > 1 else "this"
        result = "fits" if fixed_peak <= memory else "still does not fit"
        lines.append(f"with {which}: {fixed_peak / GIB:.1f} GiB, {result}")
    if fixed_peak > memory:
        lines.append(ELSEWHERE)
    return False, "\n".join(lines)


def _choose_fixes(plan: MemoryPlan, memory: int) -> tuple[list[Fix], int]:
    """Changes that leave the training as it is, or all where those do not suffice, and the bytes needed with them."""
    all_fixes = find_fixes(plan, memory)
    harmless = [fix for fix in all_fixes if fix.same]
    # Recomputed, because changes overlap: together they save less than the sum of what each saves.
    fixed_peak = peak_bytes(with_fixes(plan, harmless).stages())
    if fixed_peak <= memory:
        return harmless, fixed_peak
    return all_fixes, peak_bytes(with_fixes(plan, all_fixes).stages())
