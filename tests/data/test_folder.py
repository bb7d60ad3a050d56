"""Clips and prompts: lossless files, captions, every unusable file named, frames cut to size."""

import json
import os

import numpy as np
import pytest
import torch

from ldo.core.config import DataConfig
from ldo.core.errors import RecipeError
from ldo.data import folder
from ldo.data.captions import read_prompts
from ldo.data.folder import Clip, read_folder
from ldo.data.frames import load_frames, load_windows
from ldo.data.video import probe_video, read_video, write_video


def images(frames=6, height=32, width=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def folder_of(path, *names, frames=6, fps=8):
    for name in names:
        write_video(path / name, images(frames), fps)
    return path


def clips_of(path, frames=6, fps=8, report=None, **changes):
    """The clips of a folder; what the probe finds is kept next to the folder."""
    config = DataConfig(frames=frames, height=32, width=48, fps=fps, **changes)
    return read_folder(path, config, path.parent / "store", report)


def as_images(frames):
    """Frames [T, 3, H, W] in [0, 1] as a video file holds them: uint8 [T, H, W, 3]."""
    return (frames * 255).round().byte().permute(0, 2, 3, 1).numpy()


def metadata(path, *rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (path / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize("fps", [8, 24, 29.97])
@pytest.mark.parametrize("height, width", [(32, 48), (16, 16)])
def test_video_round_trip_is_exact(tmp_path, fps, height, width):
    written = images(height=height, width=width)
    write_video(tmp_path / "new" / "a.mp4", written, fps)
    read, rate = read_video(tmp_path / "new" / "a.mp4")
    np.testing.assert_array_equal(read, written)
    assert rate == pytest.approx(fps, rel=1e-3)


def test_limit_reads_the_first_frames(tmp_path):
    write_video(tmp_path / "a.mp4", images(), 8)
    np.testing.assert_array_equal(read_video(tmp_path / "a.mp4", 4)[0], images()[:4])


def test_folder_with_metadata(tmp_path):
    folder_of(tmp_path, "a.mp4", "sub/b.mp4", "unlisted.mp4")
    metadata(
        tmp_path,
        {"file_name": "sub/b.mp4", "text": "zwei Bälle", "kind": "bounce"},
        {"file_name": "a.mp4", "text": "one"},
    )
    first, second = clips_of(tmp_path, 6, 8)
    content = first.content
    assert first == Clip(tmp_path / "sub/b.mp4", "zwei Bälle", 6, 8.0, {"kind": "bounce"}, (6, 32, 48), 1, content)
    # the files hold the same pictures, and so the same bytes
    assert second == Clip(tmp_path / "a.mp4", "one", 6, 8.0, {}, (6, 32, 48), 1, content)


def test_folder_with_captions_next_to_clips(tmp_path):
    folder_of(tmp_path, "b.mp4", "a.mkv", "alone.mp4")
    (tmp_path / "b.txt").write_text("  a ball\n")
    (tmp_path / "a.txt").write_text("a cat")
    found = [(clip.path.name, clip.text) for clip in clips_of(tmp_path, 6, 8)]
    assert found == [("a.mkv", "a cat"), ("b.mp4", "a ball")]


def test_folder_with_a_table(tmp_path):
    folder_of(tmp_path, "a.mp4", "b.mp4")
    # as Excel writes it: a byte order mark in front, quotes doubled
    (tmp_path / "metadata.csv").write_text(
        '\ufefffile_name,text,mood\na.mp4,"one, two",gay\nb.mp4,"three ""balls""",\n', encoding="utf-8"
    )
    clips = clips_of(tmp_path)
    assert [(clip.text, clip.extra["mood"]) for clip in clips] == [("one, two", "gay"), ('three "balls"', "")]


def test_which_column_is_the_caption(tmp_path):
    folder_of(tmp_path, "a.mp4")
    metadata(tmp_path, {"file_name": "a.mp4", "text": "one", "caption": "two", "long": "three"})
    texts = [clips_of(tmp_path, caption=column)[0].text for column in ("", "caption", "long")]
    metadata(tmp_path, {"file_name": "a.mp4", "caption": "two"})
    assert [*texts, clips_of(tmp_path)[0].text] == ["one", "two", "three", "two"]
    with pytest.raises(RecipeError, match='"file_name" and "long" are needed'):
        clips_of(tmp_path, caption="long")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file_name,text\na.mp4,one,two\n",
            "line 2 has more cells than the header; put captions with commas in quotes",
        ),
        ("file_name,text\na.mp4\n", 'line 2: "file_name" and "text" are needed'),
        ("name,text\na.mp4,one\n", 'line 2: "file_name" and "text" are needed'),
        ("file_name,text\n", "holds no captioned videos"),
    ],
)
def test_mistake_in_a_table_is_reported(tmp_path, text, message):
    (folder_of(tmp_path, "a.mp4") / "metadata.csv").write_text(text)
    with pytest.raises(RecipeError, match=message):
        clips_of(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(RecipeError, match="holds both"):
        clips_of(tmp_path)


def test_line_separators_inside_json_text_do_not_end_a_line(tmp_path):
    folder_of(tmp_path, "a.mp4")
    metadata(tmp_path, {"file_name": "a.mp4", "text": "one\u2028two\x85three"})
    assert clips_of(tmp_path, 6, 8)[0].text == "one\u2028two\x85three"


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scrambled(path):
    path.write_bytes(np.random.default_rng(0).bytes(4000))


def emptied(path):
    path.write_bytes(b"")


def shortened(path):
    write_video(path, images(5), 8)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (truncated, "it cannot be decoded"),
        (scrambled, "it cannot be decoded"),
        (emptied, "it is empty"),
        (shortened, "it gives 5 frames at 8 fps and 6 are needed"),
    ],
)
def test_unusable_clip_is_named_with_its_reason(tmp_path, spoil, reason):
    folder_of(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    metadata(tmp_path, *({"file_name": name, "text": "x"} for name in ("a.mp4", "b.mp4", "c.mp4")))
    spoil(tmp_path / "b.mp4")
    with pytest.raises(
        RecipeError, match=rf"b\.mp4: {reason}.*; fix or remove them, or leave them out with data\.bad_clips=skip$"
    ):
        clips_of(tmp_path)
    spoil(tmp_path / "c.mp4")
    report = tmp_path / "run" / "report.jsonl"
    with pytest.raises(RecipeError, match=rf"b\.mp4.*\(and 1 more\), listed in {report}"):
        clips_of(tmp_path, report=report)
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert [os.path.basename(row["file"]) for row in rows] == ["b.mp4", "c.mp4", "a.mp4"]
    assert all(row["bad"].startswith(reason) for row in rows[:2]) and rows[2]["size"] == [6, 32, 48]


def test_bad_clips_are_left_out_listed_and_reported(tmp_path, caplog):
    folder_of(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    metadata(tmp_path, *({"file_name": name, "text": "x"} for name in ("a.mp4", "gone.mp4", "b.mp4", "c.mp4")))
    truncated(tmp_path / "b.mp4")
    clips = clips_of(tmp_path, bad_clips="skip", report=tmp_path / "report.jsonl")
    assert [clip.path.name for clip in clips] == ["a.mp4", "c.mp4"]
    assert "2 of 4 cannot be used and are left out: gone.mp4: it does not exist (and 1 more)" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [row.get("bad", "")[:10] for row in rows] == ["it does no", "it cannot ", "", ""]
    emptied(tmp_path / "a.mp4")
    emptied(tmp_path / "c.mp4")
    with pytest.raises(RecipeError, match=r"no clip can be used; a\.mp4: it is empty \(and 3 more\)"):
        clips_of(tmp_path, bad_clips="skip")


def test_a_file_is_probed_once_until_it_changes(tmp_path, monkeypatch):
    folder_of(tmp_path / "f", "a.mp4", "b.mp4")
    metadata(tmp_path / "f", *({"file_name": name, "text": "x"} for name in ("a.mp4", "b.mp4", "a.mp4")))
    probed = []

    def probe(path):
        probed.append(path.name)
        return probe_video(path)

    monkeypatch.setattr(folder, "probe_video", probe)
    first = clips_of(tmp_path / "f")
    assert sorted(probed) == ["a.mp4", "b.mp4"]
    assert clips_of(tmp_path / "f") == first and len(probed) == 2
    # only the file that changed is probed again
    write_video(tmp_path / "f" / "a.mp4", images(7, seed=1), 8)
    second = clips_of(tmp_path / "f")
    assert probed[2:] == ["a.mp4"]
    assert second[0].frames == 7 and second[0].content != first[0].content
    assert second[1] == first[1]


@pytest.mark.parametrize("fps, count", [(8, 9), (4, 5), (16, 17)])
def test_length_is_counted_at_the_wanted_rate(tmp_path, fps, count):
    folder_of(tmp_path, "a.mp4", frames=9)
    metadata(tmp_path, {"file_name": "a.mp4", "text": "x"})
    assert clips_of(tmp_path, count, fps)[0].frames == count
    with pytest.raises(RecipeError, match=f"it gives {count} frames"):
        clips_of(tmp_path, count + 1, fps)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"file_name": "gone.mp4", "text": "x"}], r"gone\.mp4: it does not exist; fix or remove"),
        ([{"file_name": "a.mp4"}], 'line 1: "file_name" and "text" are needed'),
        ([{"file_name": "a.mp4", "text": None}], "line 1"),
        ([{"file_name": "a.mp4", "text": "x"}, ["a.mp4"]], "line 2 is not a JSON object"),
        ([], "holds no captioned videos"),
    ],
)
def test_mistake_in_metadata_is_reported(tmp_path, rows, message):
    metadata(folder_of(tmp_path, "a.mp4"), *rows)
    with pytest.raises(RecipeError, match=message):
        clips_of(tmp_path, 6, 8)


def test_mistake_in_a_folder_is_reported(tmp_path):
    with pytest.raises(RecipeError, match=r"folder .*none does not exist"):
        clips_of(tmp_path / "none", 6, 8)
    folder_of(tmp_path, "a.mp4")
    with pytest.raises(RecipeError, match=r"holds no captioned videos; put metadata\.jsonl in it"):
        clips_of(tmp_path, 6, 8)
    (tmp_path / "lost.txt").write_text("x")
    with pytest.raises(RecipeError, match=r"lost\.txt is a caption without a clip; add lost\.mp4"):
        clips_of(tmp_path, 6, 8)


def test_prompts_from_text_and_json_lines(tmp_path):
    (tmp_path / "p.txt").write_text("a ball\n\n  a cat \n")
    (tmp_path / "p.jsonl").write_text('{"text": "a ball", "kind": "bounce"}\n\n{"text": "a cat"}\n')
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.txt")] == ["a ball", "a cat"]
    prompts = read_prompts(tmp_path / "p.jsonl")
    assert [prompt.text for prompt in prompts] == ["a ball", "a cat"]
    assert [prompt.extra for prompt in prompts] == [{"kind": "bounce"}, {}]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.txt", None, r"evaluate\.prompts: file .*p\.txt does not exist; give a file with one prompt a line"),
        ("p.txt", "\n \n", r"evaluate\.prompts: .*p\.txt holds no prompts"),
        ("p.jsonl", "", "holds no prompts"),
        ("p.jsonl", '\n{"prompt": "x"}\n', 'line 2: "text" is needed'),
        ("p.jsonl", '{"text": 3}\n', 'line 1: "text" is needed'),
        ("p.jsonl", "a ball\n", "line 1 is not a JSON object"),
    ],
)
def test_mistake_in_prompts_is_reported(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_prompts(tmp_path / name, "evaluate.prompts")


def test_frames_of_the_right_size_are_untouched(tmp_path):
    folder_of(tmp_path, "a.mp4")
    loaded = load_frames(Clip(tmp_path / "a.mp4", ""), 4, 32, 48, 8)
    assert loaded.dtype == torch.float32
    np.testing.assert_array_equal(as_images(loaded), images()[:4])


@pytest.mark.parametrize("height, width", [(16, 24), (24, 24), (20, 60), (64, 40), (17, 33)])
def test_frames_are_scaled_and_centre_cropped(tmp_path, height, width):
    ramp = np.zeros((2, 32, 48, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 240, 48).astype(np.uint8)
    ramp[..., 1] = np.linspace(0, 240, 32).astype(np.uint8)[:, None]
    write_video(tmp_path / "a.mp4", ramp, 8)
    loaded = load_frames(Clip(tmp_path / "a.mp4", ""), 2, height, width, 8)
    assert loaded.shape == (2, 3, height, width) and loaded.min() >= 0 and loaded.max() <= 1
    scale = max(height / 32, width / 48)
    # where in the source each pixel lies, measured from the common centre
    rows = (np.arange(height) + 0.5 - height / 2) / scale + 16
    columns = (np.arange(width) + 0.5 - width / 2) / scale + 24
    red = np.broadcast_to((columns[None, :] - 0.5) / 47 * 240 / 255, (height, width))
    green = np.broadcast_to((rows[:, None] - 0.5) / 31 * 240 / 255, (height, width))
    # at the border the filter of the antialiasing reaches beyond the picture
    inner = np.s_[height // 5 : -(height // 5), width // 5 : -(width // 5)]
    np.testing.assert_allclose(loaded[0, 0].numpy()[inner], red[inner], atol=0.04)
    np.testing.assert_allclose(loaded[0, 1].numpy()[inner], green[inner], atol=0.04)


@pytest.mark.parametrize(
    "fps, order", [(8, [0, 1, 2, 3]), (4, [0, 2, 4, 6]), (16, [0, 0, 1, 1]), (8.05, [0, 1, 2, 3]), (0, [0, 1, 2, 3])]
)
def test_frames_are_resampled_to_the_nearest_in_time(tmp_path, fps, order):
    folder_of(tmp_path, "a.mp4", frames=8)
    loaded = load_frames(Clip(tmp_path / "a.mp4", ""), 4, 32, 48, fps)
    np.testing.assert_array_equal(as_images(loaded), images(8)[order])


def test_windows_follow_each_other(tmp_path):
    write_video(tmp_path / "a.mp4", images(14), 8)
    windows = dict(load_windows(tmp_path / "a.mp4", {0, 2}, (4, 32, 48), 8))
    assert list(windows) == [0, 2]
    for number, window in windows.items():
        np.testing.assert_array_equal(as_images(window), images(14)[4 * number : 4 * number + 4])
    # the two frames after the last whole window are no window
    with pytest.raises(ValueError, match="it gives 14 frames at 8 fps and 16 are needed"):
        dict(load_windows(tmp_path / "a.mp4", {3}, (4, 32, 48), 8))
