"""The sandbox on disk: clips as lossless mp4 with metadata.jsonl, and prompts as JSON lines."""

from __future__ import annotations

import shutil
from pathlib import Path

from ldo.core.files import write_json_lines
from ldo.core.rng import numpy_rng
from ldo.data.video import to_images, write_video
from ldo.sandbox import corrupt, scenes, simulate
from ldo.sandbox.observe import Prompt


def data_folder(out: str | Path) -> Path:
    """The folder below ``out`` for clips and prompts of this world."""
    return Path(out) / "sandbox-data" / f"world-{scenes.WORLD_VERSION}"


def _line(scene: simulate.Scene, path_length: float) -> dict:
    return {
        "text": scene.caption,
        "kind": scene.kind,
        "colours": list(scene.colours),
        "restitution": scene.restitution,
        "path_length": round(path_length, 6),
    }


def write_clips(
    folder: Path, count: int, seed: int, split: str = "train", size: int = 32, fps: float = simulate.FPS
) -> None:
    """Write ``count`` clips, of the mix that the base generator learnt from.

    Does nothing where the folder is complete.
    """
    if folder.is_dir():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    lines = []
    for index in range(count):
        clip = corrupt.mixed(numpy_rng(seed, f"clips {split}", index), split)
        name = f"{index:05d}.mp4"
        write_video(part / name, to_images(simulate.render(clip, size)), fps)
        lines.append(
            {"file_name": name, **_line(clip.scene, clip.path_length), "violation": clip.violation, "event": clip.event}
        )
    write_json_lines(part / "metadata.jsonl", lines)
    part.rename(folder)


def write_prompts(path: Path, count: int, seed: int, split: str = "train", rest: bool = False) -> None:
    """Write ``count`` prompts of scenes that move, or of scenes at rest; each line describes its own clip's motion."""
    if path.is_file():
        return
    lines = []
    for index in range(count):
        rng = numpy_rng(seed, f"prompts {split} {rest}", index)
        scene = scenes.sample_scene(rng, split, kind="stack" if rest else None)
        while not rest and scene.kind == "stack":
            scene = scenes.sample_scene(rng, split)
        lines.append(_line(scene, simulate.track(scene).path_length))
    write_json_lines(path, lines)


def prompt_of(text: str, extra: dict) -> Prompt | None:
    """What a line of metadata promises; None where it is not a sandbox line."""
    if "kind" not in extra or "colours" not in extra:
        return None
    return Prompt(
        text,
        extra["kind"],
        tuple(extra["colours"]),
        extra.get("path_length", float("nan")),
        extra.get("restitution", 1.0),
    )
