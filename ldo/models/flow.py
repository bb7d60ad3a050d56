"""Flow matching: schedule, the noisy path, and stochastic steps with an exact transition density.

Convention: x_t = (1 - t) x_0 + t e with t from 1 (noise) to 0 (video); the model predicts v = e - x_0. A sampling step
goes from t to t' = t + dt, dt < 0. Estimates on the way: x_0 ~ x - t v and e ~ x + (1 - t) v.

Every stochastic sampler is a Gaussian x' = mu + s xi whose deviation s holds the step's length, so one density, one
ratio and one divergence serve them all:

    flow   sigma = eta sqrt(t / (1 - t)),  mu = x + (v + sigma^2 e / (2 t)) dt,  s = sigma sqrt(-dt)     Flow-GRPO
    dance  mu = x + (v + eta^2 e / (2 t)) dt,                                    s = eta sqrt(-dt)       DanceGRPO
    cps    s = t' sin(eta pi / 2),  mu = (1 - t') x_0 + sqrt(t'^2 - s^2) e                               Flow-CPS
    ode    mu = x + v dt,                                                        s = 0

Coefficients are Python floats in double precision; tensors are fp32 whatever the model runs in. The stock schedulers'
``step`` casts back to the model's dtype and keeps an index, either of which makes the policy ratio differ from 1.
"""

from __future__ import annotations

import math

from torch import Tensor

SAMPLERS = ("flow", "dance", "cps")
AT_ONE = 1e-3  # within this of t = 1, flow's sigma takes 1 - t' in place of 1 - t, which vanishes there


def schedule(steps: int, shift: float = 1.0) -> list[float]:
    """Times t_0 > ... > t_steps = 0, as diffusers' UniPC places them with ``use_flow_sigmas`` and ``flow_shift``.

    t_i = shift s / (1 + (shift - 1) s) with s falling linearly from 1 to 1/1000 (exclusive); t_0 is 1 - 1e-6, since
    at t = 1 the data term of some solvers divides by zero.
    """
    if steps < 1:
        raise ValueError(f"flow: {steps} sampling steps; at least 1 is needed")
    times = []
    for index in range(steps):
        s = 1 - (1 - 1 / 1000) * index / steps
        times.append(shift * s / (1 + (shift - 1) * s))
    # as diffusers does it; a schedule that differed in the last bit would sample another video
    times[0] -= 1e-6
    return [*times, 0.0]


def training_times(u: Tensor, shift: float) -> Tensor:
    """Uniform numbers in [0, 1) to times, denser toward noise as ``shift`` grows (the sampler's own spacing)."""
    return shift * u / (1 + (shift - 1) * u)


def noisy(x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t e, one t per sample [B]."""
    t = t_B.view(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise


def transition(
    x: Tensor, v: Tensor, t: float, t_next: float, sampler: str = "ode", eta: float = 0.0
) -> tuple[Tensor, float]:
    """Mean (fp32) and standard deviation of x_{t'} given x_t and the velocity; deviation 0 for the ODE.

    ``eta`` is the noise level: 0.7 for flow (Flow-GRPO), 0.25-0.3 for dance, 0.7-0.8 for cps (in [0, 1]).
    """
    if not 0 <= t_next < t <= 1:
        raise ValueError(f"flow: a step must fall within [0, 1], got {t} -> {t_next}")
    x, v, dt = x.float(), v.float(), t_next - t
    # before the samplers' coefficients, which divide by what vanishes without noise
    if sampler == "ode" or eta == 0:
        return x + v * dt, 0.0
    if sampler == "flow":
        # at t = 1 the deviation of Flow-GRPO is infinite; the first step takes that of the next time
        variance = eta**2 * t / (1 - (t if 1 - t > AT_ONE else t_next))
    elif sampler == "dance":
        variance = eta**2
    elif sampler == "cps":
        s = t_next * math.sin(eta * math.pi / 2)
        video, noise = x - t * v, x + (1 - t) * v
        return (1 - t_next) * video + math.sqrt(t_next**2 - s**2) * noise, s
    else:
        raise ValueError(f"flow: unknown sampler {sampler!r}; one of {', '.join(SAMPLERS)}")
    # x + (v + sigma^2 / (2 t) (x + (1 - t) v)) dt, with the factors of x and v gathered
    bend = variance / (2 * t) * dt
    return x * (1 + bend) + v * (dt + bend * (1 - t)), math.sqrt(variance * -dt)


def log_prob(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """Gaussian log-density per sample [B], averaged over dimensions, fp32 (a sum makes ratios overflow)."""
    log_density = -((x_next.float() - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


def divergence(mean: Tensor, mean_ref: Tensor, std: float) -> Tensor:
    """KL between two transitions of one deviation, per sample [B], averaged over dimensions.

    ``std`` contains sqrt(-dt). Implementations that divide by sigma^2 only give a KL smaller by |dt|: their weight of
    0.004 at 20 steps corresponds to about 2e-4 here.
    """
    return ((mean - mean_ref) ** 2).flatten(1).mean(1) / (2 * std**2)
