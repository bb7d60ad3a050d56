"""What can be said in numbers of paths through feature space, and of what a linear probe reads from features.

None of it depends on a picture. Shapes: N clips, T time steps, D features.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr

RIDGE_PENALTIES = (1e-2, 1e-1, 1e0, 1e1, 1e2)  # of the ridge, in units of the features' mean variance
FOLDS = 5


def turning_angles(path_NTD: np.ndarray) -> np.ndarray:
    """Mean angle [N] in degrees between successive steps of each path: 0 is straight, 90 a random walk.

    The curvature of Henaff et al., Perceptual straightening of natural videos (2019).
    """
    step = np.diff(path_NTD, axis=1)
    step = step / np.maximum(np.linalg.norm(step, axis=-1, keepdims=True), 1e-9)
    cosines = (step[:, 1:] * step[:, :-1]).sum(-1)
    return np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean(1)


def time_correlations(path_NTD: np.ndarray) -> np.ndarray:
    """Spearman's correlation [N], within each path, of the distance of features with the distance in time.

    1 where features move steadily away from where they were; a path that comes back lowers it.
    """
    count = path_NTD.shape[1]
    first, second = np.triu_indices(count, 1)
    apart = second - first
    distances = np.linalg.norm(path_NTD[:, first] - path_NTD[:, second], axis=-1)
    return np.array([spearmanr(apart, row).statistic if np.ptp(row) > 0 else 0.0 for row in distances])


def probe(features_NTD: np.ndarray, targets_NT2: np.ndarray) -> dict[str, float]:
    """How well a linear map reads ``targets`` from features: {"r2": at most 1, "error": RMS distance}.

    Ridge regression over ``FOLDS`` folds of whole clips, its penalty chosen inside each fold by the clips of the next
    one. ``error`` is in units of the targets. Deterministic: fold k holds clips k, k + FOLDS, ...
    """
    folds = [np.arange(len(features_NTD)) % FOLDS == fold for fold in range(FOLDS)]
    errors, spreads = [], []
    for fold, held_out in enumerate(folds):
        chosen = folds[(fold + 1) % FOLDS]
        fitted = ~held_out & ~chosen
        maps = _ridge(features_NTD[fitted], targets_NT2[fitted])
        best = min(maps, key=lambda found: _squares(found, features_NTD[chosen], targets_NT2[chosen]).mean())
        errors.append(_squares(best, features_NTD[held_out], targets_NT2[held_out]).ravel())
        middle = targets_NT2[fitted].mean((0, 1))
        spreads.append(np.square(targets_NT2[held_out] - middle).sum(-1).ravel())
    squared = np.concatenate(errors).mean()
    return {"r2": float(1 - squared / np.concatenate(spreads).mean()), "error": float(np.sqrt(squared))}


def _ridge(features: np.ndarray, targets: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(mean, map, offset) for each penalty, from one eigendecomposition."""
    rows, goals = features.reshape(-1, features.shape[-1]).astype(np.float64), targets.reshape(-1, targets.shape[-1])
    mean, offset = rows.mean(0), goals.mean(0)
    centred = rows - mean
    values, vectors = np.linalg.eigh(centred.T @ centred)
    projected = vectors.T @ (centred.T @ (goals - offset))
    scale = max(values.mean(), 1e-12)
    return [(mean, vectors @ (projected / (values + penalty * scale)[:, None]), offset) for penalty in RIDGE_PENALTIES]


def _squares(found: tuple[np.ndarray, np.ndarray, np.ndarray], features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    mean, linear, offset = found
    return np.square((features - mean) @ linear + offset - targets).sum(-1)
