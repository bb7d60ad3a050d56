"""The memory table of a recipe, whether it fits, and what to change if it does not: each change is recomputed, not guessed."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from ldo import passes
from ldo.config import Recipe, RecipeError
from ldo.memory import Plan, Stage

GIB = 2**30
RESERVED = GIB  # of every GPU: its context, and the workspaces of its libraries
TIGHT = 0.92  # above this share of the memory, fragmentation may still break a run


@dataclass(frozen=True)
class Mend:
    """A change of the recipe, the phase it helps most and the bytes it saves there; ``same``: it leaves the training as it is."""

    key: str
    value: Any
    where: str
    saves: int
    same: bool

    @property
    def text(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        value = f"[{','.join(value)}]" if isinstance(value, tuple) else value
        return f"{self.key}={value}"


def parse_memory(text: str) -> int:
    """Bytes of "80G", "79.5GiB" or "512M"; G and M are powers of 1024 with or without B or iB. RecipeError on anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise RecipeError(f"--memory is {text!r}; give the memory of one GPU, e.g. 80G")
    return int(float(found[1]) * (2**20 if found[2].upper() == "M" else GIB))


def peak(stages: list[Stage]) -> int:
    """The most that any stage takes of a GPU, with what is reserved."""
    return max(stage.worst.total for stage in stages) + RESERVED


def mends(plan: Plan, memory: int) -> list[Mend]:
    """Changes that help where ``plan`` does not fit into ``memory`` bytes, those that save most first."""
    stages = plan.stages()
    found = []
    for key, value, same in _candidates(plan):
        changed = _with(plan.recipe, key, value)
        if changed is None:
            continue
        after = Plan(changed, plan.parts, plan.judge, plan.gpus, plan.clips).stages()
        saved = [
            (before.total - now.total, f"{stage.name}: {before.name}")
            for stage, other in zip(stages, after, strict=True)
            for before, now in zip(stage.phases, other.phases, strict=True)
            if before.total + RESERVED > memory
        ]
        best = max(saved, default=(0, ""))
        if best[0] > 0.001 * memory:
            found.append(Mend(key, value, best[1], best[0], same))
    return sorted(found, key=lambda m: -m.saves)


def with_all(plan: Plan, some: list[Mend]) -> Plan:
    """The plan with several changes made."""
    recipe = plan.recipe
    for mend in some:
        recipe = _with(recipe, mend.key, mend.value) or recipe
    return Plan(recipe, plan.parts, plan.judge, plan.gpus, plan.clips)


def _candidates(plan: Plan) -> list[tuple[str, Any, bool]]:
    r = plan.recipe
    window = max(r.teacher.window, r.critic.window)
    frames = max((r.data.frames - 1) // 2 // plan.time * plan.time, -(-window // plan.time) * plan.time) + 1
    return [
        ("model.gradient_checkpointing", True, True),
        ("model.vae_tiling", True, True),
        ("model.vae_slicing", True, True),
        ("model.offload", ("text", "vae", "world_model"), True),
        ("align.micro_batch", 1, True),
        ("rl.micro_batch", 1, True),
        ("evaluate.batch", 1, True),
        ("model.dtype", "bfloat16", False),
        ("world_model.dtype", "bfloat16", False),
        *([("model.fp8", True, False)] if r.model.gradient_checkpointing and not r.model.compile else []),  # elsewhere it is refused
        ("rl.prompts", r.rl.minibatches * plan.gpus, False),
        ("rl.group_size", max(r.rl.group_size // 2, 2), False),
        ("data.frames", frames, False),
    ]


def _with(recipe: Recipe, key: str, value: Any) -> Recipe | None:
    """The recipe with one key changed; None where it has that value or less already."""
    section, name = key.split(".")
    part = getattr(recipe, section)
    now = getattr(part, name)
    if now == value or (isinstance(value, int) and not isinstance(value, bool) and 0 < now < value):
        return None
    return dataclasses.replace(recipe, **{section: dataclasses.replace(part, **{name: value})})


# ---------------------------------------------------------------------------------------------- as text


def table(plan: Plan) -> str:
    """Every phase of every stage in GiB of one GPU, the most of each stage marked, and the host's memory."""
    count, stages = plan.counts, plan.stages()
    names = {k: v for k, v in count.items() if k != "lora"}
    lines = ["models       " + ", ".join(f"{k} {v / 1e9:.2f} B" for k, v in names.items())]
    targets = plan.targets if isinstance(plan.targets, str) else ", ".join(plan.targets)
    lines.append(f"LoRA         rank {plan.recipe.lora.rank} on {targets}: {count['lora'] / 1e6:.1f} M parameters")
    each = f", each of {plan.gpus} GPUs" if plan.gpus > 1 else ""
    lines += ["", f"memory of a GPU in GiB{each}{'':{24 - len(each)}}{'weights':>9}{'adapter':>9}{'data':>9}{'work':>9}{'total':>9}"]
    for stage in stages:
        for phase in stage.phases:
            figures = "".join(f"{x / GIB:9.2f}" for x in (phase.weights, phase.adapter, phase.held, phase.work, phase.total))
            lines.append(f"  {stage.name:10} {phase.name:33}{figures}{' <' if phase is stage.worst else ''}")
    activations = _activations(plan)
    if activations:
        lines += ["", activations]
    host = max(stages, key=lambda s: s.host * (1 if s.once else plan.gpus))
    if plan.gpus == 1 or host.once:
        lines.append(f"host memory  {host.host / GIB:.1f} GiB at its most ({host.name})")
    else:
        lines.append(f"host memory  {host.host * plan.gpus / GIB:.1f} GiB at its most ({host.name}, {plan.gpus} processes on one machine)")
    return "\n".join(lines)


def _activations(plan: Plan) -> str:
    """What gradient checkpointing does to a training step of stage 1."""
    if not {"sft", "align"} & set(plan.recipe.stages):
        return ""
    step = plan.step(plan.batch, True)
    alignment = plan.alignment if "align" in plan.recipe.stages else None
    off, on = (passes.training_bytes(dataclasses.replace(step, checkpointing=c), alignment) / GIB for c in (False, True))
    return f"activations  {off:.2f} GiB a step of {step.batch}; {on:.2f} with model.gradient_checkpointing ({'on' if step.checkpointing else 'off'})"


def verdict(plan: Plan, memory: int) -> tuple[bool, str]:
    """Does the plan fit into GPUs of ``memory`` bytes? In words, with what to change if it does not."""
    need = peak(plan.stages())
    of = f"{need / GIB:.1f} of {memory / GIB:.1f} GiB, {RESERVED / GIB:.0f} of them for the GPU's context"
    if need <= memory:
        return True, f"fits: {of}" + ("; tight: fragmentation may still break it" if need > TIGHT * memory else "")
    lines = [f"does not fit: {of}"]
    found = mends(plan, memory)
    chosen = [m for m in found if m.same]
    fits = bool(chosen) and peak(with_all(plan, chosen).stages()) <= memory
    if not fits:
        chosen = found
    for mend in chosen:
        lines.append(f"  {mend.text:34} saves {mend.saves / GIB:8.1f} GiB of {mend.where}{'' if mend.same else ' (changes the training)'}")
    if chosen:
        after = peak(with_all(plan, chosen).stages())
        lines.append(
            f"with {'all of these' if len(chosen) > 1 else 'this'}: {after / GIB:.1f} GiB, {'fits' if after <= memory else 'still does not fit'}"
        )
        fits = after <= memory
    if not fits:
        lines.append("beyond these: a smaller model, smaller data.height and data.width, or GPUs with more memory")
    return False, "\n".join(lines)
