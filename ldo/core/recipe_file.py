"""Reading a recipe: YAML, ``a.b=c`` overrides, and one line for whatever is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from ldo.core.config import Recipe, Section
from ldo.core.errors import RecipeError

# what pydantic calls a value of the wrong type, and what was expected
_EXPECTED = {
    "int_type": "a whole number is expected",
    "float_type": "a number is expected",
    "string_type": "text is expected",
    "bool_type": "true or false is expected",
    "tuple_type": "a list is expected, e.g. [4, 8]",
}

_UNKNOWN = ("extra_forbidden", "invalid_key")  # what it calls an unknown key, and one that is no text


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply ``a.b=c`` overrides.

    RecipeError on anything misspelt, misplaced, of a wrong type or out of bounds.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(_no_such_recipe(path))
    try:
        # safe_load: a recipe is data, and must not be able to run code.
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path} must be a mapping of keys to values, not a {type(tree).__name__}")
    for text in overrides:
        _override(tree, text)
    return _next_to(build_section(Recipe, tree, str(path)), path.parent)


def build_section(section: type[Section], tree: dict, where: str) -> Any:
    """A section from a mapping. RecipeError, with ``where`` in front, names the first key that is wrong and the fix."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        # an unknown key explains more than the values that its misspelling left out
        problems = sorted(error.errors(), key=lambda problem: problem["type"] not in _UNKNOWN)
        raise RecipeError(f"{where}: {_in_words(section, problems[0])}") from None


def _no_such_recipe(path: Path) -> str:
    there = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, 1)
    fix = f"did you mean {path.parent / near[0]}?" if near else "give the path of a YAML file"
    return f"recipe {path} does not exist; {fix}"


def _override(tree: dict, text: str) -> None:
    """Put one ``a.b=c`` into the tree of keys."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {text!r} is not of the form key=value, e.g. align.steps=100")
    *parents, last = key.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"override {text!r}: {part} is a value, not a section")
    try:
        # Values of overrides are YAML too, so that lists and numbers look as they do in the file.
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"override {text!r}: the value is not valid YAML") from None


def _next_to(recipe: Recipe, folder: Path) -> Recipe:
    """Resolve files that lie next to the recipe and not in the current folder: recipes come with their prompts."""
    for section, key in (("data", "videos"), ("data", "prompts"), ("evaluate", "prompts")):
        part = getattr(recipe, section)
        value = getattr(part, key)
        if not Path(value).exists() and (folder / value).exists():
            recipe = recipe.changed(**{section: part.changed(**{key: str(folder / value)})})
    return recipe


# ---------------------------------------------------------------------------------------------- errors in words


def _in_words(section: type[Section], problem: dict) -> str:
    """One of pydantic's errors as what, where and the fix."""
    kind, value = problem["type"], problem["input"]
    # A key that is no text is unknown like any other: YAML 1.1 reads "on" and "no" as true and false.
    unknown = kind in _UNKNOWN
    path = [str(part) for part in problem["loc"] if unknown or isinstance(part, str)]
    key = ".".join(path)
    if unknown:
        return f"unknown key {key}{_nearest(section, path)}"
    if kind in ("model_type", "model_attributes_type"):
        first = next(iter(_section_of(section, path).model_fields))
        return f"{key} is a section; write its keys below it, e.g. {key}.{first}"
    if kind == "literal_error":
        choices = ", ".join(str(choice) for choice in _choices(_annotation(section, path)))
        return f"{key} is {value!r}; choose one of {choices}"
    if kind in _EXPECTED:
        return f"{key} is {value!r}; {_EXPECTED[kind]}"
    return f"{key} is {value}; it must be {_bounds(section, path)}"


def _bounds(section: type[Section], path: list[str]) -> str:
    """The bounds of a key: "above 0", "at least 2", "in [0, 1)"."""
    limits = {}
    for constraint in _section_of(section, path[:-1]).model_fields[path[-1]].metadata:
        for name in ("gt", "ge", "lt", "le"):
            if hasattr(constraint, name):
                limits[name] = f"{getattr(constraint, name):g}"
    low = f"above {limits['gt']}" if "gt" in limits else f"at least {limits['ge']}"
    if "lt" in limits or "le" in limits:
        upper = f"{limits['lt']})" if "lt" in limits else f"{limits['le']}]"
        return f"in {'(' if 'gt' in limits else '['}{limits.get('gt', limits.get('ge'))}, {upper}"
    return low


def _section_of(section: type[Section], path: list[str]) -> type[Section]:
    for part in path:
        section = section.model_fields[part].annotation
    return section


def _annotation(section: type[Section], path: list[str]) -> Any:
    return _section_of(section, path[:-1]).model_fields[path[-1]].annotation


def _choices(annotation: Any) -> Iterator[Any]:
    """The values of a Literal, however deep in a type."""
    for argument in get_args(annotation):
        if get_args(argument):
            yield from _choices(argument)
        elif argument is not Ellipsis:
            yield argument


def _nearest(section: type[Section], path: list[str]) -> str:
    """Where an unknown key may belong: the same key elsewhere, or one spelt alike, here before anywhere else."""
    *parents, key = path
    prefix = "".join(f"{part}." for part in parents)
    here = list(_section_of(section, parents).model_fields)
    everywhere = list(_leaves(Recipe))
    homes = [full for full in everywhere if full.rsplit(".", 1)[-1] == key]
    if homes:
        return f"; it belongs elsewhere: {' or '.join(homes)}"
    near = difflib.get_close_matches(key, here, 1, 0.6)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    near = difflib.get_close_matches(prefix + key, everywhere, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(here)}"


def _leaves(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
