"""The sandbox on disk: clips as lossless mp4 with metadata.jsonl, and prompts as JSON lines; and the shipped models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from ldo.checkpoint import write_text
from ldo.data import write_video
from ldo.rng import numpy_rng
from ldo.sandbox import corrupt, scenes, simulate
from ldo.sandbox.observe import Prompt

MODELS = Path(__file__).with_name("models")
GENERATOR, WORLD_MODEL = MODELS / "wan", MODELS / "vjepa2"


def _line(scene: simulate.Scene, path_length: float) -> dict:
    return {
        "text": scene.caption,
        "kind": scene.kind,
        "colours": list(scene.colours),
        "restitution": scene.restitution,
        "path_length": round(path_length, 6),
    }


def write_clips(folder: Path, count: int, seed: int, split: str = "train", size: int = 32, fps: float = simulate.FPS) -> None:
    """Write ``count`` clips, of the mix that the base generator learnt from; does nothing where the folder is complete."""
    if folder.is_dir():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    lines = []
    for i in range(count):
        clip = corrupt.mixed(numpy_rng(seed, f"clips {split}", i), split)
        name = f"{i:05d}.mp4"
        write_video(part / name, to_images(simulate.render(clip, size)), fps)
        lines.append({"file_name": name, **_line(clip.scene, clip.path_length), "violation": clip.violation, "event": clip.event})
    (part / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.rename(folder)


def write_prompts(path: Path, count: int, seed: int, split: str = "train", rest: bool = False) -> None:
    """Write ``count`` prompts of scenes that move, or of scenes at rest. Each line tells the motion of its own clip."""
    if path.is_file():
        return
    lines = []
    for i in range(count):
        rng = numpy_rng(seed, f"prompts {split} {rest}", i)
        scene = scenes.sample_scene(rng, split, kind="stack" if rest else None)
        while not rest and scene.kind == "stack":
            scene = scenes.sample_scene(rng, split)
        lines.append(_line(scene, simulate.track(scene).path_length))
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def prompt_of(text: str, extra: dict) -> Prompt | None:
    """What a line of metadata promises; None where it is not a sandbox line."""
    if "kind" not in extra or "colours" not in extra:
        return None
    return Prompt(text, extra["kind"], tuple(extra["colours"]), extra.get("path_length", float("nan")), extra.get("restitution", 1.0))


def to_images(frames_TCHW: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] from floats [T, 3, H, W] in [0, 1]."""
    return np.round(np.asarray(frames_TCHW).transpose(0, 2, 3, 1) * 255).clip(0, 255).astype(np.uint8)
