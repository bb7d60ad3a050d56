"""Flow matching: schedule, transitions and densities against diffusers, torch.distributions and Gaussians solved by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch.distributions import Normal, kl_divergence

from ldo import flow


def tensors(count=3, shape=(2, 3, 4), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 16, 20, 50])
def test_schedule_is_that_of_the_stock_scheduler(steps, shift):
    scheduler = UniPCMultistepScheduler(num_train_timesteps=1000, use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")
    scheduler.set_timesteps(steps)
    times = flow.schedule(steps, shift)
    np.testing.assert_array_equal(np.float32(times), scheduler.sigmas.numpy())
    assert times == sorted(times, reverse=True) and times[-1] == 0 and times[0] < 1


@pytest.mark.parametrize("steps", [0, -3])
def test_schedule_needs_a_step(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps; at least 1"):
        flow.schedule(steps)


def test_noisy_mixes_each_sample_by_its_own_time():
    x0, e = tensors(2)
    x = flow.noisy(x0, e, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(x[0], 0.75 * x0[0] + 0.25 * e[0])
    torch.testing.assert_close(x[1], e[1])


def expected(sampler, x, v, t, t_next, eta):
    """METHOD.md section 4, term by term: mean and deviation."""
    dt = t_next - t
    noise = x + (1 - t) * v
    if sampler == "flow":
        sigma = eta * math.sqrt(t / (1 - (t_next if t > 0.999 else t)))
        mu = x * (1 + sigma**2 * dt / (2 * t)) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
        return mu, sigma * math.sqrt(-dt)
    if sampler == "dance":
        return x + (v + eta**2 * noise / (2 * t)) * dt, eta * math.sqrt(-dt)
    s = t_next * math.sin(eta * math.pi / 2)
    return (1 - t_next) * (x - t * v) + math.sqrt(t_next**2 - s**2) * noise, s


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
@pytest.mark.parametrize("eta", [0.25, 0.7, 1.0])
@pytest.mark.parametrize("t, t_next", [(1.0, 0.95), (1 - 1e-6, 0.9), (0.99, 0.97), (0.5, 0.4), (0.06, 0.0)])
def test_transition_is_the_formula(sampler, eta, t, t_next):
    x, v, _ = tensors()
    mean, std = flow.transition(x, v, t, t_next, sampler, eta)
    mu, s = expected(sampler, x, v, t, t_next, eta)
    assert mean.dtype == torch.float32 and std == pytest.approx(s, rel=1e-12) and math.isfinite(std)
    torch.testing.assert_close(mean.double(), mu, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("sampler", ["ode", *flow.SAMPLERS])
def test_without_noise_every_sampler_is_the_ode(sampler):
    x, v, _ = tensors()
    mean, std = flow.transition(x, v, 0.6, 0.45, sampler, 0.0)
    assert std == 0
    torch.testing.assert_close(mean, (x - 0.15 * v).float())


def test_half_precision_input_is_stepped_in_fp32():
    x, v, _ = (t.bfloat16() for t in tensors())
    for sampler in ("ode", *flow.SAMPLERS):
        mean, _ = flow.transition(x, v, 0.5, 0.4, sampler, 0.5)
        assert torch.equal(mean, flow.transition(x.float(), v.float(), 0.5, 0.4, sampler, 0.5)[0])


@pytest.mark.parametrize("t, t_next", [(0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.5, -0.1)])
def test_step_outside_the_path_is_an_error(t, t_next):
    with pytest.raises(ValueError, match=rf"within \[0, 1\], got {t} -> {t_next}"):
        flow.transition(*tensors(2), t, t_next, "flow", 0.7)


def test_unknown_sampler_is_an_error():
    with pytest.raises(ValueError, match="unknown sampler 'ddim'; one of flow, dance, cps"):
        flow.transition(*tensors(2), 0.5, 0.4, "ddim", 0.7)


@pytest.mark.parametrize("std", [1e-3, 0.2, 3.0])
def test_log_prob_is_the_normal_density_averaged(std):
    x, mean, _ = tensors()
    x = mean + std * x
    torch.testing.assert_close(
        flow.log_prob(x, mean, std), Normal(mean, std).log_prob(x).mean((1, 2)).float(), rtol=1e-4, atol=1e-5, check_dtype=False
    )


def test_divergence_is_the_kl_of_normals_averaged():
    mean, other, _ = tensors()
    kl = kl_divergence(Normal(mean, 0.2), Normal(other, 0.2)).mean((1, 2))
    torch.testing.assert_close(flow.divergence(mean, other, 0.2), kl)


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (7, 3.0), (20, 5.0)])
def test_ode_along_a_straight_path_arrives(steps, shift):
    x0, noise, _ = tensors()
    times = flow.schedule(steps, shift)
    x = flow.noisy(x0, noise, torch.full((2,), times[0], dtype=torch.float64)).float()
    for t, t_next in pairwise(times):
        x, _ = flow.transition(x, noise - x0, t, t_next)
    torch.testing.assert_close(x, x0.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_cps_keeps_the_coefficients_of_data_and_noise(eta):
    x0, e, _ = tensors()
    t, t_next = 0.7, 0.6
    mean, std = flow.transition((1 - t) * x0 + t * e, e - x0, t, t_next, "cps", eta)
    share_of_noise = math.sqrt(t_next**2 - std**2)
    torch.testing.assert_close(mean.double(), (1 - t_next) * x0 + share_of_noise * e, rtol=1e-5, atol=1e-5)
    assert 0 < std < t_next


def sample_gaussian(sampler, eta, steps, mean, std, count=40_000):
    """Samples of N(mean, std^2) drawn with its exact velocity field."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, generator=g)
    times = flow.schedule(steps)
    for t, t_next in pairwise(times):
        centred = (x - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
        velocity = t * centred - (mean + (1 - t) * std**2 * centred)  # E[e | x] - E[x0 | x]
        mu, s = flow.transition(x, velocity, t, t_next, sampler, eta)
        x = mu + s * torch.randn(count, 1, generator=g)
    return float(x.mean()), float(x.std())


# CPS draws part of its noise afresh at every step, however many there are, so its spread falls a little short.
@pytest.mark.parametrize(
    "sampler, eta, tolerance", [("ode", 0.0, 0.01), ("flow", 0.7, 0.01), ("dance", 0.3, 0.01), ("dance", 1.0, 0.01), ("cps", 0.2, 0.02)]
)
def test_stochastic_samplers_end_in_the_data(sampler, eta, tolerance):
    mean, std = sample_gaussian(sampler, eta, 200, 1.5, 0.4)
    assert mean == pytest.approx(1.5, abs=tolerance) and std == pytest.approx(0.4, abs=tolerance)


def test_training_times_follow_the_samplers_spacing():
    u = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(flow.training_times(u, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    assert torch.equal(flow.training_times(u, 1.0), u)
