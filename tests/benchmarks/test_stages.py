"""The split of the relation loss, its benchmark and the tuner: dry runs on the CPU, and what they must refuse."""

import json
import sys
import time

import pytest
import torch

from benchmarks import bench_stages, common, model, stages, tune_pairs
from ldo.kernels import relation, relation_plan, support

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the scripts themselves")


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    monkeypatch.setattr(common, "seconds", lambda work, *_: [work() is None or 1.0])
    for name in ("choose_config", "GROUP"):  # the tuner sets them
        monkeypatch.setattr(relation_plan, name, getattr(relation_plan, name))
    yield
    relation_plan.plan.cache_clear()
    relation_plan.tile_table.cache_clear()


def run(script, monkeypatch, tmp_path, *flags):
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--out", str(out), *flags])
    return script.main(), json.loads(out.read_text())["rows"]


def test_split_covers_the_operation_and_leaves_it_as_it_was():
    before = support.Launch.__call__, relation._add_product
    x, y = torch.randn(1, 40, 16), torch.randn(1, 40, 12)
    loss = lambda x: relation.relation_loss(x, y, None, None, margin=0.1, penalty="hinge", spatial=1.0, temporal=0.0)  # noqa: E731
    work = common.passes(loss, "fwd+bwd")
    expected = work(x)
    results = []
    found = stages.split(lambda x: results.append(work(x)), [(x,)], CPU, 2)
    assert len(results) == 3 and all(torch.equal(r, expected) for r in results)
    assert set(found.ms) == set(stages.STAGES) and all(ms > 0 for ms in found.ms.values()) and found.usage == {}
    assert (support.Launch.__call__, relation._add_product) == before
    forward = stages.split(common.passes(loss, "fwd"), [(x,)], CPU, 1).ms
    assert forward["product"] == 0 < forward["pairs"]


@pytest.mark.parametrize("n", [64, 97, 700])
def test_pair_flops_are_those_of_the_tiles(n):
    c = relation_plan.ON_CPU
    tiles = relation_plan.tile_table(n, 0, n, c.rows, c.cols, CPU)
    squares = len({(r // c.square, q // c.square) for r, q in tiles.tolist()})
    assert stages.pair_flops(n, 40, 24, c) == squares * c.square**2 * 2 * (40 + 24)
    assert stages.pair_flops(n, 40, 24, c) >= model.floor_flops(n, 40, 24, "fwd")


def test_stages_run_small(monkeypatch, tmp_path):
    code, rows = run(bench_stages, monkeypatch, tmp_path, "--quick", "--sizes", "33", "--widths", "16x8", "--batch", "2")
    assert code == 0 and [r["pass"] for r in rows] == ["fwd", "fwd+bwd"] and all(r["shape"]["B"] == 2 for r in rows)
    assert all(r["stages_ms"]["pairs"] > 0 and r["pair_tflops"] > 0 for r in rows)


@pytest.mark.parametrize(("arch", "half"), tune_pairs.PROMISING)
def test_candidates_are_distinct_and_the_usual_one_leads(arch, half):
    usual = relation_plan.CONFIGS[arch, half]
    found = tune_pairs.candidates(usual, arch, half)
    assert found[0] == usual and len(set(found)) == len(found) == len({usual, *found}) and len(found) > 3
    element = 2 if half else 4
    for c in found:
        shared = (c.rows + c.cols) * c.depth * element * c.stages
        assert shared <= 228 * 1024 and c.cols % c.slices == 0 and c.slices in (1, 2, 4)
    if arch == 90 and half:
        assert all((c.rows, c.cols, c.depth, c.warps) == (128, 256, 64, 8) for c in found[:2])


def test_tuner_runs_small_and_keeps_its_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune_pairs, "TINY", tune_pairs.TINY[:2])
    code, rows = run(tune_pairs, monkeypatch, tmp_path, "--sizes", "65,40", "--widths", "16x12")
    printed = capsys.readouterr().out
    assert code == 0 and "<- in use" in printed and printed.count("best at ") == 2 and ": Config(" in printed
    first = [r for r in rows if r["N"] == 65]
    assert [tuple(r["config"].values())[:6] for r in first[:2]] == tune_pairs.TINY and [r["group"] for r in first] == [8, 8, 4, 16]
    assert all(r["fwd_ms"] and r["fwd_bwd_ms"] and r["pair_ms"] and r["pair_tflops"] and r["difference"] < 1e-5 for r in rows)
    assert rows[0]["difference"] == 0 and 1 <= len(rows) - len(first) <= tune_pairs.KEPT + 1


def test_tuner_refuses_a_configuration_that_is_wrong(monkeypatch, tmp_path, capsys):
    """One that leaves out a tile, however fast."""
    monkeypatch.setattr(tune_pairs, "TINY", tune_pairs.TINY[:2])
    monkeypatch.setattr(tune_pairs, "GROUPS", ())
    table, wrong = relation_plan.tile_table, tune_pairs.TINY[1]

    def careless(n, p0, p1, rows, cols, device):
        found = table(n, p0, p1, rows, cols, device)
        return torch.cat([found[1:2], found[1:]]) if (rows, cols) == wrong[:2] else found

    careless.cache_clear = table.cache_clear
    monkeypatch.setattr(relation_plan, "tile_table", careless)
    code, rows = run(tune_pairs, monkeypatch, tmp_path, "--sizes", "65", "--widths", "16x12")
    printed = capsys.readouterr().out
    assert code == 1 and "REFUSED" in printed and "fwd_bwd_ms" not in rows[1]
    assert f"Config({', '.join(map(str, tune_pairs.TINY[0]))}" in printed
    monkeypatch.undo()


def test_tuner_stops_when_time_is_up(monkeypatch, tmp_path, capsys):
    clock = iter([0.0] * 2 + [100.0] * 50)
    monkeypatch.setattr(tune_pairs, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock)), "perf_counter": time.perf_counter}))
    code, rows = run(tune_pairs, monkeypatch, tmp_path, "--sizes", "40", "--widths", "16x12", "--minutes", "1")
    assert (
        code == 0 and len(rows) == 1 and capsys.readouterr().out.count("no time left for 40: ") == len(tune_pairs.TINY) - 1 + len(tune_pairs.GROUPS)
    )


def test_model_stages_add_up():
    for n in (4096, 8192, 32768):
        cost = model.ours(n, 1920, 1024, model.Rates())
        assert sum(cost.stages.values()) == pytest.approx(cost.seconds) and max(cost.stages, key=cost.stages.get) in ("pairs", "product")
    assert len(model.split(model.Rates())) == 6
