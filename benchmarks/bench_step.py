"""Where the time of a run goes: one step of every stage on a recipe's models.

    python benchmarks/bench_step.py [RECIPE] [a.b=c ...] [--repeat 5] [--quick] [--out FILE.json]

Prints median and quartiles of the seconds of each part, over some repeats after one warm-up, and writes all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import provenance
from benchmarks.harness import write_json
from ldo.core.config import DEFAULT_RECIPE
from ldo.core.distributed import join_processes
from ldo.core.recipe_file import read_recipe
from ldo.core.rng import torch_rng
from ldo.data.buckets import batch_indices
from ldo.method.critic import score_clips
from ldo.method.rollout import decode_videos
from ldo.models.lora import restore_values
from ldo.report.run_report import versions
from ldo.run.load import load_run
from ldo.run.state import Run
from ldo.run.validate import validate
from ldo.stages.align import clip_losses, clips_latent_shape, make_alignment
from ldo.stages.clips import prepare_clips
from ldo.stages.collect import collect_rollout
from ldo.stages.reinforce import learn_from_rollout


def timed(work: Callable[[], object], repeat: int, device: torch.device) -> list[float]:
    """Seconds of each repeat, after an unmeasured one."""
    seconds = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def parts(here: Run) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    recipe = here.recipe
    clips = prepare_clips(here)
    rows = torch.from_numpy(batch_indices(0, "bench", 0, recipe.align.batch, len(clips)))
    noise = torch.randn((len(rows), *clips_latent_shape(here, clips, rows)), generator=torch_rng(0, "bench"))
    times_B = torch.full((len(rows),), 0.5)
    aligner = make_alignment(here)
    # without a learning rate every repeat sees the same weights
    optimizer = torch.optim.AdamW(here.parameters.values(), lr=0.0)
    rollout, _ = collect_rollout(here, 1, here.fresh)
    latents = rollout.trajectory.final_N
    group = recipe.rl.group_size
    frames = decode_videos(here.generator, latents, group)

    def stage1(with_teacher: bool) -> None:
        flow_loss, pda = clip_losses(here, aligner if with_teacher else None, clips, rows, noise, times_B)
        (flow_loss + pda).backward()
        optimizer.zero_grad()

    def stage2() -> None:
        # the policy that sampled the rollout: the update asserts that the ratio starts at 1
        restore_values(here.parameters, here.fresh)
        learn_from_rollout(here, rollout, 1, optimizer, here.fresh, aligner)

    return {
        f"flow loss, {len(rows)} clips": lambda: stage1(False),
        f"flow loss and alignment, {len(rows)} clips": lambda: stage1(True),
        f"decoding, {len(latents)} clips": lambda: decode_videos(here.generator, latents, group),
        f"critic, {len(latents)} clips": lambda: score_clips(here.world_model, frames, recipe.critic),
        f"whole rollout, {len(latents)} clips": lambda: collect_rollout(here, 1, here.fresh),
        f"update, {len(latents)} clips": stage2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default=str(DEFAULT_RECIPE))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="two repeats")
    arguments = parser.parse_intermixed_args()
    repeat = 2 if arguments.quick else arguments.repeat
    with tempfile.TemporaryDirectory() as folder:
        # few clips and a temporary folder: their preparation is not timed, and nothing is kept
        recipe = read_recipe(arguments.recipe, [*arguments.overrides, f"out={folder}", "data.clips=64"])
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        here = load_run(validate(recipe), join_processes(recipe.device))
        device = here.processes.device
        measured = {part: timed(work, repeat, device) for part, work in parts(here).items()}
    print(f"{'part':44} {'median s':>9} {'quartiles':>17}")
    for part, seconds in measured.items():
        # one repeat is its own quartiles
        several = seconds if len(seconds) > 1 else seconds * 2
        lower, middle, upper = statistics.quantiles(several, n=4, method="inclusive")
        print(f"{part:44} {middle:9.3f} {lower:8.3f} {upper:8.3f}")
    if arguments.out:
        header = provenance.record(device)
        result = {
            **header,
            "versions": {**header["versions"], **versions()},
            "recipe": recipe.name,
            "seconds": measured,
        }
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
