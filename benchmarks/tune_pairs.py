"""Which configuration of the relation loss's pair kernel is fastest on this GPU: each candidate checked and timed, none chosen for you.

    python benchmarks/tune_pairs.py [--minutes 7] [--sizes 8192,16384] [--dtype bf16] [--out FILE.json]

The kernel's configurations are fixed per kind of GPU (``kernels/relation_plan.py``), so that all ranks of a run take the same.
This is how one finds better ones. All candidates are tried at the first size, the most promising first, the best ``KEPT`` at
the others, and the winner with other groups of tiles; what no time is left for is named. A candidate that does not compile
or fit says so and is passed over, and one whose loss or gradient is not the usual configuration's is refused. The file is written after
every row. Without a GPU, TRITON_INTERPRET=1 tries the script itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import bench_align, common, stages
from benchmarks.model import USUAL
from ldo.kernels import relation_plan, support
from ldo.ops import relation_loss

KEPT = 4
GROUPS = (4, 16)  # beside the usual
LIMIT = 2e-3  # of the gradient's difference from the usual configuration's, relative: order of sums and rounding leave less, a tile gone wrong more

# rows, cols, depth, slices, warps, stages, and most registers; docs/kernels.md says what the compiler makes of those for sm_90.
PROMISING = {
    (90, True): [
        (128, 256, 64, 2, 8, 4, None),
        (128, 256, 64, 2, 8, 3, None),
        (128, 128, 64, 2, 8, 3, 128),  # two blocks a multiprocessor: one multiplies while the other writes
        (128, 256, 64, 4, 8, 4, None),
        (128, 256, 64, 4, 8, 3, None),
        (128, 128, 64, 4, 8, 3, 128),
        (128, 256, 128, 2, 8, 2, None),
        (64, 256, 64, 4, 4, 2, None),  # two blocks
        (128, 128, 64, 2, 8, 4, None),
        (128, 128, 128, 2, 8, 3, None),
    ],
    (90, False): [(128, 128, 32, 2, 8, 3), (128, 128, 32, 2, 8, 4), (128, 64, 32, 1, 4, 4), (128, 64, 32, 1, 8, 4), (64, 64, 32, 1, 4, 4)],
    (100, True): [(128, 256, 64, 4, 8, 3), (128, 256, 64, 2, 8, 3), (128, 256, 64, 4, 8, 4), (128, 128, 64, 2, 8, 4), (128, 128, 64, 2, 8, 3)],
    (100, False): [(64, 64, 32, 1, 4, 3), (128, 64, 32, 1, 8, 3), (64, 64, 32, 1, 4, 4), (128, 128, 32, 2, 8, 3)],
    (80, True): [(128, 128, 32, 1, 8, 4), (128, 128, 32, 1, 8, 3), (128, 128, 64, 1, 8, 3), (128, 64, 32, 1, 4, 4), (64, 128, 64, 1, 8, 3)],
    (80, False): [(128, 64, 32, 1, 8, 3), (128, 64, 32, 1, 4, 3), (64, 64, 32, 1, 4, 4), (128, 128, 32, 1, 8, 3)],
}
TINY = [(32, 64, 32, 4, 4, 1), (32, 32, 16, 2, 4, 1), (64, 32, 16, 1, 4, 1)]


def candidates(usual: relation_plan.Config, arch: int | None, half: bool) -> list[relation_plan.Config]:
    """The usual configuration, then the others in order of promise, each once. ``arch`` None: small ones for the interpreter."""
    found = TINY if arch is None else PROMISING[arch, half]
    return list(dict.fromkeys([usual, *(relation_plan.Config(*c[:6], usual.use_tma, *c[6:]) for c in found)]))


def label(c: relation_plan.Config) -> str:
    return f"{c.rows}x{c.cols}x{c.depth}, {c.slices} slices, {c.warps} warps, {c.stages} stages" + (
        f", {c.registers} registers" if c.registers else ""
    )


class Tuner:
    """Sets of inputs of one size, what the usual configuration makes of them, and a clock that all share."""

    def __init__(self, n: int, widths: Sequence[int], device: torch.device, dtype: torch.dtype, repeat: int):
        generator = torch.Generator(device).manual_seed(n)
        self.n, self.widths, self.device, self.repeat = n, widths, device, repeat
        self.matmul = common.matmul_tflops(device, dtype)
        self.sets = [bench_align.inputs("framed", 1, n, *widths, generator, dtype) for _ in range(2)]
        self.margin = bench_align.options("framed", *widths)["margin"]
        self.truth: tuple[Tensor, Tensor] | None = None

    def loss(self, x: Tensor, y: Tensor, frame: Tensor, weight: Tensor) -> Tensor:
        return relation_loss(x, y, frame_N=frame, weight_BN=weight, margin=self.margin, impl="triton")

    def difference(self) -> float:
        """Of loss and gradient from the first configuration's, relative, the larger of the two; 0 for the first."""
        x = self.sets[0][0].detach().requires_grad_()
        loss = self.loss(x, *self.sets[0][1:])
        found = loss.detach().double(), torch.autograd.grad(loss, x)[0].double()
        self.truth = self.truth or found
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, self.truth, strict=True))

    def row(self, config: relation_plan.Config, group: int) -> dict[str, Any]:
        """Times of one configuration, ms; ``difference`` alone if it is not to be trusted (a NaN is not either)."""
        relation_plan.choose_config, relation_plan.GROUP = (lambda *_: config), group
        relation_plan.tile_table.cache_clear()
        relation_plan.plan.cache_clear()
        row = {"N": self.n, "config": dataclasses.asdict(config), "group": group, "difference": self.difference()}
        if not row["difference"] <= LIMIT:
            return row
        both, forward = common.passes(self.loss, "fwd+bwd"), common.passes(self.loss, "fwd")
        found = stages.split(both, self.sets, self.device, self.repeat)
        rate = stages.pair_flops(self.n, *self.widths, config) / found.ms["pairs"] / 1e9
        turn = iter(range(10**9))
        for name, work in (("fwd_ms", forward), ("fwd_bwd_ms", both)):
            took = common.seconds(lambda work=work: work(*self.sets[next(turn) % 2]), self.device, self.repeat)
            row[name] = 1e3 * statistics.median(took)
        return row | {"pair_ms": found.ms["pairs"], "pair_tflops": rate, "pair_share": rate / self.matmul, **found.usage}


def tell(row: dict[str, Any], config: relation_plan.Config, note: str) -> None:
    start = f"{row['N']:6} {label(config):58} group {row['group']:2}"
    if "fwd_bwd_ms" not in row:
        print(f"{start} REFUSED: differs by {row['difference']:.1e}", flush=True)
        return
    usage = ", ".join(f"{row[k]} {k}" for k in ("registers", "spills", "shared") if k in row)
    times = f"fwd {row['fwd_ms']:8.3f}  fwd+bwd {row['fwd_bwd_ms']:8.3f}  pairs {row['pair_ms']:8.3f} ms, {row['pair_tflops']:6.4g} TFLOP/s"
    print(f"{start} {times} ({row['pair_share']:.0%} of matmul); differs by {row['difference']:.0e}; {usage}{note}", flush=True)


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=7, help="start no candidate later than this")
    parser.add_argument("--widths", type=bench_align.pairs, default=[USUAL], metavar="DSxDT", help="student x teacher")
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    if support.unavailable(device):
        parser.error("there is nothing to tune without a GPU (TRITON_INTERPRET=1 tries the script itself)")
    args.dtype = args.dtype or ("bf16" if gpu else "fp32")
    return tune(args, device, common.DTYPES[args.dtype], time.monotonic() + 60 * args.minutes)


def tune(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, until: float) -> int:
    """All rows, in order; exit code 1 if none was measured or a configuration was refused."""
    half = dtype != torch.float32
    usual = relation_plan.choose_config(device, dtype, True)
    arch = support.architecture(device) if device.type == "cuda" else None
    result = common.record(device) | {"dtype": args.dtype, "widths": args.widths[0], "matmul_tflops": common.matmul_tflops(device, dtype), "rows": []}
    rows, kept, left = result["rows"], [(c, relation_plan.GROUP) for c in candidates(usual, arch, half)], []

    def attempt(tuner: Tuner, config: relation_plan.Config, group: int) -> None:
        if time.monotonic() > until:
            left.append(f"{tuner.n}: {label(config)}, group {group}")
            return
        try:
            row = tuner.row(config, group)
        except Exception as problem:
            words = str(problem).strip().splitlines() or [type(problem).__name__]
            print(f"{tuner.n:6} {label(config):58} {words[0][:100]}", flush=True)
            return
        tell(row, config, "   <- in use" if (config, group) == (usual, kept[0][1]) else "")
        rows.append(row)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    def best(n: int) -> list[dict[str, Any]]:
        return sorted((r for r in rows if r["N"] == n and "fwd_bwd_ms" in r), key=lambda r: r["fwd_bwd_ms"])

    sizes = args.sizes or ([8192, 16384] if device.type == "cuda" else [96])
    tried, groups = kept, GROUPS
    for n in sizes:
        tuner = Tuner(n, args.widths[0], device, dtype, 20 if device.type == "cuda" else 1)
        for config, group in tried:
            attempt(tuner, config, group)
        if groups and best(n):
            for group in groups:
                attempt(tuner, relation_plan.Config(**best(n)[0]["config"]), group)
            groups = ()
        at_first = [(relation_plan.Config(**r["config"]), r["group"]) for r in best(sizes[0])[:KEPT]]
        tried = list(dict.fromkeys([kept[0], *at_first]))  # the usual one first: the others are held to it
    for line in left:
        print(f"no time left for {line}")
    for n in sizes:
        if best(n):
            winner = best(n)[0]
            c = relation_plan.Config(**winner["config"])
            limit = f", {c.registers}" if c.registers else ""
            line = f"({arch}, {half}): Config({c.rows}, {c.cols}, {c.depth}, {c.slices}, {c.warps}, {c.stages}, {c.use_tma}{limit}),"
            print(f"best at {n}: {winner['fwd_bwd_ms']:.3f} ms; for kernels/relation_plan.py: {line}  GROUP = {winner['group']}")
    return int(not rows or any("fwd_bwd_ms" not in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
