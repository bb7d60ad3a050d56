"""The second half of the relation loss, G X, and where the whole operation's time goes.

    python benchmarks/bench_product.py [--quick] [--sizes 4096,8192] [--widths 1920x1024] [--active 0.009] [--out FILE.json]

Of one G [N, N] and X [N, Ds] in bf16:

    fp32 out   cuBLAS, accumulated into fp32 as the operation has it       8 bits   G at a byte a value, widened in registers
    bf16 out   cuBLAS, a bf16 result                                       2 bits   G at four values a byte, likewise

The last two exist for a ternary G alone (hinge, all pairs alike) and are an experiment (``packed_product.py``). All see values of 0, 1
and -1, ``--active`` of which are not 0; the operation's own A has mantissas, which cost power: its product is in the second table,
that splits the whole operation into what comes before the pairs, the pair kernel, the product, and what comes after.
On a CPU the packed kernels and the split run under TRITON_INTERPRET=1 alone, and their times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import bench_align, common, model
from benchmarks.model import USUAL
from ldo.kernels import support

PLAN = [(n, *USUAL, 0.009) for n in (4096, 8192, 10240, 16384)] + [(8192, *USUAL, 0.7), (8192, 1536, 1024, 0.009), (8192, 3072, 1024, 0.009)]
CHECKED = 128  # rows of the product held to fp64


def ternary(n: int, active: float, generator: torch.Generator) -> Tensor:
    """[N, N] int8 of -1, 0, 1, of which the share ``active`` is not 0, signs drawn evenly; not symmetric, which no product minds."""
    drawn = torch.rand(n, n, generator=generator, device=generator.device)
    return (drawn < active / 2).to(torch.int8) - (drawn > 1 - active / 2).to(torch.int8)


def fp32_out(a: Tensor, x: Tensor) -> Tensor:
    from ldo.kernels import relation

    total = torch.empty(1, len(a), x.shape[1], dtype=torch.float32, device=x.device)
    relation._add_product(total, a[None], x[None], fresh=True)
    return total[0]


def packed(bits: int, device: torch.device):
    def work(_: Tensor, eight: Tensor, two: Tensor, x: Tensor) -> Tensor:
        missing = support.unavailable(device)
        if missing:
            raise common.Unavailable(missing)
        from benchmarks import packed_product

        return packed_product.product(eight if bits == 8 else two, x, bits)

    return work


def product(bench: common.Bench, n: int, ds: int, active: float) -> None:
    """The four products of one shape."""
    from benchmarks import packed_product

    device, generator = bench.device, torch.Generator(bench.device).manual_seed(n)
    depth, sets, first = packed_product.choose_cut(device).depth, [], None
    for _ in range(2):
        signs = ternary(n, active, generator)
        first = signs if first is None else first
        x = torch.randn(n, ds, generator=generator, device=device).bfloat16()
        sets.append((signs.bfloat16(), *(packed_product.pack(signs, bits, depth) for bits in (8, 2)), x))
    rows = torch.randperm(n, generator=generator, device=device)[:CHECKED]
    exact = first[rows].double() @ sets[0][-1].double()
    flops = 2 * n**2 * ds
    bench.measure(
        common.Case(
            op="product",
            kind="fwd",
            shape={"B": 1, "N": n, "Ds": ds},
            dtype=torch.bfloat16,
            inputs=sets,
            variants={
                "fp32 out": lambda a, _, __, x: fp32_out(a, x),
                "bf16 out": lambda a, _, __, x: a @ x,
                "8 bits": packed(8, device),
                "2 bits": packed(2, device),
            },
            floor_ms=bench.floor_ms(flops),
            flops=flops,
            error=lambda found: common.relative_error(found[rows], exact),
            extra={"active": active, "g_mib": {name: n * n * bits / 8 / 2**20 for name, bits in (("bf16", 16), ("8 bits", 8), ("2 bits", 2))}},
        )
    )


def whole(bench: common.Bench, n: int, ds: int, dt: int, kind: str) -> None:
    """The operation in its real use (frames, token weights), whole and split."""
    missing = support.unavailable(bench.device, bench.dtype)
    if missing:
        print(f"relation triton, split: left out, {missing}")
        return
    from benchmarks import stages
    from ldo.kernels import relation_plan

    generator = torch.Generator(bench.device).manual_seed(n + ds)
    sets = [bench_align.inputs("framed", 1, n, ds, dt, generator, bench.dtype) for _ in range(2)]
    keywords = bench_align.options("framed", ds, dt)
    work = bench_align.variants("framed", n, keywords, kind)["triton"]
    flops = model.floor_flops(n, ds, dt, kind)
    shape = {"B": 1, "N": n, "Ds": ds, "Dt": dt}
    case = common.Case(op="relation", kind=kind, shape=shape, dtype=bench.dtype, inputs=sets, variants={"triton": work})
    case.floor_ms, case.flops, case.extra = bench.floor_ms(flops), flops, {"case": "framed", **keywords}
    for row in bench.measure(case):
        if row["ms"] is None:
            continue
        found = stages.split(work, sets, bench.device, 3 if bench.args.quick else 20)
        multiplied = stages.pair_flops(n, ds, dt, relation_plan.choose_config(bench.device, bench.dtype, kind != "fwd"))
        rate = multiplied / found.ms["pairs"] / 1e9
        row |= {"stages_ms": found.ms, "pair_tflops": rate, "pair_share": rate / common.matmul_tflops(bench.device, bench.dtype), **found.usage}
        cells = ", ".join(f"{name} {ms:.3f}" for name, ms in found.ms.items())
        rest = row["ms"] - sum(found.ms.values())
        print(f"          split, ms: {cells}, rest {rest:.3f}; pairs at {rate:.4g} TFLOP/s, {row['pair_share']:.0%} of matmul {found.usage or ''}")


def plan(args: argparse.Namespace, gpu: bool) -> list[tuple[int, int, int, float]]:
    """N, Ds, Dt and the share of active pairs of each measurement."""
    if args.sizes or args.widths or args.active:
        return [(n, ds, dt, a) for ds, dt in args.widths or [USUAL] for a in args.active or [0.009] for n in args.sizes or [8192]]
    if not gpu:
        return [(96, 32, 24, 0.1)]
    return [(8192, *USUAL, 0.009)] if args.quick else PLAN


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--widths", type=bench_align.pairs, metavar="DSxDT,...", help="student x teacher")
    parser.add_argument("--active", type=lambda text: [float(a) for a in text.split(",")], metavar="SHARE,...", help="of a ternary G that is not 0")
    args = parser.parse_args()
    if not support.INSTALLED:
        parser.error("this needs Triton")
    bench = common.Bench(args)
    todo = plan(args, bench.device.type == "cuda")
    for n, ds, _, active in todo:
        bench.attempt(product, n, ds, active)
    for n, ds, dt in dict.fromkeys(at[:3] for at in todo):
        for kind in ("fwd", "fwd+bwd"):
            bench.attempt(whole, n, ds, dt, kind)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
