"""Flow matching: schedule, transitions and densities.

Held to diffusers, torch.distributions and Gaussians solved by hand.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch.distributions import Normal, kl_divergence

from ldo.models import flow


def tensors(count=3, shape=(2, 3, 4), seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 16, 20, 50])
def test_schedule_is_that_of_the_stock_scheduler(steps, shift):
    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=1000, use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
    )
    scheduler.set_timesteps(steps)
    times = flow.schedule(steps, shift)
    # to the last bit of the fp32 that the scheduler keeps
    np.testing.assert_array_equal(np.float32(times), scheduler.sigmas.numpy())
    assert times == sorted(times, reverse=True) and times[-1] == 0 and times[0] < 1


@pytest.mark.parametrize("steps", [0, -3])
def test_schedule_needs_a_step(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps; at least 1"):
        flow.schedule(steps)


def test_noisy_mixes_each_sample_by_its_own_time():
    video, noise = tensors(2)
    mixed = flow.noisy(video, noise, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(mixed[0], 0.75 * video[0] + 0.25 * noise[0])
    torch.testing.assert_close(mixed[1], noise[1])


def expected(sampler, state, velocity, time, next_time, eta):
    """Mean and deviation of a step as docs/method.md states them, term by term."""
    length = next_time - time
    video = state - time * velocity
    noise = state + (1 - time) * velocity
    if sampler == "flow":
        # at the start of the path 1 - t vanishes, and the next time takes its place
        sigma = eta * math.sqrt(time / (1 - (next_time if time > 0.999 else time)))
        of_state = 1 + sigma**2 * length / (2 * time)
        of_velocity = (1 + sigma**2 * (1 - time) / (2 * time)) * length
        return of_state * state + of_velocity * velocity, sigma * math.sqrt(-length)
    if sampler == "dance":
        return state + (velocity + eta**2 * noise / (2 * time)) * length, eta * math.sqrt(-length)
    deviation = next_time * math.sin(eta * math.pi / 2)
    return (1 - next_time) * video + math.sqrt(next_time**2 - deviation**2) * noise, deviation


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
@pytest.mark.parametrize("eta", [0.25, 0.7, 1.0])
@pytest.mark.parametrize("t, t_next", [(1.0, 0.95), (1 - 1e-6, 0.9), (0.99, 0.97), (0.5, 0.4), (0.06, 0.0)])
def test_transition_is_the_formula(sampler, eta, t, t_next):
    state, velocity, _ = tensors()
    mean, deviation = flow.transition(state, velocity, t, t_next, sampler, eta)
    true_mean, true_deviation = expected(sampler, state, velocity, t, t_next, eta)
    assert mean.dtype == torch.float32
    assert deviation == pytest.approx(true_deviation, rel=1e-12) and math.isfinite(deviation)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("sampler", ["ode", *flow.SAMPLERS])
def test_without_noise_every_sampler_is_the_ode(sampler):
    state, velocity, _ = tensors()
    mean, deviation = flow.transition(state, velocity, 0.6, 0.45, sampler, 0.0)
    assert deviation == 0
    torch.testing.assert_close(mean, (state - 0.15 * velocity).float())


def test_half_precision_input_is_stepped_in_fp32():
    state, velocity, _ = (tensor.bfloat16() for tensor in tensors())
    for sampler in ("ode", *flow.SAMPLERS):
        # bf16 arithmetic would differ from the third digit on
        mean, _ = flow.transition(state, velocity, 0.5, 0.4, sampler, 0.5)
        assert torch.equal(mean, flow.transition(state.float(), velocity.float(), 0.5, 0.4, sampler, 0.5)[0])


@pytest.mark.parametrize("t, t_next", [(0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.5, -0.1)])
def test_step_outside_the_path_is_an_error(t, t_next):
    with pytest.raises(ValueError, match=rf"within \[0, 1\], got {t} -> {t_next}"):
        flow.transition(*tensors(2), t, t_next, "flow", 0.7)


def test_unknown_sampler_is_an_error():
    with pytest.raises(ValueError, match="unknown sampler 'ddim'; one of flow, dance, cps"):
        flow.transition(*tensors(2), 0.5, 0.4, "ddim", 0.7)


@pytest.mark.parametrize("std", [1e-3, 0.2, 3.0])
def test_log_prob_is_the_normal_density_averaged(std):
    sample, mean, _ = tensors()
    sample = mean + std * sample
    density = Normal(mean, std).log_prob(sample).mean((1, 2)).float()
    torch.testing.assert_close(flow.log_prob(sample, mean, std), density, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_divergence_is_the_kl_of_normals_averaged():
    mean, other, _ = tensors()
    divergence = kl_divergence(Normal(mean, 0.2), Normal(other, 0.2)).mean((1, 2))
    torch.testing.assert_close(flow.divergence(mean, other, 0.2), divergence)


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (7, 3.0), (20, 5.0)])
def test_ode_along_a_straight_path_arrives(steps, shift):
    video, noise, _ = tensors()
    times = flow.schedule(steps, shift)
    state = flow.noisy(video, noise, torch.full((2,), times[0], dtype=torch.float64)).float()
    for time, next_time in pairwise(times):
        state, _ = flow.transition(state, noise - video, time, next_time)
    torch.testing.assert_close(state, video.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_cps_keeps_the_coefficients_of_data_and_noise(eta):
    video, noise, _ = tensors()
    time, next_time = 0.7, 0.6
    mean, deviation = flow.transition((1 - time) * video + time * noise, noise - video, time, next_time, "cps", eta)
    noise_share = math.sqrt(next_time**2 - deviation**2)
    torch.testing.assert_close(mean.double(), (1 - next_time) * video + noise_share * noise, rtol=1e-5, atol=1e-5)
    assert 0 < deviation < next_time


def sample_gaussian(sampler, eta, steps, mean, deviation, count=40_000):
    """Mean and deviation of samples of N(mean, deviation^2) drawn with its exact velocity field."""
    rng = torch.Generator().manual_seed(0)
    samples = torch.randn(count, 1, generator=rng)
    times = flow.schedule(steps)
    for time, next_time in pairwise(times):
        centred = (samples - (1 - time) * mean) / ((1 - time) ** 2 * deviation**2 + time**2)
        # E[e | x] - E[x0 | x]
        velocity = time * centred - (mean + (1 - time) * deviation**2 * centred)
        step_mean, step_deviation = flow.transition(samples, velocity, time, next_time, sampler, eta)
        samples = step_mean + step_deviation * torch.randn(count, 1, generator=rng)
    return float(samples.mean()), float(samples.std())


# CPS draws part of its noise afresh at every step, however many there are, so its spread falls a little short.
@pytest.mark.parametrize(
    "sampler, eta, tolerance",
    [("ode", 0.0, 0.01), ("flow", 0.7, 0.01), ("dance", 0.3, 0.01), ("dance", 1.0, 0.01), ("cps", 0.2, 0.02)],
)
def test_stochastic_samplers_end_in_the_data(sampler, eta, tolerance):
    mean, deviation = sample_gaussian(sampler, eta, 200, 1.5, 0.4)
    assert mean == pytest.approx(1.5, abs=tolerance) and deviation == pytest.approx(0.4, abs=tolerance)


def test_training_times_follow_the_samplers_spacing():
    uniform = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(flow.training_times(uniform, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    assert torch.equal(flow.training_times(uniform, 1.0), uniform)
