"""Random generators: reproducible, apart from each other, and untouched by what was drawn before."""

import numpy as np
import pytest
import torch

from ldo.rng import numpy_rng, torch_rng


def draw(make, *key):
    rng = make(*key)
    return rng.random(4000) if make is numpy_rng else torch.rand(4000, generator=rng).numpy()


@pytest.mark.parametrize("make", [numpy_rng, torch_rng])
def test_same_key_gives_the_same_numbers(make):
    first = draw(make, 3, "batch", 7, 1)
    draw(make, 3, "noise", 7)
    torch.rand(1)
    np.testing.assert_array_equal(draw(make, 3, "batch", 7, 1), first)


@pytest.mark.parametrize("make", [numpy_rng, torch_rng])
def test_every_part_of_the_key_counts(make):
    keys = [(0, "batch", 0, 0), (1, "batch", 0, 0), (0, "noise", 0, 0), (0, "batch", 1, 0), (0, "batch", 0, 1), (0, "batch", 1, 1)]
    apart = np.corrcoef([draw(make, *key) for key in keys]) - np.eye(len(keys))
    assert np.abs(apart).max() < 0.08  # five deviations at 4000 numbers


@pytest.mark.parametrize("make", [numpy_rng, torch_rng])
def test_successive_indices_are_uniform_together(make):
    first = [draw(make, 0, "batch", i)[0] for i in range(400)]
    assert np.histogram(first, 8, (0, 1))[0].min() > 20 and abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.2


def test_derivation_of_the_seed_does_not_change():
    assert numpy_rng(0, "batch", 1).integers(1 << 30, size=3).tolist() == [380236084, 144952405, 877241036]
    assert torch_rng(0, "batch", 1).initial_seed() == 1338130393569793822


def test_torch_generator_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    torch.rand(3, generator=torch_rng(0, "noise"))
    assert torch.equal(torch.get_rng_state(), state)
