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


@pytest.mark.parametrize("gbps, verdict", [(930.0, "stretch"), (860.0, "met"), (800.0, "missed")])
def test_residual_is_held_against_its_own_files_copy_rate(tmp_path, gbps, verdict):
    write(tmp_path, [row("residual", "triton", "fwd", {"M": 64, "D": 32}, 1.0, gbps=gbps)], "residual")
    write(tmp_path, [row("residual", "triton", "fwd", {"M": 128, "D": 32}, 1.0, gbps=990.0)], "residual-again")
    assert verdicts(tmp_path)["residual alone, share of the copy rate"] == verdict


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
