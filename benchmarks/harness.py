"""The harness of the benchmarks: times every variant of a case, prints a table as it goes, and keeps the rows as JSON.

A script makes a ``Bench`` from its arguments, hands it ``Case`` after ``Case``, and calls ``finish``:

    bench = Bench(flags.arguments(__doc__).parse_args())
    bench.measure(Case(op="relation", kind="fwd", shape={"B": 1, "N": 4096}, dtype=..., inputs=[...], variants={...}))
    sys.exit(bench.finish())

Timing: after a warm-up the variants run in turn, each turn on the next input set (``timing.rounds``). Medians and
quartiles are kept. The first variant is timed a second time under another name; how far the two medians differ is the
noise (``spread``).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory, provenance, show, timing
from benchmarks.flags import DTYPES
from benchmarks.variant import Unavailable

# a broken baseline is reported; a broken variant of ours also fails the run
OURS = ("triton", "cuda", "chunked", "cpp", "triton-graph")
TWIN = "first variant again"


@dataclass(kw_only=True)
class Case:
    """One comparison: all variants of one operation on one shape.

    ``inputs``: the input sets, rotated; see ``timing.rotation`` for how many. ``variants``: name -> function of one
    input set; it runs the whole pass and returns its result (``variant.passes`` builds them). ``floor_ms``: what no
    implementation beats, from the measured limits. ``error``: of the first input set's result, relative to fp64.
    ``flops``, ``moved``: operations and bytes of the floor.
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


def relative_error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||, in fp64."""
    return float((found.double() - exact).norm() / exact.norm())


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, and the folder that it belongs in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


class Bench:
    """Measures cases, prints a table as it goes, and keeps the rows. ``args`` come from ``flags.arguments``."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        self.dtype = DTYPES[args.dtype or ("bf16" if self.device.type == "cuda" else "fp32")]
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self._said: set[str] = set()
        # the type that each device multiplies fastest
        self._limits = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        header = provenance.record(self.device)
        versions = ", ".join(f"{package} {version}" for package, version in header["versions"].items())
        print(f"{header['device']}; {versions}; commit {show.brief(header['commit'])}")
        self.result = {
            **header,
            "matmul_tflops": timing.matmul_tflops(self.device, self._limits),
            "copy_gbps": timing.copy_gbps(self.device),
            "rows": self.rows,
        }
        print(
            f"limits: matmul {show.short(self._limits)} {self.result['matmul_tflops']:.4g} TFLOP/s, "
            f"copy {self.result['copy_gbps']:.4g} GB/s (read + write)"
        )
        if self.device.type != "cuda":
            print(
                "this is a CPU: sizes are small, Triton and CUDA variants are left out, and no number here holds for a "
                "GPU"
            )
        self._warm_backward()

    def floor_ms(self, flops: float = 0, moved: float = 0) -> float:
        """The larger of arithmetic at the measured rate of this dtype and bytes at the measured copy."""
        arithmetic = flops / timing.matmul_tflops(self.device, self.dtype) / 1e12 if flops else 0
        return 1e3 * max(arithmetic, moved / self.result["copy_gbps"] / 1e9)

    def attempt(self, measure: Callable[..., None], *arguments: Any) -> None:
        """``measure(self, *arguments)``; where its inputs or its fp64 reference do not fit, one line says so."""
        try:
            measure(self, *arguments)
        except Exception as problem:
            if not _out_of_memory(problem):
                raise
            print(f"{arguments}: left out, out of memory outside the variants", flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """Time every variant of ``case`` and return their rows.

        A variant that cannot run is left out in one line; one that runs out of memory gets a row that says so.
        """
        # a fresh compile for every shape: torch.compile gives up after a few recompilations of one function
        torch._dynamo.reset()
        ready: dict[str, Callable[..., Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        estimates: dict[str, float] = {}
        for variant, work in case.variants.items():
            if self.args.variants and variant not in self.args.variants:
                continue
            row = self._row(case, variant)
            try:
                estimates[variant], row["extra_mib"], error = self._first_calls(case, work)
                if error is not None:
                    row["grad_error"] = error
                ready[variant] = work
                rows[variant] = row
            except Exception as problem:
                if _out_of_memory(problem):
                    rows[variant] = row | {"error": "OOM"}
                else:
                    self._leave_out(case, variant, problem)
            # Not inside the except block: there the exception still holds the failed call's frames and their tensors.
            if "error" in rows.get(variant, ()) and self.device.type == "cuda":
                torch.cuda.empty_cache()
        if ready:
            self._time(case, ready, rows, estimates)
        measured = list(rows.values())
        self.rows += measured
        # the header only above the first rows of a run
        show.print_rows(measured, header=bool(measured) and len(self.rows) == len(measured))
        if self.args.profile:
            self._profile(case, ready)
        self.write()
        return measured

    def finish(self) -> int:
        """Write and plot; the exit code is 1 if a variant of ours broke."""
        self.write()
        if self.args.out and self.rows:
            show.plot(self.result, self.args.out.with_suffix(".png"))
        for line in self.failed:
            print(f"FAILED {line}")
        return int(bool(self.failed))

    def write(self) -> None:
        """Write everything that was found so far."""
        if self.args.out:
            write_json(self.args.out, self.result)

    def _row(self, case: Case, name: str) -> dict[str, Any]:
        return {
            "op": case.op,
            "variant": name,
            "pass": case.kind,
            "shape": {"B": 1, **case.shape},
            "dtype": show.short(case.dtype),
            "ms": None,
            "floor_ms": case.floor_ms,
            "extra_mib": None,
            "grad_error": None,
            **case.extra,
        }

    def _first_calls(self, case: Case, work: Callable[..., Any]) -> tuple[float, float, float | None]:
        """Warm up. Seconds of a warm call, its peak extra MiB, the first set's error."""
        # before the first call: what a variant keeps between calls counts as its memory
        before = memory.baseline(self.device)
        result = work(*case.inputs[0])
        error = case.error(result) if case.error else None
        del result
        extra_mib = memory.peak_extra(lambda: work(*case.inputs[0]), self.device, before)
        for inputs in case.inputs[1:]:
            work(*inputs)
        samples = timing.rounds([lambda inputs: work(*inputs)], case.inputs, self.device, 2)
        return min(elapsed for (elapsed,) in samples), extra_mib, error

    def _repeats(self, total: float) -> int:
        """How many rounds to time if one takes ``total`` seconds: a budget of seconds, between a least and a most."""
        gpu = self.device.type == "cuda"
        budget, least, most = (1.5, 10, 100) if gpu else (4.0, 3, 30)
        if self.args.quick:
            budget /= 3
            least = 5 if gpu else 3
            most //= 3
        return max(least, min(most, int(budget / total)))

    def _time(
        self, case: Case, ready: dict[str, Callable[..., Any]], rows: dict[str, dict], estimates: dict[str, float]
    ) -> None:
        """Complete the rows with the times of all variants that are ready."""
        first = next(iter(ready))
        repeat = self._repeats(sum(estimates.values()) + estimates[first])
        # The first variant twice: whatever differs between its two medians is noise.
        works = {**ready, TWIN: ready[first]}
        calls = [lambda inputs, work=work: work(*inputs) for work in works.values()]
        samples = timing.rounds(calls, case.inputs, self.device, repeat)
        quartiles = {}
        for index, variant in enumerate(works):
            milliseconds = [1e3 * sample[index] for sample in samples]
            quartiles[variant] = statistics.quantiles(milliseconds, n=4, method="inclusive")
        spread = abs(quartiles[TWIN][1] / quartiles[first][1] - 1)
        for variant in ready:
            lower, middle, upper = quartiles[variant]
            row = rows[variant]
            row |= {"ms": middle, "ms_low": lower, "ms_high": upper, "repeats": repeat, "spread": spread}
            if case.floor_ms:
                row["ratio_to_floor"] = middle / case.floor_ms
            if case.flops:
                row["tflops"] = case.flops / middle / 1e9
            if case.moved:
                row["gbps"] = case.moved / middle / 1e6

    def _leave_out(self, case: Case, name: str, problem: Exception) -> None:
        """Say once why a variant is left out; a variant of ours that is available and breaks fails the run."""
        message = (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]
        # An operation of ours raises such a ValueError where an impl cannot run; anything else is a fault.
        missing = isinstance(problem, Unavailable) or (isinstance(problem, ValueError) and "not available" in message)
        if missing:
            line = f"{case.op} {name}: left out, {message}"
        else:
            line = f"{case.op} {name} {case.kind} {case.shape}: {type(problem).__name__}: {message}"
        if line not in self._said:
            print(line, flush=True)
        self._said.add(line)
        if not missing and name in OURS:
            self.failed.append(line)

    def _warm_backward(self) -> None:
        """Let cuBLAS allocate its workspace for autograd's thread, so that no variant is billed for it.

        It keeps one for each thread that calls it.
        """
        if self.device.type == "cuda":
            square = torch.randn(256, 256, device=self.device, dtype=self.dtype, requires_grad=True)
            (square @ square).sum().backward()

    def _profile(self, case: Case, ready: dict[str, Callable[..., Any]]) -> None:
        self.args.profile.mkdir(parents=True, exist_ok=True)
        shape = [f"{dimension}{size}" for dimension, size in case.shape.items()]
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        for variant, work in ready.items():
            with torch.profiler.profile(profile_memory=True) as profile:
                for inputs in case.inputs:
                    work(*inputs)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            label = "-".join([case.op, case.extra.get("case", ""), *shape, case.kind, variant])
            stem = self.args.profile / re.sub(r"[^\w.+-]", "-", label)
            profile.export_chrome_trace(f"{stem}.json.gz")
            Path(f"{stem}.txt").write_text(profile.key_averages().table(sort_by=order, row_limit=20))


def _out_of_memory(problem: Exception) -> bool:
    # PyTorch's CPU allocator raises a plain RuntimeError
    return isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem)
