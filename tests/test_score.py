"""Scoring any videos: the critic's numbers from a stream, the moment of a break, broken files, restarts, the page."""

import csv
import json
import re

import numpy as np
import pytest
import torch

from ldo import score
from ldo.core.config import CriticConfig
from ldo.core.rng import numpy_rng
from ldo.data.video import read_video, to_images, write_video
from ldo.method.critic import look_at_windows, score_clips
from ldo.method.guards import motion
from ldo.models.world_model import WorldModel
from ldo.sandbox import corrupt, scenes, simulate
from ldo.sandbox.shipped import WORLD_MODEL
from ldo.stages import score_video as one_video
from ldo.stages.score_folder import find_videos
from ldo.stages.score_video import score_video


def write_clip(path, frames=17, kind=None, size=32, fps=8.0, seed=0):
    """Write a sandbox clip, broken in the way that ``kind`` names, if any; returns the frame of the break."""
    scene = scenes.sample_scene(numpy_rng(seed, "film"), kind="uniform")
    # The break draws numbers of its own, so that the scene is the same with and without it.
    if kind:
        track = corrupt.corrupt(scene, numpy_rng(seed, "film break"), kind, frames)
    else:
        track = simulate.track(scene, frames)
    write_video(path, to_images(simulate.render(track, size)), fps)
    return track.event


def whole(judge, path, config, fps=0.0):
    """The critic's score of the whole clip in memory, brought to another rate as a recipe does it."""
    images, rate = read_video(path)
    return score_clips(judge, as_batch(images), config.changed(fps=fps), rate)


def as_batch(images):
    """uint8 images [T, H, W, 3] as frames [1, T, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)[None].float() / 255


# One window; two; windows that do not fit, an even and an odd length.
@pytest.mark.parametrize("frames", [17, 25, 30, 44])
@pytest.mark.parametrize(
    "changes",
    [{}, {"direction": "forward", "reward": "plain"}, {"windows": "worst", "plain_weight": 0.5, "contexts": (8, 2)}],
)
def test_the_reward_is_the_critics_own(judge, tmp_path, frames, changes):
    config = CriticConfig(**changes)
    write_clip(tmp_path / "a.mp4", frames)
    expected = whole(judge, tmp_path / "a.mp4", config)
    for batch in (1, 4):
        record = score_video(judge, tmp_path / "a.mp4", config, batch=batch)
        for name in ("reward", "skill", "plain"):
            assert record[name] == pytest.approx(getattr(expected, name).item(), abs=1e-6), name
    assert record["frames"] == frames and record["fps"] == 8


def test_another_rate_and_a_larger_picture(judge, tmp_path):
    write_clip(tmp_path / "a.mp4", 50, size=56)
    record = score_video(judge, tmp_path / "a.mp4", CriticConfig(), fps=4.0)
    assert record["frames"] == 25 and record["fps"] == 4 and record["source_fps"] == 8 and record["width"] == 56
    assert record["reward"] == pytest.approx(
        whole(judge, tmp_path / "a.mp4", CriticConfig(), 4.0).reward.item(), abs=1e-6
    )
    assert record["motion"] == pytest.approx(motion_by_hand(judge, tmp_path / "a.mp4"), rel=1e-4)


def motion_by_hand(judge, path):
    images, _ = read_video(path)
    return motion(judge.resize(as_batch(images[::2].copy()))).item()


def test_curves_are_the_residuals_of_each_tubelet(judge, tmp_path):
    """One window: a tubelet's surprise is that of the forecast from all frames before it, one tubelet ahead."""
    write_clip(tmp_path / "a.mp4")
    record = score_video(judge, tmp_path / "a.mp4", CriticConfig(contexts=(4,)))
    curves = record["curves"]
    # By hand: one forecast for each tubelet, from all frames before it.
    images, _ = read_video(tmp_path / "a.mp4")
    forward = as_batch(images)[:, 1:]
    directions = {
        "forward": (forward, curves["forward"]),
        "backward": (forward.flip(1), curves["backward"][::-1]),
    }
    for name, (clip, curve) in directions.items():
        assert curve[:2] == [None, None]
        for context in range(4, 16, 2):
            near = CriticConfig(contexts=(context,), horizon=1, reward="plain", direction="forward")
            # The critic drops the first frame.
            alone = score_clips(judge, torch.cat([clip[:, :1], clip], 1), near).plain.item()
            assert curve[context // 2] == pytest.approx(-alone, abs=2e-6), (name, context)
    assert curves["seconds"] == [(2 + 2 * tubelet) / 8 for tubelet in range(8)]
    surprise, persistence = np.array(curves["forward"][2:]), np.array(curves["persistence"][2:])
    skill = ((persistence - surprise) / (persistence + 0.02)).clip(-1, 1)
    assert np.allclose(curves["skill"][2:], skill, atol=1e-4)


def test_the_most_surprising_moment_is_where_a_ball_jumps(tmp_path):
    """With the shipped V-JEPA: of 8 videos of 12 or 20 tubelets, at least 6 peak in the tubelet of the jump.

    Chance gives less than 1.
    """
    world = WorldModel.load(WORLD_MODEL)
    hits = 0
    for seed in range(8):
        event = write_clip(tmp_path / f"{seed}.mp4", 25 if seed % 2 else 41, "teleport", seed=seed)
        record = score_video(world, tmp_path / f"{seed}.mp4", CriticConfig())
        # A tubelet has two frames, and the later one may be that of the jump.
        hits += abs(record["worst_second"] * 8 - (event + 0.5)) <= 0.5
    assert hits >= 6


def test_little_is_held_of_a_long_video(judge, tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4", 72)
    batch_sizes = []

    def look_and_count(world_model, windows, *arguments, **options):
        batch_sizes.append(len(windows))
        return look_at_windows(world_model, windows, *arguments, **options)

    monkeypatch.setattr(one_video, "look_at_windows", look_and_count)
    record = score_video(judge, tmp_path / "a.mp4", CriticConfig(), batch=2)
    assert record["windows"] == 8 and max(batch_sizes) == 2
    assert len(record["curves"]["forward"]) == 36 and None not in record["curves"]["forward"][2:]


@pytest.fixture
def folder(tmp_path):
    """Videos of several sizes, rates and lengths, and files that cannot be scored."""
    write_clip(tmp_path / "v" / "a b#1.mp4", 17)
    write_clip(tmp_path / "v" / "deep" / "b.mkv", 30, "teleport", 48, 12.5)
    write_clip(tmp_path / "v" / "short.mp4", 9)
    (tmp_path / "v" / "<i>empty.mp4").write_bytes(b"")
    (tmp_path / "v" / "noise.avi").write_bytes(b"no video at all" * 99)
    (tmp_path / "v" / "notes.txt").write_text("not a video")
    return tmp_path


def run(folder, vjepa, *more, out="out"):
    places = [str(folder / "v"), "--world-model", str(vjepa), "--out", str(folder / out)]
    return score.main([*places, "--fps", "0", *more])


def test_a_mixed_folder(folder, vjepa_folder, capsys):
    assert run(folder, vjepa_folder) == 0
    output, errors = capsys.readouterr()
    assert (
        "2 of 5 videos scored" in output and "it is empty" in errors and "9 frames at 8 fps and 17 are needed" in errors
    )
    with open(folder / "out" / "scores.csv") as file:
        records = {record["file"].rpartition("/")[2]: record for record in csv.DictReader(file)}
    problems = {name for name, record in records.items() if record["problem"]}
    assert len(records) == 5 and problems == {"short.mp4", "<i>empty.mp4", "noise.avi"}
    assert (records["b.mkv"]["fps"], records["b.mkv"]["width"], records["b.mkv"]["windows"]) == ("12.5", "48", "3")
    curves = json.loads((folder / "out" / "curves.json").read_text())
    assert len(curves["videos"]) == 2 and curves["settings"]["critic"]["window"] == 16


def test_the_page_stands_alone(folder, vjepa_folder):
    run(folder, vjepa_folder)
    page = (folder / "out" / "index.html").read_text()
    assert not re.search(r"https?://|//cdn|@import", page)
    for words in ("<article", "data:image/jpeg;base64,", "most surprising: "):
        assert page.count(words) == 2
    # Quoted, or the browser would not find the file.
    assert 'src="../v/a%20b%231.mp4"' in page
    assert "&lt;i&gt;empty.mp4" in page and "<i>empty" not in page
    run(folder, vjepa_folder, "--embed")
    page = (folder / "out" / "index.html").read_text()
    assert page.count("data:video/") == 2 and "../v/" not in page


def test_a_restart_continues(folder, vjepa_folder, monkeypatch, capsys):
    scored_names = []
    interrupted = True

    def score_until_the_third(world_model, path, *rest):
        scored_names.append(path.name)
        if interrupted and len(scored_names) == 3:
            raise KeyboardInterrupt
        return score_video(world_model, path, *rest)

    monkeypatch.setattr(one_video, "score_video", score_until_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(folder, vjepa_folder)
    # What was done is there: a heading and two videos.
    assert len((folder / "out" / "scores.csv").read_text().splitlines()) == 3
    with open(folder / "out" / "results.jsonl", "a") as file:
        file.write('{"key": "cut sho')
    interrupted = False
    scored_names.clear()
    assert run(folder, vjepa_folder) == 0 and len(scored_names) == 3
    resumed = (folder / "out" / "scores.csv").read_text()
    assert run(folder, vjepa_folder, out="other") == 0
    assert (folder / "other" / "scores.csv").read_text() == resumed
    # A file that has changed is scored again.
    write_clip(folder / "v" / "a b#1.mp4", 18)
    scored_names.clear()
    assert run(folder, vjepa_folder) == 0 and scored_names == ["a b#1.mp4"]
    assert run(folder, vjepa_folder, "--stride", "4") == 2
    assert "was made with critic.stride=8" in capsys.readouterr().err


def test_a_recipe_gives_the_critic(folder, vjepa_folder):
    (folder / "r.yaml").write_text(
        f"world_model: {{path: {vjepa_folder}}}\ncritic: {{metric: l1, contexts: [8], fps: 6}}"
    )
    command = [str(folder / "v" / "deep"), "--recipe", str(folder / "r.yaml")]
    # At 6 fps the video gives 15 frames, which are too few for a window of 16.
    assert score.main([*command, "--out", str(folder / "out")]) == 2
    assert score.main([*command, "--out", str(folder / "two"), "--window", "10"]) == 0
    settings = json.loads((folder / "two" / "settings.json").read_text())
    assert settings["fps"] == 6 and settings["critic"]["metric"] == "l1" and settings["critic"]["window"] == 10
    with open(folder / "two" / "scores.csv") as file:
        record = next(csv.DictReader(file))
    config = CriticConfig(metric="l1", contexts=(8,), window=10)
    expected = whole(WorldModel.load(vjepa_folder), folder / "v" / "deep" / "b.mkv", config, 6.0)
    assert float(record["reward"]) == pytest.approx(expected.reward.item(), abs=1e-6)


def test_default_world_model_is_the_sandboxes_and_says_so(folder, capsys):
    assert score.main([str(folder / "v" / "a b#1.mp4"), "--out", str(folder / "out")]) == 0
    assert "knows only coloured balls" in capsys.readouterr().err
    assert json.loads((folder / "out" / "settings.json").read_text())["fps"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist; give a folder"),
        (["{v}/none*.mp4"], "does not exist"),
        (["{v}/text"], "holds no videos"),
        (["{v}", "--world-model", "{v}"], "has no readable config.json"),
        (["{v}", "--world-model", "{v}/missing"], "--world-model: folder"),
        (["{v}", "--window", "15"], "takes a multiple of 2 of at most 16"),
        (["{v}", "--window", "32"], "at most 16"),
        (["{v}", "--contexts", "4,16"], "below the window of 16"),
        (["{v}", "--window", "0"], "--window is 0"),
        (["{v}", "--stride", "0"], "--stride is 0"),
        (["{v}", "--fps", "-1"], "--fps is -1"),
        (["{v}", "--batch", "0"], "--batch is 0"),
        (["{v}", "--recipe", "{v}/no.yaml"], "does not exist"),
        (["{v}/short.mp4"], "none of 1 videos could be scored"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, words, message):
    (folder / "v" / "text").mkdir()
    arguments = [word.replace("{v}", str(folder / "v")) for word in words]
    assert score.main([*arguments, "--out", str(folder / "out")]) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("ldo: ") and message in last_line


def test_find_takes_folders_files_and_patterns(folder):
    videos = folder / "v"

    def names(*places):
        return [path.name for path in find_videos([str(place) for place in places])]

    assert names(videos) == ["<i>empty.mp4", "a b#1.mp4", "b.mkv", "noise.avi", "short.mp4"]
    assert names(videos / "*.mp4", videos / "short.mp4") == ["<i>empty.mp4", "a b#1.mp4", "short.mp4"]


def test_a_model_that_does_not_fit_is_one_line(folder, capsys, monkeypatch):
    def too_large(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(WorldModel, "load", too_large)
    assert score.main([str(folder / "v"), "--out", str(folder / "out")]) == 2
    assert "ldo: the GPU's memory does not hold --batch 4 windows" in capsys.readouterr().err
