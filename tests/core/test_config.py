"""Recipes: defaults, YAML, overrides, and the wording of every error."""

from operator import attrgetter

import pytest
import yaml

from ldo.core.config import Recipe, to_plain
from ldo.core.errors import RecipeError
from ldo.core.recipe_file import build_section, read_recipe


def write(folder, text, name="recipe.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def test_empty_recipe_is_the_defaults(tmp_path):
    assert read_recipe(write(tmp_path, "")) == Recipe()
    assert build_section(Recipe, {}, "here") == Recipe()


def test_yaml_fills_sections_and_leaves_the_rest(tmp_path):
    # Without a dot, YAML 1.1 takes 1e-4 for text; it must arrive as a number.
    text = "name: mine\nalign: {steps: 7, lr: 1e-4}\ncritic:\n  contexts: [2, 6]\ngate: {override: true}\n"
    recipe = read_recipe(write(tmp_path, text))
    assert recipe.name == "mine"
    assert recipe.align.steps == 7
    assert recipe.align.lr == 1e-4
    assert recipe.critic.contexts == (2, 6)
    assert recipe.gate.override is True
    assert recipe.align == Recipe().align.changed(steps=7, lr=1e-4)
    assert recipe.rl == Recipe().rl


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("seed=3", "seed", 3),
        ("align.steps=9", "align.steps", 9),
        ("rl.lr=1e-4", "rl.lr", 1e-4),
        ("rl.lr=2", "rl.lr", 2.0),
        ("critic.contexts=[4, 8, 12]", "critic.contexts", (4, 8, 12)),
        ("stages=[align]", "stages", ("align",)),
        ("gate.override=true", "gate.override", True),
        ("data.prompts=a=b.txt", "data.prompts", "a=b.txt"),
        ("model.dtype=bfloat16", "model.dtype", "bfloat16"),
    ],
)
def test_override_wins_over_the_file(tmp_path, override, key, value):
    path = write(tmp_path, "seed: 1\nalign: {steps: 1}\nrl: {lr: 5.0}\nstages: [gate]\n")
    found = attrgetter(key)(read_recipe(path, [override]))
    assert found == value
    # Equality would not notice a wrong type: 2 equals 2.0, and True equals 1.
    assert type(found) is type(value)


def test_last_override_wins(tmp_path):
    assert read_recipe(write(tmp_path, ""), ["align.steps=1", "align.steps=2", "seed=5"]).align.steps == 2


def test_round_trip(tmp_path):
    recipe = read_recipe(
        write(tmp_path, "name: mine\nstages: [align, report]\n"),
        ["critic.contexts=[2]", "rl.clip=1e-5", "rl.guard=false"],
    )
    again = build_section(Recipe, yaml.safe_load(yaml.safe_dump(to_plain(recipe))), "here")
    assert again == recipe
    # The defaults would survive even a round trip that lost every value.
    assert recipe != Recipe()


def test_run_folder():
    assert Recipe(out="runs", name="a").run.as_posix() == "runs/a"


ERRORS = [
    # file, overrides, part of the message
    ("- a\n- b", [], "must be a mapping of keys to values, not a list"),
    ("just text", [], "must be a mapping of keys to values, not a str"),
    ("align: {steps: 1", [], "is not valid YAML"),
    ("align: {stepz: 1}", [], "unknown key align.stepz; did you mean align.steps?"),
    ("alingn: {steps: 1}", [], "unknown key alingn; did you mean align?"),
    ("teacher: {kappa: 1}", [], "unknown key teacher.kappa; it belongs elsewhere: critic.kappa"),
    ("kappa: 1", [], "unknown key kappa; it belongs elsewhere: critic.kappa"),
    ("lora: {lr: 1e-4}", [], "unknown key lora.lr; it belongs elsewhere: align.lr or rl.lr"),
    ("gate: {zzz: 1}", [], "unknown key gate.zzz; known here: pairs, "),
    ("3: 1", [], "unknown key 3; known here: name, "),
    ("null: 1", [], "unknown key None; known here: name, "),
    ("model: {4: 1}", [], "unknown key model.4; did you mean model."),
    ("align: 3", [], "align is a section; write its keys below it, e.g. align.steps"),
    ("align: {steps: true}", [], "align.steps is True; a whole number is expected"),
    ("align: {steps: 1.5}", [], "align.steps is 1.5; a whole number is expected"),
    ("align: {lr: fast}", [], "align.lr is 'fast'; a number is expected"),
    ("align: {lr: true}", [], "align.lr is True; a number is expected"),
    ("name: 7", [], "name is 7; text is expected"),
    ("gate: {override: 1}", [], "gate.override is 1; true or false is expected"),
    ("critic: {contexts: 4}", [], "critic.contexts is 4; a list is expected, e.g. [4, 8]"),
    ("critic: {contexts: [4, x]}", [], "critic.contexts is 'x'; a whole number is expected"),
    ("teacher: {margin: -0.1}", [], "teacher.margin is -0.1; it must be at least 0"),
    ("rl: {kl: .nan}", [], "rl.kl is nan; it must be at least 0"),
    ("gate: {all_kinds: 90}", [], "gate.all_kinds is 90; it must be in [0, 1]"),
    ("data: {height: 0}", [], "data.height is 0; it must be above 0"),
    ("model: {dtype: float16}", [], "model.dtype is 'float16'; choose one of float32, bfloat16"),
    ("", ["align.steps"], "override 'align.steps' is not of the form key=value, e.g. align.steps=100"),
    ("", ["=3"], "override '=3' is not of the form key=value"),
    ("", ["stages=[gate"], "override 'stages=[gate': the value is not valid YAML"),
    ("seed: 3", ["seed.x=1"], "override 'seed.x=1': seed is a value, not a section"),
    ("", ["align=3"], "align is a section; write its keys below it"),
    ("", ["align.stepz=3"], "unknown key align.stepz; did you mean align.steps?"),
]


@pytest.mark.parametrize("text, overrides, message", ERRORS)
def test_mistake_is_reported_in_one_line(tmp_path, text, overrides, message):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides)
    reported = str(caught.value)
    assert message in reported
    assert "\n" not in reported
    # A mistake in the file names the file; one on the command line is visible there.
    assert overrides or str(path) in reported


def test_key_of_another_section_is_not_taken_for_a_misspelt_section(tmp_path):
    # "lr" is also close to the name of the section "lora", which would be the wrong advice.
    with pytest.raises(RecipeError, match=r"align\.lr or rl\.lr"):
        read_recipe(write(tmp_path, "lr: 1e-4"))


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "", "sandbox.yaml")
    with pytest.raises(RecipeError, match=r"sandbx\.yaml does not exist; did you mean .*/sandbox\.yaml\?"):
        read_recipe(tmp_path / "sandbx.yaml")
    with pytest.raises(RecipeError, match="does not exist; give the path of a YAML file"):
        read_recipe(tmp_path / "no" / "such.yaml")
    # A folder exists, but it is no recipe.
    with pytest.raises(RecipeError, match="does not exist"):
        read_recipe(tmp_path)


def test_binary_file_is_not_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecipeError, match="is not valid YAML"):
        read_recipe(path)
