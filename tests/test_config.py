"""Recipes: defaults, YAML, overrides, and the words of every error."""

import dataclasses

import pytest
import yaml

from ldo.config import Recipe, RecipeError, build, read, to_dict


def write(folder, text, name="recipe.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def test_empty_recipe_is_the_defaults(tmp_path):
    assert read(write(tmp_path, "")) == Recipe() == build(Recipe, {}, "here")


def test_yaml_fills_sections_and_leaves_the_rest(tmp_path):
    recipe = read(write(tmp_path, "name: mine\nalign: {steps: 7, lr: 1e-4}\ncritic:\n  contexts: [2, 6]\ngate: {override: true}\n"))
    assert (recipe.name, recipe.align.steps, recipe.align.lr, recipe.critic.contexts, recipe.gate.override) == ("mine", 7, 1e-4, (2, 6), True)
    assert recipe.align == dataclasses.replace(Recipe().align, steps=7, lr=1e-4)
    assert recipe.rl == Recipe().rl


@pytest.mark.parametrize(
    "override, get, value",
    [
        ("seed=3", lambda r: r.seed, 3),
        ("align.steps=9", lambda r: r.align.steps, 9),
        ("rl.lr=1e-4", lambda r: r.rl.lr, 1e-4),
        ("rl.lr=2", lambda r: r.rl.lr, 2.0),
        ("critic.contexts=[4, 8, 12]", lambda r: r.critic.contexts, (4, 8, 12)),
        ("stages=[align]", lambda r: r.stages, ("align",)),
        ("gate.override=true", lambda r: r.gate.override, True),
        ("data.prompts=a=b.txt", lambda r: r.data.prompts, "a=b.txt"),
        ("model.dtype=bfloat16", lambda r: r.model.dtype, "bfloat16"),
    ],
)
def test_override_wins_over_the_file(tmp_path, override, get, value):
    path = write(tmp_path, "seed: 1\nalign: {steps: 1}\nrl: {lr: 5.0}\nstages: [gate]\n")
    got = get(read(path, [override]))
    assert got == value and type(got) is type(value)


def test_last_override_wins(tmp_path):
    assert read(write(tmp_path, ""), ["align.steps=1", "align.steps=2", "seed=5"]).align.steps == 2


def test_round_trip(tmp_path):
    recipe = read(write(tmp_path, "name: mine\nstages: [align, report]\n"), ["critic.contexts=[2]", "rl.clip=1e-5", "rl.guard=false"])
    again = build(Recipe, yaml.safe_load(yaml.safe_dump(to_dict(recipe))), "here")
    assert again == recipe != Recipe()


def test_run_folder():
    assert Recipe(out="runs", name="a").run.as_posix() == "runs/a"


ERRORS = [
    # file, overrides, words of the message
    ("- a\n- b", [], "must be a mapping of keys to values, not a list"),
    ("just text", [], "must be a mapping of keys to values, not a str"),
    ("align: {steps: 1", [], "is not valid YAML"),
    ("align: {stepz: 1}", [], "unknown key align.stepz; did you mean align.steps?"),
    ("alingn: {steps: 1}", [], "unknown key alingn; did you mean align?"),
    ("teacher: {kappa: 1}", [], "unknown key teacher.kappa; it belongs elsewhere: critic.kappa"),
    ("kappa: 1", [], "unknown key kappa; it belongs elsewhere: critic.kappa"),
    ("lora: {lr: 1e-4}", [], "unknown key lora.lr; it belongs elsewhere: align.lr or rl.lr"),
    ("gate: {zzz: 1}", [], "unknown key gate.zzz; known here: pairs, "),
    ("align: 3", [], "align is a section; write its keys below it, e.g. align.steps"),
    ("align: {steps: true}", [], "align.steps is True; a whole number is expected"),
    ("align: {steps: 1.5}", [], "align.steps is 1.5; a whole number is expected"),
    ("align: {lr: fast}", [], "align.lr is 'fast'; a number is expected"),
    ("align: {lr: true}", [], "align.lr is True; a number is expected"),
    ("name: 7", [], "name is 7; text is expected"),
    ("gate: {override: 1}", [], "gate.override is 1; true or false is expected"),
    ("critic: {contexts: 4}", [], "critic.contexts is 4; a list is expected, e.g. [4, 8]"),
    ("critic: {contexts: [4, x]}", [], "critic.contexts is 'x'; a whole number is expected"),
    ("model: {dtype: float16}", [], "model.dtype is 'float16'; choose one of float32, bfloat16"),
    ("", ["align.steps"], "override 'align.steps' is not of the form key=value, e.g. align.steps=100"),
    ("", ["=3"], "override '=3' is not of the form key=value"),
    ("", ["stages=[gate"], "override 'stages=[gate': the value is not valid YAML"),
    ("seed: 3", ["seed.x=1"], "override 'seed.x=1': seed is a value, not a section"),
    ("", ["align=3"], "align is a section; write its keys below it"),
    ("", ["align.stepz=3"], "unknown key align.stepz; did you mean align.steps?"),
]


@pytest.mark.parametrize("text, overrides, message", ERRORS)
def test_mistake_is_told_in_one_line(tmp_path, text, overrides, message):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        read(path, overrides)
    told = str(caught.value)
    assert message in told and "\n" not in told
    assert overrides or str(path) in told


def test_key_of_another_section_is_not_taken_for_a_misspelt_section(tmp_path):
    with pytest.raises(RecipeError, match=r"align\.lr or rl\.lr"):
        read(write(tmp_path, "lr: 1e-4"))


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "", "sandbox.yaml")
    with pytest.raises(RecipeError, match=r"sandbx\.yaml does not exist; did you mean .*/sandbox\.yaml\?"):
        read(tmp_path / "sandbx.yaml")
    with pytest.raises(RecipeError, match="does not exist; give the path of a YAML file"):
        read(tmp_path / "no" / "such.yaml")
    with pytest.raises(RecipeError, match="does not exist"):
        read(tmp_path)


def test_binary_file_is_not_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecipeError, match="is not valid YAML"):
        read(path)
