"""Where the relation loss's time goes: before the pairs, the pair kernel, the product A X by cuBLAS, and what comes after.

    python benchmarks/bench_stages.py [--quick] [--sizes 4096,8192] [--widths 1920x1024] [--batch 4] [--out FILE.json]

The operation is in its real use (frames, token weights) and runs as it is; between its stages are marks of the device's clock. On a CPU it runs
under TRITON_INTERPRET=1 alone, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import bench_align, common, model
from benchmarks.model import USUAL
from ldo.kernels import support

PLAN = [(n, *USUAL) for n in (4096, 8192, 10240, 16384)] + [(8192, 1536, 1024), (8192, 3072, 1024)]


def whole(bench: common.Bench, n: int, ds: int, dt: int, kind: str) -> None:
    """One shape, whole and split."""
    missing = support.unavailable(bench.device, bench.dtype)
    if missing:
        print(f"relation triton, split: left out, {missing}")
        return
    from benchmarks import stages
    from ldo.kernels import relation_plan

    b = bench.args.batch
    generator = torch.Generator(bench.device).manual_seed(n + ds)
    sets = [bench_align.inputs("framed", b, n, ds, dt, generator, bench.dtype) for _ in range(2)]
    keywords = bench_align.options("framed", ds, dt)
    work = bench_align.variants("framed", n, keywords, kind)["triton"]
    flops = model.floor_flops(n, ds, dt, kind, b)
    shape = {"B": b, "N": n, "Ds": ds, "Dt": dt}
    case = common.Case(op="relation", kind=kind, shape=shape, dtype=bench.dtype, inputs=sets, variants={"triton": work})
    case.floor_ms, case.flops, case.extra = bench.floor_ms(flops), flops, {"case": "framed", **keywords}
    for row in bench.measure(case):
        if row["ms"] is None:
            continue
        found = stages.split(work, sets, bench.device, 3 if bench.args.quick else 20)
        multiplied = stages.pair_flops(n, ds, dt, relation_plan.choose_config(bench.device, bench.dtype, kind != "fwd"), b)
        rate = multiplied / found.ms["pairs"] / 1e9
        row |= {"stages_ms": found.ms, "pair_tflops": rate, "pair_share": rate / common.matmul_tflops(bench.device, bench.dtype), **found.usage}
        cells = ", ".join(f"{name} {ms:.3f}" for name, ms in found.ms.items())
        rest = row["ms"] - sum(found.ms.values())
        print(f"          split, ms: {cells}, rest {rest:.3f}; pairs at {rate:.4g} TFLOP/s, {row['pair_share']:.0%} of matmul {found.usage or ''}")


def plan(args: argparse.Namespace, gpu: bool) -> list[tuple[int, int, int]]:
    """N, Ds and Dt of each measurement."""
    if args.sizes or args.widths:
        return [(n, ds, dt) for ds, dt in args.widths or [USUAL] for n in args.sizes or [8192]]
    if not gpu:
        return [(96, 32, 24)]
    return [(8192, *USUAL)] if args.quick else PLAN


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--widths", type=bench_align.pairs, metavar="DSxDT,...", help="student x teacher")
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    args = parser.parse_args()
    if not support.INSTALLED:
        parser.error("this needs Triton")
    bench = common.Bench(args)
    for n, ds, dt in plan(args, bench.device.type == "cuda"):
        for kind in ("fwd", "fwd+bwd"):
            bench.attempt(whole, n, ds, dt, kind)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
