"""Every family seen as a flow: with a perfect network the samplers end in the data, with the densities they report."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ldo.method.rollout import SamplingPlan, draw_step_noise, policy_step, sample_videos
from tests.helpers.families import PROMPTS, latents


class Oracle(nn.Module):
    """Stands in for a transformer.

    It answers, by the family's own rule, what a perfect one would for Gaussian data x_0 ~ N(0, scale^2).
    """

    def __init__(self, model, answer: Callable):
        super().__init__()
        self.config, self.answer, self.dtype = model.transformer.config, answer, torch.float32

    def forward(self, hidden_states, timestep, **arguments):
        return (self.answer(hidden_states, timestep),)


def use_oracle(model, scale):
    """Replace the transformers by perfect ones."""
    if model.family == "cogvideox":
        alphas = model.pipeline.scheduler.alphas_cumprod.double()

        def answer(z, step):
            """E[a e - s x_0 | z] with z = a x_0 + s e."""
            a = alphas.sqrt()[step].view(-1, 1, 1, 1, 1)
            s = (1 - alphas).sqrt()[step].view(-1, 1, 1, 1, 1)
            return ((a * s - s * a * scale**2) * z / (a**2 * scale**2 + s**2)).float()
    else:

        def answer(x, timestep):
            """E[e - x_0 | x] with x = (1 - t) x_0 + t e."""
            # Wan2.2's 5B takes a time for every token
            per_sample = timestep if timestep.ndim == 1 else timestep[:, 0]
            t = per_sample.double().view(-1, *[1] * (x.ndim - 1)) / 1000
            return ((t - (1 - t) * scale**2) * x / ((1 - t) ** 2 * scale**2 + t**2)).float()

    for name in model.transformers:
        model.transformers[name] = Oracle(model, answer)


@pytest.mark.parametrize("sampler", ["ode", "flow", "dance", "cps"])
def test_samplers_end_in_the_data_with_the_densities_that_they_report(model, sampler):
    """Every sampler keeps to x_t's true deviation, and log_prob is the normal density of each step.

    cps does so for data that is one video: its noise does not vanish with the step, as an SDE's does.
    """
    scale = 0.5 if sampler != "cps" else 1e-3
    use_oracle(model, scale)
    text, null_text = model.encode_text(PROMPTS[:1]), model.encode_text([""])
    shape = latents(model).shape[1:]
    # so many videos that a deviation is known to half a per cent
    count = 60000 // shape.numel()
    rng = torch.Generator().manual_seed(3)
    noise = torch.randn((count, *shape), generator=rng)
    steps = 500
    window = tuple(range(steps - 1)) if sampler != "ode" else ()
    plan = SamplingPlan(tuple(model.times(steps, shape)), window, sampler, 0.3, 1.0)
    texts = text.expand(count)
    step_noise = draw_step_noise(noise.shape, len(window), rng)
    rollout = sample_videos(model, noise, texts, null_text, plan, step_noise, count)

    def true_deviation(time):
        return ((1 - time) ** 2 * scale**2 + time**2) ** 0.5

    # the last step, always the ODE's, ends in E[x_0 | x_t]
    last = plan.times[-2]
    expected = (1 - last) * scale**2 / true_deviation(last)
    assert sampler == "cps" or abs(float(rollout.final_N.std()) / expected - 1) < 0.02
    for step in range(0, len(window), steps // 5):
        before, after = rollout.x_SN[step], rollout.next_SN[step]
        mean, deviation = policy_step(model, before, window[step], plan, texts, null_text)
        density = torch.distributions.Normal(mean.double(), deviation).log_prob(after.double()).flatten(1).mean(1)
        assert torch.allclose(rollout.logp_SN[step].double(), density, atol=1e-5)
        assert abs(float(before.std()) / true_deviation(plan.times[step]) - 1) < 0.02
        # the noise has the deviation that the density says
        pushed = (after - mean) / deviation
        assert abs(float(pushed.std()) - 1) < 0.02


def test_training_times_are_times_of_the_model(model):
    shape = latents(model).shape[1:]
    uniform = torch.linspace(0, 0.999, 2000)
    times = model.training_times(uniform, shape)
    assert times.min() >= 0 and times.max() <= 1 and (times.diff() >= 0).all()
    if model.family == "cogvideox":
        table = {float(time) for time in times}
        assert len(table) == 1000
        for sampled in model.times(8, shape)[:-1]:
            assert min(abs(sampled - time) for time in table) < 1e-6
    else:
        shift = model.shift(shape)
        assert torch.allclose(times, shift * uniform / (1 + (shift - 1) * uniform)) and shift > 1
