"""Frames of a video file as tensors, at a rate, scaled and cropped to a size."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldo.data.buckets import Size
from ldo.data.folder import Clip
from ldo.data.video import stream_frames


def load_frames(clip: Clip, frames: int, height: int, width: int, fps: float) -> Tensor:
    """The first ``frames`` frames [T, 3, H, W] in [0, 1], resampled to ``fps``, scaled and centre-cropped to size."""
    _, window = next(load_windows(clip.path, {0}, (frames, height, width), fps))
    return window


def load_windows(path: Path, wanted: Collection[int], size: Size, fps: float) -> Iterator[tuple[int, Tensor]]:
    """Some windows of a file, in order and in one pass: window w is frames w F .. (w + 1) F, F = ``size[0]``.

    Each is [F, 3, H, W] in [0, 1], scaled to cover ``size`` and centre-cropped. ValueError says why the file cannot be
    read.
    """
    frames, height, width = size
    last = max(wanted)
    collected: list[Tensor] = []
    count = 0
    for count, image in enumerate(stream_frames(path, fps), 1):
        window = (count - 1) // frames
        # frames of other windows are decoded, since a codec needs them, but not scaled
        if window in wanted:
            collected.append(_fit(torch.from_numpy(image), height, width))
            if len(collected) == frames:
                yield window, torch.stack(collected).permute(0, 3, 1, 2)
                collected = []
                if window == last:
                    return
    raise ValueError(f"it gives {count} frames at {fps:g} fps and {(last + 1) * frames} are needed")


def _fit(image: Tensor, height: int, width: int) -> Tensor:
    """A uint8 picture [h, w, 3] as [height, width, 3] in [0, 1]."""
    picture = image.float() / 255
    source_height, source_width = picture.shape[:2]
    if (source_height, source_width) == (height, width):
        return picture
    # cover, then crop: a picture that is padded or stretched would teach bars or wrong shapes
    scale = max(height / source_height, width / source_width)
    covering = (max(round(source_height * scale), height), max(round(source_width * scale), width))
    channels_first = picture.permute(2, 0, 1)[None]
    scaled = F.interpolate(channels_first, covering, mode="bilinear", antialias=True, align_corners=False)
    picture = scaled[0].permute(1, 2, 0)
    top_edge, left_edge = (covering[0] - height) // 2, (covering[1] - width) // 2
    return picture[top_edge : top_edge + height, left_edge : left_edge + width].clamp(0, 1)
