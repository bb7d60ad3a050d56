"""All that needs a GPU, in order of value and within a time: ``sh benchmarks/lease.sh probe | main | all | PART ...``.

A GPU is often lent for minutes. ``probe`` takes at most 200 seconds and says whether the kernels are right and how fast in the case that matters
most; ``main`` takes at most 500 and measures the rest, the most valuable first; ``all`` takes what it takes, at the sizes of the published tables.
Each part is a process of its own with a limit of its own; one that fails, hangs or is killed costs its own figures and no other's.

    --seconds S       a deadline for the whole (default that of the mode): parts are cut short by it, and those after it left out
    --results DIR     results go to DIR/<device>/<date>-<commit>/<part>.json, beside its log (default benchmarks/results)
    --force           again, though the part has succeeded at this commit

    OUT=...           a folder for results.tgz, written again after every part
    LDO_COMMIT=...    names the commit in a copy of the tree whose .git is missing or another's
    LDO_ALLOW_CPU=1   try all of this without a GPU: tiny sizes, whose figures mean nothing

The extension is built for this GPU alone, in the background; the parts that need it wait for it. Output goes to the logs; what is printed last is
a summary of at most 12,000 characters. Exit code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import goals, show
from benchmarks.lease_parts import FULL, FULL_LIMIT, KNOWN, MODES, NATIVE, SHORT, TINY, Part, arguments

ROOT = Path(__file__).resolve().parents[1]
MOST = 12_000  # characters of the summary
SANITIZED = "(gpu_and_cpu_give_the_same_bits and dtype1) or test_repeats"  # fp32; an expression of pytest's
GRACE = 5  # seconds between asking a part to stop and killing it


# ---------------------------------------------------------------------------------------------- processes


@dataclass
class Ended:
    """How a part went: its exit code (negative: the signal that killed it; None: it was left out, ``why``) and its seconds."""

    name: str
    code: int | None
    seconds: float = 0.0
    why: str = ""

    @property
    def failed(self) -> bool:
        return self.code not in (0, None)

    def __str__(self) -> str:
        how = {None: f"left out, {self.why}", 0: "done"}.get(self.code, f"FAILED{f', {self.why}' if self.why else f' with exit code {self.code}'}")
        return f"{self.name:16} {self.seconds:6.0f} s  {how}"


def limited(
    command: Sequence[str], log: Path, limit: float, environment: dict[str, str], began: Callable[[subprocess.Popen], None] = lambda _: None
) -> Ended:
    """Run ``command`` for at most ``limit`` seconds, output to ``log``; then it and all that it started are asked to stop, and killed."""
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True)
        began(process)
        try:
            code, why = process.wait(limit), ""
        except subprocess.TimeoutExpired:
            code, why = 124, f"stopped after {limit:.0f} s"
        stop(process)
    if code < 0:
        why = f"killed by {signal.Signals(-code).name}"
    return Ended(log.stem, code, time.monotonic() - start, why)


def stop(process: subprocess.Popen) -> None:
    """End a process and its group, if anything of it is left: children may ignore a request that their parent followed."""
    for sign, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)


class Lease:
    """A run of parts within a time."""

    def __init__(self, folder: Path, size: str, seconds: float | None, environment: dict[str, str], archive: Path | None = None, force: bool = False):
        self.folder, self.size, self.archive, self.force = folder, size, archive, force
        self.environment = environment
        self.training = ROOT / "runs" / "sandbox-further"  # what the part sandbox goes on with, here or elsewhere
        self.deadline = time.monotonic() + seconds if seconds else None
        self.ended: list[Ended] = []
        self.build: subprocess.Popen | None = None
        self.running: subprocess.Popen | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def start_build(self, command: Sequence[str]) -> None:
        """Build the extension while the first parts run."""
        with (self.folder / "build.log").open("wb") as log:
            self.build = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=self.environment, start_new_session=True)

    def run(self, part: Part, command: Sequence[str] | None = None) -> Ended:
        """Run one part, unless it cannot run or has run; keep how it went."""
        found = self._run(part, command)
        self.ended.append(found)
        print(found, flush=True)
        self.pack()
        return found

    def _run(self, part: Part, command: Sequence[str] | None) -> Ended:
        out = self.folder / f"{part.name}.json"
        missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
        if part.tiny is None and self.size == TINY:
            return Ended(part.name, None, why="it needs a GPU")
        if missing:
            return Ended(part.name, None, why=f"{', '.join(missing)} is not installed")
        if not self.force and self.done(part.name):
            return Ended(part.name, None, why="it is done at this commit")
        if self.left() < 5:
            return Ended(part.name, None, why="no time is left")
        if part.extension and self.build:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.build.wait(max(0, min(part.limit, self.left() - 5)))
        limit = min(part.limit if self.size != FULL else max(FULL_LIMIT, part.limit), self.left())
        command = command or arguments(part, self.size, out)
        environment = self.environment | ({"TRITON_INTERPRET": "1"} if part.interprets and self.size == TINY else {})

        def began(process: subprocess.Popen) -> None:
            self.running = process

        found = limited(command, self.folder / f"{part.name}.log", limit, environment, began)
        self.running = None
        return found

    def done(self, name: str) -> bool:
        """Has a part succeeded here before, at this very commit?"""
        return not re.search("dirty|unknown", self.folder.name) and self._kept().get(name, {}).get("code") == 0

    def _kept(self) -> dict[str, dict]:
        path = self.folder / "parts.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def pack(self) -> None:
        """Write how the parts went, and the archive of all files so far."""
        kept = self._kept() | {e.name: {"code": e.code, "seconds": round(e.seconds, 1), "why": e.why} for e in self.ended if e.code is not None}
        (self.folder / "parts.json").write_text(json.dumps(kept, indent=1) + "\n")
        if self.archive:
            self.archive.parent.mkdir(parents=True, exist_ok=True)
            part = self.archive.with_suffix(".part")
            with tarfile.open(part, "w:gz", compresslevel=3) as tar:
                tar.add(self.folder, self.folder.name)
                if self.training.exists() and any(e.name == "sandbox" for e in self.ended):
                    tar.add(self.training, self.training.name)
            part.replace(self.archive)

    def close(self) -> None:
        """Stop what still runs."""
        for process in (self.running, self.build):
            if process is not None and process.poll() is None:
                stop(process)


# ---------------------------------------------------------------------------------------------- the summary


def summary(lease: Lease, parts: Sequence[str], most: int = MOST) -> str:
    """How the parts went, what they found, the ends of failed parts' logs and the goals: at most ``most`` characters."""
    pieces = ["\n".join(map(str, lease.ended))]
    for name in parts:
        path = lease.folder / f"{name}.json"
        if path.exists():
            pieces.append(_caught(lambda path=path: show.summary(path)))
    for name in set(parts) & {"tests", "large"}:
        log = lease.folder / f"{name}.log"
        if log.exists():
            pieces.append(f"{name}: " + (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1])
    if lease.size != TINY:
        pieces.append(_caught(lambda: print(*goals.lines(goals.judge(lease.folder), markdown=False), sep="\n")))
    for ended in lease.ended:
        log = lease.folder / f"{ended.name}.log"
        if ended.failed and log.exists():
            pieces.append(f"end of {log.name}:\n" + "\n".join(log.read_text(errors="replace").strip().splitlines()[-12:])[-1200:])
    text = "\n".join(filter(None, pieces))
    return text if len(text) <= most else text[: most - 40] + "\n... (the rest is in the files)"


def _caught(work: Callable[[], object]) -> str:
    """What ``work`` prints, or why it could not: a broken file must not cost the summary."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            work()
        except Exception as problem:
            print(f"{type(problem).__name__}: {problem}")
    return text.getvalue().strip()


# ---------------------------------------------------------------------------------------------- main


@contextlib.contextmanager
def orderly(lease: Lease) -> Iterator[None]:
    """Asked to stop, the lease still ends its part and says what it found."""

    def stopped(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, stopped)
    try:
        yield
    finally:
        lease.close()


def sanitize() -> int:
    """compute-sanitizer on the extension's kernels and on small cases of the Triton kernels."""
    command = f"compute-sanitizer --error-exitcode 99 {sys.executable} {NATIVE} -x tests/ops tests/kernels -k"
    return subprocess.run([*command.split(), SANITIZED], cwd=ROOT).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="MODE | PART", help=f"{', '.join(MODES)}; or parts: {', '.join(KNOWN)}")
    parser.add_argument("--seconds", type=float, help="a deadline for the whole")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--force", action="store_true", help="again, though a part has succeeded at this commit")
    parser.add_argument("--full", action="store_true", help="parts at the sizes of the published tables, as in the mode all")
    parser.add_argument("--sanitizer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sanitizer:
        return sanitize()
    if not args.what or (wrong := [w for w in args.what if w not in KNOWN and w not in MODES]):
        parser.error(f"unknown part {wrong[0]}" if args.what else f"what? One of {', '.join(MODES)}, or parts: {', '.join(KNOWN)}")
    names = list(dict.fromkeys(n for w in args.what for n in (MODES[w][1] if w in MODES else (w,))))
    seconds = args.seconds or next((MODES[w][0] for w in args.what if w in MODES), None)

    import torch

    from benchmarks import common

    gpu = torch.cuda.is_available()
    if not gpu and os.environ.get("LDO_ALLOW_CPU") != "1":
        parser.error("no GPU here (LDO_ALLOW_CPU=1 tries all of this with tiny sizes)")
    size = TINY if not gpu else FULL if args.full or "all" in args.what else SHORT
    commit = common.commit() or "unknown"
    device = torch.device("cuda" if gpu else "cpu")
    label = f"{time.strftime('%Y-%m-%d', time.gmtime())}-{commit[:7]}{'-dirty' if commit.endswith('-dirty') else ''}"
    folder = args.results / common.slug(device) / label
    archive = Path(os.environ["OUT"]) / "results.tgz" if os.environ.get("OUT") else None
    lease = Lease(folder, size, seconds, environment(gpu), archive, args.force)
    within = f", within {seconds:.0f} s" if seconds else ""
    print(f"{common.describe(device)}, commit {commit}: {' '.join(names)}{within}; results in {folder}", flush=True)
    status = 0
    try:
        with orderly(lease):
            if any(KNOWN[n].extension for n in names):
                lease.start_build([sys.executable, "setup.py", "build_ext"])
            for name in names:
                lease.run(KNOWN[name])
    except SystemExit as asked:
        status = int(asked.code or 0)
        print("asked to stop", flush=True)
    lease.pack()
    print(summary(lease, names), flush=True)
    return status or int(any(e.failed for e in lease.ended))


def environment(gpu: bool) -> dict[str, str]:
    """Of every part: the tree on the path, output not held back; on a GPU kernels run natively and the extension is built for it alone."""
    import torch

    here = os.environ | {"PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "kernels"), os.environ.get("PYTHONPATH", "")]
    here["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    here.pop("TRITON_INTERPRET", None)
    if gpu:
        here.setdefault("LDO_CUDA_ARCHITECTURES", "".join(map(str, torch.cuda.get_device_capability())))
    return here


if __name__ == "__main__":
    sys.exit(main())
