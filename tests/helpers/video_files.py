"""Video files as cameras and downloads produce them, good ones and broken ones."""

from fractions import Fraction

import av
import numpy as np


def ramp(count=24, height=48, width=64):
    """Frames whose top left quarter shows their number k as red 10 k, for up to 25 frames.

    The left half of the rest is blue.
    """
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:, :, : width // 2, 2] = 200
    for number in range(count):
        frames[number, : height // 2, : width // 2] = (10 * number % 250, 0, 0)
    return frames


def encode(path, frames, fps=24, codec="libx264", pixels="yuv420p", times=None, turn=None, pixel=None, faststart=False):
    """A file as a camera or a download has it; ``times`` in milliseconds make its frame rate variable."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        track = container.add_stream(codec, rate=fps)
        track.height, track.width = frames.shape[1:3]
        track.pix_fmt = pixels
        if turn is not None:
            track.set_display_rotation(turn)
        if pixel:
            track.codec_context.sample_aspect_ratio = pixel
        base = Fraction(1, fps) if times is None else Fraction(1, 1000)
        track.codec_context.time_base = base
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number if times is None else times[number], base
            container.mux(track.encode(frame))
        container.mux(track.encode())
    return path


def shake(count=40, size=96):
    """Noise: every byte of its file matters."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def sound_only(path):
    with av.open(str(path), "w") as container:
        track = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(track.encode(frame))
        container.mux(track.encode())


def no_frames(path):
    with av.open(str(path), "w") as container:
        track = container.add_stream("libx264", rate=24)
        track.height = track.width = 16
        track.pix_fmt = "yuv420p"
        container.start_encoding()


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def scratched(path, at):
    data = bytearray(path.read_bytes())
    place = int(len(data) * at)
    size = len(data) // 10  # several frames: damage within one may decode to something
    data[place : place + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(data)
