"""The processes of ``benchmarks/lease.py``: each within a time limit, and gone when it is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# seconds between asking a process to stop and killing it
GRACE = 5


@dataclass
class Ended:
    """How a part went."""

    name: str
    code: int | None  # its exit code; negative: the signal that killed it; None: it was left out
    seconds: float = 0.0
    why: str = ""  # it was left out or stopped

    @property
    def failed(self) -> bool:
        return self.code not in (0, None)

    def __str__(self) -> str:
        if self.code is None:
            outcome = f"left out, {self.why}"
        elif self.code == 0:
            outcome = "done"
        elif self.why:
            outcome = f"FAILED, {self.why}"
        else:
            outcome = f"FAILED with exit code {self.code}"
        return f"{self.name:16} {self.seconds:6.0f} s  {outcome}"


def limited(
    command: Sequence[str],
    log: Path,
    limit: float,
    environment: dict[str, str],
    began: Callable[[subprocess.Popen], None] = lambda _: None,
) -> Ended:
    """Run ``command`` for at most ``limit`` seconds, output to ``log``.

    Afterwards the command and every process that it started are asked to stop, and then killed. ``began`` is called
    with the process.
    """
    started = time.monotonic()
    reason = ""
    with log.open("wb") as output:
        # a session of its own: its process group can be stopped without stopping this process
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        began(process)
        try:
            exit_code = process.wait(limit)
        except subprocess.TimeoutExpired:
            # the exit code of the program timeout
            exit_code = 124
            reason = f"stopped after {limit:.0f} s"
        stop(process)
    if exit_code < 0:
        reason = f"killed by {signal.Signals(-exit_code).name}"
    return Ended(log.stem, exit_code, time.monotonic() - started, reason)


def stop(process: subprocess.Popen) -> None:
    """End a process and its group, if anything of it is left."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        # The group even if the process has ended: its children may have ignored what it obeyed.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, request)
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
