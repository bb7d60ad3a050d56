"""What a recipe needs of a GPU's memory and of the host's, stage by stage, before anything is loaded.

docs/memory.md says what is left out. Processes share work by data parallelism: each holds every model.
"""

from __future__ import annotations

import torch

from ldo.core.config import Recipe
from ldo.memory.counts import MemoryCounts
from ldo.memory.stages import (
    Stage,
    evaluate_stage,
    gate_stage,
    loading_stage,
    reinforce_stage,
    tuning_stage,
)
from ldo.models.generator.published import model_configs


class MemoryPlan(MemoryCounts):
    """The memory of a recipe that ``ldo.check`` found sound, on ``gpus`` GPUs.

    RecipeError where a LoRA target fits no layer.
    """

    def stages(self) -> list[Stage]:
        """The recipe's stages in order; sft is left out if align is there, which does the same and more."""
        planned = [loading_stage(self)]
        for name in self.recipe.stages:
            if name == "gate":
                planned.append(gate_stage(self))
            elif name == "align" or (name == "sft" and "align" not in self.recipe.stages):
                # Stage 1 takes every bucket in turn, so that the largest counts.
                stages = [tuning_stage(plan, name) for plan in self._buckets()]
                planned.append(max(stages, key=lambda stage: stage.worst.total))
            elif name == "reinforce":
                planned.append(reinforce_stage(self))
            elif name == "evaluate":
                planned.append(evaluate_stage(self))
        return planned

    def _buckets(self) -> list[MemoryPlan]:
        """A plan for each size of stage 1's clips."""
        plans = []
        for frames, height, width in self.recipe.data.buckets:
            data = self.recipe.data.changed(buckets=(), frames=frames, height=height, width=width)
            plans.append(self.with_recipe(self.recipe.changed(data=data)))
        return plans or [self]

    def with_recipe(self, recipe: Recipe) -> MemoryPlan:
        """The plan of another recipe for the same models, GPUs and clips."""
        return MemoryPlan(recipe, self.parts, self.world_model, self.gpus, self.clips)


def plan_memory(
    recipe: Recipe, model: str, world_model: str, gpus: int = 1, clips: int | None = None
) -> MemoryPlan | None:
    """The plan of a checked recipe, ``clips`` being how many it has.

    None where a Hub model's configuration is neither cached nor shipped.
    """
    parts = model_configs(model)
    world_model_parts = model_configs(world_model)
    if parts is None or world_model_parts is None or "transformer" not in parts:
        return None
    return MemoryPlan(recipe, parts, world_model_parts["config"], gpus, clips)


def gpu_memory_here() -> int | None:
    """Memory of this machine's first GPU in bytes; None where there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
