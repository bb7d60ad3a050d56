"""The run of everything that needs a GPU: parts and the whole keep to their limits, and no part affects another."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from benchmarks import lease, lease_parts, lease_processes
from benchmarks.lease import ROOT, Lease
from benchmarks.lease_parts import KNOWN, MODES, PARTS, SHORT, TINY, Part, arguments
from benchmarks.lease_processes import Ended

QUICK = Part("quick", 20, "unused")


@pytest.fixture
def start(tmp_path):
    return lambda seconds=None, **more: Lease(
        tmp_path / "results" / "2026-01-01-abcdef0", SHORT, seconds, dict(os.environ), tmp_path / "out.tgz", **more
    )


def python(text):
    return [sys.executable, "-c", text]


def test_a_failed_a_killed_and_a_hanging_part_cost_no_other(start, tmp_path, capsys):
    leased = start()
    outcomes = [
        leased.run(Part("fails", 20, ""), python("print('why it failed'); raise SystemExit(3)")),
        leased.run(Part("killed", 20, ""), python("import os; os.kill(os.getpid(), 9)")),
        leased.run(Part("hangs", 1, ""), python("import time; time.sleep(60)")),
        leased.run(QUICK, python("print('fine')")),
    ]
    assert [ended.code for ended in outcomes] == [3, -9, 124, 0]
    text = lease.summary(leased, [ended.name for ended in outcomes])
    assert "why it failed" in text and "killed by SIGKILL" in text and "stopped after 1 s" in text
    with tarfile.open(tmp_path / "out.tgz") as archive:
        names = archive.getnames()
        saved_parts = json.load(archive.extractfile("2026-01-01-abcdef0/parts.json"))
    assert {f"2026-01-01-abcdef0/{ended.name}.log" for ended in outcomes} < set(names)
    assert saved_parts["hangs"]["code"] == 124 and saved_parts["quick"]["code"] == 0


def test_what_a_part_started_is_stopped_with_it(start, tmp_path):
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'lived')!r}).touch()"
    start().run(
        Part("parent", 1, ""),
        python(f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"),
    )
    # longer than the child would take
    time.sleep(3.5)
    assert not (tmp_path / "lived").exists()


def test_a_part_that_will_not_stop_is_killed(start, monkeypatch):
    # the test need not wait as long as a real part
    monkeypatch.setattr(lease_processes, "GRACE", 0.5)
    started = time.monotonic()
    ended = start().run(
        Part("stubborn", 1, ""),
        python("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"),
    )
    assert ended.code == 124 and time.monotonic() - started < 10


def test_the_archive_is_there_after_every_part(start, tmp_path):
    leased = start()
    for part_name in ("first", "second"):
        leased.run(Part(part_name, 20, ""), python("print(1)"))
        with tarfile.open(tmp_path / "out.tgz") as archive:
            assert f"2026-01-01-abcdef0/{part_name}.log" in archive.getnames()


def test_the_whole_has_a_deadline(start):
    leased = start(seconds=6.5)
    assert leased.run(Part("long", 60, ""), python("import time; time.sleep(60)")).code == 124
    assert leased.run(QUICK).why == "no time is left"


def test_what_is_done_at_this_commit_is_not_done_again(start):
    command = python("print(1)")
    assert start().run(QUICK, command).code == 0
    assert start().run(QUICK, command).why == "it is done at this commit"
    assert start(force=True).run(QUICK, command).code == 0


def test_what_cannot_run_is_left_out(start):
    leased = start()
    assert leased.run(Part("models", 5, "", needs=("no_such_module",))).why == "no_such_module is not installed"
    # the size without a GPU
    leased.size = TINY
    assert leased.run(Part("real", 5, "", tiny=None)).why == "it needs a GPU"


def test_the_summary_is_short_enough(start):
    leased = start()
    for number in range(40):
        (leased.folder / f"p{number}.log").write_text("x" * 5000 + "\n")
        leased.ended.append(Ended(f"p{number}", 1))
    assert len(lease.summary(leased, [])) <= lease.MOST


def test_a_part_waits_for_the_extension(start, tmp_path):
    leased = start()
    built = repr(str(tmp_path / "built"))
    leased.start_build(python(f"import time, pathlib; time.sleep(1); pathlib.Path({built}).touch()"))
    look = python(f"import pathlib; raise SystemExit(not pathlib.Path({built}).exists())")
    assert leased.run(Part("extended", 20, "", extension=True), look).code == 0


def test_every_part_names_what_exists():
    assert [part.name for part in PARTS] == list(KNOWN)
    for _, part_names in MODES.values():
        assert set(part_names) <= set(KNOWN)
    for part in PARTS:
        for size in (TINY, SHORT, lease_parts.FULL):
            if getattr(part, size) is None:
                continue
            for word in arguments(part, size, ROOT / "x.json")[1:]:
                path = word.split("=")[-1]
                if word.endswith((".py", ".yaml")) or word.startswith("tests/"):
                    assert (ROOT / path).exists(), (part.name, word)
                if word.startswith("ldo."):
                    assert importlib.util.find_spec(word), (part.name, word)


def test_every_word_that_selects_tests_is_in_the_name_of_one():
    """A test that is renamed would silently leave a selection, or join one that is to leave it out."""
    files = [*(ROOT / "tests" / "kernels").glob("test_*.py"), *(ROOT / "tests" / "ops").glob("test_*.py")]
    test_names = [test_name for file in files for test_name in re.findall(r"def (test_\w+)", file.read_text())]
    for part in PARTS:
        command = arguments(part, SHORT, ROOT / "x.json")
        if "-k" in command:
            selection = command[command.index("-k") + 1]
            for word in set(re.findall(r"\w+", selection)) - {"not", "or", "and"}:
                assert any(word in test_name for test_name in test_names), (part.name, word)


def test_the_sanitizer_has_tests_of_every_kernel_to_watch():
    selection = ["--collect-only", "tests/ops", "tests/kernels", "-k", lease.SANITIZED]
    command = [sys.executable, *lease_parts.NATIVE.split(), *selection]
    collected = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=lease.environment(False)).stdout
    assert all(f"/{module}.py::" in collected for module in ("test_native", "test_relation", "test_residual"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["nonsense"], "unknown part nonsense"),
        ([], "name what to run: one of probe, main, all"),
        (["probe"], "no GPU here"),
        (["--nonsense"], "usage"),
    ],
)
def test_it_refuses_in_one_line(words, message):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("LDO_ALLOW_CPU", None)
    completed = subprocess.run(
        ["sh", ROOT / "benchmarks" / "lease.sh", *words], capture_output=True, text=True, env=environment
    )
    assert completed.returncode == 2 and message in completed.stderr


@pytest.mark.slow
def test_the_script_without_a_gpu_and_asked_to_stop(tmp_path):
    environment = os.environ | {
        "PYTHON": sys.executable,
        "LDO_ALLOW_CPU": "1",
        "OUT": str(tmp_path / "out"),
        "CUDA_VISIBLE_DEVICES": "",
        "LDO_COMMIT": "0123456789",
        "TORCH_COMPILE_DISABLE": "1",  # what is compiled on a CPU is of no interest here and takes longest
    }
    options = ["--seconds", "100", "--results", tmp_path / "results"]
    command = ["sh", ROOT / "benchmarks" / "lease.sh", "residual", "model", *options]
    # The signal comes during the second part, when the first has left its results.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("residual"):
                break
        process.send_signal(signal.SIGTERM)
        printed = "".join([*lines, process.stdout.read()])
    assert process.returncode == 128 + signal.SIGTERM
    assert "asked to stop" in printed and "residual.json: " in printed
    with tarfile.open(tmp_path / "out" / "results.tgz") as archive:
        assert any(name.endswith("residual.json") for name in archive.getnames())
