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

from ldo.sandbox.shipped import GENERATOR, WORLD_MODEL

PARTS = ("vae", "thresholds", "encoder", "predictor", "base", "save")


def save_models(work: Path, generator: Path, world_model: Path) -> None:
    """Write both models in half precision, as ``from_pretrained`` reads them."""
    from ldo.sandbox.build import base, world
    from ldo.sandbox.build.vae import load_vae

    base.save_half(base.base_pipeline(work, load_vae(work)), generator)
    world.load_world_model(work).half().save_pretrained(world_model)
    size = 0
    for folder in (generator, world_model):
        size += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"saved {generator} and {world_model}, {size / 2**20:.1f} MiB")


def _run_part(part: str, args: argparse.Namespace, deadline: float) -> None:
    """Run or resume one of PARTS. Raises OutOfTime past ``deadline`` (of time.monotonic)."""
    from ldo.sandbox.build import base, vae, world
    from ldo.sandbox.build.calibrate import calibrate_thresholds
    from ldo.sandbox.measure import THRESHOLDS

    if part == "vae":
        vae.train_vae(args.work, args.device, deadline)
    elif part == "thresholds":
        found = calibrate_thresholds(vae.load_vae(args.work))
        THRESHOLDS.write_text(json.dumps(found, indent=1) + "\n")
    elif part == "encoder":
        world.train_encoder(args.work, args.device, deadline)
    elif part == "predictor":
        world.train_predictor(args.work, args.device, deadline, vae.load_vae(args.work))
    elif part == "base":
        base.train_base(args.work, args.device, deadline, vae.load_vae(args.work), fast=args.compile)
    else:
        save_models(args.work, args.generator, args.world_model)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ldo.sandbox.build", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/sandbox-build"), help="checkpoints and rendered clips (about 15 GB)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time; the work can be resumed")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the base generator's training; needs a C++ compiler"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--generator", type=Path, default=GENERATOR, help="where the generator is written")
    parser.add_argument("--world-model", type=Path, default=WORLD_MODEL, help="where the world model is written")
    args = parser.parse_args()
    # Here and not above: --help and mistakes in the arguments need no PyTorch.
    import torch

    from ldo.sandbox.build.loop import OutOfTime

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    try:
        for part in args.parts:
            print(f"part: {part}", flush=True)
            _run_part(part, args, deadline)
    except OutOfTime:
        print("out of time; run the same command again to continue")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
