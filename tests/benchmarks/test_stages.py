"""The split of the relation loss, its benchmark and the tuner: dry runs on the CPU, and what they must refuse."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_stages, model, stages, timing, tune_pairs
from benchmarks.variant import passes
from ldo.kernels import relation, relation_plan, support
from ldo.kernels.relation import fused_relation_loss

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the scripts themselves")


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    monkeypatch.setattr(timing, "seconds", lambda work, *_: [work() is None or 1.0])
    # the tuner sets these: pytest puts them back
    for attribute in ("choose_config", "GROUP"):
        monkeypatch.setattr(relation_plan, attribute, getattr(relation_plan, attribute))
    yield
    relation_plan.plan.cache_clear()
    relation_plan.tile_table.cache_clear()


def run(script, monkeypatch, tmp_path, *flags):
    result_path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--out", str(result_path), *flags])
    return script.main(), json.loads(result_path.read_text())["rows"]


def test_split_covers_the_operation_and_leaves_it_as_it_was():
    before = support.Launch.__call__, relation._add_product
    student, teacher = torch.randn(1, 40, 16), torch.randn(1, 40, 12)
    options = {"margin": 0.1, "penalty": "hinge", "spatial": 1.0, "temporal": 0.0}

    def loss(student):
        return fused_relation_loss(student, teacher, None, None, **options)

    work = passes(loss, "fwd+bwd")
    expected = work(student)
    results = []
    measured = stages.split(lambda x: results.append(work(x)), [(student,)], CPU, 2)
    assert len(results) == 3 and all(torch.equal(result, expected) for result in results)
    assert set(measured.ms) == set(stages.STAGES) and all(ms > 0 for ms in measured.ms.values())
    # the interpreter compiles nothing
    assert measured.usage == {}
    assert (support.Launch.__call__, relation._add_product) == before
    forward = stages.split(passes(loss, "fwd"), [(student,)], CPU, 1).ms
    assert forward["product"] == 0 < forward["pairs"]


@pytest.mark.parametrize("n", [64, 97, 700])
def test_pair_flops_are_those_of_the_tiles(n):
    config = relation_plan.ON_CPU
    tiles = relation_plan.tile_table(n, 0, n, config.rows, config.cols, CPU)
    squares = len({(row // config.square, column // config.square) for row, column in tiles.tolist()})
    assert stages.pair_flops(n, 40, 24, config) == squares * config.square**2 * 2 * (40 + 24)
    assert stages.pair_flops(n, 40, 24, config) >= model.floor_flops(n, 40, 24, "fwd")


def test_stages_run_small(monkeypatch, tmp_path):
    arguments = ["--quick", "--sizes", "33", "--widths", "16x8", "--batch", "2"]
    exit_code, rows = run(bench_stages, monkeypatch, tmp_path, *arguments)
    assert exit_code == 0 and [row["pass"] for row in rows] == ["fwd", "fwd+bwd"]
    for row in rows:
        assert row["shape"]["B"] == 2
        assert row["stages_ms"]["pairs"] > 0 and row["pair_tflops"] > 0


@pytest.mark.parametrize(("arch", "half"), tune_pairs.PROMISING)
def test_candidates_are_distinct_and_the_usual_one_leads(arch, half):
    usual = relation_plan.CONFIGS[arch, half]
    configs = tune_pairs.candidates(usual, arch, half)
    assert configs[0] == usual and len(set(configs)) == len(configs) == len({usual, *configs}) and len(configs) > 3
    element_bytes = 2 if half else 4
    for config in configs:
        shared_bytes = (config.rows + config.cols) * config.depth * element_bytes * config.stages
        # what a multiprocessor has at most
        assert shared_bytes <= 228 * 1024 and config.cols % config.slices == 0 and config.slices in (1, 2, 4)
    if arch == 90 and half:
        # the most promising tile leads
        for config in configs[:2]:
            assert (config.rows, config.cols, config.depth, config.warps) == (128, 256, 64, 8)


def test_tuner_runs_small_and_keeps_its_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune_pairs, "TINY", tune_pairs.TINY[:2])
    exit_code, rows = run(tune_pairs, monkeypatch, tmp_path, "--sizes", "65,40", "--widths", "16x12")
    printed = capsys.readouterr().out
    assert exit_code == 0 and "<- in use" in printed and printed.count("best at ") == 2 and ": Config(" in printed
    first = [row for row in rows if row["N"] == 65]
    assert [tuple(row["config"].values())[:6] for row in first[:2]] == tune_pairs.TINY
    assert [row["group"] for row in first] == [8, 8, 4, 16]
    for row in rows:
        assert row["fwd_ms"] and row["fwd_bwd_ms"] and row["pair_ms"] and row["pair_tflops"]
        assert row["difference"] < 1e-5
    assert rows[0]["difference"] == 0 and 1 <= len(rows) - len(first) <= tune_pairs.KEPT + 1


def test_tuner_refuses_a_configuration_that_is_wrong(monkeypatch, tmp_path, capsys):
    """One that leaves out a tile, however fast."""
    monkeypatch.setattr(tune_pairs, "TINY", tune_pairs.TINY[:2])
    monkeypatch.setattr(tune_pairs, "GROUPS", ())
    tile_table, wrong_config = relation_plan.tile_table, tune_pairs.TINY[1]

    def careless(n, p0, p1, rows, cols, device):
        tiles = tile_table(n, p0, p1, rows, cols, device)
        return torch.cat([tiles[1:2], tiles[1:]]) if (rows, cols) == wrong_config[:2] else tiles

    careless.cache_clear = tile_table.cache_clear
    monkeypatch.setattr(relation_plan, "tile_table", careless)
    exit_code, rows = run(tune_pairs, monkeypatch, tmp_path, "--sizes", "65", "--widths", "16x12")
    printed = capsys.readouterr().out
    assert exit_code == 1 and "REFUSED" in printed and "fwd_bwd_ms" not in rows[1]
    assert f"Config({', '.join(map(str, tune_pairs.TINY[0]))}" in printed
    monkeypatch.undo()


def test_tuner_stops_when_time_is_up(monkeypatch, tmp_path, capsys):
    # The deadline and the first candidate are at 0 s, all later candidates at 100 s.
    clock = iter([0.0] * 2 + [100.0] * 50)
    monkeypatch.setattr(tune_pairs, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    exit_code, rows = run(tune_pairs, monkeypatch, tmp_path, "--sizes", "40", "--widths", "16x12", "--minutes", "1")
    assert exit_code == 0 and len(rows) == 1
    skipped = len(tune_pairs.TINY) - 1 + len(tune_pairs.GROUPS)
    assert capsys.readouterr().out.count("no time left for 40: ") == skipped


def test_model_stages_add_up():
    for tokens in (4096, 8192, 32768):
        cost = model.ours(tokens, 1920, 1024, model.Rates())
        assert sum(cost.stages.values()) == pytest.approx(cost.seconds)
        assert max(cost.stages, key=cost.stages.get) in ("pairs", "product")
    assert len(model.split(model.Rates())) == 6
