"""The picture of a run: which frames it shows, where they stand, and what it says when the run lacks them."""

import json

import numpy as np
import pytest
from PIL import Image

from ldo.data.video import write_video
from ldo.report.picture import CAPTION_HEIGHT, FRAME_HEIGHT, FRAMES_SHOWN, GAP, LABEL_WIDTH, PromptStrips, lay_out, main


def video(red: int, frames: int = 17, size: int = 32) -> np.ndarray:
    """Frames of one shade of red each, with the frame's number in green."""
    images = np.zeros((frames, size, size, 3), np.uint8)
    images[..., 0] = red
    images[..., 1] = 10 * np.arange(frames)[:, None, None]
    return images


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "trial"
    for arm, red in (("base", 50), ("ldo", 200)):
        for prompt in range(2):
            write_video(folder / "eval" / arm / f"{prompt:04d}-0.mp4", video(red + prompt), 8)
    records = [{"prompt": prompt, "text": f"ball {prompt}"} for prompt in range(2)]
    (folder / "eval" / "base.json").write_text(json.dumps({"moving": records, "rest": []}))
    return folder


def centre(picture: Image.Image, column: int, row: int, prompt: int = 0) -> tuple[int, int, int]:
    """The colour in the middle of a frame."""
    left = LABEL_WIDTH + column * (FRAME_HEIGHT + GAP) + FRAME_HEIGHT // 2
    top = prompt * (CAPTION_HEIGHT + 2 * (FRAME_HEIGHT + GAP)) + CAPTION_HEIGHT + row * (FRAME_HEIGHT + GAP)
    return picture.getpixel((left, top + FRAME_HEIGHT // 2))


def test_base_stands_above_ldo_from_the_first_frame_to_the_last(run, tmp_path, capsys):
    out = tmp_path / "new" / "picture.png"
    assert main([str(run), "--out", str(out), "--prompt", "1", "0"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    picture = Image.open(out)
    assert picture.size == (
        LABEL_WIDTH + FRAMES_SHOWN * (FRAME_HEIGHT + GAP) - GAP,
        2 * (CAPTION_HEIGHT + 2 * (FRAME_HEIGHT + GAP)) - GAP,
    )
    for column in range(FRAMES_SHOWN):
        assert centre(picture, column, row=0) == (51, 20 * column, 0)
        assert centre(picture, column, row=1) == (201, 20 * column, 0)
        assert centre(picture, column, row=0, prompt=1) == (50, 20 * column, 0)


def test_caption_and_labels_are_drawn():
    strips = PromptStrips("a blue ball", video(50), video(200))
    picture = np.array(lay_out([strips]))
    assert (picture[:CAPTION_HEIGHT, LABEL_WIDTH:] < 128).any()
    assert (picture[CAPTION_HEIGHT:, : LABEL_WIDTH - GAP] < 128).any()


def test_short_and_wide_videos_fit():
    wide = np.zeros((3, 192, 384, 3), np.uint8)
    picture = lay_out([PromptStrips("short", wide, wide)])
    assert picture.width == LABEL_WIDTH + 3 * (2 * FRAME_HEIGHT + GAP) - GAP


def test_what_the_run_lacks_is_reported_in_one_line(run, tmp_path, capsys):
    def told(*arguments):
        assert main([*map(str, arguments), "--out", str(tmp_path / "picture.png")]) == 2
        return capsys.readouterr().err

    assert "has no evaluation prompt 7; it has 0 to 1" in told(run, "--prompt", 7)
    (run / "eval" / "ldo" / "0000-0.mp4").unlink()
    assert "0000-0.mp4" in told(run)
    assert "has no evaluation" in told(tmp_path / "missing")
    assert not (tmp_path / "picture.png").exists()
