"""Random generators: reproducible, independent of each other, and untouched by earlier draws."""

import numpy as np
import pytest
import torch

from ldo.core.rng import numpy_rng, torch_rng


def draw(make, *key):
    generator = make(*key)
    return generator.random(4000) if make is numpy_rng else torch.rand(4000, generator=generator).numpy()


@pytest.mark.parametrize("make", [numpy_rng, torch_rng])
def test_same_key_gives_the_same_numbers(make):
    first = draw(make, 3, "batch", 7, 1)
    # Draws in between, from another generator and the global one, must change nothing.
    draw(make, 3, "noise", 7)
    torch.rand(1)
    np.testing.assert_array_equal(draw(make, 3, "batch", 7, 1), first)


@pytest.mark.parametrize("make", [numpy_rng, torch_rng])
def test_every_part_of_the_key_counts(make):
    keys = [
        (0, "batch", 0, 0),
        (1, "batch", 0, 0),
        (0, "noise", 0, 0),
        (0, "batch", 1, 0),
        (0, "batch", 0, 1),
        (0, "batch", 1, 1),
    ]
    # Correlations and not only inequality: sequences that are shifted or scaled copies differ as well.
    correlations = np.corrcoef([draw(make, *key) for key in keys]) - np.eye(len(keys))
    # Five standard deviations at 4000 numbers.
    assert np.abs(correlations).max() < 0.08


@pytest.mark.parametrize("make", [numpy_rng, torch_rng])
def test_successive_indices_are_uniform_together(make):
    # Training draws a few numbers from each of many generators, so the first numbers must be random among themselves.
    first_numbers = [draw(make, 0, "batch", index)[0] for index in range(400)]
    assert np.histogram(first_numbers, 8, (0, 1))[0].min() > 20
    assert abs(np.corrcoef(first_numbers[:-1], first_numbers[1:])[0, 1]) < 0.2


def test_derivation_of_the_seed_does_not_change():
    # Frozen numbers: with another derivation, a resumed run would not continue with the numbers it began with.
    assert numpy_rng(0, "batch", 1).integers(1 << 30, size=3).tolist() == [380236084, 144952405, 877241036]
    assert torch_rng(0, "batch", 1).initial_seed() == 1338130393569793822


def test_torch_generator_does_not_touch_the_global_one():
    state = torch.get_rng_state()
    torch.rand(3, generator=torch_rng(0, "noise"))
    assert torch.equal(torch.get_rng_state(), state)
