"""Stage 0, the gate: a critic that cannot tell broken physics from sound physics does not judge.

Three tests: matched pairs (a valid clip and a broken one from the same start), controls (static, shuffled and noise
clips rank below real ones), and, on the policy's own samples, rank correlation of reward and exact metrics within a
prompt. Also reported: whether the critic prefers one restitution over another from the same start (it should not),
and, for a forward reward, whether it tells a soft bounce from its reversal.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ldo import critic
from ldo.config import Critic, Gate
from ldo.progress import Bar, batches
from ldo.rng import numpy_rng
from ldo.sandbox import corrupt, scenes, simulate
from ldo.sandbox.measure import measure, severity
from ldo.sandbox.observe import Prompt
from ldo.world_model import WorldModel

KINDS = ("teleport", "vanish", "freeze", "float", "colour", "jitter", "shuffle", "swap", "interpenetrate")
CONTROLS = ("static", "shuffled", "noise")
BATCH = 50


def _score(world: WorldModel, clips: list[np.ndarray], config: Critic, name: str, active: bool) -> np.ndarray:
    """Rewards of rendered clips."""
    out = []
    for rows in batches(name, len(clips), BATCH, active):
        x = torch.from_numpy(np.stack(clips[rows])).to(world.mean.device)
        out.append(critic.score(world, x, config).reward.cpu())
    return torch.cat(out).numpy()


def _accuracy(better: np.ndarray, worse: np.ndarray) -> float:
    """Share of pairs ranked rightly; a tie is half."""
    return float(((better > worse) + 0.5 * (better == worse)).mean())


def matched_pairs(world: WorldModel, config: Critic, pairs: int, seed: int = 0, active: bool = False) -> dict:
    """Rank accuracies per kind of violation, over all kinds, on the controls, and the restitution preference.

    Scenes are shared between kinds: each valid clip is scored once and compared with every break that applies to it.
    """
    size = world.crop
    valid: list[np.ndarray] = []
    broken: dict[str, list[tuple[int, np.ndarray]]] = {k: [] for k in KINDS}
    index = 0
    while any(len(v) < pairs for v in broken.values()):
        rng = numpy_rng(seed, "gate", index)
        index += 1
        wanted = [k for k in KINDS if len(broken[k]) < pairs]
        need = {"swap": "occluder", "interpenetrate": ("collision_1d", "collision_2d")[index % 2], "float": ("ballistic", "bounce")[index % 2]}
        scene = scenes.sample_scene(rng, kind=need.get(wanted[-1]) if len(wanted) < len(KINDS) else None)
        if scene.kind == "stack":  # a scene at rest has no dynamics to judge
            continue
        found = {k: corrupt.corrupt(scene, rng, k) for k in wanted}
        for kind, clip in found.items():
            if clip is not None:
                broken[kind].append((len(valid), simulate.render(clip, size)))
        if any(c is not None for c in found.values()):
            valid.append(simulate.render(simulate.track(scene), size))
    good = _score(world, valid, config, "gate: valid", active)
    kinds = {}
    for kind, entries in broken.items():
        bad = _score(world, [c for _, c in entries], config, f"gate: {kind}", active)
        kinds[kind] = _accuracy(good[[i for i, _ in entries]], bad)
    rng = numpy_rng(seed, "gate controls")
    some = valid[:pairs]
    controls = {
        "static": [np.repeat(c[:1], len(c), 0) for c in some],
        "shuffled": [c[rng.permutation(len(c))] for c in some],
        "noise": [rng.random(c.shape, np.float32) for c in some],
    }
    below = {k: _accuracy(good[: len(some)], _score(world, v, config, f"gate: {k}", active)) for k, v in controls.items()}
    return {"kinds": kinds, "all_kinds": float(np.mean(list(kinds.values()))), "controls": below, **_bounces(world, config, pairs, seed, active)}


def _bounces(world: WorldModel, config: Critic, pairs: int, seed: int, active: bool) -> dict:
    """Restitution 0.6 against 1.0 from the same start, and a soft bounce against its reversal (forward rewards only)."""
    hard, soft, index = [], [], 0
    while len(hard) < pairs:
        scene = scenes.sample_scene(numpy_rng(seed, "gate bounce", index), kind="bounce")
        other = scenes.with_restitution(scene, 0.6)
        index += 1
        if other is not None:
            hard.append(simulate.render(simulate.track(scene), world.crop))
            soft.append(simulate.render(simulate.track(other), world.crop))
    a = _score(world, hard, config, "gate: restitution 1", active)
    b = _score(world, soft, config, "gate: restitution 0.6", active)
    out = {"restitution_preference": _accuracy(a, b)}
    if config.direction == "forward":
        back = _score(world, [c[::-1].copy() for c in soft], config, "gate: reversed", active)
        out["time_reversal"] = _accuracy(b, back)
    return out


def within_prompt(rewards: np.ndarray, severities: np.ndarray) -> float:
    """Mean over prompts [P, n] of Spearman's correlation of reward and minus severity; prompts without spread count 0."""
    out = []
    for r, s in zip(rewards, -severities, strict=True):
        a, b = rankdata(r), rankdata(s)
        out.append(float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0)
    return float(np.mean(out))


def own_samples(world: WorldModel, config: Critic, videos: Tensor, prompts: list[Prompt]) -> float:
    """Within-prompt Spearman on the policy's videos [P, n, T, 3, H, W]."""
    rewards, severities = [], []
    with Bar("gate: own samples", len(prompts)) as bar:
        for group, prompt in zip(videos, prompts, strict=True):
            rewards.append(critic.score(world, group, config).reward.cpu().numpy())
            severities.append([severity(measure(v.cpu().numpy(), prompt), prompt.kind) for v in group])
            bar.advance()
    return within_prompt(np.array(rewards), np.array(severities))


def verdict(found: dict, gate: Gate) -> dict:
    """``found`` with every bar beside its figure, ``failures`` in words, and ``passed``."""
    failures = []
    if found["all_kinds"] < gate.all_kinds:
        failures.append(f"over all kinds {found['all_kinds']:.1%} of pairs are ranked rightly; {gate.all_kinds:.0%} are needed")
    for kind, value in found["kinds"].items():
        if value < gate.each_kind:
            failures.append(f"{kind}: {value:.1%} of pairs are ranked rightly; {gate.each_kind:.0%} are needed")
    for control, value in found["controls"].items():
        if value < gate.each_kind:
            failures.append(f"control {control}: ranks below real in {value:.1%} of pairs; {gate.each_kind:.0%} are needed")
    if abs(found["restitution_preference"] - 0.5) > 0.1:
        failures.append(f"restitution 1.0 is preferred to 0.6 in {found['restitution_preference']:.1%} of pairs; 40-60% would be no preference")
    if "spearman" in found and found["spearman"] < gate.spearman:
        failures.append(f"on the policy's own samples reward and exact metrics correlate by {found['spearman']:.2f}; {gate.spearman:.2f} is needed")
    return {**found, "bars": dataclasses.asdict(gate), "failures": failures, "passed": not failures}


def table(result: dict) -> str:
    """The gate's table as text."""
    bars = result["bars"]
    rows = [(k, v, bars["each_kind"]) for k, v in result["kinds"].items()] + [("all kinds", result["all_kinds"], bars["all_kinds"])]
    rows += [(f"control: {k}", v, bars["each_kind"]) for k, v in result["controls"].items()]
    lines = [f"  {'matched pairs ranked rightly':32} {'found':>7} {'needed':>7}"]
    lines += [f"  {name:32} {value:7.1%} {need:7.0%}  {'' if value >= need else 'FAILS'}" for name, value, need in rows]
    fair = abs(result["restitution_preference"] - 0.5) <= 0.1
    lines.append(f"  {'restitution 1.0 over 0.6':32} {result['restitution_preference']:7.1%}  40-60%  {'' if fair else 'FAILS'}")
    if "spearman" in result:
        fine = result["spearman"] >= bars["spearman"]
        lines.append(f"  {'Spearman on own samples':32} {result['spearman']:7.2f} {bars['spearman']:7.2f}  {'' if fine else 'FAILS'}")
    return "\n".join(lines)
