"""Goals read from result files: the worst comparison counts, what is missing is open, and a miss is an exit code."""

import json

import pytest

from benchmarks import goals


def row(op, variant, kind, shape, ms, **more):
    fixed = {"op": op, "variant": variant, "pass": kind, "shape": {"B": 1, **shape}, "dtype": "bf16", "ms": ms}
    return {**fixed, "floor_ms": 1.0, "extra_mib": 100.0, "grad_error": 1e-3, **more}


def relation(n, ms, kind="fwd+bwd", case="few", **others):
    shape = {"N": n, "Ds": 1920, "Dt": 1024}
    ours = row("relation", "triton", kind, shape, ms, case=case, ratio_to_floor=ms)
    return [ours, *(row("relation", name, kind, shape, took, case=case) for name, took in others.items())]


def write(folder, rows, name="align-sizes"):
    (folder / f"{name}.json").write_text(json.dumps({"copy_gbps": 1000.0, "rows": rows}))


def verdicts(folder):
    rows = goals.read(folder)
    return {goal.name: goal.verdict(goal.measure(rows)) for goal in goals.GOALS}


def test_the_worst_size_counts(tmp_path):
    write(tmp_path, relation(8192, 1.2, compile=3.0, eager=3.0) + relation(16384, 1.4, compile=2.0, eager=2.0) + relation(4096, 9.0, compile=9.0))
    found = verdicts(tmp_path)
    assert found["relation loss and gradient, 8k to 32k, over the floor"] == "met"  # 1.4; 4096 is none of the goal's sizes
    assert found["the same, against torch.compile"] == "missed"  # 2.0 / 1.4
    assert found["the same, against eager bf16"] == "missed"
    assert found["the same, against chunks with checkpointing"] == "not measured"


def test_out_of_memory_is_no_comparison(tmp_path):
    write(tmp_path, relation(8192, 1.0, eager=3.0) + relation(16384, 1.0, eager=None))
    assert verdicts(tmp_path)["the same, against eager bf16"] == "stretch"


@pytest.mark.parametrize(
    ("kind", "ms", "verdict"), [("fwd", 1.03, "stretch"), ("fwd", 1.07, "met"), ("fwd", 1.2, "missed"), ("fwd+bwd", 2.6, "stretch")]
)
def test_residual_is_held_against_its_own_files_copy_rate(tmp_path, kind, ms, verdict):
    """Of 64 x 32 in bf16 the forward moves 2 x 4096 bytes, at 1 GB/s in 8.2 us; both passes move 5."""
    size = 64 * 32 * 2 / 1e6
    for name, rate, took in (("residual", 1.0, ms), ("residual-again", 10.0, ms / 10)):
        rows = [row("residual", "triton", kind, {"M": 64, "D": 32}, 2 * took * size)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"copy_gbps": rate, "rows": rows}))
    assert verdicts(tmp_path)["residual, share of the copy rate"] == verdict


def test_eager_was_fp32_before_there_were_two_of_it(tmp_path):
    shape, ours = {"M": 64, "D": 32}, row("residual", "triton", "fwd", {"M": 64, "D": 32}, 1.0)
    write(tmp_path, [ours, row("residual", "eager", "fwd", shape, 9.0)], "residual")
    assert verdicts(tmp_path)["residual, against eager in bf16"] == "not measured"
    write(tmp_path, [ours, row("residual", "eager", "fwd", shape, 4.0), row("residual", "widened", "fwd", shape, 9.0)], "residual")
    assert verdicts(tmp_path)["residual, against eager in bf16"] == "met"
    write(tmp_path, [ours, row("residual", "eager", "fwd", shape, 4.0, eager_precision="the inputs'")], "residual")
    assert verdicts(tmp_path)["residual, against eager in bf16"] == "met"


def test_goals_have_names_of_their_own():
    names = [goal.name for goal in goals.GOALS if not goal.name.startswith("the same")]
    assert len(names) == len(set(names)) and "that case, against torch.compile" in names


def test_the_gradients_error_is_also_that_of_its_own_benchmark(tmp_path):
    shape, errors = {"B": 1, "N": 8192, "Ds": 1920, "Dt": 1024}, {"flips": 0.0, "all": 2e-3}
    found = [{"op": "gradient error", "shape": shape, "gains": gains, "errors": {**errors, "all": e}} for gains, e in ((False, 9e-3), (True, 2e-3))]
    (tmp_path / "gradient.json").write_text(json.dumps({"rows": found}))
    assert verdicts(tmp_path)["its gradient's error, few pairs active"] == "stretch"


def test_runs_are_folders_of_gpus(tmp_path):
    for name in ("nvidia-x/2026-01-02-b", "nvidia-x/2026-01-01-a", "some-cpu-1-threads/2026-01-01-a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "nvidia-x" / "README.md").touch()
    assert [folder.name for folder in goals.runs(tmp_path)] == ["2026-01-01-a", "2026-01-02-b"]


def test_memory_is_held_against_what_the_design_allows(tmp_path):
    allowed = 256 + 6 * 8192 * 1920 / 2**20
    for extra, verdict in ((allowed - 1, "stretch"), (allowed + 1, "missed")):
        rows = relation(8192, 1.0)
        rows[0]["extra_mib"] = extra
        write(tmp_path, rows)
        assert verdicts(tmp_path)["its extra memory over 256 MiB + 6 bytes an element"] == verdict


def test_exit_code_and_table(tmp_path, monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr("sys.argv", ["goals", *map(str, flags)])
        return goals.main()

    write(tmp_path, relation(8192, 1.2))
    assert run(tmp_path) == 0 and "1.20 F" in capsys.readouterr().out
    write(tmp_path, relation(8192, 1.6))
    assert run(tmp_path, "--markdown") == 1
    assert (
        "| relation loss and gradient, 8k to 32k, over the floor | <= 1.50 F | <= 1.25 F | 1.60 F | missed | align-sizes.json |"
        in capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        run(tmp_path / "nowhere")
