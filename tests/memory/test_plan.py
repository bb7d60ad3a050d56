"""The memory plan: which phases a recipe has, and what moves their bytes."""

from pathlib import Path

import pytest

from ldo.core.recipe_file import read_recipe
from ldo.memory.meta_models import count_bytes
from ldo.memory.plan import MemoryPlan, plan_memory
from ldo.sandbox.shipped import GENERATOR, WORLD_MODEL


def find_phase(plan, stage, begins):
    """The phase of a stage whose name begins so."""
    phases = next(found.phases for found in plan.stages() if found.name == stage)
    return next(phase for phase in phases if phase.name.startswith(begins))


def test_stages_and_weights(plan, wan, judge):
    memory_plan = plan()
    stages = {stage.name: stage for stage in memory_plan.stages()}
    # Without sft, since align does the same and more.
    assert list(stages) == ["load", "gate", "align", "reinforce", "evaluate"]
    assert memory_plan.weights["world_model"] == count_bytes(judge.model)
    generator = memory_plan.weights["transformer"] + memory_plan.weights["vae"]
    assert generator == count_bytes(wan.transformer) + count_bytes(wan.vae)
    assert stages["load"].worst.total == sum(memory_plan.weights.values()) + 2 * memory_plan.lora
    assert all(phase.total <= stage.worst.total for stage in stages.values() for phase in stage.phases)


def test_what_waits_on_the_cpu_is_not_resident(plan):
    memory_plan = plan()
    memory_plan.offload = ("text", "vae", "world_model")
    assert memory_plan.resident() == memory_plan.weights["transformer"]
    assert memory_plan.resident("vae") == memory_plan.weights["transformer"] + memory_plan.weights["vae"]


def test_gpus_share_the_batch_and_the_groups(plan):
    alone, shared = (find_phase(plan(gpus), "align", "train") for gpus in (1, 2))
    assert shared.name == "train on 2" and shared.work < 0.6 * alone.work
    alone, shared = (find_phase(plan(gpus), "reinforce", "sample") for gpus in (1, 2))
    assert alone.held > 1.8 * shared.held


def test_the_largest_bucket_counts(plan):
    def work(**changes):
        return find_phase(plan(stages=["align"], **changes), "align", "train").work

    assert work(data__buckets=[[17, 32, 32], [17, 64, 64]]) == work(data__height=64, data__width=64) > 2 * work()


def test_guidance_trains_through_two_passes(plan):
    def work(**changes):
        return find_phase(plan(**changes), "reinforce", "train").work

    assert 1.9 < work(rl__guidance=3.0) / work() < 2.1


def test_losses_on_clips_in_stage_two_take_what_they_do_in_stage_one(plan):
    def in_stage_two(loss):
        memory_plan = plan(stages=["reinforce"], **{f"rl__{loss}_weight": 0.1})
        return find_phase(memory_plan, "reinforce", "losses on clips").work

    def in_stage_one(stage):
        return find_phase(plan(stages=[stage]), stage, "train on").work

    assert in_stage_two("flow") == in_stage_one("sft") < in_stage_two("align") == in_stage_one("align")


def test_both_experts_carry_an_adapter(plan):
    single_expert = plan()
    two_experts = MemoryPlan(
        single_expert.recipe,
        single_expert.parts | {"transformer_2": single_expert.parts["transformer"]},
        single_expert.world_model,
    )
    assert two_experts.lora == 2 * single_expert.lora
    assert (
        sum(two_experts.weights.values()) == sum(single_expert.weights.values()) + single_expert.weights["transformer"]
    )


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipes_models_are_known(path):
    recipe = read_recipe(path)
    model = str(GENERATOR) if recipe.model.path == "sandbox" else recipe.model.path
    world_model = str(WORLD_MODEL) if recipe.world_model.path == "sandbox" else recipe.world_model.path
    memory_plan = plan_memory(recipe, model, world_model)
    assert memory_plan is not None and memory_plan.lora > 0 and all(memory_plan.weights.values())
