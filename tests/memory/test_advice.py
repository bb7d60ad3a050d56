"""The memory table and verdict, what to change where a recipe does not fit, and the command that prints them."""

import time
from pathlib import Path

import pytest

from ldo.check import main as check_main
from ldo.core.errors import RecipeError
from ldo.memory.advice import RESERVED, find_fixes, memory_verdict, parse_memory, peak_bytes, with_fixes
from tests.helpers import recipes


@pytest.mark.parametrize(
    ("text", "size"), [("80G", 80 * 2**30), ("79.5GiB", int(79.5 * 2**30)), ("512 mb", 2**29), ("24GB", 24 * 2**30)]
)
def test_memory_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["80", "eighty", "0G", "-1G", "80T"])
def test_what_is_no_memory_size(text):
    with pytest.raises(RecipeError, match=r"give the memory of one GPU, e\.g\. 80G"):
        parse_memory(text)


def test_the_effect_of_a_fix_is_recomputed(plan):
    before = plan(stages=["align"], data__height=64, data__width=64)
    # The models fit, and nothing that works on them.
    limit = before.stages()[0].worst.total + RESERVED
    sufficient, words = memory_verdict(before, limit)
    fixes = find_fixes(before, limit)
    assert not sufficient and words.startswith("does not fit: ")
    assert [fix.saves for fix in fixes] == sorted((fix.saves for fix in fixes), reverse=True)
    thrifty = next(fix for fix in fixes if fix.key == "model.gradient_checkpointing")
    phase_name = thrifty.where.split(": ")[1]

    def total(plan):
        return next(phase.total for stage in plan.stages() for phase in stage.phases if phase.name == phase_name)

    assert thrifty.text == "model.gradient_checkpointing=true"
    assert thrifty.saves == total(before) - total(with_fixes(before, [thrifty])) > 0


def test_the_verdict_turns_at_the_peak(plan):
    memory_plan = plan(stages=["align"], data__height=64, data__width=64)
    peak = peak_bytes(memory_plan.stages())
    assert memory_verdict(memory_plan, peak)[0] and not memory_verdict(memory_plan, peak - 1)[0]


# ---------------------------------------------------------------------------------------------- the command


def hub_recipe(folder, **changes) -> Path:
    """A recipe of published models, named as on the Hub, at a real size."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a ball rolls\na ball falls\n")
    settings = {
        "model.path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "model.dtype": "bfloat16",
        "world_model.path": "facebook/vjepa2-vitl-fpc64-256",
        "data.frames": 33,
        "data.height": 240,
        "data.width": 416,
        "data.prompts": str(prompts),
        "evaluate.prompts": str(prompts),
    }
    return recipes.write(folder, Path("-"), Path("-"), **settings, **changes)


def test_check_prints_a_table_for_hub_models_within_a_minute(tmp_path, capsys):
    # CPU time, which other processes do not lengthen.
    began = time.process_time()
    assert check_main([str(hub_recipe(tmp_path)), "--memory", "10000G"]) == 0
    assert time.process_time() - began < 60
    output = capsys.readouterr().out
    for words in ("transformer 1.42 B", "fits: ", "host memory", "The recipe is sound."):
        assert words in output
    assert all(f"\n  {stage} " in output for stage in ("load", "align", "reinforce"))


def test_too_large_is_exit_code_1(recipe, capsys):
    assert check_main([str(recipe()), "stages=[align]", "--memory", "1G"]) == 1
    output = capsys.readouterr().out
    assert "does not fit" in output and "The recipe is sound, but too large." in output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.frames=32", "32 frames; the VAE takes 4K+1: use 33"),
        ("data.height=250", "height 250; it must be a multiple of 16"),
        (
            "model.family=ltx",
            "model.family is 'ltx', but Wan-AI/Wan2.1-T2V-1.3B-Diffusers holds a wan model; set model.family=wan",
        ),
    ],
)
def test_sizes_that_a_hub_model_cannot_take(tmp_path, capsys, change, words):
    assert check_main([str(hub_recipe(tmp_path)), change]) == 2
    assert words in capsys.readouterr().err


def test_mistakes_in_the_command_line(recipe, capsys):
    assert check_main([str(recipe()), "--memory", "much"]) == 2
    assert check_main([str(recipe()), "--gpus", "3"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "--memory is 'much'" in lines[0] and "with 3 processes" in lines[1]


def test_unknown_models(tmp_path, capsys):
    assert check_main([str(hub_recipe(tmp_path)), "model.path=someone/else", "--memory", "1G"]) == 0
    assert "memory       unknown" in capsys.readouterr().out


def test_the_sandboxs_table(capsys):
    assert check_main([str(Path(__file__).parents[2] / "recipes" / "sandbox.yaml")]) == 0
    assert "host memory" in capsys.readouterr().out
