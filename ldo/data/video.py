"""Video files: lossless writing, frames one at a time at any rate, and a probe that finds what is broken.

Frames come upright (rotation in the file's metadata is applied) and with square pixels. A rate is met by presentation
timestamps, not by counting, so files of variable frame rate keep their speed: the frame shown at k / fps seconds is the
one nearest in time, the earlier of two equally near. The last one may lie up to half a step beyond the file's last
frame, so that 81 frames at 30 fps are 81 at 29.97.
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

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif")
SLACK = 1e-6  # seconds, or steps: far above rounding, far below any frame's duration


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds.

    ``seconds`` is the time from its first frame to its last; height and width are of upright frames with square pixels.
    """

    frames: int
    fps: float
    height: int
    width: int
    seconds: float

    def count(self, fps: float = 0.0) -> int:
        """How many frames ``stream_frames(path, fps)`` gives."""
        return int(self.seconds * fps + 0.5 - SLACK) + 1 if fps else self.frames


def write_video(path: Path, frames_THWC: np.ndarray, fps: float) -> None:
    """Write uint8 RGB frames without loss (H.264 in RGB): what is read back is what was written."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264rgb", rate=Fraction(fps).limit_denominator(1000), options={"qp": "0", "preset": "veryfast"}
        )
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "rgb24"
        # one thread, so that the same frames give the same bytes on every machine
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
    return np.stack(list(itertools.islice(stream_frames(path), limit))), fps


def stream_frames(path: Path, fps: float = 0.0) -> Iterator[np.ndarray]:
    """uint8 RGB frames [H, W, 3], one at a time, at ``fps`` (0: every frame as it is).

    ValueError says why a file cannot be read.
    """
    shape = None
    for image in _at_rate(_pyav(path), fps):
        shape = shape or image.shape
        if image.shape != shape:
            raise ValueError(
                f"its picture changes from {shape[1]} x {shape[0]} to {image.shape[1]} x {image.shape[0]} pixels "
                "partway"
            )
        yield image
    if shape is None:
        raise ValueError("it holds no frames")


def probe_video(path: Path) -> VideoInfo:
    """Decode a file once from end to end, without keeping a picture. ValueError says why it cannot be used.

    What counts as broken: no video, an error or a corrupt frame anywhere, fewer frames or less time than the
    container promises (a file cut short), a change of size.
    """
    times: list[float] = []
    sizes: set[tuple[int, int]] = set()
    packet_count = 0
    with _opened(path) as container:
        video = _video(container)
        # callers probe many files at once, so threads of its own would only get in their way
        video.codec_context.thread_count = 1
        # without this, decoders paint over the damage
        video.codec_context.options = {"err_detect": "explode"}
        for packet in container.demux(video):
            packet_count += packet.size > 0
            for frame in packet.decode():
                if frame.is_corrupt or packet.is_corrupt:
                    raise ValueError(f"it is damaged at frame {len(times)}")
                # some old formats have no timestamps: then frames come at the nominal rate
                times.append(len(times) / (_rate(video) or 1) if frame.time is None else frame.time)
                sizes.add(_size(frame, _pixel(video)))
        promised_frames, nominal_fps, promised_seconds = video.frames, _rate(video), _promised_seconds(video)
    if not times:
        raise ValueError("it holds no frames")
    if packet_count < promised_frames:
        raise ValueError(f"it is cut short: {packet_count} of {promised_frames} frames")
    seconds = max(times) - times[0]
    measured_fps = (len(times) - 1) / seconds if seconds else nominal_fps
    # Matroska and WebM promise a time instead of a number; a tenth allows for streams that end at different times
    if not promised_frames and measured_fps and max(times) + 2 / measured_fps < 0.9 * promised_seconds:
        raise ValueError(f"it is cut short: {max(times):.1f} of {promised_seconds:.1f} seconds")
    if len(sizes) > 1:
        raise ValueError("its picture changes size partway")
    height, width = sizes.pop()
    # the nominal rate where it is right, because it is exact; the measured one where the container is wrong about it
    fps = nominal_fps if abs(nominal_fps - measured_fps) < 0.01 * measured_fps else measured_fps
    return VideoInfo(len(times), fps, height, width, seconds)


def to_images(frames_TCHW: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] from floats [T, 3, H, W] in [0, 1]."""
    return np.round(np.asarray(frames_TCHW).transpose(0, 2, 3, 1) * 255).clip(0, 255).astype(np.uint8)


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
    if len(parts) != 3:
        return 0.0
    hours, minutes, seconds = (float(part) for part in parts)
    return seconds + 60 * minutes + 3600 * hours


# Frames of a decoder: the time of each in seconds, and a function that makes the picture. It is called for the chosen
# frames only, because the conversion to RGB costs more than the decoding.
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
            # phones store upright videos sideways, with a note to turn them
            turns = frame.rotation // 90 % 4
            return np.ascontiguousarray(np.rot90(image, turns)) if turns else image

        for index, frame in enumerate(container.decode(video)):
            time = index / rate if frame.time is None else frame.time
            yield time, lambda frame=frame: picture(frame)


def _at_rate(frames: _Frames, fps: float) -> Iterator[np.ndarray]:
    """Pictures nearest to 0, 1/fps, 2/fps, ... seconds after the first; all of them without a rate."""
    if not fps:
        for _, picture in frames:
            yield picture()
        return
    given = 0
    start: float | None = None
    before: tuple[float, Callable[[], np.ndarray]] | None = None
    for time, picture in frames:
        start = time if start is None else start
        now = time - start
        # the frame before is the nearest to every wanted time up to the middle between it and this one
        while before and given / fps <= (before[0] + now) / 2 + SLACK:
            yield before[1]()
            given += 1
        before = now, picture
    # the last frame stands for up to half a step beyond it
    while before and given < before[0] * fps + 0.5 - SLACK:
        yield before[1]()
        given += 1
