"""Every mistake a user can make is one line, what, where and the fix, with exit code 2, before anything loads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldo import train
from ldo.check import main as check_main
from ldo.core.config import AlignConfig, Recipe, ReinforceConfig
from ldo.core.errors import RecipeError
from ldo.data.video import write_video
from ldo.run.rules import check_processes
from ldo.stages import sequence
from tests.helpers import recipes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def recipe(tmp_path, wan_folder, vjepa_folder):
    return lambda **changes: str(recipes.write(tmp_path, wan_folder, vjepa_folder, **changes))


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch):
    def refuse(*_):
        raise AssertionError("a model was about to load")

    monkeypatch.setattr(sequence, "run_stages", refuse)


def fails(capsys, *argv):
    """Run both commands; return the one line that each prints."""
    # both must refuse, and for the same reason: whoever checked a recipe must not be surprised by the trainer
    for main in (train.main, check_main):
        assert main([str(argument) for argument in argv]) == 2
        lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("probe ")]
        assert len(lines) == 1 and lines[0].startswith("ldo: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rl.group_size=1", ["rl.group_size is 1", "at least 2"]),
        ("data.frames=16", ["16 frames", "4K+1", "use 17"]),
        ("data.frames=19", ["19 frames", "use"]),
        ("data.height=30", ["height 30", "multiple of 8", "use 32"]),
        ("teacher.context=16", ["teacher.context", "16 frames is not shorter than the window of 16"]),
        ("critic.contexts=[4,20]", ["critic.contexts", "20"]),
        ("critic.contexts=[]", ["critic.contexts is empty"]),
        ("critic.motion_ceiling=0", ["critic.motion_ceiling is 0", "above 0"]),
        ("critic.plain_horizon=-1", ["critic.plain_horizon is -1", "at least 0"]),
        ("teacher.context=7", ["teacher.context is 7", "tubelets of 2"]),
        ("critic.window=20", ["critic.window is 20", "use at most 16"]),
        ("teacher.stride=12", ["teacher.stride is 12", "never forecast"]),
        ("rl.window=5", ["the last must be the ODE's"]),
        ("rl.micro_batch=3", ["rl.micro_batch is 3", "divide rl.group_size (4)"]),
        ("rl.micro_batch=-2", ["rl.micro_batch is -2", "at least 0"]),
        ("align.micro_batch=-1", ["align.micro_batch is -1", "at least 0"]),
        ("model.family=cogvideox align.time_shift=3", ["align.time_shift is 3", "discrete schedule"]),
        ("model.family=ltx", ["model.family is 'ltx'", "holds a wan model", "set model.family=wan"]),
        ("rl.minibatches=3", ["rl.minibatches is 3", "divide"]),
        ("align.steps=0", ["align.steps is 0"]),
        ("stages=[align,gate]", ["stages", "order"]),
        ("stages=[align,rest]", ["stages", "rest unknown"]),
        ("model.family=sora", ["model.family", "sora"]),
        ("align.stepz=3", ["unknown key align.stepz", "did you mean align.steps"]),
        ("align.steps=many", ["align.steps is 'many'", "whole number"]),
        ("teacher.mode=guess", ["teacher.mode is 'guess'", "forecast, encode, delta"]),
        ("model.path=./nowhere", ["model.path", "./nowhere does not exist"]),
        ("world_model.path=/no/such", ["world_model.path", "/no/such does not exist"]),
        ("evaluate.batch=3", ["evaluate.batch is 3", "divide"]),
        ("rl.sampler=cps rl.eta=1.0", ["rl.eta", "(0, 1)"]),
        ("rl.objective=nft rl.guidance=2.0", ["rl.guidance", "nft"]),
        (
            "teacher.projector=mlp rl.align_weight=0.1 stages=[reinforce]",
            ["projector is mlp", "rl.align_weight 0.1", "add align to stages"],
        ),
        ("name=a/b", ["name is 'a/b'"]),
        ("data.buckets=[[17,32,32]]", ["data.buckets sorts videos of your own"]),
        ("data.best_of=4", ["data.best_of chooses among the base model's own samples"]),
        (
            "data.videos=films data.buckets=[[17,32]]",
            ["data.buckets: [17, 32] is not a size; write [frames, height, width]"],
        ),
        ("data.videos=films data.buckets=[[17,32,0]]", ["[17, 32, 0] is not a size"]),
        ("data.videos=films data.buckets=[17,32,32]", ["data.buckets is 17; a list is expected"]),
        ("data.videos=films data.buckets=[[17,32,32],[17,32,32]]", ["data.buckets names a size twice"]),
        ("data.videos=films data.buckets=[[18,32,32]]", ["data.buckets [18, 32, 32]: 18 frames", "use 17"]),
        ("data.videos=films data.buckets=[[17,32,36]]", ["data.buckets [17, 32, 36]: width 36", "multiple of 8"]),
        (
            "data.videos=films data.buckets=[[17,32,32],[13,32,32]]",
            ["[13, 32, 32] leaves 12 frames", "teacher.window is 16", "longer clips"],
        ),
        ("data.bad_clips=ignore", ["data.bad_clips is 'ignore'", "error, skip"]),
        ("data.decoder=ffmpeg", ["data.decoder is 'ffmpeg'", "choose one of pyav"]),
    ],
)
def test_values(capsys, recipe, change, words):
    line = fails(capsys, recipe(), *change.split())
    assert all(word in line for word in words), line


def test_recipe_files(capsys, tmp_path, recipe):
    assert "does not exist" in fails(capsys, tmp_path / "recipy.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("align: {steps: [")
    assert "not valid YAML" in fails(capsys, path)
    path.write_text("- a\n- b\n")
    assert "must be a mapping" in fails(capsys, path)
    assert "key=value" in fails(capsys, recipe(), "align.steps")


def test_model_folders(capsys, tmp_path, recipe, wan_folder, vjepa_folder):
    assert "model_index.json" in fails(capsys, recipe(), f"model.path={tmp_path}")
    assert "no readable config.json" in fails(capsys, recipe(), f"world_model.path={tmp_path}")
    assert "not a diffusers pipeline folder" in fails(capsys, recipe(), f"model.path={vjepa_folder}")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "holds a vit model" in fails(capsys, recipe(), f"world_model.path={tmp_path}")


@pytest.fixture
def videos(tmp_path):
    """A folder of two good clips."""
    folder = tmp_path / "videos"
    rng = np.random.default_rng(0)
    for name in "ab":
        write_video(folder / f"{name}.mp4", rng.integers(0, 255, (20, 32, 32, 3), dtype=np.uint8), 8)
        (folder / f"{name}.txt").write_text("a red ball rolls")
    return folder


def test_videos(capsys, recipe, videos):
    change = f"data.videos={videos}"
    (videos / "c.txt").write_text("a caption")
    assert "c.txt is a caption without a clip" in fails(capsys, recipe(), change)
    (videos / "c.mp4").write_bytes(b"")
    assert "c.mp4: it is empty" in fails(capsys, recipe(), change)
    (videos / "c.mp4").write_bytes(b"not a video" * 100)
    assert "c.mp4: it cannot be decoded" in fails(capsys, recipe(), change)
    write_video(videos / "c.mp4", np.zeros((5, 32, 32, 3), np.uint8), 8)
    assert "c.mp4: it gives 5 frames" in fails(capsys, recipe(), change)
    (videos / "metadata.jsonl").write_text(json.dumps({"file_name": "lost.mp4", "text": "a ball"}))
    assert "lost.mp4" in fails(capsys, recipe(), change)
    assert "does not exist" in fails(capsys, recipe(), "data.videos=nowhere")


def test_prompts(capsys, recipe, tmp_path):
    assert "does not exist" in fails(capsys, recipe(), "data.prompts=none.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert "holds no prompts" in fails(capsys, recipe(), f"data.prompts={empty}")


@pytest.mark.parametrize(
    "change",
    [
        "rl.align_weight=0.1 stages=[align,reinforce]",
        "rl.align_weight=0.1 stages=[align]",
        "rl.flow_weight=0.1 stages=[reinforce]",
        "rl.align_weight=0.1 stages=[reinforce] teacher.projector=none",
    ],
)
def test_a_projector_is_refused_only_where_stage_two_would_lack_it(recipe, change):
    assert check_main([recipe(teacher__projector="mlp"), *change.split(), "--no-models"]) == 0


def test_a_sound_recipe_passes(capsys, recipe, videos):
    assert check_main([recipe(), f"data.videos={videos}", "--no-models"]) == 0
    out = capsys.readouterr().out
    assert "(5, 4, 4) tokens" in out and "The recipe is sound." in out


def test_a_run_is_not_continued_with_another_recipe(capsys, recipe, monkeypatch):
    monkeypatch.setattr(sequence, "run_stages", lambda *_: None)
    path = recipe()
    # the first start records the recipe, a second one with the same recipe is fine
    assert train.main([path]) == 0
    assert train.main([path]) == 0
    capsys.readouterr()
    assert train.main([path, "align.steps=8"]) == 2
    line = capsys.readouterr().err.strip()
    assert "was begun with align.steps=6" in line and "name=" in line and "\n" not in line


@pytest.mark.parametrize(
    "command",
    [
        "ldo.train --help",
        "ldo.train {recipe} rl.window=17",
        "ldo.check {recipe} --no-models",
        "ldo.evaluate --help",
        "ldo.report --help",
        "ldo.score nowhere",
        "ldo.sandbox.build --help",
        "ldo.sandbox.build.further --help",
        "ldo.sandbox.build.quality --help",
        "ldo.sandbox.study {recipe} rl.window=0.5",
    ],
)
def test_what_needs_no_model_is_done_without_pytorch(recipe, command):
    """In a quarter of a second and not in two: neither PyTorch nor a model library is imported."""
    module, *arguments = command.format(recipe=recipe()).split()
    # a process of its own: this one imported PyTorch long ago
    code = (
        "import runpy, sys\n"
        f"sys.argv[1:] = {arguments}\n"
        "try:\n"
        f"    runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "print({'torch', 'diffusers', 'transformers', 'peft', 'scipy'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip().endswith("set()"), out


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("align.batch", {"align": AlignConfig(batch=3)}),
        ("rl.prompts / rl.minibatches", {"rl": ReinforceConfig(prompts=2)}),
    ],
)
def test_work_must_divide_among_processes(key, change):
    with pytest.raises(RecipeError, match=f"{key} is .* with 2 processes it must be a multiple of 2"):
        check_processes(Recipe(**change), 2)
    check_processes(Recipe(**change), 1)
