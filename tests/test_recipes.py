"""Every recipe that is shipped is sound, is documented, and brings its prompts along from wherever it is used."""

from pathlib import Path

import pytest

from ldo.core.recipe_file import read_recipe
from ldo.run.rules import check_processes
from ldo.run.validate import validate

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
REAL = [path for path in RECIPES if not path.stem.startswith("sandbox")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda file: file.stem)
def test_it_is_sound(path, tmp_path, monkeypatch):
    # prompts are found next to the recipe, not in the working directory
    monkeypatch.chdir(tmp_path)
    checked = validate(read_recipe(path))
    assert checked.geometry is not None and checked.recipe.name == path.stem
    if path in REAL:
        assert len(checked.prompts) > 100 and checked.recipe.model.dtype == "bfloat16"
        for processes in (1, 2, 4, 8):
            check_processes(checked.recipe, processes)


def test_training_and_test_prompts_differ():
    train, test = (
        {line.strip() for line in (ROOT / "recipes" / name).read_text().splitlines()}
        for name in ("motion.txt", "motion-test.txt")
    )
    assert len(train) > 100 and len(test) >= 32 and not train & test


def test_each_real_one_is_documented():
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert REAL and all(f"recipes/{path.name}" in page for path in REAL)
