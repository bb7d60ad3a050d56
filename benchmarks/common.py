"""What every benchmark shares: who measured, the machine's own limits, interleaved timing, and the JSON.

A script makes a ``Bench`` from its arguments, hands it ``Case`` after ``Case``, and calls ``finish``:

    bench = common.Bench(common.arguments(__doc__).parse_args())
    bench.measure(Case(op="relation", kind="fwd", shape={"B": 1, "N": 4096}, dtype=..., inputs=[...], variants={...}))
    sys.exit(bench.finish())

Timing: after a warm-up the variants run in turn (A B C A B C ...), each turn on the next of several input sets, so that
neither a drifting clock nor a warm cache favours one. Medians and quartiles are kept. The first variant is also timed a
second time under another name; how far the two medians differ is the noise (``spread``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory, show

ROOT = Path(__file__).resolve().parent.parent
OURS = ("triton", "cuda", "chunked", "cpp", "triton-graph")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TWIN = "first variant again"


@dataclass(kw_only=True)
class Case:
    """One comparison: all variants of one operation on one shape.

    ``inputs``: the input sets, rotated; see ``rotation`` for how many. ``variants``: name -> function of one input set; it does all of the pass
    and returns what it made (``passes`` builds them). ``floor_ms``: what no implementation beats, from the measured limits.
    ``error``: of the first input set's result, relative to fp64. ``flops``, ``moved``: operations and bytes of the floor.
    """

    op: str
    kind: str  # fwd | fwd+bwd
    shape: dict[str, int]
    dtype: torch.dtype
    inputs: Sequence[tuple[Any, ...]]
    variants: dict[str, Callable[..., Any]]
    floor_ms: float | None = None
    flops: float | None = None
    moved: float | None = None
    error: Callable[[Any], float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Unavailable(Exception):
    """A variant that this machine cannot run; its message says why."""


# ------------------------------------------------------------------------------------------------ who measured


def describe(device: torch.device) -> str:
    """A GPU as its driver names it; a CPU by its model and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{found.group(1).strip() if found else platform.machine()} CPU, {torch.get_num_threads()} threads"


def slug(device: torch.device) -> str:
    """``describe`` as a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", describe(device).lower()).strip("-")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return found


def commit() -> str | None:
    """LDO_COMMIT, for a copy whose .git is missing or another's; else the commit, with "-dirty" if the tree differs from it (results apart)."""
    if named := os.environ.get("LDO_COMMIT"):
        return named
    head = _output("git", "rev-parse", "HEAD")
    return head + ("-dirty" if _output("git", "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results") else "") if head else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def record(device: torch.device) -> dict[str, Any]:
    """The head of every result file."""
    return {
        "device": describe(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


# ------------------------------------------------------------------------------------------------ the machine's limits


@cache
def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measured rate of torch.matmul on random data: 8192^3 on a GPU, 2048^3 on a CPU."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / statistics.median(seconds(lambda: a @ b, device, 20 if device.type == "cuda" else 5)) / 1e12


@cache
def copy_gbps(device: torch.device) -> float:
    """Measured device-to-device copy, bytes read plus bytes written: 2 GiB each way on a GPU, 256 MiB on a CPU."""
    size = 2**31 if device.type == "cuda" else 2**28
    a = torch.empty(size, dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    return 2 * size / statistics.median(seconds(lambda: b.copy_(a), device, 20 if device.type == "cuda" else 5)) / 1e9


def seconds(work: Callable[[], Any], device: torch.device, repeat: int) -> list[float]:
    """Of each repeat, after three unmeasured ones."""
    for _ in range(3):
        work()
    return [s for (s,) in _rounds([lambda _: work()], [()], device, repeat)]


def _rounds(works: Sequence[Callable[[Any], Any]], inputs: Sequence[Any], device: torch.device, repeat: int) -> list[list[float]]:
    """[repeat][work] seconds, the works in turn. A GPU is waited for once, at the end."""
    if device.type != "cuda":
        out = []
        for k in range(repeat):
            row = []
            for work in works:
                began = time.perf_counter()
                work(inputs[k % len(inputs)])
                row.append(time.perf_counter() - began)
            out.append(row)
        return out
    marks = []
    torch.cuda.synchronize(device)
    for k in range(repeat):
        row = []
        for work in works:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work(inputs[k % len(inputs)])
            end.record()
            row.append((start, end))
        marks.append(row)
    torch.cuda.synchronize(device)
    return [[start.elapsed_time(end) / 1e3 for start, end in row] for row in marks]


# ------------------------------------------------------------------------------------------------ helpers for scripts


def passes(function: Callable[..., Tensor], kind: str) -> Callable[..., Tensor]:
    """``function(x, *rest)`` as a variant: its value without autograd, or the gradient of its sum in x."""

    def forward(x: Tensor, *rest: Any) -> Tensor:
        with torch.no_grad():
            return function(x, *rest)

    def both(x: Tensor, *rest: Any) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x, *rest).sum(), x)[0]

    return {"fwd": forward, "fwd+bwd": both}[kind]


def graphed(work: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``work`` as a variant whose launches cost the host nothing: captured once for each input set as a CUDA graph, then replayed."""
    made: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def replay(first: Tensor, *rest: Any) -> Tensor:
        if not first.is_cuda:
            raise Unavailable("CUDA graphs need a GPU")
        if first.data_ptr() not in made:
            for _ in range(2):
                work(first, *rest)
            torch.cuda.synchronize(first.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = work(first, *rest)
            made[first.data_ptr()] = graph, out
        graph, out = made[first.data_ptr()]
        graph.replay()
        return out

    return replay


def rotation(bytes_per_set: int, device: torch.device) -> int:
    """How many input sets: enough to overflow the L2 four times, within 4 GiB, from 2 to 8; 2 on a CPU."""
    if device.type != "cuda":
        return 2
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    return max(2, min(math.ceil(4 * l2 / bytes_per_set), 2**32 // bytes_per_set, 8))


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for the one shape at hand. ``Bench.measure`` forgets earlier shapes first."""
    return torch.compile(function, dynamic=False)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||, in fp64."""
    return float((found.double() - exact).norm() / exact.norm())


def arguments(doc: str) -> argparse.ArgumentParser:
    """The flags all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write results here, and a plot beside it")
    parser.add_argument("--quick", action="store_true", help="few shapes and repeats: under two minutes on a GPU")
    parser.add_argument("--sizes", type=integers, metavar="N,N,...", help="replace the sizes")
    parser.add_argument("--dtype", choices=DTYPES, help="default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--variants", type=words, metavar="A,B,...", help="only these")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write a torch profiler trace of every variant")
    parser.add_argument("--model", action="store_true", help="print what a static model predicts, and run nothing")
    return parser


def words(text: str) -> list[str]:
    """The type of a flag that takes a comma-separated list."""
    return text.split(",")


def integers(text: str) -> list[int]:
    """The same, of numbers."""
    return [int(n) for n in text.split(",")]


# ------------------------------------------------------------------------------------------------ the harness


class Bench:
    """Measures cases, prints a table as it goes, and keeps the rows. ``args`` come from ``arguments``."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        self.dtype = DTYPES[args.dtype or ("bf16" if self.device.type == "cuda" else "fp32")]
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self._said: set[str] = set()
        self._limits = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        head = record(self.device)
        print(f"{head['device']}; {', '.join(f'{k} {v}' for k, v in head['versions'].items())}; commit {show.brief(head['commit'])}")
        self.result = {**head, "matmul_tflops": matmul_tflops(self.device, self._limits), "copy_gbps": copy_gbps(self.device), "rows": self.rows}
        dtype = show.short(self._limits)
        print(f"limits: matmul {dtype} {self.result['matmul_tflops']:.4g} TFLOP/s, copy {self.result['copy_gbps']:.4g} GB/s (read + write)")
        if self.device.type != "cuda":
            print("this is a CPU: small sizes, and Triton and CUDA variants are left out; nothing here speaks for a GPU")
        self._warm_backward()

    def floor_ms(self, flops: float = 0, moved: float = 0) -> float:
        """The larger of arithmetic at the measured rate of this dtype and bytes at the measured copy."""
        arithmetic = flops / matmul_tflops(self.device, self.dtype) / 1e12 if flops else 0
        return 1e3 * max(arithmetic, moved / self.result["copy_gbps"] / 1e9)

    def attempt(self, measure: Callable[..., None], *arguments: Any) -> None:
        """``measure(self, *arguments)``; where not even its inputs or its fp64 reference fit, one line says so and the run goes on."""
        try:
            measure(self, *arguments)
        except Exception as problem:
            if not _out_of_memory(problem):
                raise
            print(f"{arguments}: left out, out of memory outside the variants", flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """Time every variant of ``case``; a variant that cannot run is left out in one line, one that runs out of memory gets a row that says so."""
        torch._dynamo.reset()  # a fresh compile for every shape, below the limit on recompiles
        wanted = {n: f for n, f in case.variants.items() if not self.args.variants or n in self.args.variants}
        ready, rows, estimate = {}, {}, {}
        for name, work in wanted.items():
            row = self._row(case, name)
            try:
                estimate[name], row["extra_mib"], error = self._first_calls(case, work)
                if error is not None:
                    row["grad_error"] = error
                ready[name], rows[name] = work, row
            except Exception as problem:
                if _out_of_memory(problem):
                    rows[name] = row | {"error": "OOM"}
                else:
                    self._leave_out(case, name, problem)
            if "error" in rows.get(name, ()) and self.device.type == "cuda":
                torch.cuda.empty_cache()  # only now, with the failed call's frames gone
        if ready:
            self._time(case, ready, rows, estimate)
        found = list(rows.values())
        self.rows += found
        show.print_rows(found, header=bool(found) and len(self.rows) == len(found))
        if self.args.profile:
            self._profile(case, ready)
        self.write()
        return found

    def finish(self) -> int:
        """Write and plot; the exit code is 1 if a variant of ours broke."""
        self.write()
        if self.args.out and self.rows:
            show.plot(self.result, self.args.out.with_suffix(".png"))
        for line in self.failed:
            print(f"FAILED {line}")
        return int(bool(self.failed))

    def _row(self, case: Case, name: str) -> dict[str, Any]:
        shape = {"B": 1, **case.shape}
        fixed = {"op": case.op, "variant": name, "pass": case.kind, "shape": shape, "dtype": show.short(case.dtype)}
        return {**fixed, "ms": None, "floor_ms": case.floor_ms, "extra_mib": None, "grad_error": None, **case.extra}

    def _first_calls(self, case: Case, work: Callable[..., Any]) -> tuple[float, float, float | None]:
        """Warm up. Seconds of a warm call, its peak extra MiB, the first set's error."""
        before = memory.baseline(self.device)
        result = work(*case.inputs[0])
        error = case.error(result) if case.error else None
        del result
        extra = memory.peak_extra(lambda: work(*case.inputs[0]), self.device, before)
        for each in case.inputs[1:]:
            work(*each)
        return min(s for (s,) in _rounds([lambda i: work(*i)], case.inputs, self.device, 2)), extra, error

    def _time(self, case: Case, ready: dict[str, Callable[..., Any]], rows: dict[str, dict], estimate: dict[str, float]) -> None:
        first = next(iter(ready))
        total = sum(estimate.values()) + estimate[first]
        budget, least, most = (1.5, 10, 100) if self.device.type == "cuda" else (4.0, 3, 30)
        if self.args.quick:
            budget, least, most = budget / 3, 5 if self.device.type == "cuda" else 3, most // 3
        repeat = max(least, min(most, int(budget / total)))
        works = {**ready, TWIN: ready[first]}
        samples = _rounds([lambda i, w=w: w(*i) for w in works.values()], case.inputs, self.device, repeat)
        quartiles = {name: statistics.quantiles([1e3 * row[k] for row in samples], n=4, method="inclusive") for k, name in enumerate(works)}
        spread = abs(quartiles[TWIN][1] / quartiles[first][1] - 1)
        for name in ready:
            low, middle, high = quartiles[name]
            row = rows[name]
            row |= {"ms": middle, "ms_low": low, "ms_high": high, "repeats": repeat, "spread": spread}
            if case.floor_ms:
                row["ratio_to_floor"] = middle / case.floor_ms
            if case.flops:
                row["tflops"] = case.flops / middle / 1e9
            if case.moved:
                row["gbps"] = case.moved / middle / 1e6

    def _leave_out(self, case: Case, name: str, problem: Exception) -> None:
        message = (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]
        missing = isinstance(problem, Unavailable) or (isinstance(problem, ValueError) and "not available" in message)
        where = f"{case.op} {name} {case.kind} {case.shape}"
        line = f"{case.op} {name}: left out, {message}" if missing else f"{where}: {type(problem).__name__}: {message}"
        if line not in self._said:
            print(line, flush=True)
        self._said.add(line)
        if not missing and name in OURS:
            self.failed.append(line)

    def _warm_backward(self) -> None:
        """cuBLAS takes a workspace for each thread that calls it; take autograd's now, so that no variant is billed for it."""
        if self.device.type == "cuda":
            x = torch.randn(256, 256, device=self.device, dtype=self.dtype, requires_grad=True)
            (x @ x).sum().backward()

    def _profile(self, case: Case, ready: dict[str, Callable[..., Any]]) -> None:
        self.args.profile.mkdir(parents=True, exist_ok=True)
        for name, work in ready.items():
            labels = [case.op, case.extra.get("case", ""), *(f"{k}{v}" for k, v in case.shape.items()), case.kind, name]
            with torch.profiler.profile(profile_memory=True) as found:
                for each in case.inputs:
                    work(*each)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            stem = self.args.profile / re.sub(r"[^\w.+-]", "-", "-".join(labels))
            found.export_chrome_trace(f"{stem}.json.gz")
            by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            Path(f"{stem}.txt").write_text(found.key_averages().table(sort_by=by, row_limit=20))

    def write(self) -> None:
        """Write all that was found so far."""
        if self.args.out:
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            self.args.out.write_text(json.dumps(self.result, indent=1) + "\n")


def _out_of_memory(problem: Exception) -> bool:
    return isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem)
