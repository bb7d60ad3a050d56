"""Video files: rates met by time, upright frames, and every way in which a file can be broken."""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
from films import cut, encode, no_frames, ramp, scratched, shake, sound_only

from ldo import video
from ldo.video import probe, read_video, stream, write_video


def numbers(frames):
    """Which frames of ``ramp`` these are."""
    return [round(float(f[: f.shape[0] // 2, : f.shape[1] // 2, 0].mean()) / 10) for f in frames]


# ------------------------------------------------------------------------------------------ rates


@pytest.mark.parametrize("fps", [0, 5, 8, 12, 23.976, 24, 30, 48, 60])
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")])
def test_probe_counts_what_stream_gives(tmp_path, name, codec, fps):
    path = encode(tmp_path / name, ramp(), codec=codec)
    assert probe(path).count(fps) == len(list(stream(path, fps)))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_variable_rate_keeps_its_speed(tmp_path, name):
    times = [0, 40, 80, 200, 240, 270, 360, 400, 440, 560, 600, 630, 720, 760, 800, 920]
    path = encode(tmp_path / name, ramp(16), times=times)
    assert numbers(stream(path, 10)) == [min(range(16), key=lambda k: abs(times[k] - t)) for t in range(0, 921, 100)]
    info = probe(path)  # the header of the mkv says 24 fps
    assert info.frames == 16 and info.seconds == pytest.approx(0.92) and info.fps == pytest.approx(15 / 0.92, rel=0.01)


def test_nearly_equal_rates_lose_no_frame(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((81, 16, 16, 3), np.uint8), 30000 / 1001)
    assert [probe(tmp_path / "a.mp4").count(fps) for fps in (29.97, 30, 15)] == [81, 81, 41]


def test_an_endless_film_streams(monkeypatch):
    """Frames come as they are asked for, and only those that are shown are turned into pictures."""
    made = []

    def film(_path):
        for k in itertools.count():
            yield k / 24, lambda k=k: made.append(k) or np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(video, "_pyav", film)
    assert len(list(itertools.islice(stream("endless", 2), 3))) == 3
    assert made == [0, 12, 24]


# ------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("turn", [90, 180, 270, -90])
def test_frames_are_upright(tmp_path, turn):
    plain, turned = (encode(tmp_path / f"{t}.mp4", ramp(3), turn=t) for t in (0, turn))
    shown, expected = (np.stack(list(stream(p))) for p in (turned, plain))
    np.testing.assert_array_equal(shown, np.rot90(expected, turn // 90, axes=(1, 2)))
    assert (probe(turned).height, probe(turned).width) == shown.shape[1:3]


def test_a_phones_matrix_turns_clockwise(tmp_path):
    """A phone held upright writes the matrix (0 1; -1 0): a quarter turn clockwise brings the picture upright."""
    path = encode(tmp_path / "a.mp4", ramp(3), turn=0)
    data, unit = bytearray(path.read_bytes()), 1 << 16
    at = data.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8
    assert int.from_bytes(data[at : at + 4], "big") == unit
    for place, value in ((0, 0), (4, unit), (12, -unit), (16, 0)):
        data[at + place : at + place + 4] = value.to_bytes(4, "big", signed=True)
    upright = np.stack(list(stream(path)))
    path.write_bytes(data)
    np.testing.assert_array_equal(np.stack(list(stream(path))), np.rot90(upright, -1, axes=(1, 2)))


def test_pixels_become_square(tmp_path):
    path = encode(tmp_path / "a.mp4", ramp(2), pixel=Fraction(4, 3))
    assert next(stream(path)).shape == (48, 85, 3) and (probe(path).height, probe(path).width) == (48, 85)


@pytest.mark.parametrize("size", [(33, 47), (17, 64), (48, 31)])
def test_odd_sizes(tmp_path, size):
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 8)
    np.testing.assert_array_equal(read_video(tmp_path / "a.mp4")[0], frames)
    path = encode(tmp_path / "a.webm", ramp(2, *size), codec="libvpx-vp9")
    assert next(stream(path)).shape == (*size, 3)


# ------------------------------------------------------------------------------------------ broken files


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("empty.mp4", lambda p: p.write_bytes(b""), "it is empty"),
        ("text.mp4", lambda p: p.write_text("no film\n" * 50), "it cannot be decoded"),
        ("sound.mp4", sound_only, "it has no video stream"),
        ("nothing.mp4", no_frames, "it cannot be decoded|it holds no frames|it has no video stream"),
        ("end.mp4", lambda p: cut(encode(p, shake()), 0.7), "it cannot be decoded"),
        ("start.mp4", lambda p: cut(encode(p, shake(), faststart=True), 0.7), "it cannot be decoded|it is cut short|it is damaged"),
        ("cut.webm", lambda p: cut(encode(p, shake(40, 32), codec="libvpx-vp9"), 0.5), "it is cut short"),
        ("cut.mkv", lambda p: cut(encode(p, shake()), 0.5), "it is cut short"),
        ("hole.mp4", lambda p: scratched(encode(p, shake()), 0.6), "it cannot be decoded|it is damaged"),
        ("hole.avi", lambda p: scratched(encode(p, shake(), codec="mpeg4"), 0.4), "it cannot be decoded|it is damaged"),
    ],
)
def test_a_probe_finds_what_is_broken(tmp_path, name, make, reason):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=reason):
        probe(tmp_path / name)


def test_a_cut_between_frames_is_found(tmp_path):
    """The index lies in front and whole frames are missing at the end: every frame that is there decodes."""
    path = encode(tmp_path / "a.mp4", shake(), faststart=True)
    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    path.write_bytes(path.read_bytes()[: places[30][0]])
    with pytest.raises(ValueError, match=r"it is cut short: 3\d of 40 frames"):
        probe(path)


def test_streaming_a_broken_file_says_why(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="it is empty"):
        next(stream(tmp_path / "a.mp4"))


# ------------------------------------------------------------------------------------------ the other decoder


@pytest.mark.parametrize("fps", [0, 10])
def test_torchcodec_gives_the_same_frames(tmp_path, fps):
    if not video.have_torchcodec():
        pytest.skip("torchcodec cannot be imported here")
    for path in (encode(tmp_path / "a.mp4", ramp()), encode(tmp_path / "b.mp4", ramp(), turn=90), encode(tmp_path / "c.mkv", shake())):
        for ours, theirs in zip(stream(path, fps), stream(path, fps, "torchcodec"), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_torchcodec_says_why(tmp_path):
    if not video.have_torchcodec():
        pytest.skip("torchcodec cannot be imported here")
    (tmp_path / "a.mp4").write_text("no film\n" * 50)
    with pytest.raises(ValueError, match=r"^it cannot be decoded \(.+\)$"):
        next(stream(tmp_path / "a.mp4", decoder="torchcodec"))
