"""Where the time of a run goes: one step of every stage on a recipe's models.

    python benchmarks/bench_step.py [RECIPE] [a.b=c ...] [--repeat 5] [--quick] [--out FILE.json]

Prints and writes, per part, the median and the quartiles of seconds over some repeats after one warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import common
from ldo import align, critic, data, lora, reinforce, run
from ldo.check import check
from ldo.config import read
from ldo.distributed import join
from ldo.report import versions
from ldo.rng import torch_rng
from ldo.rollout import decode
from ldo.train import DEFAULT


def timed(work: Callable[[], object], repeat: int, device: torch.device) -> list[float]:
    """Seconds of each repeat, after one that is thrown away."""
    seconds = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def parts(here: run.Run) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    recipe, rl = here.recipe, here.recipe.rl
    clips = align.prepare(here)
    rows = torch.from_numpy(data.batch_indices(0, "bench", 0, recipe.align.batch, len(clips)))
    noise = torch.randn((len(rows), *align.latent_shape(here, clips, rows)), generator=torch_rng(0, "bench"))
    t_B = torch.full((len(rows),), 0.5)
    aligner = align.make_aligner(here)
    optimizer = torch.optim.AdamW(here.parameters.values(), lr=0.0)
    rollout, _ = reinforce.collect(here, 1, here.fresh)
    latents = rollout.trajectory.final_N
    frames = decode(here.generator, latents, rl.group_size)

    def stage1(with_teacher: bool) -> None:
        flow_loss, pda = align.losses(here, aligner if with_teacher else None, clips, rows, noise, t_B)
        (flow_loss + pda).backward()
        optimizer.zero_grad()

    def stage2() -> None:
        lora.restore(here.parameters, here.fresh)  # the rollout's own policy, as its ratio of 1 is asserted
        reinforce.learn(here, rollout, 1, optimizer, here.fresh, aligner)

    return {
        f"flow loss, {len(rows)} clips": lambda: stage1(False),
        f"flow loss and alignment, {len(rows)} clips": lambda: stage1(True),
        f"decoding, {len(latents)} clips": lambda: decode(here.generator, latents, rl.group_size),
        f"critic, {len(latents)} clips": lambda: critic.score(here.judge, frames, recipe.critic),
        f"whole rollout, {len(latents)} clips": lambda: reinforce.collect(here, 1, here.fresh),
        f"update, {len(latents)} clips": stage2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default=str(DEFAULT))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="two repeats")
    args = parser.parse_intermixed_args()
    repeat = 2 if args.quick else args.repeat
    with tempfile.TemporaryDirectory() as folder:
        recipe = read(args.recipe, [*args.overrides, f"out={folder}", "data.clips=64"])
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        here = run.load(check(recipe), join(recipe.device))
        device = here.world.device
        found = {name: timed(work, repeat, device) for name, work in parts(here).items()}
    print(f"{'part':44} {'median s':>9} {'quartiles':>17}")
    for name, seconds in found.items():
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        print(f"{name:44} {middle:9.3f} {low:8.3f} {high:8.3f}")
    if args.out:
        head = common.record(device)
        record = {**head, "versions": {**head["versions"], **versions()}, "recipe": recipe.name, "seconds": found}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
