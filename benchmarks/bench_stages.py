"""Where the time of the relation loss goes: before the pairs, the pair kernel, the product A X by cuBLAS, and after it.

    python benchmarks/bench_stages.py [--quick] [--sizes 4096,8192] [--widths 1920x1024] [--batch 4] [--out FILE.json]

The operation is measured in its real use (frames, token weights), unchanged, with marks of the device's clock between
its stages. On a CPU it runs only under TRITON_INTERPRET=1, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_align, flags, model, timing
from benchmarks.harness import Bench, Case
from benchmarks.model import USUAL
from ldo.kernels import support

# N, Ds, Dt
PLAN = [(size, *USUAL) for size in (4096, 8192, 10240, 16384)] + [(8192, 1536, 1024), (8192, 3072, 1024)]


def whole(bench: Bench, n: int, ds: int, dt: int, kind: str) -> None:
    """One shape, whole and split."""
    missing = support.unavailable(bench.device, bench.dtype)
    if missing:
        print(f"relation triton, split: left out, {missing}")
        return
    # here, since both need Triton
    from benchmarks import stages
    from ldo.kernels import relation_plan

    batch = bench.args.batch
    generator = torch.Generator(bench.device).manual_seed(n + ds)
    input_sets = [bench_align.inputs("framed", batch, n, ds, dt, generator, bench.dtype) for _ in range(2)]
    keywords = bench_align.options("framed", ds, dt)
    work = bench_align.variants("framed", n, keywords, kind)["triton"]
    operations = model.floor_flops(n, ds, dt, kind, batch)
    case = Case(
        op="relation",
        kind=kind,
        shape={"B": batch, "N": n, "Ds": ds, "Dt": dt},
        dtype=bench.dtype,
        inputs=input_sets,
        variants={"triton": work},
        floor_ms=bench.floor_ms(operations),
        flops=operations,
        extra={"case": "framed", **keywords},
    )
    # none if the variant cannot run
    for row in bench.measure(case):
        if row["ms"] is None:
            continue
        measured = stages.split(work, input_sets, bench.device, 3 if bench.args.quick else 20)
        config = relation_plan.choose_config(bench.device, bench.dtype, kind != "fwd")
        multiplied = stages.pair_flops(n, ds, dt, config, batch)
        pair_tflops = multiplied / measured.ms["pairs"] / 1e9
        row |= {
            "stages_ms": measured.ms,
            "pair_tflops": pair_tflops,
            "pair_share": pair_tflops / timing.matmul_tflops(bench.device, bench.dtype),
            **measured.usage,
        }
        cells = ", ".join(f"{stage} {milliseconds:.3f}" for stage, milliseconds in measured.ms.items())
        rest = row["ms"] - sum(measured.ms.values())
        print(
            f"          split, ms: {cells}, rest {rest:.3f}; pairs at {pair_tflops:.4g} TFLOP/s, "
            f"{row['pair_share']:.0%} of matmul {measured.usage or ''}"
        )


def plan(args: argparse.Namespace, gpu: bool) -> list[tuple[int, int, int]]:
    """N, Ds and Dt of each measurement."""
    if args.sizes or args.widths:
        return [(size, *widths) for widths in args.widths or [USUAL] for size in args.sizes or [8192]]
    if not gpu:
        return [(96, 32, 24)]
    return [(8192, *USUAL)] if args.quick else PLAN


def main() -> int:
    parser = flags.arguments(__doc__)
    parser.add_argument("--widths", type=flags.pairs, metavar="DSxDT,...", help="student x teacher")
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    arguments = parser.parse_args()
    if not support.INSTALLED:
        parser.error("this needs Triton")
    bench = Bench(arguments)
    for shape in plan(arguments, bench.device.type == "cuda"):
        for kind in ("fwd", "fwd+bwd"):
            bench.attempt(whole, *shape, kind)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
