"""Stage 1 on a folder of ordinary files, of mixed sizes, rates and lengths, some broken."""

import json
import os
import shutil
from fractions import Fraction

import pytest
import torch

from ldo.core.checkpoint import load_checkpoint
from ldo.core.distributed import Processes
from ldo.core.errors import TrainingError
from ldo.core.files import read_json_lines
from ldo.core.recipe_file import read_recipe
from ldo.data.cache import read_entry
from ldo.models.lora import read_lora
from ldo.run.load import load_run
from ldo.run.validate import validate
from ldo.stages import align, cached_clips
from ldo.stages.align import train_align
from ldo.stages.cached_clips import CODE_VERSIONS
from ldo.stages.clips import prepare_clips
from ldo.stages.encoded_clips import EncodedClips
from ldo.train import main
from tests.helpers import recipes
from tests.helpers.forked import start_run
from tests.helpers.interrupt import interrupted
from tests.helpers.video_files import cut, encode, no_frames, ramp, scratched, shake, sound_only

BUCKETS = [[17, 32, 32], [17, 32, 48], [17, 48, 32], [33, 32, 32]]
BROKEN = ("cut.mp4", "empty.mp4", "hole.avi", "nothing.mp4", "short.mp4", "small.mp4", "sound.mp4", "text.mp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of every kind with a caption next to each."""
    path = tmp_path_factory.mktemp("videos")
    encode(path / "camera.mp4", ramp(72, 48, 64), fps=24)
    encode(path / "web.webm", ramp(25, 49, 71), fps=10, codec="libvpx-vp9")
    encode(path / "phone.mp4", ramp(60, 32, 48), fps=24, turn=-90)
    encode(path / "screen.mkv", ramp(40, 64, 64), times=[60 * number + 25 * (number % 3) for number in range(40)])
    encode(path / "long.mp4", ramp(120, 36, 36), fps=12)
    encode(path / "anamorphic.mp4", ramp(40, 48, 48), fps=16, pixel=Fraction(4, 3))
    encode(path / "old.avi", ramp(30, 32, 48), fps=12, codec="mpeg4")
    encode(path / "square.mp4", ramp(35, 64, 64), fps=16)
    cut(encode(path / "cut.mp4", shake()), 0.6)
    (path / "empty.mp4").write_bytes(b"")
    scratched(encode(path / "hole.avi", shake(), codec="mpeg4"), 0.4)
    no_frames(path / "nothing.mp4")
    encode(path / "short.mp4", ramp(20, 32, 32), fps=24)
    encode(path / "small.mp4", ramp(60, 16, 24), fps=24)
    sound_only(path / "sound.mp4")
    (path / "text.mp4").write_text("no video\n" * 50)
    for video in list(path.iterdir()):
        video.with_suffix(".txt").write_text(f"a red ball rolls {len(video.stem)}")
    return path


@pytest.fixture
def recipe(tmp_path, wan_folder, vjepa_folder, folder):
    def make(**changes):
        own = {
            "data__videos": str(folder),
            "data__buckets": BUCKETS,
            "data__bad_clips": "skip",
            "stages": ["align"],
            "align__batch": 2,
        }
        return recipes.write(tmp_path, wan_folder, vjepa_folder, **own | changes)

    return make


@pytest.fixture
def open_own(recipe):
    return lambda **changes: load_run(validate(read_recipe(recipe(**changes))), Processes())


def test_the_first_bad_clip_is_told_and_all_are_listed(recipe, capsys, tmp_path):
    assert main([str(recipe(data__bad_clips="error"))]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("ldo:")]
    assert "cut.mp4: it cannot be decoded" in line and "(and 7 more)" in line and "data.bad_clips=skip" in line
    report = tmp_path / "runs" / "small" / "clips-report.jsonl"
    assert str(report) in line
    rows = [json.loads(text) for text in report.read_text().splitlines()]
    reasons = {os.path.basename(row["file"]): row["bad"] for row in rows if "bad" in row}
    assert tuple(reasons) == BROKEN and len(rows) == 16
    assert "it is empty" in reasons["empty.mp4"] and "7 frames at 8 fps and 17 are needed" in reasons["short.mp4"]
    assert "its 24 x 16 pixels are too few" in reasons["small.mp4"] and "no video stream" in reasons["sound.mp4"]


def test_clips_fall_into_buckets(open_own):
    found = {clip.path.name: (clip.size, clip.windows) for clip in open_own(data__windows="all").clips}
    assert found == {
        "anamorphic.mp4": ((17, 32, 48), 1),
        "camera.mp4": ((17, 32, 48), 1),
        "long.mp4": ((33, 32, 32), 2),
        "old.avi": ((17, 32, 48), 1),
        "phone.mp4": ((17, 48, 32), 1),
        "screen.mkv": ((17, 32, 32), 1),
        "square.mp4": ((17, 32, 32), 1),
        "web.webm": ((17, 32, 48), 1),
    }


def test_it_trains_and_resumes_bitwise(open_own, tmp_path):
    whole = open_own()
    expected = train_align(whole, "align")
    rows = read_json_lines(whole.folder / "align.jsonl")
    assert [row["step"] for row in rows] == list(range(6)) and all(row["pda_loss"] > 0 for row in rows)
    text = (whole.folder / "align.jsonl").read_text()
    shutil.rmtree(whole.folder)

    with interrupted(align, "optimizer_step", 6):
        train_align(open_own(), "align")
    again = open_own()
    assert load_checkpoint(again.checkpoint("align"))["step"] == 4
    lost, damaged = sorted(again.recipe.cache.glob("latents/*/*"))[:2]
    # what is lost or damaged meanwhile is made again, with the same bits
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-9])
    found = train_align(again, "align")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (whole.folder / "align.jsonl").read_text() == text


def test_a_run_continues_only_with_its_own_clips(open_own, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    train_align(open_own(data__videos=str(copy), align__steps=2), "align")
    encode(copy / "square.mp4", shake(35, 64), fps=16)
    with pytest.raises(TrainingError, match=r"the clips of data\.videos are not those that .* began with"):
        prepare_clips(open_own(data__videos=str(copy), align__steps=4))


def test_the_second_start_encodes_nothing(open_own, monkeypatch):
    first = prepare_clips(open_own(data__windows="all"))
    again = open_own(data__windows="all")
    for part in ("encode_video", "encode_text"):
        monkeypatch.setattr(again.generator, part, lambda *_: pytest.fail("encoded twice"))
    monkeypatch.setattr(cached_clips, "make_target", lambda *_: pytest.fail("encoded twice"))
    monkeypatch.setattr("ldo.data.folder.probe_video", lambda *_: pytest.fail("probed twice"))
    second = prepare_clips(again)
    assert len(second) == len(first) == 9
    again.texts(first.prompts)
    for index in range(9):
        encoded, read_again = first.read(torch.tensor([index])), second.read(torch.tensor([index]))
        assert all(torch.equal(encoded[name], read_again[name]) for name in encoded)


@pytest.mark.parametrize("change", ["code", "teacher", "frames"])
def test_what_changes_is_encoded_again(open_own, monkeypatch, change):
    before = open_own()
    prepare_clips(before)

    def count(kind):
        return len(list(before.recipe.cache.glob(f"{kind}/*/*")))

    made = count("latents"), count("teacher")
    assert made == (8, 8)
    if change == "code":
        monkeypatch.setitem(CODE_VERSIONS, "latents", 99)
    changes = {"code": {}, "teacher": {"teacher__mode": "encode"}, "frames": {"data__fps": 7.5}}[change]
    prepare_clips(open_own(**changes))
    clips = {"code": (16, 8), "teacher": (8, 16)}
    assert (count("latents"), count("teacher")) == clips.get(change, (count("latents"), count("teacher")))
    assert change != "frames" or min(count("latents"), count("teacher")) > 8


def test_a_clip_lost_after_the_probe(open_own, folder, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for policy in ("error", "skip"):
        for bad in BROKEN:
            (copy / bad).unlink(missing_ok=True)
            (copy / bad).with_suffix(".txt").unlink(missing_ok=True)
        session = open_own(data__videos=str(copy), data__bad_clips=policy, name=policy)
        (copy / "camera.mp4").rename(copy / "away")
        if policy == "error":
            with pytest.raises(
                TrainingError, match=r"1 of 8 clips can no longer be read, first .*camera\.mp4: .*; fix them"
            ):
                prepare_clips(session)
        else:
            clips = prepare_clips(session)
            assert len(clips) == 7 and "camera.mp4" not in {file.name for file in clips.files}
            assert "1 of 8 clips can no longer be read" in caplog.text
            assert "camera.mp4" in (session.folder / "clips-lost.jsonl").read_text()
        (copy / "away").rename(copy / "camera.mp4")
    again = prepare_clips(open_own(data__videos=str(copy), data__bad_clips="skip", name="skip"))
    # the run continues as it began, though the file is back
    assert again.files == clips.files


def test_held_out_files_are_not_trained_on(open_own):
    clips = EncodedClips(list("abcdefghijklmnop"), [(17, 32, 32)] * 16, [*"aabbccddeefffggg"], dict)
    train, held = clips.split()
    # the last eighth, from 14 on, would part the windows of file g
    assert (train, held) == ([list(range(13))], [[13, 14, 15]])
    assert EncodedClips(["x"] * 16, [(1, 1, 1)] * 16, ["a"] * 16, dict).split() == ([list(range(14))], [[14, 15]])


def test_two_processes_train_what_one_does(recipe, tmp_path):
    path = recipe(rl__prompts=4, align__steps=3)
    pair = [str(path), "name=pair", f"data.cache={tmp_path / 'pair'}"]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "OMP_NUM_THREADS": "1"}
    # tests/test_train.py starts its ranks with torchrun
    ranks = [start_run(pair, RANK=rank, LOCAL_RANK=rank, **where) for rank in "01"]
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert main([str(path), "name=alone", f"data.cache={tmp_path / 'alone'}"]) == 0

    def entries(name):
        return {path.name: read_entry(path) for path in (tmp_path / name).glob("*/*/*.safetensors")}

    def gradient_norms(name):
        return [row["grad_norm"] for row in read_json_lines(tmp_path / "runs" / name / "align.jsonl")]

    of_pair, of_one = entries("pair"), entries("alone")
    assert of_pair.keys() == of_one.keys() and len(of_pair) >= 16
    # the same bits, whichever rank made an entry
    for name, entry in of_pair.items():
        assert all(torch.equal(value, of_one[name][key]) for key, value in entry.items())
    # the ranks' gradients are added in another order, so training agrees to rounding only
    of_pair, of_one = (read_lora(tmp_path / "runs" / name / "lora" / "aligned") for name in ("pair", "alone"))
    assert all(torch.allclose(of_pair[name], of_one[name], atol=2e-4) for name in of_one)
    assert gradient_norms("pair") == pytest.approx(gradient_norms("alone"), rel=1e-4)
