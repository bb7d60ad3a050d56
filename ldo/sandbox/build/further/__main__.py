"""Train the shipped generator further, fast enough for a GPU: ``python -m ldo.sandbox.build.further``.

    --minutes 7               a slice at a constant rate; the same command again continues
    --minutes 7 --decay       the last slice: the rate falls to zero in the steps that these minutes will hold
    --write FOLDER            the average as a pipeline in half precision, like the shipped one

Under ``torchrun --nproc-per-node N`` the processes share each batch: on a CPU, one for each core is a third faster than
all cores in one process. What is trained lies in ``--work``. Rendered clips lie in ``--cache``, which several trainings
may share.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from ldo.core.errors import RecipeError, TrainingError
from ldo.core.progress import quiet_libraries
from ldo.sandbox.build.further.settings import FORMS, PRECISIONS, Settings
from ldo.sandbox.shipped import GENERATOR


def _command_line() -> argparse.ArgumentParser:
    """The command's options; those named like a field of Settings set it."""
    parser = argparse.ArgumentParser(prog="python -m ldo.sandbox.build.further", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/sandbox-further"),
        help="the training: three files of 7 MiB and further.json",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("runs/sandbox-clips"),
        help="rendered clips and their latents (57 KB a clip), made on first use",
    )
    parser.add_argument("--init", type=Path, default=GENERATOR, help="the pipeline to begin with")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of this slice, the making of clips included")
    parser.add_argument(
        "--decay",
        type=int,
        nargs="?",
        const=0,
        metavar="STEPS",
        help="let the rate fall to zero; without a number, within this slice",
    )
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="write the average as a pipeline, and train nothing"
    )
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument(
        "--form",
        choices=FORMS,
        help="of a step: compiled blocks in a CUDA graph (default on a GPU), stock kernels in one, neither (default on "
        "a CPU, where compiled blocks need a C++ compiler)",
    )
    parser.add_argument("--precision", choices=PRECISIONS)
    # Without defaults here: what is not given comes from the training in --work, and only then from Settings.
    options = (("clips", int), ("batch", int), ("lr", float), ("muon-lr", float), ("warmup", int), ("guidance", float))
    for name, kind in options:
        parser.add_argument(f"--{name}", type=kind, help=f"default {getattr(Settings, name.replace('-', '_'))}")
    return parser


def _chosen_settings(args: argparse.Namespace) -> Settings:
    """The settings of the training in ``--work``, or the defaults, with what the command line gives."""
    from ldo.sandbox.build.further.checkpoint import read_training

    given = {}
    for field in fields(Settings):
        value = getattr(args, field.name, None)
        if value is not None:
            given[field.name] = value
    training = read_training(args.work)
    return replace(training[1] if training else Settings(), **given)


def main(argv: Sequence[str] | None = None) -> int:
    args = _command_line().parse_args(argv)
    # Here and not above: --help and mistakes in the arguments need no PyTorch.
    import torch

    from ldo.core.distributed import join_processes, leave_processes
    from ldo.sandbox.build.further.slices import train_slice, write_average

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    processes = join_processes(device)
    deadline = time.monotonic() + 60 * args.minutes
    quiet_libraries()
    try:
        if args.write:
            write_average(args.work, args.init, args.write)
            return 0
        progress = train_slice(
            args.work,
            args.cache,
            args.init,
            device,
            deadline,
            _chosen_settings(args),
            decay=args.decay,
            form=args.form,
            processes=processes,
        )
    except (RecipeError, TrainingError) as error:
        print(f"ldo: {error}", file=sys.stderr)
        return 2
    finally:
        leave_processes()
    if processes.first:
        outcome = "done" if progress.done else "out of time; run the same command again to continue"
        print(f"step {progress.step}: {outcome}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
