"""Everything that needs a GPU, within a time limit: ``sh benchmarks/lease.sh probe | main | all | PART ...``.

A GPU is often available only for minutes, so the most valuable parts run first. ``probe`` takes at most 200 seconds and
says whether the kernels are right and how fast they are in the case that matters most. ``main`` takes at most 500 and
also measures the rest. ``all`` has no limit and measures at the sizes of the published tables. Each part is a process
with its own time limit; a part that fails, hangs or is killed does not affect the results of the others.

    --seconds S       a deadline for the whole (default: that of the mode); the part that runs then is stopped, those
                      after it are left out
    --results DIR     results go to DIR/<device>/<date>-<commit>/<part>.json, next to logs (default benchmarks/results)
    --force           run a part again even if it has succeeded at this commit

    OUT=...           a folder for results.tgz, written again after every part
    LDO_COMMIT=...    names the commit in a copy of the tree that has no .git, or that of another repository
    LDO_ALLOW_CPU=1   try all of this without a GPU, at tiny sizes whose numbers mean nothing

The extension is built only for this GPU, in the background; the parts that need it wait for it. Output goes to the
logs; a summary of at most 12,000 characters is printed last. Exit code 1 if a part failed.
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
from pathlib import Path

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import goals, show
from benchmarks.lease_parts import FULL, FULL_LIMIT, KNOWN, MODES, NATIVE, SHORT, TINY, Part, arguments
from benchmarks.lease_processes import Ended, limited, stop

ROOT = Path(__file__).resolve().parents[1]
# Characters of the summary: what the end of a log that is cut short still shows.
MOST = 12_000
# For pytest -k. compute-sanitizer slows kernels by orders of magnitude, so one type must do: dtype1 is fp32.
SANITIZED = "(gpu_and_cpu_give_the_same_bits and dtype1) or test_repeats"


class Lease:
    """A run of parts within a time limit."""

    def __init__(
        self,
        folder: Path,
        size: str,
        seconds: float | None,
        environment: dict[str, str],
        archive: Path | None = None,
        force: bool = False,
    ):
        self.folder = folder
        self.size = size
        self.archive = archive
        self.force = force
        self.environment = environment
        # the part sandbox continues this training, which therefore goes into the archive
        self.training = ROOT / "runs" / "sandbox-further"
        self.deadline = time.monotonic() + seconds if seconds else None
        self.ended: list[Ended] = []
        self.build: subprocess.Popen | None = None
        self.running: subprocess.Popen | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds until the deadline."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def start_build(self, command: Sequence[str]) -> None:
        """Build the extension while the first parts run."""
        with (self.folder / "build.log").open("wb") as log:
            self.build = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=self.environment, start_new_session=True
            )

    def run(self, part: Part, command: Sequence[str] | None = None) -> Ended:
        """Run one part, unless it cannot run or has run; keep how it went."""
        ended = self._run(part, command)
        self.ended.append(ended)
        print(ended, flush=True)
        self.pack()
        return ended

    def _run(self, part: Part, command: Sequence[str] | None) -> Ended:
        why_not = self._why_not(part)
        if why_not:
            return Ended(part.name, None, why=why_not)
        if part.extension and self.build:
            # Without the extension the part still says something: it runs after its share of waiting.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.build.wait(max(0, min(part.limit, self.left() - 5)))
        limit = max(FULL_LIMIT, part.limit) if self.size == FULL else part.limit
        command = command or arguments(part, self.size, self.folder / f"{part.name}.json")
        environment = dict(self.environment)
        if part.interprets and self.size == TINY:
            environment["TRITON_INTERPRET"] = "1"

        def began(process: subprocess.Popen) -> None:
            self.running = process

        ended = limited(command, self.folder / f"{part.name}.log", min(limit, self.left()), environment, began)
        self.running = None
        return ended

    def _why_not(self, part: Part) -> str | None:
        """Why a part is left out, if it is."""
        missing = [module for module in part.needs if importlib.util.find_spec(module) is None]
        if part.tiny is None and self.size == TINY:
            return "it needs a GPU"
        if missing:
            return f"{', '.join(missing)} is not installed"
        if not self.force and self.done(part.name):
            return "it is done at this commit"
        if self.left() < 5:
            return "no time is left"
        return None

    def done(self, name: str) -> bool:
        """Whether a part has succeeded here before, at this very commit."""
        # A dirty tree may be another than the one that the part ran in.
        return not re.search("dirty|unknown", self.folder.name) and self._kept().get(name, {}).get("code") == 0

    def _kept(self) -> dict[str, dict]:
        outcomes = self.folder / "parts.json"
        return json.loads(outcomes.read_text()) if outcomes.exists() else {}

    def pack(self) -> None:
        """Write how the parts went, and the archive of all files so far."""
        outcomes = self._kept()
        for ended in self.ended:
            if ended.code is not None:
                outcomes[ended.name] = {"code": ended.code, "seconds": round(ended.seconds, 1), "why": ended.why}
        (self.folder / "parts.json").write_text(json.dumps(outcomes, indent=1) + "\n")
        if self.archive:
            self.archive.parent.mkdir(parents=True, exist_ok=True)
            # in one step: whoever takes the archive at any moment gets a whole one
            partial = self.archive.with_suffix(".part")
            # fast rather than small: it is written again after every part
            with tarfile.open(partial, "w:gz", compresslevel=3) as archive:
                archive.add(self.folder, self.folder.name)
                if self.training.exists() and any(ended.name == "sandbox" for ended in self.ended):
                    archive.add(self.training, self.training.name)
            partial.replace(self.archive)

    def close(self) -> None:
        """Stop what still runs."""
        for process in (self.running, self.build):
            if process is not None and process.poll() is None:
                stop(process)


# ---------------------------------------------------------------------------------------------- the summary


def summary(lease: Lease, parts: Sequence[str], most: int = MOST) -> str:
    """How the parts went, their results, the goals, and the ends of the logs of failed parts.

    At most ``most`` characters.
    """
    pieces = ["\n".join(map(str, lease.ended))]
    for part_name in parts:
        results = lease.folder / f"{part_name}.json"
        if results.exists():
            pieces.append(_caught(lambda path=results: show.summary(path)))
    # tests write no JSON
    for part_name in set(parts) & {"tests", "large"}:
        log = lease.folder / f"{part_name}.log"
        if log.exists():
            # pytest's last line has the counts
            lines = _lines(log) or ["nothing"]
            pieces.append(f"{part_name}: {lines[-1]}")
    if lease.size != TINY:
        pieces.append(_caught(lambda: print(*goals.lines(goals.judge(lease.folder), markdown=False), sep="\n")))
    for ended in lease.ended:
        log = lease.folder / f"{ended.name}.log"
        if ended.failed and log.exists():
            end = "\n".join(_lines(log)[-12:])[-1200:]
            pieces.append(f"end of {log.name}:\n{end}")
    text = "\n".join(filter(None, pieces))
    return text if len(text) <= most else text[: most - 40] + "\n... (the rest is in the files)"


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").strip().splitlines()


def _caught(work: Callable[[], object]) -> str:
    """What ``work`` prints, or why it failed: a broken file must not spoil the summary."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            work()
        except Exception as problem:
            print(f"{type(problem).__name__}: {problem}")
    return text.getvalue().strip()


# ---------------------------------------------------------------------------------------------- main


@contextlib.contextmanager
def orderly(lease: Lease) -> Iterator[None]:
    """When asked to stop, the lease still ends its part and prints its summary."""

    def stopped(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for request in (signal.SIGTERM, signal.SIGINT):
        signal.signal(request, stopped)
    try:
        yield
    finally:
        lease.close()


def sanitize() -> int:
    """Run compute-sanitizer on the extension's kernels and on small cases of the Triton kernels."""
    command = f"compute-sanitizer --error-exitcode 99 {sys.executable} {NATIVE} -x tests/ops tests/kernels -k"
    return subprocess.run([*command.split(), SANITIZED], cwd=ROOT).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="*", metavar="MODE | PART", help=f"{', '.join(MODES)}; or parts: {', '.join(KNOWN)}"
    )
    parser.add_argument("--seconds", type=float, help="a deadline for the whole")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--force", action="store_true", help="again, though a part has succeeded at this commit")
    parser.add_argument(
        "--full", action="store_true", help="parts at the sizes of the published tables, as in the mode all"
    )
    parser.add_argument("--sanitizer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sanitizer:
        return sanitize()
    if not arguments.what:
        parser.error(f"name what to run: one of {', '.join(MODES)}, or parts: {', '.join(KNOWN)}")
    for word in arguments.what:
        if word not in KNOWN and word not in MODES:
            parser.error(f"unknown part {word}; one of {', '.join(MODES)}, or parts: {', '.join(KNOWN)}")
    names = chosen_parts(arguments.what)
    deadlines = [MODES[word][0] for word in arguments.what if word in MODES]
    seconds = arguments.seconds or next(iter(deadlines), None)

    # only now: a mistake is reported without waiting for PyTorch
    import torch

    from benchmarks import provenance

    on_gpu = torch.cuda.is_available()
    if not on_gpu and os.environ.get("LDO_ALLOW_CPU") != "1":
        parser.error("no GPU here (LDO_ALLOW_CPU=1 tries all of this with tiny sizes)")
    full = arguments.full or "all" in arguments.what
    if not on_gpu:
        size = TINY
    elif full:
        size = FULL
    else:
        size = SHORT
    commit = provenance.commit() or "unknown"
    device = torch.device("cuda" if on_gpu else "cpu")
    dirty = "-dirty" if commit.endswith("-dirty") else ""
    label = f"{time.strftime('%Y-%m-%d', time.gmtime())}-{commit[:7]}{dirty}"
    folder = arguments.results / provenance.slug(device) / label
    archive = Path(os.environ["OUT"]) / "results.tgz" if os.environ.get("OUT") else None
    lease = Lease(folder, size, seconds, environment(on_gpu), archive, arguments.force)
    within = f", within {seconds:.0f} s" if seconds else ""
    print(f"{provenance.describe(device)}, commit {commit}: {' '.join(names)}{within}; results in {folder}", flush=True)
    status = 0
    try:
        with orderly(lease):
            if any(KNOWN[part_name].extension for part_name in names):
                lease.start_build([sys.executable, "setup.py", "build_ext"])
            for part_name in names:
                lease.run(KNOWN[part_name])
    except SystemExit as asked:
        status = int(asked.code or 0)
        print("asked to stop", flush=True)
    # again: a part that was stopped has not packed its log
    lease.pack()
    print(summary(lease, names), flush=True)
    return status or int(any(ended.failed for ended in lease.ended))


def chosen_parts(words: Sequence[str]) -> list[str]:
    """The names of the parts that modes and names of parts ask for, each once and in order."""
    names: list[str] = []
    for word in words:
        names += MODES[word][1] if word in MODES else (word,)
    return list(dict.fromkeys(names))


def environment(gpu: bool) -> dict[str, str]:
    """The environment of every part: the tree on the path, and output that is not buffered.

    On a GPU kernels run natively, and the extension is built only for that GPU.
    """
    import torch

    variables = os.environ | {"PYTHONUNBUFFERED": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # set for tests on a CPU; kernels would then run in Python on a GPU too
    variables.pop("TRITON_INTERPRET", None)
    if gpu:
        variables.setdefault("LDO_CUDA_ARCHITECTURES", "".join(map(str, torch.cuda.get_device_capability())))
    return variables


if __name__ == "__main__":
    sys.exit(main())
