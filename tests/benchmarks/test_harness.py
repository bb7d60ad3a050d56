"""The harness: what it measures, what a failing variant does, the keys of its JSON, and the plans of the scripts."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_advantage, bench_align, bench_residual, flags, memory, model, provenance, show
from benchmarks.harness import Bench, Case
from benchmarks.variant import Unavailable, passes
from tests.helpers import pretend

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
KEYS = {"device", "versions", "commit", "date", "matmul_tflops", "copy_gbps", "rows"}
ROW = {"op", "variant", "pass", "shape", "dtype", "ms", "floor_ms", "extra_mib", "grad_error"}


def bench(*given):
    return Bench(flags.arguments("Doc.").parse_args(["--device", "cpu", "--quick", *given]))


def case(variants, **options):
    square = torch.randn(64, 64)
    return Case(
        op="relation",
        kind="fwd",
        shape={"N": 64},
        dtype=torch.float32,
        inputs=[(square,), (square + 1,)],
        variants=variants,
        **options,
    )


def peak(work):
    return memory.peak_extra(work, CPU, 0)


# elements of fp32 in a MiB
MIB = 2**18


@pytest.mark.parametrize(
    "work, expected",
    [
        # the result counts
        (lambda: torch.zeros(3 * MIB), 3),
        (lambda: [torch.randn(2 * MIB) for _ in range(3)], 6),
        # what is freed within the call does not add up
        (lambda: sum(float(torch.randn(2 * MIB)[0]) for _ in range(3)), 2),
        (lambda: torch.randn(2 * MIB).mul_(2).add_(1), 2),
    ],
)
def test_peak_of_known_allocations(work, expected):
    assert peak(work) == pytest.approx(expected, abs=0.01)


def test_peak_counts_temporaries_of_backward():
    """A function whose forward keeps nothing and whose backward needs 8 MiB besides its gradient of 1 MiB."""

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, upstream):
            return torch.randn(8 * MIB)[:1].expand(MIB) * upstream

    leaf = torch.randn(MIB, requires_grad=True)
    assert peak(lambda: Greedy.apply(leaf)) < 0.1
    assert peak(lambda: torch.autograd.grad(Greedy.apply(leaf), leaf)) == pytest.approx(9, abs=0.1)


def test_chunked_relation_loss_holds_no_square():
    extra = {tokens: peak(lambda tokens=tokens: _chunked(tokens)) for tokens in (1024, 2048, 4096)}
    first_step = extra[2048] - extra[1024]
    assert extra[4096] - extra[2048] == pytest.approx(2 * first_step, rel=0.1), "memory grows faster than N"
    assert extra[4096] < 4096**2 * 4 / 2**20


def _chunked(tokens):
    variants = bench_align.variants("few", tokens, {"margin": 0.1, "penalty": "hinge"}, "fwd+bwd")
    variants["chunked"](torch.randn(1, tokens, 8), torch.randn(1, tokens, 8), None, None)


def test_json_has_the_agreed_keys(tmp_path, capsys):
    result_path = tmp_path / "deep" / "result.json"
    harness = bench("--out", str(result_path))
    harness.measure(
        case(
            {"chunked": lambda x: x @ x, "eager": lambda x: x * 2},
            floor_ms=0.001,
            flops=64**3 * 2,
            error=lambda r: 0.5,
            extra={"case": "few"},
        )
    )
    assert harness.finish() == 0
    result = json.loads(result_path.read_text())
    assert set(result) == KEYS
    assert [row["variant"] for row in result["rows"]] == ["chunked", "eager"]
    for row in result["rows"]:
        assert set(row) > ROW and row["shape"] == {"B": 1, "N": 64} and row["dtype"] == "fp32"
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["ratio_to_floor"] == row["ms"] / 0.001
        assert row["grad_error"] == 0.5
    assert result["versions"]["torch"] and result["device"].endswith(f"CPU, {torch.get_num_threads()} threads")
    printed = capsys.readouterr().out
    assert "this is a CPU" in printed and printed.count("relation  few") == 2


def test_variants_take_turns_on_every_input_set():
    calls = []

    def noted(name):
        return lambda x: calls.append((name, float(x[0, 0])))

    bench().measure(case({variant: noted(variant) for variant in ("chunked", "eager")}))
    timed = [variant for variant, _ in calls][-9:]
    assert timed == ["chunked", "eager", "chunked"] * 3, "the first variant is timed twice a round"
    assert len({value for _, value in calls}) == 2


def test_out_of_memory_is_a_row_and_the_run_continues(capsys):
    def hungry(x):
        raise torch.OutOfMemoryError("out of memory")

    harness = bench()
    rows = harness.measure(case({"eager": hungry, "chunked": lambda x: x + 1}))
    failed, timed = rows
    assert (failed["variant"], failed["ms"], failed["error"]) == ("eager", None, "OOM")
    assert timed["variant"] == "chunked" and timed["ms"] > 0 and "error" not in timed
    assert harness.finish() == 0 and "OOM" in capsys.readouterr().out


def test_inputs_that_do_not_fit_are_left_out(capsys):
    def hungry(bench, n):
        raise torch.OutOfMemoryError("out of memory")

    harness = bench()
    harness.attempt(hungry, 32768)
    assert harness.finish() == 0 and "(32768,): left out, out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    "problem, variant, exit_code, line",
    [
        (Unavailable("no nvcc here"), "cuda", 0, "relation cuda: left out, no nvcc here"),
        (ValueError("relation_loss: impl='triton' is not available"), "triton", 0, "relation triton: left out"),
        (RuntimeError("bad\nmore"), "triton", 1, "FAILED relation triton fwd {'N': 64}: RuntimeError: bad"),
        (RuntimeError("no compiler"), "compile", 0, "relation compile fwd {'N': 64}: RuntimeError: no compiler"),
    ],
)
def test_a_variant_that_cannot_run_is_reported_once(problem, variant, exit_code, line, capsys):
    def broken(x):
        raise problem

    harness = bench()
    for _ in range(2):
        rows = harness.measure(case({variant: broken, "eager": lambda x: x + 1}))
        assert [row["variant"] for row in rows] == ["eager"]
    assert harness.finish() == exit_code
    printed = capsys.readouterr().out
    assert line in printed and printed.count(f"{variant}: left out,") <= 1


def test_only_the_variants_asked_for():
    rows = bench("--variants", "eager").measure(case({"chunked": lambda x: x, "eager": lambda x: x + 1}))
    assert [row["variant"] for row in rows] == ["eager"]


def test_profile_writes_a_trace(tmp_path):
    bench("--profile", str(tmp_path)).measure(case({"eager": lambda x: x @ x}, extra={"case": "l1/rows"}))
    written = list(tmp_path.iterdir())
    assert {path.suffix for path in written} == {".gz", ".txt"}
    assert all(path.stat().st_size for path in written)


def test_passes():
    leaf = torch.randn(5, requires_grad=True)
    assert not passes(lambda x: x.square(), "fwd")(leaf).requires_grad
    torch.testing.assert_close(passes(lambda x, k: k * x.square(), "fwd+bwd")(leaf, 3), 6 * leaf.detach())


def test_commit_of_a_copy_whose_git_is_missing_or_old(monkeypatch):
    # LDO_COMMIT comes first, whatever git says
    monkeypatch.setattr(provenance, "_output", lambda *_: "another")
    monkeypatch.setenv("LDO_COMMIT", "abc")
    assert provenance.commit() == "abc"
    monkeypatch.setattr(provenance, "_output", lambda *_: "")
    assert provenance.commit() == "abc"
    monkeypatch.delenv("LDO_COMMIT")
    assert provenance.commit() is None and show.brief(None) == "unknown"


@pytest.mark.parametrize("ds, dt", [(1536, 1024), (5120, 1408)])
def test_model_tends_to_the_floor(ds, dt):
    rates = model.Rates(pair=1.0, launch=0.0)
    sizes = (4096, 10240, 23040, 32768)
    excess = [model.ours(size, ds, dt, rates).flops / model.floor_flops(size, ds, dt) for size in sizes]
    # the tiles on the diagonal, which are computed whole, matter less the more tiles there are
    assert excess == sorted(excess, reverse=True) and 1 <= excess[-1] < 1.02
    tokens = 32768
    assert model.ours(tokens, ds, dt, rates).seconds >= model.floor_flops(tokens, ds, dt) / rates.tflops / 1e12
    assert model.ours(tokens, ds, dt, rates).extra <= 256 * 2**20 + 6 * tokens * ds
    assert model.eager(tokens, ds, dt, rates).flops == tokens**2 * (6 * ds + 2 * dt)
    assert model.checkpointed(tokens, ds, dt, rates).flops == tokens**2 * (8 * ds + 4 * dt)
    assert model.floor_flops(tokens, ds, dt, "fwd") == tokens**2 * (ds + dt)
    assert "assumed, not measured" in model.table(rates)


def test_share_of_active_pairs_is_as_said():
    generator = torch.Generator().manual_seed(0)
    for name, low, high in (("few", 0.005, 0.015), ("many", 0.5, 1.0)):
        student = bench_align.features(name, 1, 700, 400, generator, CPU, torch.float32)
        teacher = bench_align.features("few", 1, 700, 400, generator, CPU, torch.float32)
        assert low < bench_align.active(student, teacher, bench_align.options(name, 400, 400)["margin"]) < high
    assert bench_align.options("few", 1920, 1024)["margin"] == pytest.approx(0.1, abs=2e-3)


def test_scripts_run_small(tmp_path, monkeypatch):
    # sizes of the layout windows are multiples of it
    monkeypatch.setattr(bench_residual, "WINDOW", 32)
    for script, further in (
        (bench_align, ["--sizes", "64", "--widths", "16x12", "--cases", "few,framed"]),
        (bench_residual, ["--sizes", "96"]),
    ):
        result_path = tmp_path / f"{script.__name__}.json"
        shared_flags = ["--device", "cpu", "--quick", "--variants", "chunked,eager", "--out", str(result_path)]
        monkeypatch.setattr(sys, "argv", ["x", *shared_flags, *further])
        assert script.main() == 0
        rows = json.loads(result_path.read_text())["rows"]
        assert {row["pass"] for row in rows} == {"fwd", "fwd+bwd"} and all(row["ms"] for row in rows)
        assert all(row["grad_error"] < 1e-5 for row in rows if row["pass"] == "fwd+bwd")
        show.summary(result_path)


def test_plot_without_matplotlib_says_so(monkeypatch, capsys, tmp_path):
    # None makes the import fail
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    show.plot({"rows": []}, tmp_path / "x.png")
    assert "matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script, extra, ours",
    [
        (bench_align, "--sizes 33 --widths 24x16 --cases few --passes fwd+bwd", "triton"),
        (bench_residual, "--sizes 8 --widths 32 --layouts one --metrics cosine --passes fwd+bwd", "triton"),
        (bench_advantage, "--sizes 64", "cuda"),
    ],
)
def test_what_a_script_does_on_a_gpu_runs_on_a_pretended_one(script, extra, ours, monkeypatch, tmp_path):
    def one_launch(work):
        work()
        return 1

    # a profiler sees only the launches of a real GPU
    monkeypatch.setattr(bench_advantage, "launches", one_launch)
    shared_flags = ["--quick", "--out", str(tmp_path / "r.json"), "--variants", f"{ours},eager"]
    monkeypatch.setattr("sys.argv", ["bench", *shared_flags, *extra.split()])
    with pretend.gpu():
        assert script.main() == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["device"] == "Pretended GPU"
    assert {(row["variant"], row["pass"]) for row in result["rows"]} >= {(ours, "fwd+bwd"), ("eager", "fwd+bwd")}
    assert all(row["ms"] > 0 and (row["grad_error"] or 0) < 0.5 for row in result["rows"])
