"""Score any videos with the critic alone: ``python -m ldo.score VIDEOS/ --world-model DIR``.

Every video is decoded as a stream and judged window by window, so its length does not matter; its reward is the one that
``ldo.critic.score`` would give to the whole clip. Beside it comes a curve: how surprising each tubelet was, given the
frames just before it (and, turned around, given those just after).

    scores.csv    a line a video, with the reason beside those that could not be scored
    curves.json   the curves
    index.html    the videos with their curves, to be opened in a browser
    results.jsonl what is done so far: the same command, started again, goes on from there
"""

from __future__ import annotations

import argparse
import csv
import glob
import io
import json
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldo import critic
from ldo.check import world_model_folder
from ldo.checkpoint import write_text
from ldo.config import Critic, Recipe, RecipeError, flat, read, to_dict
from ldo.metrics import read as read_lines
from ldo.progress import Bar
from ldo.report import surprise
from ldo.report.charts import strip
from ldo.sandbox import dataset as sandbox
from ldo.video import SUFFIXES, probe, stream
from ldo.world_model import WorldModel, window_starts

PRETRAINED_FPS = 4.0  # what V-JEPA 2 saw in pretraining
COLUMNS = (
    *("file", "seconds", "source_fps", "fps", "frames", "width", "height", "windows"),
    *("reward", "skill", "plain", "surprise", "worst_second", "worst_surprise", "motion", "problem"),
)
THUMBNAILS, THUMBNAIL_HEIGHT = 8, 72


@dataclass(frozen=True)
class Settings:
    """All that figures depend on. ``fps`` 0 takes each file's own rate."""

    world_model: str
    critic: Critic
    fps: float
    dtype: str


# ---------------------------------------------------------------------------------------------- one video


def judge(world: WorldModel, path: Path, config: Critic, fps: float = 0.0, batch: int = 4) -> dict:
    """A video's record: the columns of scores.csv, "curves" (a value a tubelet, None where there is none) and "strip".

    ``fps`` 0 takes the file's own rate. At most ``batch`` windows are in memory at once. ValueError says why a video
    cannot be scored. ``config.fps`` is not looked at.
    """
    info = probe(path)
    count, rate, window = info.count(fps), fps or info.fps, config.window
    if count <= window:
        raise ValueError(f"it gives {count} frames at {rate:g} fps and {window + 1} are needed: the first, and a window of {window}")
    length = count - 1  # the first frame is dropped, as the critic does
    starts = window_starts(length, window, config.stride)
    ways = {"forward": starts}
    if config.direction == "both":
        ways["backward"] = [length - window - s for s in starts]
    tracks = {way: _Track(world, config, length, s, way == "backward") for way, s in ways.items()}
    wanted = {s for own in ways.values() for s in own}
    shown = [int((k + 0.5) / THUMBNAILS * count) for k in range(THUMBNAILS)]
    held, waiting, thumbnails, moved, seen = deque(maxlen=window), [], [], 0.0, 0
    before = None
    for i, image in enumerate(stream(path, fps)):
        thumbnails += [_thumbnail(image)] * shown.count(i)
        frame = world.resize(torch.from_numpy(image).to(world.mean.device).permute(2, 0, 1)[None, None].float() / 255)[0, 0]
        moved += 0.0 if before is None else float((frame - before).abs().mean())
        before, seen = frame, i + 1
        if i:
            held.append(frame)
        if i - window in wanted and len(held) == window:
            waiting.append((i - window, torch.stack(tuple(held))))
        if len(waiting) == batch or (i == count - 1 and waiting):
            for track in tracks.values():
                track.look(waiting)
            waiting = []
    if seen != count:
        raise ValueError(f"it gives {seen} frames, not the {count} that its timestamps promise")
    score = critic.combine([track.rewards() for track in tracks.values()], config)
    forward, persistence = tracks["forward"].curves()
    curves = {"forward": forward, "persistence": persistence, "skill": ((persistence - forward) / (persistence + config.kappa)).clip(-1, 1)}
    known = forward
    if "backward" in tracks:
        curves["backward"] = tracks["backward"].curves()[0]
        known = np.where(np.isnan(forward), curves["backward"], forward)
    middles = (1 + world.tubelet * (np.arange(len(forward)) + 0.5)) / rate  # seconds
    worst = int(np.nanargmax(known))
    return {
        "seconds": count / rate,
        "source_fps": info.fps,
        "fps": rate,
        "frames": count,
        "width": info.width,
        "height": info.height,
        "windows": len(starts),
        "reward": score.reward.item(),
        "skill": score.skill.item(),
        "plain": score.plain.item(),
        "surprise": float(np.nanmean(forward)),
        "worst_second": float(middles[worst]),
        "worst_surprise": float(known[worst]),
        "motion": moved / length,
        "curves": {"seconds": _numbers(middles), **{k: _numbers(v) for k, v in curves.items()}},
        "thumbnails": THUMBNAILS,
        "strip": strip(np.stack(thumbnails), lossy=True),
    }


class _Track:
    """Rewards and curves of one direction of time, gathered window by window. Starts count from the film's second frame, forwards."""

    def __init__(self, world: WorldModel, config: Critic, length: int, starts: list[int], backward: bool):
        self.world, self.config, self.starts, self.backward = world, config, starts, backward
        self.found: dict[int, tuple] = {}
        self.sums, self.counts = np.zeros((2, length)), np.zeros(length)

    def look(self, windows: list[tuple[int, torch.Tensor]]) -> None:
        own = [(s, w) for s, w in windows if s in self.starts]
        if not own:
            return
        x = torch.stack([w for _, w in own])
        seen = critic.look(self.world, x.flip(1) if self.backward else x, self.config, curves=True)
        for k, (start, _) in enumerate(own):
            self.found[start] = (seen.skill[:, k].cpu(), seen.plain[:, k].cpu())
            values = torch.stack([seen.surprise[k], seen.persistence[k]]).cpu().numpy().repeat(self.world.tubelet, axis=1)
            values = values[:, ::-1] if self.backward else values
            here = slice(start, start + values.shape[1])
            self.sums[:, here] += np.nan_to_num(values)
            self.counts[here] += ~np.isnan(values[0])

    def rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Skill and plain rewards [K W, 1]."""
        return tuple(torch.stack([self.found[s][i] for s in self.starts], 1).reshape(-1, 1) for i in range(2))

    def curves(self) -> np.ndarray:
        """Surprise and persistence [2, tubelets], each the mean over the windows that have it; NaN where none has."""
        bins = np.arange(0, len(self.counts), self.world.tubelet)
        counts = np.add.reduceat(self.counts, bins)
        return np.where(counts > 0, np.add.reduceat(self.sums, bins, axis=1) / counts.clip(1), np.nan)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else round(float(v), 6) for v in values]


def _thumbnail(image: np.ndarray) -> np.ndarray:
    h, w = image.shape[:2]
    how = Image.Resampling.NEAREST if h < THUMBNAIL_HEIGHT else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((max(round(w * THUMBNAIL_HEIGHT / h), 1), THUMBNAIL_HEIGHT), how))


# ---------------------------------------------------------------------------------------------- many videos


def find(places: Sequence[str]) -> list[Path]:
    """The videos that folders (searched through), files and patterns name, sorted. RecipeError where one names none."""
    found: set[Path] = set()
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            here = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
        else:
            here = [path] if path.is_file() else [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not here:
            what = f"folder {place} holds no videos ({', '.join(SUFFIXES)})" if path.is_dir() else f"{place} does not exist"
            raise RecipeError(f"{what}; give a folder of videos, files, or a pattern in quotes")
        found.update(here)
    return sorted(found)


def check_windows(config: Critic, tubelet: int, frames: int) -> None:
    """RecipeError where the critic's windows do not suit a world model of ``tubelet`` frames a token, trained on ``frames``."""
    if not 0 < config.window <= frames or config.window % tubelet:
        raise RecipeError(f"--window is {config.window}; this world model takes a multiple of {tubelet} of at most {frames} frames")
    bad = [c for c in config.contexts if not 0 < c < config.window or c % tubelet]
    if bad or not config.contexts:
        raise RecipeError(f"--contexts is {list(config.contexts)}; give multiples of {tubelet} below the window of {config.window}, e.g. 4,8")
    if config.stride < 1:
        raise RecipeError(f"--stride is {config.stride}; it must be above 0")


def claim(out: Path, settings: Settings) -> list[dict]:
    """Claim the output folder; returns what an earlier start with the same settings has done. RecipeError on other settings."""
    path, now = out / "settings.json", json.loads(json.dumps(to_dict(settings)))
    if path.exists():
        then = dict(flat(json.loads(path.read_text())))
        changed = [k for k, v in flat(now) if then.get(k) != v]
        if changed:
            raise RecipeError(f"{out} was made with {changed[0]}={then.get(changed[0], 'unset')}; give another --out, or remove that folder")
    else:
        write_text(path, json.dumps(now, indent=1))
    rows = read_lines(out / "results.jsonl")
    write_text(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))  # without a line cut short by a kill
    return rows


def score(world: WorldModel, videos: Sequence[Path], out: Path, settings: Settings, batch: int = 4, embed: bool = False) -> list[dict]:
    """Score videos into the folder ``out`` and return their records, in the order of ``videos``; those that failed hold "problem"."""
    done = {row["key"]: row for row in claim(out, settings)}
    rows = []
    try:
        with Bar("score", len(videos)) as bar, open(out / "results.jsonl", "a") as file:
            for path in videos:
                stat = path.stat()
                key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
                row = done.get(key)
                if row is None:
                    try:
                        row = judge(world, path, settings.critic, settings.fps, batch)
                    except ValueError as error:
                        row = {"problem": str(error)}
                    row = {"key": key, **row}
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                rows.append(row | {"file": str(path)})
                bar.advance(path.name)
    finally:  # also of what is done when someone stops it
        write_outputs(out, rows, settings, embed)
    return rows


def write_outputs(out: Path, rows: list[dict], settings: Settings, embed: bool = False) -> None:
    """scores.csv, curves.json and index.html of the records."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_text(out / "scores.csv", table.getvalue())
    curves = {row["file"]: row["curves"] for row in rows if "curves" in row}
    write_text(out / "curves.json", json.dumps({"settings": to_dict(settings), "videos": curves}))
    write_text(out / "index.html", surprise.page(rows, to_dict(settings), out, embed))


# ---------------------------------------------------------------------------------------------- the command


def _settings(args: argparse.Namespace) -> tuple[Settings, dict | None]:
    """Settings from the recipe and the options that replace its values, and the world model's config where it is at hand."""
    recipe = read(args.recipe) if args.recipe else Recipe()
    changes = {k: v for k, v in (("window", args.window), ("stride", args.stride), ("contexts", args.contexts)) if v is not None}
    config = replace(recipe.critic, **changes)
    folder, model = world_model_folder(args.world_model or recipe.world_model.path, "--world-model")
    fps = args.fps if args.fps is not None else config.fps or (0.0 if _shipped(folder) else PRETRAINED_FPS)
    if fps < 0:
        raise RecipeError(f"--fps is {fps:g}; give frames a second, or 0 for each video's own rate")
    if args.batch < 1:
        raise RecipeError(f"--batch is {args.batch}; it must be above 0")
    return Settings(folder, config, fps, args.dtype or recipe.world_model.dtype), model


def _shipped(folder: str) -> bool:
    return Path(folder).is_dir() and Path(folder).resolve() == sandbox.WORLD_MODEL.resolve()


def _contexts(text: str) -> tuple[int, ...]:
    return tuple(int(c) for c in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ldo.score", description="Score videos with the critic: CSV, curves and a page.")
    parser.add_argument("videos", nargs="+", help="folders (searched through), files, or patterns in quotes")
    parser.add_argument("--world-model", metavar="DIR", help="V-JEPA 2 folder or Hub name (default: the recipe's, else the shipped sandbox model)")
    parser.add_argument("--recipe", metavar="YAML", help="take the critic and the world model from a recipe")
    parser.add_argument("--out", default="scores", help="output folder (default: scores)")
    parser.add_argument("--fps", type=float, help="rate to look at (default: critic.fps, else 4; the sandbox model: each video's own; 0: own)")
    parser.add_argument("--window", type=int, help="frames seen at once (default: the recipe's, 16)")
    parser.add_argument("--stride", type=int, help="frames between windows (default: the recipe's, 8)")
    parser.add_argument("--contexts", type=_contexts, metavar="4,8", help="frames it forecasts from (default: the recipe's)")
    parser.add_argument("--batch", type=int, default=4, help="windows at once (default: 4)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the world model (default: the recipe's, float32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--embed", action="store_true", help="put small videos into the page, so that it can be moved")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    out = Path(args.out)
    try:
        videos = find(args.videos)
        settings, model = _settings(args)
        if model is not None:
            check_windows(settings.critic, model.get("tubelet_size", 2), model.get("frames_per_clip", 64))
        claim(out, settings)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("--device is cuda, but PyTorch finds no GPU here; choose auto or cpu")
        device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
        if _shipped(settings.world_model):
            print("world model: the sandbox's, which knows coloured balls alone; on films of anything else its figures mean nothing", file=sys.stderr)
        import transformers

        transformers.utils.logging.disable_progress_bar()
        world = WorldModel.load(settings.world_model, getattr(torch, settings.dtype)).to(device)
        check_windows(settings.critic, world.tubelet, world.frames)
        rows = score(world, videos, out, settings, args.batch, args.embed)
    except RecipeError as error:
        print(f"ldo: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(f"ldo: the GPU's memory does not hold --batch {args.batch} windows; lower it, or give --dtype bfloat16", file=sys.stderr)
        return 2
    bad = [row for row in rows if "problem" in row]
    for row in bad:
        print(f"left out: {row['file']}: {row['problem']}", file=sys.stderr)
    if len(bad) == len(rows):
        print(f"ldo: none of {len(rows)} videos could be scored, first {bad[0]['file']}: {bad[0]['problem']}", file=sys.stderr)
        return 2
    print(f"{len(rows) - len(bad)} of {len(rows)} videos scored: {out / 'scores.csv'}, {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
