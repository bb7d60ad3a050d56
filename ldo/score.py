"""Score any videos with the critic: ``python -m ldo.score VIDEOS/ --world-model DIR``.

Every video is decoded as a stream and scored window by window, so its length does not matter; its reward is the one
that ``ldo.method.critic.score_clips`` would give to the whole clip. With it comes a curve: how surprising each tubelet
was, given the frames just before it (and, turned around, given those just after).

    scores.csv    a line for each video, with the reason next to those that could not be scored
    curves.json   the curves
    index.html    the videos with their curves, to be opened in a browser
    results.jsonl what is done so far: the same command, started again, continues from there
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldo.core.config import Recipe
from ldo.core.errors import RecipeError
from ldo.core.recipe_file import read_recipe
from ldo.run.validate import world_model_folder
from ldo.sandbox.shipped import WORLD_MODEL
from ldo.stages.score_folder import (
    PRETRAINED_FPS,
    ScoreSettings,
    check_windows,
    claim_scores,
    find_videos,
    score_videos,
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    out = Path(arguments.out)
    try:
        videos = find_videos(arguments.videos)
        settings, config = _settings(arguments)
        if config is not None:
            check_windows(settings.critic, config.get("tubelet_size", 2), config.get("frames_per_clip", 64))
        # Claimed before the model loads: scores of two settings must never meet in one table.
        claim_scores(out, settings)
        rows = _score(arguments, videos, settings)
    except RecipeError as error:
        print(f"ldo: {error}", file=sys.stderr)
        return 2
    failed = [row for row in rows if "problem" in row]
    for row in failed:
        print(f"left out: {row['file']}: {row['problem']}", file=sys.stderr)
    if len(failed) == len(rows):
        first = f"{failed[0]['file']}: {failed[0]['problem']}"
        print(f"ldo: none of {len(rows)} videos could be scored, first {first}", file=sys.stderr)
        return 2
    done = len(rows) - len(failed)
    print(f"{done} of {len(rows)} videos scored: {out / 'scores.csv'}, {out / 'index.html'}")
    return 0


def _score(arguments: argparse.Namespace, videos: list[Path], settings: ScoreSettings) -> list[dict]:
    """Load the world model and score the videos. RecipeError where the GPU is missing or too small."""
    # Here and not above: a mistake in the arguments is reported before PyTorch loads.
    import torch
    import transformers

    from ldo.models.world_model import WorldModel

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device is cuda, but PyTorch finds no GPU here; choose auto or cpu")
    device = "cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu"
    if _shipped(settings.world_model):
        print(
            "world model: the sandbox's, which knows only coloured balls; on any other video its scores mean nothing",
            file=sys.stderr,
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        world_model = WorldModel.load(settings.world_model, getattr(torch, settings.dtype)).to(device)
        # Again with the loaded model: a Hub model's configuration may not have been at hand before.
        check_windows(settings.critic, world_model.tubelet, world_model.frames)
        return score_videos(world_model, videos, Path(arguments.out), settings, arguments.batch, arguments.embed)
    except torch.OutOfMemoryError:
        raise RecipeError(
            f"the GPU's memory does not hold --batch {arguments.batch} windows; lower it, or give --dtype bfloat16"
        ) from None


def _settings(arguments: argparse.Namespace) -> tuple[ScoreSettings, dict | None]:
    """Settings from the recipe and the options that replace its values, and the world model's config if it is here."""
    recipe = read_recipe(arguments.recipe) if arguments.recipe else Recipe()
    for option, value in (("window", arguments.window), ("stride", arguments.stride), ("batch", arguments.batch)):
        if value is not None and value < 1:
            raise RecipeError(f"--{option} is {value}; it must be above 0")
    given = {"window": arguments.window, "stride": arguments.stride, "contexts": arguments.contexts}
    critic = recipe.critic.changed(**{key: value for key, value in given.items() if value is not None})
    folder, config = world_model_folder(arguments.world_model or recipe.world_model.path, "--world-model")
    fps = arguments.fps
    if fps is None:
        fps = critic.fps or (0.0 if _shipped(folder) else PRETRAINED_FPS)
    if fps < 0:
        raise RecipeError(f"--fps is {fps:g}; give frames per second, or 0 for each video's own rate")
    dtype = arguments.dtype or recipe.world_model.dtype
    return ScoreSettings(world_model=folder, critic=critic, fps=fps, dtype=dtype), config


def _shipped(folder: str) -> bool:
    return Path(folder).is_dir() and Path(folder).resolve() == WORLD_MODEL.resolve()


def _contexts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ldo.score", description="Score videos with the critic: CSV, curves and a page."
    )
    add = parser.add_argument
    add("videos", nargs="+", help="folders (searched through), files, or patterns in quotes")
    default = "default: the recipe's, else the shipped sandbox model"
    add("--world-model", metavar="DIR", help=f"V-JEPA 2 folder or Hub name ({default})")
    add("--recipe", metavar="YAML", help="take the critic and the world model from a recipe")
    add("--out", default="scores", help="output folder (default: scores)")
    rate = "default: critic.fps, else 4; the sandbox model: each video's own; 0: own"
    add("--fps", type=float, help=f"rate to score at ({rate})")
    add("--window", type=int, help="frames seen at once (default: the recipe's, 16)")
    add("--stride", type=int, help="frames between windows (default: the recipe's, 8)")
    add("--contexts", type=_contexts, metavar="4,8", help="frames it forecasts from (default: the recipe's)")
    add("--batch", type=int, default=4, help="windows at once (default: 4)")
    precisions = ("float32", "bfloat16")
    add("--dtype", choices=precisions, help="of the world model (default: the recipe's, float32)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--embed", action="store_true", help="put small videos into the page, so that it can be moved")
    return parser


if __name__ == "__main__":
    sys.exit(main())
