"""The run of all that needs a GPU: each part within its limit and the whole within its own, whatever becomes of a part."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from benchmarks import lease, lease_parts
from benchmarks.lease import ROOT, Lease
from benchmarks.lease_parts import KNOWN, MODES, PARTS, SHORT, TINY, Part, arguments

QUICK = Part("quick", 20, "unused")


@pytest.fixture
def start(tmp_path):
    return lambda seconds=None, **more: Lease(
        tmp_path / "results" / "2026-01-01-abcdef0", SHORT, seconds, dict(os.environ), tmp_path / "out.tgz", **more
    )


def python(text):
    return [sys.executable, "-c", text]


def test_a_failed_a_killed_and_a_hanging_part_cost_no_other(start, tmp_path, capsys):
    run = start()
    ends = [
        run.run(Part("fails", 20, ""), python("print('why it failed'); raise SystemExit(3)")),
        run.run(Part("killed", 20, ""), python("import os; os.kill(os.getpid(), 9)")),
        run.run(Part("hangs", 1, ""), python("import time; time.sleep(60)")),
        run.run(QUICK, python("print('fine')")),
    ]
    assert [e.code for e in ends] == [3, -9, 124, 0]
    text = lease.summary(run, [e.name for e in ends])
    assert "why it failed" in text and "killed by SIGKILL" in text and "stopped after 1 s" in text
    with tarfile.open(tmp_path / "out.tgz") as tar:
        names = tar.getnames()
        kept = json.load(tar.extractfile("2026-01-01-abcdef0/parts.json"))
    assert {f"2026-01-01-abcdef0/{e.name}.log" for e in ends} < set(names) and kept["hangs"]["code"] == 124 and kept["quick"]["code"] == 0


def test_what_a_part_started_is_stopped_with_it(start, tmp_path):
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'lived')!r}).touch()"
    start().run(Part("parent", 1, ""), python(f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"))
    time.sleep(3.5)
    assert not (tmp_path / "lived").exists()


def test_a_part_that_will_not_stop_is_killed(start, monkeypatch):
    monkeypatch.setattr(lease, "GRACE", 0.5)
    began = time.monotonic()
    found = start().run(Part("stubborn", 1, ""), python("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"))
    assert found.code == 124 and time.monotonic() - began < 10


def test_the_archive_is_there_after_every_part(start, tmp_path):
    run = start()
    for name in ("first", "second"):
        run.run(Part(name, 20, ""), python("print(1)"))
        with tarfile.open(tmp_path / "out.tgz") as tar:
            assert f"2026-01-01-abcdef0/{name}.log" in tar.getnames()


def test_the_whole_has_a_deadline(start):
    run = start(seconds=6.5)
    assert run.run(Part("long", 60, ""), python("import time; time.sleep(60)")).code == 124
    assert run.run(QUICK).why == "no time is left"


def test_what_is_done_at_this_commit_is_not_done_again(start):
    ran = python("print(1)")
    assert start().run(QUICK, ran).code == 0
    assert start().run(QUICK, ran).why == "it is done at this commit"
    assert start(force=True).run(QUICK, ran).code == 0


def test_what_cannot_run_is_left_out(start):
    run = start()
    assert run.run(Part("models", 5, "", needs=("no_such_module",))).why == "no_such_module is not installed"
    run.size = TINY
    assert run.run(Part("real", 5, "", tiny=None)).why == "it needs a GPU"


def test_the_summary_is_short_enough(start):
    run = start()
    for k in range(40):
        (run.folder / f"p{k}.log").write_text("x" * 5000 + "\n")
        run.ended.append(lease.Ended(f"p{k}", 1))
    assert len(lease.summary(run, [])) <= lease.MOST


def test_a_part_waits_for_the_extension(start, tmp_path):
    run = start()
    run.start_build(python(f"import time, pathlib; time.sleep(1); pathlib.Path({str(tmp_path / 'built')!r}).touch()"))
    look = python(f"import pathlib; raise SystemExit(not pathlib.Path({str(tmp_path / 'built')!r}).exists())")
    assert run.run(Part("extended", 20, "", extension=True), look).code == 0


def test_every_part_names_what_there_is():
    assert [p.name for p in PARTS] == list(KNOWN) and {n for _, names in MODES.values() for n in names} <= set(KNOWN)
    for part in PARTS:
        for size in (TINY, SHORT, lease_parts.FULL):
            words = arguments(part, size, ROOT / "x.json")[1:] if getattr(part, size) is not None else []
            for word in words:
                if word.endswith((".py", ".yaml")) or word.startswith("tests/"):
                    assert (ROOT / word.split("=")[-1]).exists(), (part.name, word)


def test_the_sanitizer_has_tests_of_every_kernel_to_watch():
    command = [sys.executable, *lease_parts.NATIVE.split(), "--collect-only", "tests/ops", "tests/kernels", "-k", lease.SANITIZED]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=lease.environment(False)).stdout
    assert all(f"/{name}.py::" in found for name in ("test_native", "test_relation", "test_residual"))


@pytest.mark.parametrize(
    "words, message",
    [(["nonsense"], "unknown part nonsense"), ([], "what? One of probe, main, all"), (["probe"], "no GPU here"), (["--nonsense"], "usage")],
)
def test_it_refuses_in_one_line(words, message):
    environment = {k: v for k, v in os.environ.items() if k != "LDO_ALLOW_CPU"} | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(["sh", ROOT / "benchmarks" / "lease.sh", *words], capture_output=True, text=True, env=environment)
    assert found.returncode == 2 and message in found.stderr


@pytest.mark.slow
def test_the_script_without_a_gpu_and_asked_to_stop(tmp_path):
    environment = os.environ | {
        "PYTHON": sys.executable,
        "LDO_ALLOW_CPU": "1",
        "OUT": str(tmp_path / "out"),
        "CUDA_VISIBLE_DEVICES": "",
        "LDO_COMMIT": "0123456789",
    }
    command = ["sh", ROOT / "benchmarks" / "lease.sh", "residual", "model", "--seconds", "100", "--results", tmp_path / "results"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("residual"):
                break
        process.send_signal(signal.SIGTERM)
        text = "".join([*lines, process.stdout.read()])
    assert process.returncode == 128 + signal.SIGTERM and "asked to stop" in text and "residual.json: " in text
    with tarfile.open(tmp_path / "out" / "results.tgz") as tar:
        assert any(name.endswith("residual.json") for name in tar.getnames())
