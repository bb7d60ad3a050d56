"""Goals read from result files: the worst comparison counts, a missing one is open, and a miss sets the exit code."""

import json

import pytest

from benchmarks import goals


def row(op, variant, kind, shape, ms, **more):
    common_fields = {"op": op, "variant": variant, "pass": kind, "shape": {"B": 1, **shape}, "dtype": "bf16", "ms": ms}
    return {**common_fields, "floor_ms": 1.0, "extra_mib": 100.0, "grad_error": 1e-3, **more}


def relation(n, ms, kind="fwd+bwd", case="few", **others):
    shape = {"N": n, "Ds": 1920, "Dt": 1024}
    ours = row("relation", "triton", kind, shape, ms, case=case, ratio_to_floor=ms)
    baselines = [row("relation", variant, kind, shape, took, case=case) for variant, took in others.items()]
    return [ours, *baselines]


def write(folder, rows, name="align-sizes"):
    (folder / f"{name}.json").write_text(json.dumps({"copy_gbps": 1000.0, "rows": rows}))


def verdicts(folder):
    rows = goals.read(folder)
    return {goal.name: goal.verdict(goal.measure(rows)) for goal in goals.GOALS}


def test_the_worst_size_counts(tmp_path):
    write(
        tmp_path,
        relation(8192, 1.2, compile=3.0, eager=3.0)
        + relation(16384, 1.4, compile=2.0, eager=2.0)
        + relation(4096, 9.0, compile=9.0),
    )
    outcomes = verdicts(tmp_path)
    # 1.4; 4096 is not one of the goal's sizes
    assert outcomes["relation loss and gradient, 8k to 32k, over the floor"] == "met"
    # 2.0 / 1.4
    assert outcomes["the same, against torch.compile"] == "missed"
    assert outcomes["the same, against eager bf16"] == "missed"
    # no row has that baseline
    assert outcomes["the same, against chunks with checkpointing"] == "not measured"


def test_out_of_memory_is_no_comparison(tmp_path):
    write(tmp_path, relation(8192, 1.0, eager=3.0) + relation(16384, 1.0, eager=None))
    assert verdicts(tmp_path)["the same, against eager bf16"] == "stretch"


@pytest.mark.parametrize(
    ("kind", "ms", "verdict"),
    [("fwd", 1.03, "stretch"), ("fwd", 1.07, "met"), ("fwd", 1.2, "missed"), ("fwd+bwd", 2.6, "stretch")],
)
def test_residual_is_compared_with_the_copy_rate_of_its_file(tmp_path, kind, ms, verdict):
    """Of 64 x 32 in bf16 the forward moves 2 x 4096 bytes, at 1 GB/s in 8.2 us; both passes move 5."""
    size = 64 * 32 * 2 / 1e6
    for file_name, rate, milliseconds in (("residual", 1.0, ms), ("residual-again", 10.0, ms / 10)):
        rows = [row("residual", "triton", kind, {"M": 64, "D": 32}, 2 * milliseconds * size)]
        (tmp_path / f"{file_name}.json").write_text(json.dumps({"copy_gbps": rate, "rows": rows}))
    assert verdicts(tmp_path)["residual, share of the copy rate"] == verdict


def test_eager_was_fp32_before_there_were_two_of_it(tmp_path):
    def verdict(*baselines):
        write(tmp_path, [residual("triton", 1.0), *baselines], "residual")
        return verdicts(tmp_path)["residual, against eager in bf16"]

    def residual(variant, took, **more):
        return row("residual", variant, "fwd", {"M": 64, "D": 32}, took, **more)

    # old files: this eager is in fp32, and is no goal
    assert verdict(residual("eager", 9.0)) == "not measured"
    assert verdict(residual("eager", 4.0), residual("widened", 9.0)) == "met"
    assert verdict(residual("eager", 4.0, eager_precision="the inputs'")) == "met"


def test_goals_have_different_names():
    names = [goal.name for goal in goals.GOALS if not goal.name.startswith("the same")]
    assert len(names) == len(set(names)) and "that case, against torch.compile" in names


def test_the_gradients_error_is_also_that_of_its_own_benchmark(tmp_path):
    shape = {"B": 1, "N": 8192, "Ds": 1920, "Dt": 1024}
    error_rows = [
        {"op": "gradient error", "shape": shape, "gains": gains, "errors": {"flips": 0.0, "all": error}}
        for gains, error in ((False, 9e-3), (True, 2e-3))
    ]
    (tmp_path / "gradient.json").write_text(json.dumps({"rows": error_rows}))
    assert verdicts(tmp_path)["its gradient's error, few pairs active"] == "stretch"


def test_runs_are_folders_of_gpus(tmp_path):
    for folder_name in ("nvidia-x/2026-01-02-b", "nvidia-x/2026-01-01-a", "some-cpu-1-threads/2026-01-01-a"):
        (tmp_path / folder_name).mkdir(parents=True)
    # a file among the runs is none
    (tmp_path / "nvidia-x" / "README.md").touch()
    assert [folder.name for folder in goals.runs(tmp_path)] == ["2026-01-01-a", "2026-01-02-b"]


def test_memory_is_compared_with_what_the_design_allows(tmp_path):
    allowed = 256 + 6 * 8192 * 1920 / 2**20
    # the workspace of 256 MiB and six bytes for each element of the student
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
    line = "relation loss and gradient, 8k to 32k, over the floor | <= 1.50 F | <= 1.25 F | 1.60 F | missed"
    assert f"| {line} | align-sizes.json |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tmp_path / "nowhere")
