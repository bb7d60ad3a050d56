"""The path of an object through feature space, in the world model and in the generator before and after LDO.

On valid sandbox clips the ball's true position is known. At each time step the features at that point are read
(bilinear) from V-JEPA's tokens, from what V-JEPA forecasts for the second half of the clip, and from the aligned
block's hidden state on the noised clip. A video model that carries the dynamics should move them steadily along a
smooth path. ``path_measures`` says how far it does, in the full feature space; the picture is t-SNE.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldo.core.files import write_text
from ldo.core.rng import torch_rng
from ldo.models import flow, lora
from ldo.models.world_model import Tokens
from ldo.run.state import Run
from ldo.sandbox.moving_balls import draw_moving_balls
from ldo.stages.align import block_index
from ldo.stages.path_measures import time_correlations, turning_angles

PATH_CLIPS = 120
PATH_BATCH = 40
SHOWN_PATHS = 12  # of the clips, in the picture
NOISE_LEVELS = (0.2, 0.5, 0.8)  # at which the generator sees the clips
SHOWN_LEVEL = 0.5
WORLD, FORECAST = "V-JEPA", "V-JEPA's forecast"


def write_feature_paths(run: Run) -> None:
    """Write ``eval/figure.json``: the base, and the last adapter that was exported.

    Does nothing if the file exists, if clips are not square, or if they are too short for a path to turn.
    """
    path = run.folder / "eval" / "figure.json"
    data = run.recipe.data
    exported = [name for name in ("ldo", "aligned", "sft") if run.lora_folder(name).is_dir()]
    turns = (data.frames - 1) // run.generator.geometry.time - 2
    if path.exists() or not exported or turns <= 0 or data.height != data.width:
        return
    last = lora.read_lora(run.lora_folder(exported[0]))
    adapters = {"base": lora.zeros(run.parameters), exported[0]: last}
    write_text(path, json.dumps(describe_paths(feature_paths(run, adapters), run.seed)))


@torch.no_grad()
def feature_paths(run: Run, adapters: dict[str, dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Paths [clips, t, D] of the world model, of its forecast, and of each adapter (name -> values) at each level.

    The adapters' are named ``<name>, t = <level>``.
    """
    device, data = run.processes.device, run.recipe.data
    balls = draw_moving_balls(PATH_CLIPS, run.seed, data.frames, data.height)
    noise_rng = torch_rng(run.seed, "figure")
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, PATH_CLIPS, PATH_BATCH):
        clips = slice(start, start + PATH_BATCH)
        frames = torch.from_numpy(balls.frames[clips]).to(device)
        # Frame 0 is left out: neither model gives it a token of its own kind.
        positions = torch.tensor(balls.positions[clips, 1:], dtype=torch.float32, device=device)
        for name, features in _world_paths(run, frames, positions).items():
            parts.setdefault(name, []).append(features)
        latents = run.generator.encode_video(frames)
        noise = torch.randn(latents.shape, generator=noise_rng).to(device)
        text = run.texts(balls.captions[clips])
        latent_positions = _mean_position(positions, run.generator.geometry.time)
        for name, values in adapters.items():
            for level in NOISE_LEVELS:
                times_B = torch.full((len(frames),), level, device=device)
                with lora.swapped(run.parameters, values), run.generator.tap(block_index(run)) as tap:
                    run.generator.velocity(flow.noisy(latents, noise, times_B), times_B, text)
                features = _features_at(without_first_step(tap.take()), latent_positions)
                parts.setdefault(f"{name}, t = {level}", []).append(features)
    return {name: torch.cat(batches).cpu().numpy() for name, batches in parts.items()}


def _world_paths(run: Run, frames: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """V-JEPA's features of the whole clip, and its forecast of the second half from the first."""
    world_model, tubelet = run.world_model, run.world_model.tubelet
    places = _mean_position(positions, tubelet)
    paths = {WORLD: _features_at(world_model.encode(frames[:, 1:]), places)}
    tubelets = places.shape[1]
    seen = tubelets // 2
    # A path of fewer than three steps cannot turn.
    if tubelets - seen >= 3:
        _, predicted = world_model.forecast(frames[:, 1:], seen * tubelet)
        paths[FORECAST] = _features_at(predicted, places[:, seen:])
    return paths


def _mean_position(positions_BT2: Tensor, frames_of_token: int) -> Tensor:
    return positions_BT2.unflatten(1, (-1, frames_of_token)).mean(2)


def without_first_step(tokens: Tokens) -> Tokens:
    """Tokens of all time steps but the first, which stands for frame 0 alone."""
    steps, height, width = tokens.grid
    rest = tokens.x_BND.unflatten(1, (steps, -1))[:, 1:].flatten(1, 2)
    return Tokens(rest, (steps - 1, height, width))


def _features_at(tokens: Tokens, positions_BT2: Tensor) -> Tensor:
    """Features [B, t, D] at one point of the picture for each clip and time step; positions in [0, 1]."""
    steps, height, width = tokens.grid
    maps = tokens.x_BND.float().unflatten(1, (steps, height, width)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    points = (positions_BT2.flatten(0, 1) * 2 - 1).view(-1, 1, 1, 2)
    features = F.grid_sample(maps, points, align_corners=False, padding_mode="border")
    return features.view(len(tokens.x_BND), steps, -1)


def describe_paths(paths: dict[str, np.ndarray], seed: int) -> dict[str, dict]:
    """For each panel {"turning", "time_correlation"}: medians over clips; and 2-D "paths" for those that are pictured.

    Pictured are V-JEPA and the adapters at SHOWN_LEVEL, in one embedding for all adapters, so that they can be
    compared; of the clips, those whose turning in the base is nearest to the median.
    """
    described: dict[str, dict] = {}
    for name, path in paths.items():
        described[name] = {
            "turning": float(np.median(turning_angles(path))),
            "time_correlation": float(np.median(time_correlations(path))),
            "clips": len(path),
        }
    adapters = [name for name in paths if name.endswith(f"t = {SHOWN_LEVEL}")]
    typical = _nearest_to_median(turning_angles(paths[adapters[0]]))
    # V-JEPA's features have another width, so they cannot share the adapters' embedding.
    placed = {WORLD: _embed(paths[WORLD][typical], seed)}
    together = _embed(np.concatenate([paths[name][typical] for name in adapters]), seed)
    for name, points in zip(adapters, together.reshape(len(adapters), len(typical), *together.shape[1:]), strict=True):
        placed[name] = points
    for name, points in placed.items():
        described[name]["paths"] = np.round(points, 2).tolist()
    return described


def _nearest_to_median(values: np.ndarray) -> np.ndarray:
    """Indices of the SHOWN_PATHS values around the median."""
    order = np.argsort(values, kind="stable")
    shown = min(SHOWN_PATHS, len(order))
    start = (len(order) - shown) // 2
    return order[start : start + shown]


def _embed(features: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE of paths [clips, t, D] to [clips, t, 2]."""
    from sklearn.manifold import TSNE

    rows = features.reshape(-1, features.shape[-1])
    embedding = TSNE(2, perplexity=min(20, len(rows) // 4), init="pca", random_state=seed)
    return embedding.fit_transform(rows).reshape(*features.shape[:-1], 2)
