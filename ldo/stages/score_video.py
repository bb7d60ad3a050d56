"""One video of any length, decoded as a stream and scored window by window.

Its reward is the one that ``ldo.method.critic.score_clips`` would give to the whole clip.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldo.core.config import CriticConfig
from ldo.data.video import VideoInfo, probe_video, stream_frames
from ldo.method.critic import combine_scores, look_at_windows
from ldo.models.world_model import WorldModel, window_starts
from ldo.report.charts import strip

THUMBNAILS, THUMBNAIL_HEIGHT = 8, 72


def score_video(world_model: WorldModel, path: Path, config: CriticConfig, fps: float = 0.0, batch: int = 4) -> dict:
    """A video's record: the columns of scores.csv, "curves" (a value or None per tubelet) and "strip".

    ``fps`` 0 takes the file's own rate; ``config.fps`` is ignored. At most ``batch`` windows are in memory at once.
    ValueError says why a video cannot be scored.
    """
    info = probe_video(path)
    rate = fps or info.fps
    count = info.count(fps)
    if count <= config.window:
        raise ValueError(
            f"it gives {count} frames at {rate:g} fps and {config.window + 1} are needed: "
            f"the first, and a window of {config.window}"
        )
    reader = _Reader(world_model, config, count, batch)
    for image in stream_frames(path, fps):
        reader.add(image)
    if reader.seen != count:
        raise ValueError(f"it gives {reader.seen} frames, not the {count} that its timestamps promise")
    reader.score_waiting()
    return _record(reader, info, rate)


@dataclass(frozen=True)
class _Window:
    """Frames of a window [window, 3, H, W]. ``start`` counts from the video's second frame, forwards."""

    start: int
    frames: Tensor


class _Direction:
    """Rewards and curves of one direction of time, gathered window by window.

    ``starts`` are its windows, as ``_Window`` counts them; ``length`` is the video's frames after the first.
    """

    def __init__(self, world_model: WorldModel, config: CriticConfig, length: int, starts: list[int], backward: bool):
        self.world_model, self.config = world_model, config
        self.starts, self.backward = starts, backward
        self.skills: dict[int, Tensor] = {}  # by start, [contexts]
        self.plains: dict[int, Tensor] = {}
        self.sums = np.zeros((2, length))  # of surprise and persistence, for each frame
        self.counts = np.zeros(length)  # windows that have a value for the frame

    def look(self, windows: list[_Window]) -> None:
        """Score those of ``windows`` that belong to this direction."""
        own_windows = [window for window in windows if window.start in self.starts]
        if not own_windows:
            return
        frames = torch.stack([window.frames for window in own_windows])
        if self.backward:
            frames = frames.flip(1)
        scores = look_at_windows(self.world_model, frames, self.config, curves=True)
        for index, window in enumerate(own_windows):
            self.skills[window.start] = scores.skill[:, index].cpu()
            self.plains[window.start] = scores.plain[:, index].cpu()
            self._add_curves(window.start, torch.stack([scores.surprise[index], scores.persistence[index]]))

    def _add_curves(self, start: int, curves: Tensor) -> None:
        """Add a window's surprise and persistence [2, tubelets] to the sums."""
        # Frame by frame, because a window need not start where a tubelet of the whole video's curve does.
        values = curves.cpu().numpy().repeat(self.world_model.tubelet, axis=1)
        if self.backward:
            values = values[:, ::-1]
        covered = slice(start, start + values.shape[1])
        self.sums[:, covered] += np.nan_to_num(values)
        self.counts[covered] += ~np.isnan(values[0])

    def rewards(self) -> tuple[Tensor, Tensor]:
        """Skill and plain rewards [K W, 1]."""
        skill = torch.stack([self.skills[start] for start in self.starts], 1)
        plain = torch.stack([self.plains[start] for start in self.starts], 1)
        return skill.reshape(-1, 1), plain.reshape(-1, 1)

    def curves(self) -> np.ndarray:
        """Surprise and persistence [2, tubelets], each the mean over the windows that have it; NaN where none has."""
        first_frames = np.arange(0, len(self.counts), self.world_model.tubelet)
        sums = np.add.reduceat(self.sums, first_frames, axis=1)
        counts = np.add.reduceat(self.counts, first_frames)
        return np.where(counts > 0, sums / counts.clip(1), np.nan)


class _Reader:
    """Takes a video's ``count`` frames one by one and scores windows in batches as soon as they are complete."""

    def __init__(self, world_model: WorldModel, config: CriticConfig, count: int, batch: int):
        self.world_model, self.config, self.count, self.batch = world_model, config, count, batch
        # The critic drops the first frame.
        self.length = count - 1
        self.starts = window_starts(self.length, config.window, config.stride)
        self.directions = {"forward": _Direction(world_model, config, self.length, self.starts, backward=False)}
        if config.direction == "both":
            # The windows of the reversed video, at their places in the video as it is.
            mirrored = [self.length - config.window - start for start in self.starts]
            self.directions["backward"] = _Direction(world_model, config, self.length, mirrored, backward=True)
        self.wanted = {start for direction in self.directions.values() for start in direction.starts}
        self.shown = [int((index + 0.5) / THUMBNAILS * count) for index in range(THUMBNAILS)]
        self.seen = 0
        self.moved = 0.0  # sum over frames of the mean absolute change of a pixel
        self.thumbnails: list[np.ndarray] = []
        self.recent: deque[Tensor] = deque(maxlen=config.window)
        self.waiting: list[_Window] = []
        self._previous: Tensor | None = None

    def add(self, image_HWC: np.ndarray) -> None:
        """Take the next frame, uint8 RGB."""
        index = self.seen
        self.seen += 1
        # A short video shows the same frame more than once.
        self.thumbnails += [_thumbnail(image_HWC)] * self.shown.count(index)
        frame = self._resized(image_HWC)
        if self._previous is not None:
            self.moved += float((frame - self._previous).abs().mean())
        self._previous = frame
        if index == 0:
            return
        self.recent.append(frame)
        start = index - self.config.window
        if start in self.wanted:
            self.waiting.append(_Window(start, torch.stack(tuple(self.recent))))
        if len(self.waiting) == self.batch:
            self.score_waiting()

    def score_waiting(self) -> None:
        """Score the windows that have not filled a batch."""
        if not self.waiting:
            return
        for direction in self.directions.values():
            direction.look(self.waiting)
        self.waiting = []

    def _resized(self, image_HWC: np.ndarray) -> Tensor:
        """A frame [3, H, W] in [0, 1] as the world model sees it."""
        pixels = torch.from_numpy(image_HWC).to(self.world_model.mean.device)
        frames_BTCHW = pixels.permute(2, 0, 1)[None, None].float() / 255
        return self.world_model.resize(frames_BTCHW)[0, 0]

    def curves(self) -> dict[str, np.ndarray]:
        """Curves by name, each [tubelets], NaN where there is no value.

        skill = clip((c - s) / (c + kappa), -1, 1), with the surprise s forward in time and the persistence c.
        """
        s, c = self.directions["forward"].curves()
        curves = {"forward": s, "persistence": c, "skill": ((c - s) / (c + self.config.kappa)).clip(-1, 1)}
        if "backward" in self.directions:
            curves["backward"], _ = self.directions["backward"].curves()
        return curves


def _record(reader: _Reader, info: VideoInfo, rate: float) -> dict:
    """The record of a video that was read to its end."""
    score = combine_scores([direction.rewards() for direction in reader.directions.values()], reader.config)
    curves = reader.curves()
    forward = curves["forward"]
    known = forward
    if "backward" in curves:
        # Nothing comes before the first tubelets, so that they can only be predicted from the frames after them.
        known = np.where(np.isnan(forward), curves["backward"], forward)
    worst = int(np.nanargmax(known))
    # The first tubelet begins at the video's second frame.
    middles = (1 + reader.world_model.tubelet * (np.arange(len(forward)) + 0.5)) / rate
    return {
        "seconds": reader.count / rate,
        "source_fps": info.fps,
        "fps": rate,
        "frames": reader.count,
        "width": info.width,
        "height": info.height,
        "windows": len(reader.starts),
        "reward": score.reward.item(),
        "skill": score.skill.item(),
        "plain": score.plain.item(),
        "surprise": float(np.nanmean(forward)),
        "worst_second": float(middles[worst]),
        "worst_surprise": float(known[worst]),
        "motion": reader.moved / reader.length,
        "curves": {"seconds": _numbers(middles)} | {name: _numbers(curve) for name, curve in curves.items()},
        "thumbnails": THUMBNAILS,
        "strip": strip(np.stack(reader.thumbnails), lossy=True),
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    """Values for JSON, which has no NaN."""
    return [None if np.isnan(value) else round(float(value), 6) for value in values]


def _thumbnail(image_HWC: np.ndarray) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    # Small pictures are enlarged pixel by pixel, so that the sandbox's stay sharp.
    method = Image.Resampling.NEAREST if height < THUMBNAIL_HEIGHT else Image.Resampling.BOX
    size = (max(round(width * THUMBNAIL_HEIGHT / height), 1), THUMBNAIL_HEIGHT)
    return np.asarray(Image.fromarray(image_HWC).resize(size, method))
