"""Video files: lossless writing, frames one at a time at any rate, and a probe that finds what is broken.

Frames come upright (rotation in the file's metadata is applied) and with square pixels. A rate is met by presentation
timestamps, not by counting, so files of variable frame rate keep their speed: the frame shown at k / fps seconds is the
one nearest in time, the earlier of two equally near. The last one may lie up to half a step beyond the file's last frame,
so that 81 frames at 29.97 fps are 81 at 30.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # PyAV is imported where a file is opened: what needs no files runs without it
    import av

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif")
SLACK = 1e-6  # seconds, or steps: far above rounding, far below any frame's duration


@dataclass(frozen=True)
class Info:
    """What a file holds. ``seconds`` pass from its first frame to its last; height and width are of upright, square-pixelled frames."""

    frames: int
    fps: float
    height: int
    width: int
    seconds: float

    def count(self, fps: float = 0.0) -> int:
        """How many frames ``stream(path, fps)`` gives."""
        return int(self.seconds * fps + 0.5 - SLACK) + 1 if fps else self.frames


def write_video(path: Path, frames_THWC: np.ndarray, fps: float) -> None:
    """Write uint8 RGB frames without loss (H.264 in RGB): what is read back is what was written."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(fps).limit_denominator(1000), options={"qp": "0", "preset": "veryfast"})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.codec_context.thread_count = 1
        for image in frames_THWC:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def read_video(path: Path, limit: int | None = None) -> tuple[np.ndarray, float]:
    """uint8 RGB frames [T, H, W, 3] and the frame rate; ValueError says why a file cannot be read."""
    with _opened(path) as container:
        fps = _rate(_video(container))
    return np.stack(list(itertools.islice(stream(path), limit))), fps


def stream(path: Path, fps: float = 0.0, decoder: str = "pyav") -> Iterator[np.ndarray]:
    """uint8 RGB frames [H, W, 3], one at a time, at ``fps`` (0: every frame as it is).

    ``decoder`` is "pyav" or "torchcodec", which must be installed; it differs where pixels are not square (it leaves
    them so) or sizes odd (in the rounding of colours). ValueError says why a file cannot be read.
    """
    shape = None
    frames = _torchcodec(path) if decoder == "torchcodec" else _pyav(path)
    for image in _at_rate(frames, fps):
        shape = shape or image.shape
        if image.shape != shape:
            raise ValueError(f"its picture changes from {shape[1]} x {shape[0]} to {image.shape[1]} x {image.shape[0]} pixels on the way")
        yield image
    if shape is None:
        raise ValueError("it holds no frames")


def probe(path: Path) -> Info:
    """Decode a file once from end to end, without keeping a picture. ValueError says why it is of no use.

    What counts as broken: no video, an error or a corrupt frame anywhere, fewer frames or less time than the
    container promises (a file cut short), a change of size.
    """
    times, sizes, packets = [], set(), 0
    with _opened(path) as container:
        video = _video(container)
        video.codec_context.thread_count = 1  # callers probe many files at once
        video.codec_context.options = {"err_detect": "explode"}  # else decoders paint over the damage
        for packet in container.demux(video):
            packets += packet.size > 0
            for frame in packet.decode():
                if frame.is_corrupt or packet.is_corrupt:
                    raise ValueError(f"it is damaged at frame {len(times)}")
                times.append(frame.time if frame.time is not None else len(times) / (_rate(video) or 1))
                sizes.add(_size(frame, _pixel(video)))
        promised, rate, length = video.frames, _rate(video), _promised_seconds(video)
    if not times:
        raise ValueError("it holds no frames")
    if packets < promised:
        raise ValueError(f"it is cut short: {packets} of {promised} frames")
    seconds = max(times) - times[0]
    measured = (len(times) - 1) / seconds if seconds else rate
    if not promised and measured and max(times) + 2 / measured < 0.9 * length:
        raise ValueError(f"it is cut short: {max(times):.1f} of {length:.1f} seconds")
    if len(sizes) > 1:
        raise ValueError("its picture changes size on the way")
    height, width = sizes.pop()
    return Info(len(times), rate if abs(rate - measured) < 0.01 * measured else measured, height, width, seconds)


def have_torchcodec() -> bool:
    """Can torchcodec be used here? It is compiled against certain versions of PyTorch, CUDA and FFmpeg."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


# ---------------------------------------------------------------------------------------------- decoding


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """An open file; whatever goes wrong while it is open becomes a ValueError that says why."""
    import av

    try:
        with av.open(str(path)) as container:
            yield container
    except (av.FFmpegError, OSError) as error:
        if path.exists() and not path.stat().st_size:
            raise ValueError("it is empty") from None
        raise ValueError(f"it cannot be decoded ({error.strerror or error})") from None


def _video(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise ValueError("it has no video stream")
    return container.streams.video[0]


def _rate(video: av.VideoStream) -> float:
    return float(video.average_rate or video.guessed_rate or 0)


def _pixel(video: av.VideoStream) -> float:
    """Width of a pixel over its height."""
    return float(video.sample_aspect_ratio or 1)


def _size(frame: av.VideoFrame, pixel: float) -> tuple[int, int]:
    """Height and width of the upright frame."""
    size = frame.height, round(frame.width * pixel)
    return size[::-1] if frame.rotation % 180 else size


def _promised_seconds(video: av.VideoStream) -> float:
    """The stream's length by its container (Matroska has it in a tag); 0 if unknown."""
    if video.duration:
        return float(video.duration * video.time_base)
    parts = video.metadata.get("DURATION", "").split(":")
    return sum(float(p) * 60**k for k, p in enumerate(reversed(parts))) if len(parts) == 3 else 0.0


# Frames of a decoder: the time of each in seconds, and a function that makes the picture, called for the chosen alone.
_Frames = Iterator[tuple[float, Callable[[], np.ndarray]]]


def _pyav(path: Path) -> _Frames:
    with _opened(path) as container:
        video = _video(container)
        video.thread_type = "AUTO"
        pixel, rate = _pixel(video), _rate(video) or 1.0

        def picture(frame: av.VideoFrame) -> np.ndarray:
            if pixel != 1:
                frame = frame.reformat(width=round(frame.width * pixel), height=frame.height, format="rgb24")
            image = frame.to_ndarray(format="rgb24")
            turns = frame.rotation // 90 % 4
            return np.ascontiguousarray(np.rot90(image, turns)) if turns else image

        for k, frame in enumerate(container.decode(video)):
            yield frame.time if frame.time is not None else k / rate, lambda frame=frame: picture(frame)


def _torchcodec(path: Path) -> _Frames:
    from torchcodec.decoders import VideoDecoder

    try:
        source = VideoDecoder(str(path), dimension_order="NHWC", seek_mode="exact")
        for k in range(len(source)):
            frame = source.get_frame_at(k)
            yield frame.pts_seconds, lambda frame=frame: frame.data.numpy()
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"it cannot be decoded ({str(error).splitlines()[0].rpartition(', ')[2]})") from None


def _at_rate(frames: _Frames, fps: float) -> Iterator[np.ndarray]:
    """Pictures nearest to 0, 1/fps, 2/fps, ... seconds after the first; all of them without a rate."""
    if not fps:
        for _, picture in frames:
            yield picture()
        return
    k, start, before = 0, None, None
    for time, picture in frames:
        start = time if start is None else start
        now = time - start
        while before and k / fps <= (before[0] + now) / 2 + SLACK:
            yield before[1]()
            k += 1
        before = now, picture
    while before and k < before[0] * fps + 0.5 - SLACK:
        yield before[1]()
        k += 1
