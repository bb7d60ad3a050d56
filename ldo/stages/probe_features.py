"""What a linear probe reads from features: where a ball is, and how fast it moves.

A map of all tokens of a time step is projected to PROJECTED random directions, and ridge regression reads the ball's
position and velocity from them (``path_measures.probe``). Both are known exactly on valid sandbox clips of one ball.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldo.core.errors import RecipeError
from ldo.core.rng import numpy_rng, torch_rng
from ldo.models import flow, lora
from ldo.models.world_model import Tokens
from ldo.run.state import Run
from ldo.sandbox.moving_balls import draw_moving_balls
from ldo.stages.align import block_index
from ldo.stages.feature_paths import FORECAST, NOISE_LEVELS, PATH_BATCH, WORLD, without_first_step
from ldo.stages.path_measures import FOLDS, probe

PROJECTED = 512
LAST_SEEN = "the last tubelet that V-JEPA saw"  # what a forecast has to be better than


@torch.no_grad()
def probe_features(run: Run, clips: int) -> dict:
    """{"clips", "half_patch", "panels": {name: {"position": {r2, error}, "velocity": {r2, error}}}}.

    Errors are in box widths, and box widths a frame. ``half_patch`` is half a V-JEPA token's width. RecipeError where
    there are too few clips, or the recipe's are not square.
    """
    data, tubelet = run.recipe.data, run.world_model.tubelet
    if clips < 2 * FOLDS:
        raise RecipeError(f"--clips {clips} are too few for {FOLDS} folds; give at least {2 * FOLDS}")
    if data.height != data.width:
        raise RecipeError(f"probes need square clips; data.height is {data.height} and data.width {data.width}")
    balls = draw_moving_balls(clips, run.seed, data.frames, data.height, alone=True)
    adapters = {"base": lora.zeros(run.parameters)}
    for name in ("sft", "aligned", "ldo"):
        if run.lora_folder(name).is_dir():
            adapters[name] = lora.read_lora(run.lora_folder(name))
    projections: dict[int, Tensor] = {}
    noise_rng = torch_rng(run.seed, "probe")
    parts: dict[str, list[Tensor]] = {}

    def keep(name: str, tokens: Tokens) -> None:
        steps = tokens.grid[0]
        maps = tokens.x_BND.float().unflatten(1, (steps, -1)).flatten(2)
        width = maps.shape[-1]
        # One projection for each width: panels of one model must see the same directions.
        if width not in projections:
            drawn = numpy_rng(run.seed, f"probe {width}").normal(size=(width, min(PROJECTED, width))) / np.sqrt(width)
            projections[width] = torch.tensor(drawn, dtype=torch.float32, device=maps.device)
        parts.setdefault(name, []).append((maps @ projections[width]).cpu())

    for start in range(0, clips, PATH_BATCH):
        batch = slice(start, start + PATH_BATCH)
        frames = torch.from_numpy(balls.frames[batch]).to(run.processes.device)
        seen = frames[:, 1:]
        keep(WORLD, run.world_model.encode(seen))
        known, predicted = run.world_model.forecast(seen, _context(seen.shape[1], tubelet))
        keep(FORECAST, predicted)
        keep(LAST_SEEN, _last_step(known, predicted.grid[0]))
        latents = run.generator.encode_video(frames)
        noise = torch.randn(latents.shape, generator=noise_rng).to(latents.device)
        text = run.texts(balls.captions[batch])
        for name, values in adapters.items():
            for level in NOISE_LEVELS:
                times_B = torch.full((len(frames),), level, device=latents.device)
                with lora.swapped(run.parameters, values), run.generator.tap(block_index(run)) as tap:
                    run.generator.velocity(flow.noisy(latents, noise, times_B), times_B, text)
                keep(f"{name}, t = {level}", without_first_step(tap.take()))

    panels = {}
    for name, features in parts.items():
        rows = torch.cat(features).numpy()
        frames_of_token = run.generator.geometry.time if ", t = " in name else tubelet
        position, velocity = _motion(balls.positions[:, 1:], frames_of_token)
        # A forecast has only the last steps.
        steps = rows.shape[1]
        panels[name] = {
            "position": probe(rows, position[:, -steps:]),
            "velocity": probe(rows, velocity[:, -steps:]),
        }
    return {"clips": clips, "half_patch": 0.5 / run.world_model.side, "panels": panels}


def _context(frames: int, tubelet: int) -> int:
    """Half of the clip, in whole tubelets."""
    return frames // tubelet // 2 * tubelet


def _last_step(tokens: Tokens, steps: int) -> Tokens:
    """The tokens of the last time step, ``steps`` times."""
    _, height, width = tokens.grid
    last = tokens.x_BND[:, -height * width :]
    return Tokens(last.repeat(1, steps, 1), (steps, height, width))


def _motion(positions_NT2: np.ndarray, frames_of_token: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean position and velocity [N, t, 2] over the frames of each token."""
    count, frames, _ = positions_NT2.shape
    of_token = positions_NT2.reshape(count, frames // frames_of_token, frames_of_token, 2)
    return of_token.mean(2), (of_token[:, :, -1] - of_token[:, :, 0]) / (frames_of_token - 1)


def probe_table(found: dict) -> str:
    """The probes as a Markdown table."""
    lines = [
        "| features | position R2 | position error, box widths | velocity R2 |",
        "| --- | --- | --- | --- |",
    ]
    for name, panel in found["panels"].items():
        position, velocity = panel["position"], panel["velocity"]
        lines.append(f"| {name} | {position['r2']:.3f} | {position['error']:.3f} | {velocity['r2']:.3f} |")
    lines.append(f"\nHalf a V-JEPA patch is {found['half_patch']:.3f} box widths; {found['clips']} clips.")
    return "\n".join(lines)
