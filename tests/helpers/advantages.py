"""What the tests of the extension's group advantage share: groups of given sizes, and the comparison of two calls."""

import torch


def draw(sizes, kinds=2, dtype=torch.float32, device="cpu", shuffle=False, seed=0):
    """Rewards [N, r] and ids [N] of groups of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.arange(len(sizes)) * 7 - 3, torch.tensor(sizes))
    rewards = (torch.randn(len(ids), kinds, generator=generator, dtype=torch.float64) * 3 + 2).to(dtype)
    if shuffle:
        order = torch.randperm(len(ids), generator=generator)
        ids, rewards = ids[order], rewards[order]
    return rewards.to(device), ids.to(device)


def close(found, expected, tolerance):
    """Assert that advantages and statistics of two calls agree within ``tolerance``, relative and absolute.

    It is absolute too, since equal rewards leave a rounding error of 1e-16 in the spread.
    """
    ours = (found[0], *vars(found[1]).values())
    theirs = (expected[0], *vars(expected[1]).values())
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        assert torch.allclose(mine.double(), other.double(), rtol=tolerance, atol=tolerance)
