"""``python -m ldo.sandbox.build``: train the sandbox's tiny models from nothing and write them in the real formats.

Parts, in order: vae, thresholds, encoder, predictor, base, save. Each resumes where it stopped; ``--minutes`` ends a
slice early. On two CPU cores the whole takes about nine hours.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from ldo.sandbox.build import base, calibrate, vae, world
from ldo.sandbox.build.loop import OutOfTime
from ldo.sandbox.dataset import GENERATOR, WORLD_MODEL
from ldo.sandbox.measure import THRESHOLDS

PARTS = ("vae", "thresholds", "encoder", "predictor", "base", "save")


def save(work: Path, generator: Path, world_model: Path) -> None:
    """Write both models in half precision, as ``from_pretrained`` reads them."""
    pipeline = base.pipeline(work, vae.load(work))
    base.save_half(pipeline, generator)
    world.load(work).half().save_pretrained(world_model)
    size = sum(f.stat().st_size for folder in (generator, world_model) for f in folder.rglob("*") if f.is_file())
    print(f"saved {generator} and {world_model}, {size / 2**20:.1f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ldo.sandbox.build", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/sandbox-build"), help="checkpoints and rendered clips (about 15 GB)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, resumable")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the base generator's training; needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--generator", type=Path, default=GENERATOR)
    parser.add_argument("--world-model", type=Path, default=WORLD_MODEL)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    try:
        for part in args.parts:
            print(f"part: {part}", flush=True)
            if part == "vae":
                vae.train(args.work, args.device, deadline)
            elif part == "thresholds":
                found = calibrate.thresholds(vae.load(args.work))
                THRESHOLDS.write_text(json.dumps(found, indent=1) + "\n")
            elif part == "encoder":
                world.train_encoder(args.work, args.device, deadline)
            elif part == "predictor":
                world.train_predictor(args.work, args.device, deadline, vae.load(args.work))
            elif part == "base":
                base.train(args.work, args.device, deadline, vae.load(args.work), fast=args.compile)
            else:
                save(args.work, args.generator, args.world_model)
    except OutOfTime:
        print("out of time; run the same command again to go on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
