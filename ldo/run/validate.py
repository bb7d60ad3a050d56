"""Everything that can be known of a recipe before a model loads: its rules, its model folders and its data.

``validate`` takes a second at most, unless videos of one's own are probed for the first time. Each rule raises a
``RecipeError`` of one line: what, where, and the fix.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ldo.core.config import Recipe
from ldo.core.errors import RecipeError
from ldo.data import hub
from ldo.data.captions import PromptLine, read_prompts
from ldo.data.folder import Clip, read_folder
from ldo.models.generator.folder import Geometry, geometry_of, read_geometry
from ldo.models.generator.published import model_configs
from ldo.run.rules import check_rules, check_window_lengths, require
from ldo.sandbox.shipped import GENERATOR, WORLD_MODEL

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ValidatedRecipe:
    """A sound recipe.

    ``clips`` is None where they are yet to be made; ``geometry`` where a Hub model is yet to come.
    """

    recipe: Recipe
    model: str
    world_model: str
    geometry: Geometry | None
    clips: list[Clip] | None
    prompts: list[PromptLine] | None


def validate(recipe: Recipe) -> ValidatedRecipe:
    """Validate a recipe's values, its model folders and its data. RecipeError on the first thing wrong."""
    check_rules(recipe)
    model, geometry = _generator(recipe)
    # after the sizes, whose mistakes would otherwise be reported as a window that does not fit
    check_window_lengths(recipe)
    world_model = _world_model(recipe)
    _attention(recipe, model)
    clips = _clips(recipe)
    prompts = None if recipe.data.prompts == "sandbox" else read_prompts(Path(recipe.data.prompts))
    if recipe.evaluate.prompts != "sandbox":
        read_prompts(Path(recipe.evaluate.prompts), "evaluate.prompts")
    return ValidatedRecipe(recipe, model, world_model, geometry, clips, prompts)


def world_model_folder(path: str, where: str = "world_model.path") -> tuple[str, dict | None]:
    """What ``WorldModel.load`` takes for a recipe's path, and the model's config.json.

    The latter is None for a Hub model whose configuration is neither cached nor shipped.
    """
    folder = _folder(where, path, WORLD_MODEL)
    if folder is None:
        return path, (model_configs(path) or {}).get("config")
    try:
        # The configuration only: a world model takes seconds to load, and this must take a tenth.
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise RecipeError(f"{where}: {folder} is not a V-JEPA 2 folder: it has no readable config.json") from None
    kind = config.get("model_type")
    require(kind == "vjepa2", f"{where}: {folder} holds a {kind} model; a vjepa2 model is needed")
    return str(folder), config


def _folder(where: str, path: str, shipped: Path) -> Path | None:
    """The folder that a model path names; None for a Hub name."""
    if path == "sandbox":
        return shipped
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    require(
        bool(_HUB_NAME.fullmatch(path)),
        f"{where}: folder {path} does not exist; give a checkpoint folder, a Hub name (owner/name), or sandbox",
    )
    return None


def _sizes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Every size (frames, height, width) that the recipe asks for, by where it says so."""
    data = recipe.data
    sizes = {"data": (data.frames, data.height, data.width)}
    return sizes | {f"data.buckets {list(size)}": size for size in data.buckets}


def _generator(recipe: Recipe) -> tuple[str, Geometry | None]:
    path = recipe.model.path
    folder = _folder("model.path", path, GENERATOR)
    try:
        if folder is not None:
            family, geometry = read_geometry(folder)
        else:
            configs = model_configs(path)
            if configs is None:
                return path, None
            family, geometry = geometry_of(path, configs)
    except ValueError as error:
        raise RecipeError(f"model.path: {error}") from None
    model = str(folder or path)
    require(
        family == recipe.model.family,
        f"model.family is {recipe.model.family!r}, but {model} holds a {family} model; set model.family={family}",
    )
    for where, size in _sizes(recipe).items():
        problem = geometry.problem(*size)
        require(problem is None, f"{where}: {problem}")
    return model, geometry


def _world_model(recipe: Recipe) -> str:
    folder, config = world_model_folder(recipe.world_model.path)
    if config is None:
        return folder
    tubelet = config.get("tubelet_size", 2)
    teacher, critic = recipe.teacher, recipe.critic
    lengths = {"teacher.window": teacher.window, "teacher.context": teacher.context, "teacher.stride": teacher.stride}
    lengths["critic.window"] = critic.window
    lengths |= {f"critic.contexts ({context})": context for context in critic.contexts}
    for key, value in lengths.items():
        require(
            value % tubelet == 0,
            f"{key} is {value}; it must be a multiple of the world model's tubelets of {tubelet} frames",
        )
    for where, (frames, *_) in _sizes(recipe).items():
        key = "data.frames" if where == "data" else where
        require(
            (frames - 1) % tubelet == 0,
            f"{key}: {frames} frames; without its first a clip must be a multiple of {tubelet}",
        )
    return folder


def _attention(recipe: Recipe, model: str) -> None:
    """Attention backends that are named explicitly exist here and take the models' precision and masks."""
    if {recipe.model.attention, recipe.world_model.attention} <= {"auto", "native"}:
        return
    # only now: PyTorch takes longer to import than everything else here
    import torch

    from ldo.models.attention_backends import check_attention

    uses_cuda = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if uses_cuda else "cpu")
    transformer = (model_configs(model) or {}).get("transformer", {}).get("_class_name", "")
    dtypes = {part: getattr(torch, part.dtype) for part in (recipe.model, recipe.world_model)}
    check_attention("model.attention", recipe.model.attention, dtypes[recipe.model], device, transformer)
    check_attention("world_model.attention", recipe.world_model.attention, dtypes[recipe.world_model], device)


def _clips(recipe: Recipe) -> list[Clip] | None:
    """The user's own clips, every one of them probed; None where there are none or no stage needs them."""
    data, rl_config = recipe.data, recipe.rl
    trained_on = bool({"sft", "align"} & set(recipe.stages))
    trained_on |= "reinforce" in recipe.stages and bool(rl_config.align_weight or rl_config.flow_weight)
    if not trained_on or data.source != "videos" or data.videos == "sandbox":
        return None
    if hub.is_dataset(data.videos):
        # A dataset is written out once as a folder of clips: from there on there is one way for clips to come in.
        folder = hub.clips_folder(data.videos, data.caption, recipe.cache)
    else:
        folder = Path(data.videos)
    return read_folder(folder, data, recipe.cache, recipe.run / "clips-report.jsonl")
