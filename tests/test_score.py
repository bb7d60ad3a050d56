"""Scoring any videos: the critic's own numbers from a stream, the moment of a break, broken files, restarts, a page that stands alone."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldo import critic, score
from ldo.config import Critic
from ldo.rng import numpy_rng
from ldo.sandbox import corrupt, scenes, simulate
from ldo.sandbox.dataset import WORLD_MODEL, to_images
from ldo.video import read_video, write_video
from ldo.world_model import WorldModel


def film(path, frames=17, kind=None, size=32, fps=8.0, seed=0):
    """A sandbox clip on disk, broken at a frame that is returned if ``kind`` says how."""
    scene = scenes.sample_scene(numpy_rng(seed, "film"), kind="uniform")
    track = corrupt.corrupt(scene, numpy_rng(seed, "film break"), kind, frames) if kind else simulate.track(scene, frames)
    write_video(path, to_images(simulate.render(track, size)), fps)
    return track.event


def whole(judge, path, config, fps=0.0):
    """The critic's score of the whole clip in memory, by the recipe's way to another rate."""
    images, rate = read_video(path)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)[None].float() / 255
    return critic.score(judge, x, replace(config, fps=fps), rate)


@pytest.mark.parametrize("frames", [17, 25, 30, 44])  # one window; two; windows that do not fit, an even and an odd length
@pytest.mark.parametrize("changes", [{}, {"direction": "forward", "reward": "plain"}, {"windows": "worst", "plain_weight": 0.5, "contexts": (8, 2)}])
def test_the_reward_is_the_critics_own(judge, tmp_path, frames, changes):
    config = Critic(**changes)
    film(tmp_path / "a.mp4", frames)
    expected = whole(judge, tmp_path / "a.mp4", config)
    for batch in (1, 4):
        row = score.judge(judge, tmp_path / "a.mp4", config, batch=batch)
        for name in ("reward", "skill", "plain"):
            assert row[name] == pytest.approx(getattr(expected, name).item(), abs=1e-6), name
    assert row["frames"] == frames and row["fps"] == 8


def test_another_rate_and_a_larger_picture(judge, tmp_path):
    film(tmp_path / "a.mp4", 50, size=56)
    row = score.judge(judge, tmp_path / "a.mp4", Critic(), fps=4.0)
    assert row["frames"] == 25 and row["fps"] == 4 and row["source_fps"] == 8 and row["width"] == 56
    assert row["reward"] == pytest.approx(whole(judge, tmp_path / "a.mp4", Critic(), 4.0).reward.item(), abs=1e-6)
    assert row["motion"] == pytest.approx(motion_by_hand(judge, tmp_path / "a.mp4"), rel=1e-4)


def motion_by_hand(judge, path):
    images = torch.from_numpy(read_video(path)[0][::2].copy()).permute(0, 3, 1, 2)[None].float() / 255
    return critic.motion(judge.resize(images)).item()


def test_curves_are_the_residuals_of_each_tubelet(judge, tmp_path):
    """One window: a tubelet's surprise is that of the forecast from all frames before it, one tubelet ahead."""
    film(tmp_path / "a.mp4")
    row = score.judge(judge, tmp_path / "a.mp4", Critic(contexts=(4,)))
    x = torch.from_numpy(read_video(tmp_path / "a.mp4")[0]).permute(0, 3, 1, 2)[None].float()[:, 1:] / 255
    for way, clip in (("forward", x), ("backward", x.flip(1))):
        found = row["curves"][way][:: 1 if way == "forward" else -1]
        assert found[:2] == [None, None]
        for context in range(4, 16, 2):
            near = Critic(contexts=(context,), horizon=1, reward="plain", direction="forward")
            alone = critic.score(judge, torch.cat([clip[:, :1], clip], 1), near).plain.item()
            assert found[context // 2] == pytest.approx(-alone, abs=2e-6), (way, context)
    assert row["curves"]["seconds"] == [(2 + 2 * k) / 8 for k in range(8)]
    s, c = np.array(row["curves"]["forward"][2:]), np.array(row["curves"]["persistence"][2:])
    assert np.allclose(row["curves"]["skill"][2:], ((c - s) / (c + 0.02)).clip(-1, 1), atol=1e-4)


def test_the_most_surprising_moment_is_where_a_ball_jumps(tmp_path):
    """With the shipped V-JEPA: of 8 films of some 12 or 20 tubelets, at least 6 peak in the tubelet of the jump. Chance gives less than 1."""
    world, hits = WorldModel.load(WORLD_MODEL), 0
    for seed in range(8):
        event = film(tmp_path / f"{seed}.mp4", 25 if seed % 2 else 41, "teleport", seed=seed)
        row = score.judge(world, tmp_path / f"{seed}.mp4", Critic())
        hits += abs(row["worst_second"] * 8 - (event + 0.5)) <= 0.5  # a tubelet of two frames, the later of which may be the event
    assert hits >= 6


def test_little_is_held_of_a_long_film(judge, tmp_path, monkeypatch):
    film(tmp_path / "a.mp4", 72)
    held = []
    look = critic.look
    monkeypatch.setattr(critic, "look", lambda world, windows, *a, **k: held.append(len(windows)) or look(world, windows, *a, **k))
    row = score.judge(judge, tmp_path / "a.mp4", Critic(), batch=2)
    assert row["windows"] == 8 and max(held) == 2
    assert len(row["curves"]["forward"]) == 36 and None not in row["curves"]["forward"][2:]


@pytest.fixture
def folder(tmp_path):
    """Films of several sizes, rates and lengths, and files that are of no use."""
    film(tmp_path / "v" / "a b#1.mp4", 17)
    film(tmp_path / "v" / "deep" / "b.mkv", 30, "teleport", 48, 12.5)
    film(tmp_path / "v" / "short.mp4", 9)
    (tmp_path / "v" / "<i>empty.mp4").write_bytes(b"")
    (tmp_path / "v" / "noise.avi").write_bytes(b"no video at all" * 99)
    (tmp_path / "v" / "notes.txt").write_text("not a video")
    return tmp_path


def run(folder, vjepa, *more):
    return score.main([str(folder / "v"), "--world-model", str(vjepa), "--fps", "0", "--out", str(folder / "out"), *more])


def test_a_mixed_folder(folder, vjepa_folder, capsys):
    assert run(folder, vjepa_folder) == 0
    out, err = capsys.readouterr()
    assert "2 of 5 videos scored" in out and "it is empty" in err and "9 frames at 8 fps and 17 are needed" in err
    with open(folder / "out" / "scores.csv") as file:
        rows = {r["file"].rpartition("/")[2]: r for r in csv.DictReader(file)}
    assert len(rows) == 5 and {k for k, r in rows.items() if r["problem"]} == {"short.mp4", "<i>empty.mp4", "noise.avi"}
    assert (rows["b.mkv"]["fps"], rows["b.mkv"]["width"], rows["b.mkv"]["windows"]) == ("12.5", "48", "3")
    curves = json.loads((folder / "out" / "curves.json").read_text())
    assert len(curves["videos"]) == 2 and curves["settings"]["critic"]["window"] == 16


def test_the_page_stands_alone(folder, vjepa_folder):
    run(folder, vjepa_folder)
    page = (folder / "out" / "index.html").read_text()
    assert not re.search(r"https?://|//cdn|@import", page)
    assert page.count("<article") == 2 == page.count("data:image/jpeg;base64,") and page.count("most surprising: ") == 2
    assert 'src="../v/a%20b%231.mp4"' in page  # so that the page finds it
    assert "&lt;i&gt;empty.mp4" in page and "<i>empty" not in page
    run(folder, vjepa_folder, "--embed")
    page = (folder / "out" / "index.html").read_text()
    assert page.count("data:video/") == 2 and "../v/" not in page


def test_a_restart_goes_on(folder, vjepa_folder, monkeypatch, capsys):
    seen, judge = [], score.judge

    def stop_at_the_second(world, path, *rest):
        seen.append(path.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return judge(world, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(score, "judge", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(folder, vjepa_folder)
    assert len((folder / "out" / "scores.csv").read_text().splitlines()) == 3  # what was done is there
    with open(folder / "out" / "results.jsonl", "a") as file:
        file.write('{"key": "cut sho')
    seen.clear()
    monkeypatch.setattr(score, "judge", lambda world, path, *rest: seen.append(path.name) or judge(world, path, *rest))
    assert run(folder, vjepa_folder) == 0 and len(seen) == 3
    first = (folder / "out" / "scores.csv").read_text()
    assert score.main([str(folder / "v"), "--world-model", str(vjepa_folder), "--fps", "0", "--out", str(folder / "other")]) == 0
    assert (folder / "other" / "scores.csv").read_text() == first
    film(folder / "v" / "a b#1.mp4", 18)  # a file that has changed is scored anew
    seen.clear()
    assert run(folder, vjepa_folder) == 0 and seen == ["a b#1.mp4"]
    assert run(folder, vjepa_folder, "--stride", "4") == 2 and "was made with critic.stride=8" in capsys.readouterr().err


def test_a_recipe_gives_the_critic(folder, vjepa_folder):
    (folder / "r.yaml").write_text(f"world_model: {{path: {vjepa_folder}}}\ncritic: {{metric: l1, contexts: [8], fps: 6}}")
    assert score.main([str(folder / "v" / "deep"), "--recipe", str(folder / "r.yaml"), "--out", str(folder / "out")]) == 2  # 15 frames at 6 fps
    assert score.main([str(folder / "v" / "deep"), "--recipe", str(folder / "r.yaml"), "--out", str(folder / "two"), "--window", "10"]) == 0
    settings = json.loads((folder / "two" / "settings.json").read_text())
    assert settings["fps"] == 6 and settings["critic"]["metric"] == "l1" and settings["critic"]["window"] == 10
    with open(folder / "two" / "scores.csv") as file:
        row = next(csv.DictReader(file))
    config = Critic(metric="l1", contexts=(8,), window=10)
    expected = whole(WorldModel.load(vjepa_folder), folder / "v" / "deep" / "b.mkv", config, 6.0)
    assert float(row["reward"]) == pytest.approx(expected.reward.item(), abs=1e-6)


def test_default_world_model_is_the_sandboxes_and_says_so(folder, capsys):
    assert score.main([str(folder / "v" / "a b#1.mp4"), "--out", str(folder / "out")]) == 0
    assert "knows coloured balls alone" in capsys.readouterr().err
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
        (["{v}", "--stride", "0"], "--stride is 0"),
        (["{v}", "--fps", "-1"], "--fps is -1"),
        (["{v}", "--batch", "0"], "--batch is 0"),
        (["{v}", "--recipe", "{v}/no.yaml"], "does not exist"),
        (["{v}/short.mp4"], "none of 1 videos could be scored"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, words, message):
    (folder / "v" / "text").mkdir()
    words = [w.replace("{v}", str(folder / "v")) for w in words]
    assert score.main([*words, "--out", str(folder / "out")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("ldo: ") and message in last


def test_find_takes_folders_files_and_patterns(folder):
    v = folder / "v"
    assert [p.name for p in score.find([str(v)])] == ["<i>empty.mp4", "a b#1.mp4", "b.mkv", "noise.avi", "short.mp4"]
    assert [p.name for p in score.find([str(v / "*.mp4"), str(v / "short.mp4")])] == ["<i>empty.mp4", "a b#1.mp4", "short.mp4"]
