"""The path of an object through feature space, in the world model and in the generator before and after LDO.

On valid sandbox clips the ball's true position is known. At each time step the features at that point are read
(bilinear) from V-JEPA's tokens and from the aligned block's hidden state on the noised clip. A video model that
carries the dynamics should move them along a smooth path; its number is the mean turning angle between successive
steps, taken in the full feature space (90 degrees is a random walk, less is smoother). The picture is t-SNE.
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

PATH_CLIPS = 24
PATH_NOISE = 0.3  # the generator sees the clip at this noise level


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
    write_text(path, json.dumps(embed_paths(feature_paths(run, adapters), run.seed)))


@torch.no_grad()
def feature_paths(run: Run, adapters: dict[str, dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Paths [clips, t, D]: one entry for the world model and one for each adapter (name -> values)."""
    device, data = run.processes.device, run.recipe.data
    balls = draw_moving_balls(PATH_CLIPS, run.seed, data.frames, data.height)
    frames = torch.from_numpy(balls.frames).to(device)
    positions = torch.tensor(balls.positions, dtype=torch.float32, device=device)

    def mean_position(frames_of_token: int) -> Tensor:
        # frame 0 is left out: neither model gives it a token of its own kind
        return positions[:, 1:].unflatten(1, (-1, frames_of_token)).mean(2)

    encoded = run.world_model.encode(frames[:, 1:])
    paths = {"V-JEPA": _features_at(encoded, mean_position(run.world_model.tubelet)).cpu().numpy()}
    # A little noise, because a diffusion model sees a clean clip only at the end of sampling.
    latents = run.generator.encode_video(frames)
    noise = torch.randn(latents.shape, generator=torch_rng(run.seed, "figure")).to(device)
    times_B = torch.full((PATH_CLIPS,), PATH_NOISE, device=device)
    text = run.texts(balls.captions)
    for name, values in adapters.items():
        with lora.swapped(run.parameters, values), run.generator.tap(block_index(run)) as tap:
            run.generator.velocity(flow.noisy(latents, noise, times_B), times_B, text)
        hidden = _without_first_step(tap.take())
        paths[name] = _features_at(hidden, mean_position(run.generator.geometry.time)).cpu().numpy()
    return paths


def _without_first_step(tokens: Tokens) -> Tokens:
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


def turning(path_BTD: np.ndarray) -> float:
    """Mean angle in degrees between successive steps of the paths."""
    step = np.diff(path_BTD, axis=1)
    step = step / np.maximum(np.linalg.norm(step, axis=-1, keepdims=True), 1e-9)
    cosines = (step[:, 1:] * step[:, :-1]).sum(-1)
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean())


def embed_paths(paths: dict[str, np.ndarray], seed: int) -> dict:
    """Panels with 2-D paths and their smoothness; adapters share one embedding, so that they can be compared."""
    adapters = [name for name in paths if name != "V-JEPA"]
    # V-JEPA's features have another width, so they cannot share the adapters' embedding.
    placed = {"V-JEPA": _embed(paths["V-JEPA"], seed)}
    together = _embed(np.concatenate([paths[name] for name in adapters]), seed)
    for index, name in enumerate(adapters):
        placed[name] = together[index * PATH_CLIPS : (index + 1) * PATH_CLIPS]
    return {
        name: {"turning": turning(paths[name]), "paths": np.round(points, 2).tolist()}
        for name, points in placed.items()
    }


def _embed(features: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE of paths [clips, t, D] to [clips, t, 2]."""
    from sklearn.manifold import TSNE

    rows = features.reshape(-1, features.shape[-1])
    embedding = TSNE(2, perplexity=min(20, len(rows) // 4), init="pca", random_state=seed)
    return embedding.fit_transform(rows).reshape(*features.shape[:-1], 2)
