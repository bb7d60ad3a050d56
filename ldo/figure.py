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

from ldo import flow, lora
from ldo.align import block_index
from ldo.checkpoint import write_text
from ldo.rng import numpy_rng, torch_rng
from ldo.run import Run
from ldo.sandbox import scenes, simulate
from ldo.world_model import Tokens

CLIPS = 24
NOISE = 0.3  # the generator sees the clip at this noise level


def _at(tokens: Tokens, xy_BT2: Tensor) -> Tensor:
    """Features [B, t, D] at a point of the picture per clip and time step; xy in [0, 1]."""
    t, h, w = tokens.grid
    b = len(tokens.x_BND)
    maps = tokens.x_BND.float().unflatten(1, (t, h, w)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    grid = (xy_BT2.flatten(0, 1) * 2 - 1).view(-1, 1, 1, 2)
    return F.grid_sample(maps, grid, align_corners=False, padding_mode="border").view(b, t, -1)


def turning(path_BTD: np.ndarray) -> float:
    """Mean angle in degrees between successive steps of the paths."""
    step = np.diff(path_BTD, axis=1)
    step = step / np.maximum(np.linalg.norm(step, axis=-1, keepdims=True), 1e-9)
    return float(np.degrees(np.arccos(np.clip((step[:, 1:] * step[:, :-1]).sum(-1), -1, 1))).mean())


@torch.no_grad()
def feature_paths(run: Run, adapters: dict[str, dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Paths [clips, t, D]: one entry for the world model and one per adapter (name -> values)."""
    device, d = run.world.device, run.recipe.data
    drawn, index = [], 0
    while len(drawn) < CLIPS:
        scene = scenes.sample_scene(numpy_rng(run.seed, "figure", index), "test")
        index += 1
        if scene.kind not in ("stack", "occluder"):
            drawn.append(scene)
    tracks = [simulate.track(s, d.frames) for s in drawn]
    frames = torch.from_numpy(np.stack([simulate.render(t, d.height) for t in tracks])).to(device)
    fastest = [int(np.linalg.norm(np.diff(t.positions, axis=0), axis=-1).sum(0).argmax()) for t in tracks]
    xy = torch.tensor(np.stack([t.positions[:, i] for t, i in zip(tracks, fastest, strict=True)]), dtype=torch.float32, device=device)

    def per_step(size: int) -> Tensor:  # mean position over the frames of a token, frame 0 left out
        return xy[:, 1:].unflatten(1, (-1, size)).mean(2)

    paths = {"V-JEPA": _at(run.judge.encode(frames[:, 1:]), per_step(run.judge.tubelet)).cpu().numpy()}
    latents = run.generator.encode_video(frames)
    noise = torch.randn(latents.shape, generator=torch_rng(run.seed, "figure")).to(device)
    t_B = torch.full((CLIPS,), NOISE, device=device)
    text = run.texts([s.caption for s in drawn])
    for name, values in adapters.items():
        with lora.swapped(run.parameters, values), run.generator.tap(block_index(run)) as tap:
            run.generator.velocity(flow.noisy(latents, noise, t_B), t_B, text)
        hidden = tap.take()
        t, h, w = hidden.grid
        rest = Tokens(hidden.x_BND.unflatten(1, (t, -1))[:, 1:].flatten(1, 2), (t - 1, h, w))
        paths[name] = _at(rest, per_step(run.generator.geometry.time)).cpu().numpy()
    return paths


def draw(paths: dict[str, np.ndarray], seed: int) -> dict:
    """Panels with 2-D paths and their smoothness; adapters share one embedding, so that they can be compared."""
    from sklearn.manifold import TSNE

    def embed(x: np.ndarray) -> np.ndarray:
        flat = x.reshape(-1, x.shape[-1])
        return TSNE(2, perplexity=min(20, len(flat) // 4), init="pca", random_state=seed).fit_transform(flat).reshape(*x.shape[:-1], 2)

    names = [n for n in paths if n != "V-JEPA"]
    placed = {"V-JEPA": embed(paths["V-JEPA"])}
    together = embed(np.concatenate([paths[n] for n in names]))
    for k, name in enumerate(names):
        placed[name] = together[k * CLIPS : (k + 1) * CLIPS]
    return {n: {"turning": turning(paths[n]), "paths": np.round(p, 2).tolist()} for n, p in placed.items()}


def write(run: Run) -> None:
    """Write ``eval/figure.json``: the base, and the last adapter that was exported.

    Nothing where it is there already, or where clips are not square or so short that a path has no turn.
    """
    path = run.folder / "eval" / "figure.json"
    names = [n for n in ("ldo", "aligned", "sft") if run.lora_folder(n).is_dir()]
    turns = (run.recipe.data.frames - 1) // run.generator.geometry.time - 2
    if not path.exists() and names and turns > 0 and run.recipe.data.height == run.recipe.data.width:
        adapters = {"base": lora.zeros(run.parameters), names[0]: lora.read(run.lora_folder(names[0]))}
        write_text(path, json.dumps(draw(feature_paths(run, adapters), run.seed)))
