"""A picture of a run: frames of a prompt's videos side by side, the base model's above LDO's.

``python -m ldo.report.picture RUN --out docs/picture.png [--prompt N ...]``. RUN is the folder of a run that has been
evaluated; N numbers its evaluation prompts. Shown are videos of the first seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldo.data.video import read_video

FRAMES_SHOWN = 9  # of each video, evenly spaced
FRAME_HEIGHT, GAP, CAPTION_HEIGHT, LABEL_WIDTH = 96, 3, 26, 44
TEXT_SIZE = 15
INK, PAPER = "#1d2129", "#ffffff"


@dataclass(frozen=True)
class PromptStrips:
    """The videos of one prompt, uint8 RGB [T, H, W, 3] each."""

    caption: str
    base: np.ndarray
    ldo: np.ndarray


def read_strips(run: Path, prompts: Sequence[int]) -> list[PromptStrips]:
    """The videos of some evaluation prompts, first seed. ValueError says what the run lacks."""
    records = run / "eval" / "base.json"
    if not records.is_file():
        raise ValueError(f"{run} has no evaluation: {records} does not exist; let the run's evaluate stage finish")
    # Scenes at rest are measured too, but their videos are not kept.
    captions = {record["prompt"]: record["text"] for record in json.loads(records.read_text())["moving"]}
    strips = []
    for prompt in prompts:
        if prompt not in captions:
            raise ValueError(f"{run} has no evaluation prompt {prompt}; it has 0 to {max(captions)}")
        videos = {}
        for arm in ("base", "ldo"):
            path = run / "eval" / arm / f"{prompt:04d}-0.mp4"
            if not path.is_file():
                raise ValueError(f"{run} has no video {path}; its reinforce and evaluate stages must have finished")
            videos[arm], _ = read_video(path)
        strips.append(PromptStrips(captions[prompt], **videos))
    return strips


def lay_out(strips: Sequence[PromptStrips]) -> Image.Image:
    """One picture of all prompts, one below the other: caption, frames of the base model, frames of LDO."""
    prompt_height = CAPTION_HEIGHT + 2 * (FRAME_HEIGHT + GAP)
    rows = [_frames(video) for strip in strips for video in (strip.base, strip.ldo)]
    width = LABEL_WIDTH + max(sum(frame.width + GAP for frame in row) for row in rows) - GAP
    picture = Image.new("RGB", (width, len(strips) * prompt_height - GAP), PAPER)
    font = ImageFont.load_default(TEXT_SIZE)
    drawing = ImageDraw.Draw(picture)
    for number, strip in enumerate(strips):
        caption_top = number * prompt_height
        drawing.text((LABEL_WIDTH, caption_top + 4), f'"{strip.caption}"', INK, font)
        for position, label in enumerate(("base", "LDO")):
            row_top = caption_top + CAPTION_HEIGHT + position * (FRAME_HEIGHT + GAP)
            drawing.text((0, row_top + FRAME_HEIGHT // 2), label, INK, font, anchor="lm")
            frame_left = LABEL_WIDTH
            for frame in rows[2 * number + position]:
                picture.paste(frame, (frame_left, row_top))
                frame_left += frame.width + GAP
    return picture


def _frames(video_THWC: np.ndarray) -> list[Image.Image]:
    """Evenly spaced frames of a video, the first and the last among them, at the picture's height."""
    count, height, width, _ = video_THWC.shape
    chosen = np.linspace(0, count - 1, min(FRAMES_SHOWN, count)).round().astype(int)
    # Pixels of a tiny video must stay squares: smoothed, a ball of five pixels would look better than it was sampled.
    # A large video is averaged down, or thin things would flicker from frame to frame.
    resampling = Image.Resampling.NEAREST if height < FRAME_HEIGHT else Image.Resampling.LANCZOS
    frame_size = (round(width * FRAME_HEIGHT / height), FRAME_HEIGHT)
    return [Image.fromarray(video_THWC[index]).resize(frame_size, resampling) for index in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ldo.report.picture", description="Frames of a run's videos, the base model's above LDO's."
    )
    parser.add_argument("run", help="folder of a run that has been evaluated, e.g. runs/sandbox")
    parser.add_argument("--out", type=Path, default=Path("picture.png"), help="file to write (default picture.png)")
    parser.add_argument(
        "--prompt", type=int, nargs="+", default=[0], metavar="N", help="evaluation prompts to show (default 0)"
    )
    arguments = parser.parse_args(argv)
    try:
        strips = read_strips(Path(arguments.run), arguments.prompt)
    except ValueError as problem:
        print(f"ldo: {problem}", file=sys.stderr)
        return 2
    # The picture may go to a folder of documents that does not exist yet.
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lay_out(strips).save(arguments.out, optimize=True)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
