"""How good a sandbox generator is: ``python -m ldo.sandbox.build.quality [FOLDER ...] --out FILE.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ldo.core.files import write_text
from ldo.sandbox.shipped import GENERATOR


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ldo.sandbox.build.quality", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="pipelines to compare with the shipped one")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="print to the terminal if not given")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/sandbox-clips"), help="rendered clips and their latents"
    )
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--loss-clips", type=int, default=512, help="that the flow loss is taken over")
    parser.add_argument("--sound-clips", type=int, default=128, help="valid clips that are noised and sampled down")
    parser.add_argument("--prompts", type=int, default=96, help="that videos are sampled for")
    args = parser.parse_args()
    # Here and not above: --help and mistakes in the arguments need no PyTorch.
    import torch

    from ldo.stages.generator_quality import compare_generators

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folders = {"base": GENERATOR}
    for folder in args.folders:
        folders[str(folder)] = folder
    found = compare_generators(folders, args.cache, device, args.loss_clips, args.sound_clips, args.prompts)
    text = json.dumps(found, indent=1)
    if args.out:
        write_text(args.out, text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
