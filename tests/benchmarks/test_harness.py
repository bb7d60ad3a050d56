"""The harness: what it measures, what a failing variant does, the shape of its JSON, and the scripts' own plans."""

import json
import sys
from pathlib import Path

import pretend
import pytest
import torch

from benchmarks import bench_advantage, bench_align, bench_residual, common, memory, model, show

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
KEYS = {"device", "versions", "commit", "date", "matmul_tflops", "copy_gbps", "rows"}
ROW = {"op", "variant", "pass", "shape", "dtype", "ms", "floor_ms", "extra_mib", "grad_error"}


def bench(*flags):
    return common.Bench(common.arguments("Doc.").parse_args(["--device", "cpu", "--quick", *flags]))


def case(variants, **options):
    x = torch.randn(64, 64)
    return common.Case(op="relation", kind="fwd", shape={"N": 64}, dtype=torch.float32, inputs=[(x,), (x + 1,)], variants=variants, **options)


def peak(work):
    return memory.peak_extra(work, CPU, 0)


MIB = 2**18  # elements of fp32 in a MiB


@pytest.mark.parametrize(
    "work, expected",
    [
        (lambda: torch.zeros(3 * MIB), 3),  # the result counts
        (lambda: [torch.randn(2 * MIB) for _ in range(3)], 6),
        (lambda: sum(float(torch.randn(2 * MIB)[0]) for _ in range(3)), 2),  # what is freed is freed
        (lambda: torch.randn(2 * MIB).mul_(2).add_(1), 2),
    ],
)
def test_peak_of_known_allocations(work, expected):
    assert peak(work) == pytest.approx(expected, abs=0.01)


def test_peak_counts_temporaries_of_backward():
    """Of a function whose forward keeps nothing and whose backward needs 8 MiB beside the gradient of 1."""

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, upstream):
            return torch.randn(8 * MIB)[:1].expand(MIB) * upstream

    x = torch.randn(MIB, requires_grad=True)
    assert peak(lambda: Greedy.apply(x)) < 0.1
    assert peak(lambda: torch.autograd.grad(Greedy.apply(x), x)) == pytest.approx(9, abs=0.1)


def test_chunked_relation_loss_holds_no_square():
    extra = {n: peak(lambda n=n: _chunked(n)) for n in (1024, 2048, 4096)}
    assert extra[4096] - extra[2048] == pytest.approx(2 * (extra[2048] - extra[1024]), rel=0.1), "memory grows faster than N"
    assert extra[4096] < 4096**2 * 4 / 2**20


def _chunked(n):
    bench_align.variants("few", n, {"margin": 0.1, "penalty": "hinge"}, "fwd+bwd")["chunked"](torch.randn(1, n, 8), torch.randn(1, n, 8), None, None)


def test_json_has_the_agreed_keys(tmp_path, capsys):
    out = tmp_path / "deep" / "result.json"
    b = bench("--out", str(out))
    b.measure(
        case({"chunked": lambda x: x @ x, "eager": lambda x: x * 2}, floor_ms=0.001, flops=64**3 * 2, error=lambda r: 0.5, extra={"case": "few"})
    )
    assert b.finish() == 0
    result = json.loads(out.read_text())
    assert set(result) == KEYS and [r["variant"] for r in result["rows"]] == ["chunked", "eager"]
    for row in result["rows"]:
        assert set(row) > ROW and row["shape"] == {"B": 1, "N": 64} and row["dtype"] == "fp32"
        assert row["ms_low"] <= row["ms"] <= row["ms_high"] and row["ratio_to_floor"] == row["ms"] / 0.001 and row["grad_error"] == 0.5
    assert result["versions"]["torch"] and result["device"].endswith(f"CPU, {torch.get_num_threads()} threads")
    printed = capsys.readouterr().out
    assert "this is a CPU" in printed and printed.count("relation  few") == 2


def test_variants_take_turns_on_every_input_set():
    seen = []
    b = bench()
    b.measure(case({name: lambda x, name=name: seen.append((name, float(x[0, 0]))) for name in ("chunked", "eager")}))
    timed = [name for name, _ in seen][-9:]
    assert timed == ["chunked", "eager", "chunked"] * 3, "the first variant is timed twice a round"
    assert len({value for _, value in seen}) == 2


def test_out_of_memory_is_a_row_and_the_run_goes_on(capsys):
    def hungry(x):
        raise torch.OutOfMemoryError("out of memory")

    b = bench()
    rows = b.measure(case({"eager": hungry, "chunked": lambda x: x + 1}))
    assert [(r["variant"], r["ms"], r.get("error")) for r in rows] == [("eager", None, "OOM"), ("chunked", rows[1]["ms"], None)] and rows[1]["ms"] > 0
    assert b.finish() == 0 and "OOM" in capsys.readouterr().out


def test_inputs_that_do_not_fit_are_left_out(capsys):
    def hungry(bench, n):
        raise torch.OutOfMemoryError("out of memory")

    b = bench()
    b.attempt(hungry, 32768)
    assert b.finish() == 0 and "(32768,): left out, out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    "problem, name, code, line",
    [
        (common.Unavailable("no nvcc here"), "cuda", 0, "relation cuda: left out, no nvcc here"),
        (ValueError("relation_loss: impl='triton' is not available; choose auto"), "triton", 0, "relation triton: left out"),
        (RuntimeError("bad kernel\nmore"), "triton", 1, "FAILED relation triton fwd {'N': 64}: RuntimeError: bad kernel"),
        (RuntimeError("no compiler"), "compile", 0, "relation compile fwd {'N': 64}: RuntimeError: no compiler"),
    ],
)
def test_a_variant_that_cannot_run_is_told_once(problem, name, code, line, capsys):
    def broken(x):
        raise problem

    b = bench()
    for _ in range(2):
        assert [r["variant"] for r in b.measure(case({name: broken, "eager": lambda x: x + 1}))] == ["eager"]
    assert b.finish() == code
    printed = capsys.readouterr().out
    assert line in printed and printed.count(f"{name}: left out,") <= 1


def test_only_the_variants_asked_for():
    rows = bench("--variants", "eager").measure(case({"chunked": lambda x: x, "eager": lambda x: x + 1}))
    assert [r["variant"] for r in rows] == ["eager"]


def test_profile_writes_a_trace(tmp_path):
    bench("--profile", str(tmp_path)).measure(case({"eager": lambda x: x @ x}, extra={"case": "l1/rows"}))
    assert {p.suffix for p in tmp_path.iterdir()} == {".gz", ".txt"} and all(p.stat().st_size for p in tmp_path.iterdir())


def test_passes():
    x = torch.randn(5, requires_grad=True)
    assert not common.passes(lambda x: x.square(), "fwd")(x).requires_grad
    torch.testing.assert_close(common.passes(lambda x, k: k * x.square(), "fwd+bwd")(x, 3), 6 * x.detach())


def test_commit_of_a_copy_whose_git_is_missing_or_old(monkeypatch):
    monkeypatch.setattr(common, "_output", lambda *_: "another")
    monkeypatch.setenv("LDO_COMMIT", "abc")
    assert common.commit() == "abc"
    monkeypatch.setattr(common, "_output", lambda *_: "")
    assert common.commit() == "abc"
    monkeypatch.delenv("LDO_COMMIT")
    assert common.commit() is None and show.brief(None) == "unknown"


@pytest.mark.parametrize("ds, dt", [(1536, 1024), (5120, 1408)])
def test_model_tends_to_the_floor(ds, dt):
    rates = model.Rates(pair=1.0, launch=0.0)
    excess = [model.ours(n, ds, dt, rates).flops / model.floor_flops(n, ds, dt) for n in (4096, 10240, 23040, 32768)]
    assert excess == sorted(excess, reverse=True) and 1 <= excess[-1] < 1.02
    n = 32768
    assert model.ours(n, ds, dt, rates).seconds >= model.floor_flops(n, ds, dt) / rates.tflops / 1e12
    assert model.ours(n, ds, dt, rates).extra <= 256 * 2**20 + 6 * n * ds
    assert model.eager(n, ds, dt, rates).flops == n**2 * (6 * ds + 2 * dt)
    assert model.checkpointed(n, ds, dt, rates).flops == n**2 * (8 * ds + 4 * dt)
    assert model.floor_flops(n, ds, dt, "fwd") == n**2 * (ds + dt)
    assert "assumed, not measured" in model.table(rates)


def test_share_of_active_pairs_is_as_said():
    g = torch.Generator().manual_seed(0)
    for name, low, high in (("few", 0.005, 0.015), ("many", 0.5, 1.0)):
        x, y = (bench_align.features(c, 1, 700, 400, g, CPU, torch.float32) for c in (name, "few"))
        assert low < bench_align.active(x, y, bench_align.options(name, 400, 400)["margin"]) < high
    assert bench_align.options("few", 1920, 1024)["margin"] == pytest.approx(0.1, abs=2e-3)


def test_scripts_run_small(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_residual, "WINDOW", 32)
    for script, flags in ((bench_align, ["--sizes", "64", "--widths", "16x12", "--cases", "few,framed"]), (bench_residual, ["--sizes", "96"])):
        out = tmp_path / f"{script.__name__}.json"
        monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--quick", "--variants", "chunked,eager", "--out", str(out), *flags])
        assert script.main() == 0
        rows = json.loads(out.read_text())["rows"]
        assert {r["pass"] for r in rows} == {"fwd", "fwd+bwd"} and all(r["ms"] for r in rows)
        assert all(r["grad_error"] < 1e-5 for r in rows if r["pass"] == "fwd+bwd")
        show.summary(out)


def test_plot_without_matplotlib_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    show.plot({"rows": []}, tmp_path / "x.png")
    assert "matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script, flags, ours",
    [
        (bench_align, "--sizes 33 --widths 24x16 --cases few --passes fwd+bwd", "triton"),
        (bench_residual, "--sizes 8 --widths 32 --layouts one --metrics cosine --passes fwd+bwd", "triton"),
        (bench_advantage, "--sizes 64", "cuda"),
    ],
)
def test_what_a_script_does_on_a_gpu_runs_on_a_pretended_one(script, flags, ours, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_advantage, "launches", lambda work: (work(), 1)[1])  # a profiler sees only real ones
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--out", str(tmp_path / "r.json"), "--variants", f"{ours},eager", *flags.split()])
    with pretend.gpu():
        assert script.main() == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["device"] == "Pretended GPU"
    assert {(row["variant"], row["pass"]) for row in result["rows"]} >= {(ours, "fwd+bwd"), ("eager", "fwd+bwd")}
    assert all(row["ms"] > 0 and (row["grad_error"] or 0) < 0.5 for row in result["rows"])
