"""Video files: rates met by time, upright frames, and every way in which a file can be broken."""

import itertools
from fractions import Fraction
from functools import partial

import av
import numpy as np
import pytest

from ldo.data import video
from ldo.data.video import probe_video, read_video, stream_frames, write_video
from tests.helpers.video_files import cut, encode, no_frames, ramp, scratched, shake, sound_only


def numbers(frames):
    """Which frames of ``ramp`` these are."""
    corners = [frame[: frame.shape[0] // 2, : frame.shape[1] // 2] for frame in frames]
    return [round(float(corner[..., 0].mean()) / 10) for corner in corners]


# ------------------------------------------------------------------------------------------ rates


@pytest.mark.parametrize("fps", [0, 5, 8, 12, 23.976, 24, 30, 48, 60])
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")])
def test_probe_counts_what_stream_gives(tmp_path, name, codec, fps):
    path = encode(tmp_path / name, ramp(), codec=codec)
    assert probe_video(path).count(fps) == len(list(stream_frames(path, fps)))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_variable_rate_keeps_its_speed(tmp_path, name):
    times = [0, 40, 80, 200, 240, 270, 360, 400, 440, 560, 600, 630, 720, 760, 800, 920]
    path = encode(tmp_path / name, ramp(16), times=times)
    nearest = [min(range(16), key=lambda number: abs(times[number] - shown)) for shown in range(0, 921, 100)]
    assert numbers(stream_frames(path, 10)) == nearest
    # the header of the mkv says 24 fps
    info = probe_video(path)
    assert info.frames == 16 and info.seconds == pytest.approx(0.92) and info.fps == pytest.approx(15 / 0.92, rel=0.01)


def test_nearly_equal_rates_lose_no_frame(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((81, 16, 16, 3), np.uint8), 30000 / 1001)
    assert [probe_video(tmp_path / "a.mp4").count(fps) for fps in (29.97, 30, 15)] == [81, 81, 41]


def test_an_endless_video_streams(monkeypatch):
    """Frames come as they are asked for, and only those that are shown are turned into pictures."""
    converted = []

    def convert(number):
        converted.append(number)
        return np.zeros((2, 2, 3), np.uint8)

    def decode(_path):
        for number in itertools.count():
            yield number / 24, partial(convert, number)

    monkeypatch.setattr(video, "_pyav", decode)
    assert len(list(itertools.islice(stream_frames("endless", 2), 3))) == 3
    assert converted == [0, 12, 24]


# ------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("turn", [90, 180, 270, -90])
def test_frames_are_upright(tmp_path, turn):
    plain, turned = (encode(tmp_path / f"{angle}.mp4", ramp(3), turn=angle) for angle in (0, turn))
    shown, expected = (np.stack(list(stream_frames(path))) for path in (turned, plain))
    np.testing.assert_array_equal(shown, np.rot90(expected, turn // 90, axes=(1, 2)))
    assert (probe_video(turned).height, probe_video(turned).width) == shown.shape[1:3]


def test_a_phones_matrix_turns_clockwise(tmp_path):
    """A phone held upright writes the matrix (0 1; -1 0): a quarter turn clockwise brings the picture upright."""
    path = encode(tmp_path / "a.mp4", ramp(3), turn=0)
    data, unit = bytearray(path.read_bytes()), 1 << 16
    # the matrix comes after the box's name, version, five numbers, eight unused bytes, and layer, group and volume
    start = data.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8
    assert int.from_bytes(data[start : start + 4], "big") == unit
    for place, value in ((0, 0), (4, unit), (12, -unit), (16, 0)):
        data[start + place : start + place + 4] = value.to_bytes(4, "big", signed=True)
    upright = np.stack(list(stream_frames(path)))
    path.write_bytes(data)
    np.testing.assert_array_equal(np.stack(list(stream_frames(path))), np.rot90(upright, -1, axes=(1, 2)))


def test_pixels_become_square(tmp_path):
    path = encode(tmp_path / "a.mp4", ramp(2), pixel=Fraction(4, 3))
    assert next(stream_frames(path)).shape == (48, 85, 3)
    info = probe_video(path)
    assert (info.height, info.width) == (48, 85)


@pytest.mark.parametrize("size", [(33, 47), (17, 64), (48, 31)])
def test_odd_sizes(tmp_path, size):
    # codecs halve the resolution of colour, which an odd size does not divide
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 8)
    np.testing.assert_array_equal(read_video(tmp_path / "a.mp4")[0], frames)
    path = encode(tmp_path / "a.webm", ramp(2, *size), codec="libvpx-vp9")
    assert next(stream_frames(path)).shape == (*size, 3)


# ------------------------------------------------------------------------------------------ broken files


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("empty.mp4", lambda p: p.write_bytes(b""), "it is empty"),
        ("text.mp4", lambda p: p.write_text("no video\n" * 50), "it cannot be decoded"),
        ("sound.mp4", sound_only, "it has no video stream"),
        ("nothing.mp4", no_frames, "it cannot be decoded|it holds no frames|it has no video stream"),
        # an mp4 keeps its index at the end unless told otherwise
        ("end.mp4", lambda p: cut(encode(p, shake()), 0.7), "it cannot be decoded"),
        (
            "start.mp4",
            lambda p: cut(encode(p, shake(), faststart=True), 0.7),
            "it cannot be decoded|it is cut short|it is damaged",
        ),
        ("cut.webm", lambda p: cut(encode(p, shake(40, 32), codec="libvpx-vp9"), 0.5), "it is cut short"),
        ("cut.mkv", lambda p: cut(encode(p, shake()), 0.5), "it is cut short"),
        ("hole.mp4", lambda p: scratched(encode(p, shake()), 0.6), "it cannot be decoded|it is damaged"),
        ("hole.avi", lambda p: scratched(encode(p, shake(), codec="mpeg4"), 0.4), "it cannot be decoded|it is damaged"),
    ],
)
def test_a_probe_finds_what_is_broken(tmp_path, name, make, reason):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=reason):
        probe_video(tmp_path / name)


def test_a_cut_between_frames_is_found(tmp_path):
    """The index lies in front and whole frames are missing at the end: every frame that is there decodes."""
    path = encode(tmp_path / "a.mp4", shake(), faststart=True)
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: positions[30]])
    with pytest.raises(ValueError, match=r"it is cut short: 3\d of 40 frames"):
        probe_video(path)


def test_streaming_a_broken_file_says_why(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="it is empty"):
        next(stream_frames(tmp_path / "a.mp4"))
