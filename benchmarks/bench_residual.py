"""The predictive residual against eager PyTorch and torch.compile: time, share of the copy bandwidth, memory, gradient error.

    python benchmarks/bench_residual.py [--quick] [--sizes 100352] [--widths 1024] [--metrics cosine,l1] [--layouts windows,rows] [--out FILE.json]

M rows of D features (``--sizes`` are M), target layer-normed, in segments: ``rows`` (each row one), ``windows`` (1568 tokens, as one V-JEPA
window has), ``one`` (all rows). Bound by memory: the floor is the bytes that must move over the measured copy bandwidth, forward 2 M D (both
inputs once), with the gradient 5 M D (both once more in the backward, and the gradient written: what comes from above is not known earlier),
times the size of an element; offsets and means are left out as small.
``gbps`` is those bytes over the time. ``eager`` computes in the inputs' precision, ``widened`` and ``compile`` in fp32, as the reference and
ours do; the gradient is checked on a sample of rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import baselines, common
from benchmarks.model import RESIDUAL_ROWS
from ldo.ops import predictive_residual

WINDOW = 1568
METRICS = ("cosine", "l1", "l2")
LAYOUTS = ("windows", "rows", "one")
SAMPLE = 4096  # rows whose gradient is compared with fp64


def offsets(layout: str, rows: int) -> Tensor:
    """CSR offsets, on the CPU where the operation wants them."""
    length = {"rows": 1, "windows": WINDOW, "one": rows}[layout]
    return torch.arange(0, rows + 1, length)


def exact_rows(z: Tensor, h: Tensor, segments: Tensor, rows: Tensor, metric: str) -> Tensor:
    """The exact gradient of the sum of the segments' means in some rows, in fp64: each row's own, over its segment's length."""
    x = z[rows].double().requires_grad_()
    loss = baselines.residual(x, h[rows].double(), torch.arange(len(rows) + 1), metric=metric).sum()
    return torch.autograd.grad(loss, x)[0] / int(segments[1])


def variants(metric: str, kind: str) -> dict[str, Callable[..., Tensor]]:
    wide = partial(baselines.residual, metric=metric)
    losses = {
        "triton": lambda z, h, s: predictive_residual(z, h, segments=s, metric=metric, impl="triton"),
        "eager": partial(baselines.residual, metric=metric, widen=False),
        "widened": wide,
        "compile": common.compiled(wide),
    }
    return {name: common.passes(loss, kind) for name, loss in losses.items()}


def measure(bench: common.Bench, metric: str, layout: str, m: int, d: int, kinds: list[str]) -> None:
    """One metric and layout on one shape, its passes on the same inputs."""
    device, dtype = bench.device, bench.dtype
    generator = torch.Generator(device).manual_seed(m + d)
    segments = offsets(layout, m)
    sets = []
    for _ in range(common.rotation(2 * m * d * dtype.itemsize, device)):
        z, h = (torch.randn(m, d, generator=generator, device=device).to(dtype) for _ in range(2))
        sets.append((z, h, segments))
    for kind in kinds:
        moved = RESIDUAL_ROWS[kind] * m * d * dtype.itemsize
        error, extra = None, {"case": f"{metric}/{layout}", "metric": metric, "segments": len(segments) - 1, "eager_precision": "the inputs'"}
        if kind == "fwd+bwd":
            rows = torch.randperm(m, generator=generator, device=device)[:SAMPLE]
            exact = exact_rows(*sets[0], rows, metric)
            error = lambda g, rows=rows, exact=exact: common.relative_error(g[rows], exact)  # noqa: E731
            extra["grad_rows"] = len(rows)
        case = common.Case(
            op="residual",
            kind=kind,
            shape={"M": m, "D": d},
            dtype=dtype,
            inputs=sets,
            variants=variants(metric, kind),
            floor_ms=bench.floor_ms(moved=moved),
            moved=moved,
            error=error,
            extra=extra,
        )
        bench.measure(case)


def plan(args: argparse.Namespace, gpu: bool) -> list[tuple[str, str, int, int]]:
    """Metric, layout and shape of each measurement. Any of --sizes, --widths, --metrics, --layouts asks for the product of what is given."""
    most = WINDOW * (256 if gpu else 2)
    if args.sizes or args.widths or args.metrics or args.layouts:
        axes = (args.metrics or ["cosine"], args.layouts or ["windows"], args.sizes or [most], args.widths or [1024])
        return [(metric, layout, m, d) for metric in axes[0] for layout in axes[1] for m in axes[2] for d in axes[3]]
    if not gpu or args.quick:
        return [("cosine", "windows", most, 1024), ("l1", "rows", most, 1408)]
    layouts = [("cosine", layout, most, d) for d in (1024, 1408) for layout in LAYOUTS]
    return layouts + [(metric, "windows", most, 1408) for metric in ("l1", "l2")] + [("cosine", "windows", WINDOW * k, 1408) for k in (16, 64)]


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--widths", type=common.integers, metavar="D,D,...")
    parser.add_argument("--metrics", type=common.words, metavar=",".join(METRICS))
    parser.add_argument("--layouts", type=common.words, metavar=",".join(LAYOUTS))
    parser.add_argument("--passes", type=common.words, default=["fwd", "fwd+bwd"], metavar="fwd,fwd+bwd")
    args = parser.parse_args()
    if set(args.metrics or ()) - set(METRICS) or set(args.layouts or ()) - set(LAYOUTS):
        parser.error(f"metrics are {', '.join(METRICS)}; layouts are {', '.join(LAYOUTS)}")
    if "windows" in (args.layouts or ["windows"]) and any(m % WINDOW for m in args.sizes or ()):
        parser.error(f"sizes must be multiples of {WINDOW} with the layout windows")
    if args.model:
        print("bytes of the floor: fwd 2 M D, fwd+bwd 5 M D, times the element's size. At bf16, M = 401408, D = 1408 that is 2.26 and 5.65 GB")
        return 0
    bench = common.Bench(args)
    for metric, layout, m, d in plan(args, bench.device.type == "cuda"):
        bench.attempt(measure, metric, layout, m, d, args.passes)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
