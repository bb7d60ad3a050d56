"""Which configuration of the relation loss's pair kernel is fastest on this GPU: candidates are checked and timed.

    python benchmarks/tune_pairs.py [--minutes 7] [--sizes 8192,16384] [--dtype bf16] [--out FILE.json]

The kernel's configurations are fixed per kind of GPU (``kernels/relation_plan.py``), so that all ranks of a run take
the same; the script prints the line to put there and changes nothing. All candidates are tried at the first size, the
most promising first, the best ``KEPT`` at the others, and the winner with other groups of tiles; what no time is left
for is named. A candidate that does not compile or fit is reported and skipped, and one whose loss or gradient differs
from that of the usual configuration is refused. The file is written after every row. Without a GPU, TRITON_INTERPRET=1
tries the script itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_align, flags, provenance, stages, timing
from benchmarks.harness import write_json
from benchmarks.model import USUAL
from benchmarks.variant import passes
from ldo.kernels import relation_plan, support
from ldo.ops import relation_loss

# candidates of the first size that are tried at the others
KEPT = 4
# besides the usual one
GROUPS = (4, 16)
# Of the relative difference of loss and gradient from those of the usual configuration. The order of sums and rounding
# cause less, a wrong tile more.
LIMIT = 2e-3

# Rows, cols, depth, slices, warps, stages, and a limit on registers; docs/kernels.md says how the compiler handles
# those for sm_90.
PROMISING = {
    (90, True): [
        (128, 256, 64, 2, 8, 4, None),
        (128, 256, 64, 2, 8, 3, None),
        # two blocks on a multiprocessor: one multiplies while the other writes
        (128, 128, 64, 2, 8, 3, 128),
        (128, 256, 64, 4, 8, 4, None),
        (128, 256, 64, 4, 8, 3, None),
        (128, 128, 64, 4, 8, 3, 128),
        (128, 256, 128, 2, 8, 2, None),
        # two blocks here too
        (64, 256, 64, 4, 4, 2, None),
        (128, 128, 64, 2, 8, 4, None),
        (128, 128, 128, 2, 8, 3, None),
    ],
    (90, False): [
        (128, 128, 32, 2, 8, 3),
        (128, 128, 32, 2, 8, 4),
        (128, 64, 32, 1, 4, 4),
        (128, 64, 32, 1, 8, 4),
        (64, 64, 32, 1, 4, 4),
    ],
    (100, True): [
        (128, 256, 64, 4, 8, 3),
        (128, 256, 64, 2, 8, 3),
        (128, 256, 64, 4, 8, 4),
        (128, 128, 64, 2, 8, 4),
        (128, 128, 64, 2, 8, 3),
    ],
    (100, False): [(64, 64, 32, 1, 4, 3), (128, 64, 32, 1, 8, 3), (64, 64, 32, 1, 4, 4), (128, 128, 32, 2, 8, 3)],
    (80, True): [
        (128, 128, 32, 1, 8, 4),
        (128, 128, 32, 1, 8, 3),
        (128, 128, 64, 1, 8, 3),
        (128, 64, 32, 1, 4, 4),
        (64, 128, 64, 1, 8, 3),
    ],
    (80, False): [(128, 64, 32, 1, 8, 3), (128, 64, 32, 1, 4, 3), (64, 64, 32, 1, 4, 4), (128, 128, 32, 1, 8, 3)],
}
TINY = [(32, 64, 32, 4, 4, 1), (32, 32, 16, 2, 4, 1), (64, 32, 16, 1, 4, 1)]


def candidates(usual: relation_plan.Config, arch: int | None, half: bool) -> list[relation_plan.Config]:
    """The usual configuration, then the others, the most promising first, each once.

    ``arch`` None: small ones for the interpreter.
    """
    numbers = TINY if arch is None else PROMISING[arch, half]
    others = [relation_plan.Config(*given[:6], usual.use_tma, *given[6:]) for given in numbers]
    return list(dict.fromkeys([usual, *others]))


def label(config: relation_plan.Config) -> str:
    """A configuration for the table."""
    tile = f"{config.rows}x{config.cols}x{config.depth}"
    registers = f", {config.registers} registers" if config.registers else ""
    return f"{tile}, {config.slices} slices, {config.warps} warps, {config.stages} stages{registers}"


class Tuner:
    """Sets of inputs of one size, and what the first configuration, the usual one, computes from them."""

    def __init__(self, n: int, widths: Sequence[int], device: torch.device, dtype: torch.dtype, repeat: int):
        generator = torch.Generator(device).manual_seed(n)
        self.n = n
        self.widths = widths
        self.device = device
        self.repeat = repeat
        self.matmul = timing.matmul_tflops(device, dtype)
        self.sets = [bench_align.inputs("framed", 1, n, *widths, generator, dtype) for _ in range(2)]
        self.margin = bench_align.options("framed", *widths)["margin"]
        self.truth: tuple[Tensor, Tensor] | None = None

    def loss(self, student: Tensor, teacher: Tensor, frame: Tensor, weight: Tensor) -> Tensor:
        """The relation loss in its real use: frames, token weights and the hinge."""
        return relation_loss(student, teacher, frame_N=frame, weight_BN=weight, margin=self.margin, impl="triton")

    def difference(self) -> float:
        """The relative difference from the first configuration, of loss or gradient, whichever is larger."""
        student, *rest = self.sets[0]
        leaf = student.detach().requires_grad_()
        loss = self.loss(leaf, *rest)
        computed = loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()
        # the first call is for the usual configuration
        self.truth = self.truth or computed
        return max(float((ours - true).norm() / true.norm()) for ours, true in zip(computed, self.truth, strict=True))

    def row(self, config: relation_plan.Config, group: int) -> dict[str, Any]:
        """Times of one configuration, in ms; only ``difference`` if the configuration is wrong."""
        relation_plan.choose_config = lambda *_: config
        relation_plan.GROUP = group
        # both remember what the configuration before this one made
        relation_plan.tile_table.cache_clear()
        relation_plan.plan.cache_clear()
        row = {"N": self.n, "config": dataclasses.asdict(config), "group": group, "difference": self.difference()}
        # "not <=": a NaN is wrong too
        if not row["difference"] <= LIMIT:
            return row
        both = passes(self.loss, "fwd+bwd")
        forward = passes(self.loss, "fwd")
        stage_times = stages.split(both, self.sets, self.device, self.repeat)
        pair_tflops = stages.pair_flops(self.n, *self.widths, config) / stage_times.ms["pairs"] / 1e9
        inputs = itertools.cycle(self.sets)
        for column, work in (("fwd_ms", forward), ("fwd_bwd_ms", both)):
            times = timing.seconds(lambda work=work: work(*next(inputs)), self.device, self.repeat)
            row[column] = 1e3 * statistics.median(times)
        return row | {
            "pair_ms": stage_times.ms["pairs"],
            "pair_tflops": pair_tflops,
            "pair_share": pair_tflops / self.matmul,
            **stage_times.usage,
        }


def tell(row: dict[str, Any], config: relation_plan.Config, note: str) -> None:
    """Print a row."""
    start = f"{row['N']:6} {label(config):58} group {row['group']:2}"
    if "fwd_bwd_ms" not in row:
        print(f"{start} REFUSED: differs by {row['difference']:.1e}", flush=True)
        return
    usage = ", ".join(
        f"{row[resource]} {resource}" for resource in ("registers", "spills", "shared") if resource in row
    )
    times = f"fwd {row['fwd_ms']:8.3f}  fwd+bwd {row['fwd_bwd_ms']:8.3f}  pairs {row['pair_ms']:8.3f} ms"
    pair_rate = f"{row['pair_tflops']:6.4g} TFLOP/s ({row['pair_share']:.0%} of matmul)"
    print(f"{start} {times}, {pair_rate}; differs by {row['difference']:.0e}; {usage}{note}", flush=True)


def main() -> int:
    parser = flags.arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=7, help="start no candidate later than this")
    parser.add_argument("--widths", type=flags.pairs, default=[USUAL], metavar="DSxDT", help="student x teacher")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    gpu = device.type == "cuda"
    if support.unavailable(device):
        parser.error("there is nothing to tune without a GPU (TRITON_INTERPRET=1 tries the script itself)")
    arguments.dtype = arguments.dtype or ("bf16" if gpu else "fp32")
    return tune(arguments, device, flags.DTYPES[arguments.dtype], time.monotonic() + 60 * arguments.minutes)


def tune(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype, until: float) -> int:
    """Measure all rows in order; exit code 1 if none was measured or a configuration was refused."""
    half_precision = dtype != torch.float32
    usual = relation_plan.choose_config(device, dtype, True)
    architecture = support.architecture(device) if device.type == "cuda" else None
    result = provenance.record(device) | {
        "dtype": arguments.dtype,
        "widths": arguments.widths[0],
        "matmul_tflops": timing.matmul_tflops(device, dtype),
        "rows": [],
    }
    measured_rows = result["rows"]
    # the first group tried is the usual one: ``Tuner.row`` sets relation_plan.GROUP later
    in_use = (usual, relation_plan.GROUP)
    skipped: list[str] = []

    def attempt(tuner: Tuner, config: relation_plan.Config, group: int) -> None:
        if time.monotonic() > until:
            skipped.append(f"{tuner.n}: {label(config)}, group {group}")
            return
        try:
            row = tuner.row(config, group)
        except Exception as problem:
            words = str(problem).strip().splitlines() or [type(problem).__name__]
            print(f"{tuner.n:6} {label(config):58} {words[0][:100]}", flush=True)
            return
        tell(row, config, "   <- in use" if (config, group) == in_use else "")
        measured_rows.append(row)
        if arguments.out:
            write_json(arguments.out, result)

    def ranked(size: int) -> list[dict[str, Any]]:
        timed = [row for row in measured_rows if row["N"] == size and "fwd_bwd_ms" in row]
        return sorted(timed, key=lambda row: row["fwd_bwd_ms"])

    sizes = arguments.sizes or ([8192, 16384] if device.type == "cuda" else [96])
    tried = [(config, in_use[1]) for config in candidates(usual, architecture, half_precision)]
    groups = GROUPS
    for size in sizes:
        tuner = Tuner(size, arguments.widths[0], device, dtype, 20 if device.type == "cuda" else 1)
        for config, group in tried:
            attempt(tuner, config, group)
        if groups and ranked(size):
            for group in groups:
                attempt(tuner, relation_plan.Config(**ranked(size)[0]["config"]), group)
            # at one size only, to leave time for the candidates at the others
            groups = ()
        kept = [(relation_plan.Config(**row["config"]), row["group"]) for row in ranked(sizes[0])[:KEPT]]
        # the usual one first: the others are compared with it
        tried = list(dict.fromkeys([in_use, *kept]))
    for line in skipped:
        print(f"no time left for {line}")
    for size in sizes:
        if ranked(size):
            winner = ranked(size)[0]
            config = relation_plan.Config(**winner["config"])
            line = f"({architecture}, {half_precision}): {constructor(config)},  GROUP = {winner['group']}"
            print(f"best at {size}: {winner['fwd_bwd_ms']:.3f} ms; for kernels/relation_plan.py: {line}")
    return int(not measured_rows or any("fwd_bwd_ms" not in row for row in measured_rows))


def constructor(config: relation_plan.Config) -> str:
    """A configuration as kernels/relation_plan.py writes it."""
    arguments = [config.rows, config.cols, config.depth, config.slices, config.warps, config.stages, config.use_tma]
    if config.registers:
        arguments.append(config.registers)
    return f"Config({', '.join(map(str, arguments))})"


if __name__ == "__main__":
    sys.exit(main())
