"""How good a sandbox generator is: ``python -m ldo.sandbox.build.quality [FOLDER ...] --out FILE.json``.

The shipped generator and each FOLDER, on the same clips, noise and prompts:

    flow loss      of clips that no training has drawn, at four noise levels; ``seen`` is the same of clips that training had
    resampled      sound clips noised to a level and sampled down again: the share past each exact metric's threshold, the law residual
    samples        as ``ldo.evaluate`` samples and measures them, intervals and differences from the shipped one included, and the
                   share of videos past each threshold
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ldo import evaluate, flow
from ldo.checkpoint import write_text
from ldo.config import read
from ldo.distributed import World
from ldo.generator import Generator, Text
from ldo.rng import torch_rng
from ldo.run import quiet
from ldo.sandbox import simulate
from ldo.sandbox.build.calibrate import valid
from ldo.sandbox.build.further import Clips, clips, load
from ldo.sandbox.dataset import GENERATOR, WORLD_MODEL
from ldo.sandbox.measure import METRICS, Measured, measure
from ldo.sandbox.observe import Prompt
from ldo.train import DEFAULT
from ldo.world_model import WorldModel

TIMES = (0.2, 0.45, 0.7, 0.9)
LEVELS = (0.45, 0.75)
BATCH = 64
HELD_OUT = 1  # seed of the clips that no training has drawn


@torch.no_grad()
def flow_losses(model: Generator, data: Clips) -> dict[str, float]:
    """Mean squared error of the velocity at each of TIMES, over all of ``data`` with their captions, on fixed noise."""
    losses = {}
    for t in TIMES:
        total = 0.0
        for i in range(0, len(data.latents), BATCH):
            x0 = data.latents[i : i + BATCH].float()
            noise = torch.randn(x0.shape, generator=torch_rng(0, "quality flow", i)).to(x0.device)
            t_B = torch.full((len(x0),), t, device=x0.device)
            v = model.velocity(flow.noisy(x0, noise, t_B), t_B, Text({"embeds": data.texts[data.caption[i : i + BATCH]]}))
            total += (v - (noise - x0)).square().mean().item() * len(x0)
        losses[str(t)] = total / len(data.latents)
    return losses


@torch.no_grad()
def resampled(model: Generator, tracks: list[simulate.Track], level: float, steps: int) -> list[Measured]:
    """Sound clips noised to ``level``, brought down by the ODE in ``steps`` steps, and measured."""
    top = level / (model.shift((1,)) - (model.shift((1,)) - 1) * level)  # the uniform number that the shift takes to ``level``
    times = flow.training_times(torch.linspace(top, 0, steps + 1), model.shift((1,))).tolist()
    found = []
    for i in range(0, len(tracks), BATCH):
        part = tracks[i : i + BATCH]
        frames = torch.from_numpy(np.stack([simulate.render(t) for t in part])).float()
        x0 = model.encode_video(frames.to(model.device))
        text = model.encode_text([t.scene.caption for t in part])
        noise = torch.randn(x0.shape, generator=torch_rng(0, f"quality {level}", i)).to(x0.device)
        x = flow.noisy(x0, noise, torch.full((len(part),), times[0], device=x0.device))
        for t, t_next in pairwise(times):
            v = model.velocity(x, torch.full((len(part),), t, device=x.device), text)
            x, _ = flow.transition(x, v, t, t_next)
        videos = model.decode_video(x).cpu().numpy()
        found += [measure(video, Prompt.of(t.scene)) for video, t in zip(videos, part, strict=True)]
    return found


def past(violations: list[tuple[str, ...] | list[str]]) -> dict[str, float]:
    """Share of clips past the threshold of each metric, and of any."""
    shares = {k: float(np.mean([k in v for v in violations])) for k in METRICS}
    return shares | {"any": float(np.mean([bool(v) for v in violations]))}


def judge(folders: dict[str, Path], cache: Path, device: str, loss_clips: int, sound_clips: int, prompts: int) -> dict:
    """Everything above for each named folder; ``base`` is what the others are compared with."""
    quiet()
    world = World(device=torch.device(device))
    recipe = read(DEFAULT, [f"out={cache}", f"evaluate.count={prompts}"])
    lines = evaluate.prompt_lines(recipe)
    critic = WorldModel.load(str(WORLD_MODEL)).to(device)
    tracks = valid(HELD_OUT, "quality", sound_clips)
    rows, records = {}, {}
    for name, folder in folders.items():
        model = load(folder)
        model.pipeline.to(device).set_progress_bar_config(disable=True)
        rows[name] = {
            "flow_loss": flow_losses(model, clips(cache, model, loss_clips, device, HELD_OUT)),
            "flow_loss_seen": flow_losses(model, clips(cache, model, loss_clips, device)),
        }
        for level in LEVELS:
            found = resampled(model, tracks, level, recipe.evaluate.steps)
            rows[name][f"resampled_{level}"] = past([m.violations for m in found]) | {
                "law_residual_mean": float(np.mean([m.law_residual for m in found]))
            }
        records[name] = evaluate.arm_records(model.pipeline, recipe, lines, f"samples: {name}", critic, world)
        rows[name]["samples_past"] = past([r["violations"] for r in records[name]])
        print(f"{name}: flow loss " + ", ".join(f"{v:.4f} at {t}" for t, v in rows[name]["flow_loss"].items()), flush=True)
        print(f"{name}: law residual past its threshold in {rows[name]['samples_past']['law_residual']:.3f} of samples", flush=True)
    metrics, paired = evaluate.statistics(records, recipe.evaluate.seeds, recipe.seed)
    for name, row in rows.items():
        row |= {"samples": metrics[name], "samples_minus_base": paired.get(name, {})}
    sizes = {"loss_clips": loss_clips, "sound_clips": sound_clips, "prompts": prompts, "seeds": recipe.evaluate.seeds, "steps": recipe.evaluate.steps}
    return {"device": device, "torch": torch.__version__, **sizes, "models": rows}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ldo.sandbox.build.quality", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="pipelines to compare with the shipped one")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--cache", type=Path, default=Path("runs/sandbox-clips"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--loss-clips", type=int, default=512)
    parser.add_argument("--sound-clips", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=96)
    args = parser.parse_args()
    folders = {"base": GENERATOR} | {str(f): f for f in args.folders}
    text = json.dumps(judge(folders, args.cache, args.device, args.loss_clips, args.sound_clips, args.prompts), indent=1)
    if args.out:
        write_text(args.out, text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
