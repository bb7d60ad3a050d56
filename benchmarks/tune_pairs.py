"""Which cut of the relation loss's pair kernel is fastest on this GPU: each candidate timed, none chosen for you.

    python benchmarks/tune_pairs.py [--sizes 8192,16384] [--dtype bf16] [--out FILE.json]

The kernel's configurations are fixed per kind of GPU (``kernels/relation.py``), so that all ranks of a run take the same.
This is how one finds better ones. A candidate that does not compile or does not fit says so and is passed over.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import common
from ldo.kernels import relation
from ldo.ops import relation_loss

WIDTHS = (1920, 1024)


def candidates(half: bool, bulk: bool) -> list[relation.Config]:
    """Tiles, epilogues, warps and pipeline depths that the compiler was seen to take without spilling, and their neighbours."""
    if not half:
        tiles = [(128, 128, 32), (128, 64, 32), (64, 64, 32)]
    elif bulk:
        tiles = [(128, 256, 64), (128, 128, 64), (256, 128, 64), (64, 256, 64)]
    else:
        tiles = [(128, 128, 32), (128, 128, 64), (128, 64, 32), (64, 128, 64)]
    return [
        relation.Config(*tile, slices, warps, stages, bulk) for tile, slices, warps, stages in itertools.product(tiles, (1, 2, 4), (4, 8), (3, 4))
    ]


def milliseconds(config: relation.Config, sets: list, gradient: bool, device: torch.device) -> float:
    """Median of the whole operation with this configuration."""
    relation.choose_config = lambda *_: config
    work = common.passes(lambda x, y: relation_loss(x, y, impl="triton"), "fwd+bwd" if gradient else "fwd")
    turn = itertools.cycle(sets)
    return 1e3 * statistics.median(common.seconds(lambda: work(*next(turn)), device, 20))


def main() -> int:
    parser = common.arguments(__doc__)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type != "cuda":
        parser.error("there is nothing to tune without a GPU")
    args.dtype = args.dtype or "bf16"
    dtype = common.DTYPES[args.dtype]
    usual = relation.choose_config(device, dtype)
    tried = [usual, *(c for c in candidates(dtype != torch.float32, usual.bulk) if c != usual)]
    rows = []
    for n in args.sizes or [8192]:
        sets = [tuple(torch.randn(1, n, width, device=device).to(dtype) for width in WIDTHS) for _ in range(2)]
        for config in tried:
            label = f"{config.rows}x{config.cols}x{config.depth}, {config.slices} slices, {config.warps} warps, {config.stages} stages"
            try:
                both, forward = (milliseconds(config, sets, gradient, device) for gradient in (True, False))
            except Exception as problem:
                print(f"{n:6} {label:55} {str(problem).strip().splitlines()[0][:80] or type(problem).__name__}", flush=True)
                continue
            rows.append({"N": n, "config": vars(config), "fwd_ms": forward, "fwd_bwd_ms": both})
            print(f"{n:6} {label:55} {forward:8.3f} {both:8.3f} ms{'   <- in use' if config is usual else ''}", flush=True)
    for n in args.sizes or [8192]:
        best = min((r for r in rows if r["N"] == n), key=lambda r: r["fwd_bwd_ms"])
        print(f"best at {n}: {best}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(common.record(device) | {"dtype": args.dtype, "widths": WIDTHS, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
