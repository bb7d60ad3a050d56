"""The predictive residual against eager PyTorch and torch.compile.

Time, share of the copy bandwidth, memory, gradient error.

    python benchmarks/bench_residual.py [--quick] [--sizes 100352] [--widths 1024] [--metrics cosine,l1]
                                        [--layouts windows,rows] [--out FILE.json]

M rows of D features (``--sizes`` are M), target layer-normed, in segments: ``rows`` (each row one), ``windows`` (1568
tokens, as one V-JEPA window has), ``one`` (all rows). The operation is bound by memory. The floor is the bytes that
must move over the measured copy bandwidth: forward 2 M D elements (both inputs once), with the gradient 5 M D (both
inputs once more in the backward, since the upstream gradient is not known earlier, and the gradient written). Offsets
and means are too small to count. ``gbps`` is those bytes over the time. ``eager`` computes in the inputs' precision,
``widened`` and ``compile`` in fp32, as the reference and ours do; the gradient is checked on a sample of rows.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import baselines, flags, timing
from benchmarks.harness import Bench, Case, relative_error
from benchmarks.model import RESIDUAL_ROWS
from benchmarks.variant import compiled, passes
from ldo.ops import predictive_residual

WINDOW = 1568
METRICS = ("cosine", "l1", "l2")
LAYOUTS = ("windows", "rows", "one")
# Rows whose gradient is compared with fp64: a row depends on no other, so a sample says as much as all.
SAMPLE = 4096


def offsets(layout: str, rows: int) -> Tensor:
    """CSR offsets, on the CPU where the operation wants them."""
    length = {"rows": 1, "windows": WINDOW, "one": rows}[layout]
    return torch.arange(0, rows + 1, length)


def exact_rows(predicted: Tensor, target: Tensor, segments: Tensor, rows: Tensor, metric: str) -> Tensor:
    """The exact gradient of the sum of the segments' means in some rows, in fp64.

    A row's gradient depends only on the row itself and the length of its segment.
    """
    chosen = predicted[rows].double().requires_grad_()
    loss = baselines.residual(chosen, target[rows].double(), torch.arange(len(rows) + 1), metric=metric).sum()
    return torch.autograd.grad(loss, chosen)[0] / int(segments[1])


def variants(metric: str, kind: str) -> dict[str, Callable[..., Tensor]]:
    """All ways to compute one metric."""
    wide = partial(baselines.residual, metric=metric)

    def ours(predicted: Tensor, target: Tensor, segments: Tensor) -> Tensor:
        return predictive_residual(predicted, target, segments=segments, metric=metric, impl="triton")

    losses = {
        "triton": ours,
        "eager": partial(baselines.residual, metric=metric, widen=False),
        "widened": wide,
        "compile": compiled(wide),
    }
    return {variant: passes(loss, kind) for variant, loss in losses.items()}


def measure(bench: Bench, metric: str, layout: str, m: int, d: int, kinds: list[str]) -> None:
    """One metric and layout on one shape, its passes on the same inputs."""
    device, dtype = bench.device, bench.dtype
    # from the shape, so that a case has the same inputs whatever is measured before it
    generator = torch.Generator(device).manual_seed(m + d)
    segments = offsets(layout, m)
    input_sets = []
    for _ in range(timing.rotation(2 * m * d * dtype.itemsize, device)):
        predicted, target = (torch.randn(m, d, generator=generator, device=device).to(dtype) for _ in range(2))
        input_sets.append((predicted, target, segments))
    for kind in kinds:
        bytes_moved = RESIDUAL_ROWS[kind] * m * d * dtype.itemsize
        error = None
        extra = {
            "case": f"{metric}/{layout}",
            "metric": metric,
            "segments": len(segments) - 1,
            # says to benchmarks/goals.py that "eager" is not what it was in the first results: fp32
            "eager_precision": "the inputs'",
        }
        if kind == "fwd+bwd":
            rows = torch.randperm(m, generator=generator, device=device)[:SAMPLE]
            exact = exact_rows(*input_sets[0], rows, metric)

            def error(gradient: Tensor, rows: Tensor = rows, exact: Tensor = exact) -> float:
                return relative_error(gradient[rows], exact)

            extra["grad_rows"] = len(rows)
        case = Case(
            op="residual",
            kind=kind,
            shape={"M": m, "D": d},
            dtype=dtype,
            inputs=input_sets,
            variants=variants(metric, kind),
            floor_ms=bench.floor_ms(moved=bytes_moved),
            moved=bytes_moved,
            error=error,
            extra=extra,
        )
        bench.measure(case)


def plan(args: argparse.Namespace, gpu: bool) -> list[tuple[str, str, int, int]]:
    """Metric, layout and shape of each measurement.

    Any of --sizes, --widths, --metrics, --layouts asks for all combinations of them.
    """
    largest = WINDOW * (256 if gpu else 2)
    if args.sizes or args.widths or args.metrics or args.layouts:
        metrics = args.metrics or ["cosine"]
        layouts = args.layouts or ["windows"]
        return list(itertools.product(metrics, layouts, args.sizes or [largest], args.widths or [1024]))
    if not gpu or args.quick:
        return [("cosine", "windows", largest, 1024), ("l1", "rows", largest, 1408)]
    by_layout = [("cosine", layout, largest, width) for width in (1024, 1408) for layout in LAYOUTS]
    by_metric = [(metric, "windows", largest, 1408) for metric in ("l1", "l2")]
    by_size = [("cosine", "windows", WINDOW * windows, 1408) for windows in (16, 64)]
    return by_layout + by_metric + by_size


def main() -> int:
    parser = flags.arguments(__doc__)
    parser.add_argument("--widths", type=flags.integers, metavar="D,D,...")
    parser.add_argument("--metrics", type=flags.words, metavar=",".join(METRICS))
    parser.add_argument("--layouts", type=flags.words, metavar=",".join(LAYOUTS))
    parser.add_argument("--passes", type=flags.words, default=["fwd", "fwd+bwd"], metavar="fwd,fwd+bwd")
    arguments = parser.parse_args()
    if set(arguments.metrics or ()) - set(METRICS) or set(arguments.layouts or ()) - set(LAYOUTS):
        parser.error(f"metrics are {', '.join(METRICS)}; layouts are {', '.join(LAYOUTS)}")
    if "windows" in (arguments.layouts or ["windows"]) and any(size % WINDOW for size in arguments.sizes or ()):
        parser.error(f"sizes must be multiples of {WINDOW} with the layout windows")
    if arguments.model:
        print(
            "bytes of the floor: fwd 2 M D, fwd+bwd 5 M D, times the element's size. At bf16, M = 401408, D = 1408 "
            "that is 2.26 and 5.65 GB"
        )
        return 0
    bench = Bench(arguments)
    for case_and_shape in plan(arguments, bench.device.type == "cuda"):
        bench.attempt(measure, *case_and_shape, arguments.passes)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
