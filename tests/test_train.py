"""All of it from the command line: every stage, killed in each and started again, on one process and on two."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from ldo.core.files import read_json_lines
from ldo.models.lora import read_lora
from ldo.train import main
from tests.helpers import recipes
from tests.helpers.forked import start_run

STAGES = ["gate", "sft", "align", "reinforce", "evaluate", "report"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(path, *extra, processes=1):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "ldo.train", str(path), *extra]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, wan_folder, vjepa_folder):
    return recipes.write(
        tmp_path_factory.mktemp("train"), wan_folder, vjepa_folder, stages=STAGES, align__steps=8, rl__updates=6
    )


@pytest.fixture(scope="module")
def whole(recipe):
    """The folder of an undisturbed run."""
    assert main([str(recipe)]) == 0
    return recipe.parent / "runs" / "small"


def contents(folder):
    """What two runs must share: logs, adapters, gate, measurements."""
    report = json.loads((folder / "report.json").read_text())
    return {
        **{stage: (folder / f"{stage}.jsonl").read_text() for stage in ("sft", "align", "reinforce")},
        **{str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("lora/*/*.safetensors"))},
        "gate": (folder / "gate.json").read_text(),
        "eval": [(folder / "eval" / f"{arm}.json").read_text() for arm in ("base", "sft", "aligned", "ldo")],
        "stages": report["stages"],
    }


def test_a_run_leaves_report_and_loras(whole):
    report = json.loads((whole / "report.json").read_text())
    assert [arm["name"] for arm in report["stages"]] == ["base", "sft", "aligned", "ldo"]
    for stage in report["stages"]:
        assert stage["n_videos"] == 8
        assert set(stage["metrics"]) >= {
            "violation_rate",
            "existence",
            "law_residual",
            "teleport_rate",
            "motion_ratio",
            "reward_skill",
            "reward_plain",
        }
        assert all(metric["low"] <= metric["mean"] <= metric["high"] for metric in stage["metrics"].values())
    assert report["gate"]["passed"] is False and report["versions"]["torch"] and report["config"]["align"]["steps"] == 8
    page = (whole / "report.html").read_text()
    assert "Side by side" in page and "data:image/png" in page and "http" not in page.replace("http://www.w3.org", "")


def test_a_finished_run_started_again_changes_nothing(whole, recipe):
    before = contents(whole)
    assert main([str(recipe)]) == 0
    assert contents(whole) == before


def wait_for(process, ready, seconds=120):
    end = time.monotonic() + seconds
    while not ready():
        assert process.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < end, "the run did not come so far"
        time.sleep(0.002)


def test_killed_anywhere_it_ends_with_the_same_numbers(whole, recipe):
    name = ["name=killed"]
    folder = whole.with_name("killed")

    def lines(stage):
        log = folder / f"{stage}.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0

    moments = [
        lambda: (folder / "recipe.yaml").exists(),
        lambda: lines("sft") >= 3,
        lambda: lines("align") >= 5,
        lambda: lines("reinforce") >= 3,
        lambda: (folder / "eval" / "sft.json").exists(),
    ]
    for ready in moments:
        process = start_run([str(recipe), *name], OMP_NUM_THREADS="1")
        wait_for(process, ready)
        process.kill()
        process.join()
    assert main([str(recipe), *name]) == 0
    assert contents(folder) == contents(whole)


def test_two_processes_train_what_one_does(whole, recipe):
    extra = ["name=pair", "stages=[sft,align,reinforce]", "align.steps=4", "rl.updates=2", "rl.prompts=4"]
    subprocess.run(command(recipe, *extra, processes=2), env=ENVIRONMENT, check=True, capture_output=True)
    assert main([str(recipe), "name=alone", *extra[1:]]) == 0
    pair, alone = whole.with_name("pair"), whole.with_name("alone")
    # the ranks' gradients are added in another order, so the two agree to rounding only
    for arm in ("sft", "aligned", "ldo"):
        of_pair, of_one = read_lora(pair / "lora" / arm), read_lora(alone / "lora" / arm)
        for name in of_pair:
            assert torch.allclose(of_pair[name], of_one[name], atol=2e-4), (arm, name)
    for row, expected in zip(read_json_lines(pair / "sft.jsonl"), read_json_lines(alone / "sft.jsonl"), strict=True):
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_critic_that_fails_the_gate_stops_the_run(recipe, capsys):
    assert main([str(recipe), "name=gated", "gate.override=false"]) == 2
    out = capsys.readouterr()
    assert "gate: FAILED" in out.out and "FAILS" in out.out
    assert "the critic failed the gate" in out.err and "gate.override=true" in out.err
    assert not (recipe.parent / "runs" / "gated" / "sft.jsonl").exists()
