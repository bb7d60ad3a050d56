"""The clipped surrogate: every form against the formula written out, its gradient, and what it refuses."""

import pytest
import torch

from ldo.ops import grpo_surrogate
from tests.helpers import forms, regions

FIELDS = ("total", "policy", "divergence", "ratio", "clipped")


def draw(samples=5, steps=3, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    logp, old, away = (torch.randn(samples, steps, generator=generator, dtype=torch.float64) for _ in range(3))
    advantage = torch.randn(samples, generator=generator, dtype=torch.float64)
    # ratios within a few per cent of 1, so that the clips of these tests bind some and not others
    given = (old + 0.05 * logp, old, advantage, away.abs())
    return tuple(tensor.to(device, dtype) for tensor in given)


def by_hand(logp, old, advantage, away, clip, weight, kl):
    """Total, policy and clipped share, element by element in Python floats."""
    samples, steps = logp.shape
    total = policy = clipped = 0.0
    for sample in range(samples):
        for step in range(steps):
            ratio, gain = float((logp[sample, step] - old[sample, step]).exp()), float(advantage[sample])
            # the larger loss counts: clipping never makes a sample look better
            free, held = -gain * ratio, -gain * min(max(ratio, 1 - clip), 1 + clip)
            policy += max(free, held) / (samples * steps)
            total += float(weight[step]) * max(free, held) / (samples * steps)
            clipped += (held > free) / (samples * steps)
    return total + kl * float(away.mean()), policy, clipped


@pytest.mark.parametrize("form", forms.ALL)
def test_value_is_the_formula(form):
    logp, old, advantage, away = draw(device=forms.device_of(form))
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    found = grpo_surrogate(logp, old, advantage, away, clip=0.02, weight=weight.to(logp.device), kl=0.3, impl=form)
    total, policy, clipped = by_hand(*(tensor.cpu() for tensor in (logp, old, advantage, away)), 0.02, weight, 0.3)
    assert 0 < clipped < 1
    assert [float(getattr(found, field)) for field in ("total", "policy", "clipped")] == pytest.approx(
        [total, policy, clipped], rel=1e-12
    )
    assert torch.allclose(found.ratio, (logp - old).exp(), rtol=1e-14) and torch.isclose(found.divergence, away.mean())


@pytest.mark.parametrize("form", forms.NATIVE)
@pytest.mark.parametrize("samples, steps", [(1, 1), (16, 1), (7, 4), (1024, 1), (683, 3), (5000, 2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_extension_gives_what_the_reference_gives_in_fp64(form, samples, steps, weighted):
    """Values and gradients, also of ``policy`` and of the ratios. In fp32 they are as close to fp64 as fp32 can be."""
    device = forms.device_of(form)
    inputs = draw(samples, steps, device=device, seed=samples)
    weight = torch.linspace(0.5, 2, steps, dtype=torch.float64, device=device) if weighted else 1.7

    def run(dtype, impl):
        logp, old, advantage, away = (tensor.to(dtype).requires_grad_() for tensor in inputs)
        found = grpo_surrogate(logp, old, advantage, away, clip=0.03, weight=weight, kl=0.4, impl=impl)
        grads = torch.autograd.grad(
            found.total + 0.3 * found.policy + 0.2 * found.divergence + (found.ratio**2).mean(), (logp, away)
        )
        return [getattr(found, field).detach() for field in FIELDS] + list(grads)

    exact = run(torch.float64, "reference")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for name, ours, theirs in zip((*FIELDS, "logp.grad", "divergence.grad"), run(dtype, form), exact, strict=True):
            if name == "clipped" and dtype == torch.float32:
                continue  # a ratio at the very edge may round to either side
            scale = theirs.abs().max().clamp_min(1e-3)
            assert ours.dtype == dtype and float(((ours - theirs).abs() / scale).max()) < tolerance, name


@pytest.mark.parametrize("form", forms.ALL)
def test_ratio_is_exactly_one_where_nothing_changed(form):
    logp, _, advantage, _ = draw(dtype=torch.float32, device=forms.device_of(form))
    found = grpo_surrogate(logp.requires_grad_(), logp.detach().clone(), advantage, clip=1e-3, impl=form)
    assert (found.ratio == 1).all() and found.clipped == 0
    found.total.backward()
    # a tie of the two forms loses no gradient
    assert torch.allclose(logp.grad, -advantage[:, None].expand(5, 3) / 15)


@pytest.mark.parametrize("form", forms.ALL)
def test_one_step_may_be_flat_and_old_may_be_missing(form):
    device = forms.device_of(form)
    logp, _, advantage, _ = draw(steps=1, device=device)
    flat = grpo_surrogate(logp[:, 0], None, advantage, clip=0.1, weight=2.0, impl=form)
    square = grpo_surrogate(logp, torch.zeros_like(logp), advantage, clip=0.1, weight=2.0, impl=form)
    assert (
        flat.ratio.shape == (5,)
        and torch.equal(flat.total, square.total)
        and torch.equal(flat.ratio, square.ratio[:, 0])
    )
    assert torch.equal(flat.total, 2 * flat.policy) and flat.divergence == 0


@pytest.mark.parametrize("form", forms.ALL)
def test_a_log_prob_that_is_not_finite_is_not_hidden(form):
    logp, old, advantage, away = draw(device=forms.device_of(form))
    logp[2, 1] = float("nan")
    found = grpo_surrogate(logp, old, advantage, away, clip=0.1, impl=form)
    assert found.total.isnan() and found.policy.isnan() and found.ratio.isnan().sum() == 1


@pytest.mark.parametrize("form", forms.ALL)
def test_strides_do_not_matter(form):
    inputs = draw(6, 3, device=forms.device_of(form))
    strided = [torch.stack([tensor, -tensor], -1)[..., 0].detach() for tensor in inputs]
    assert not any(tensor.is_contiguous() for tensor in strided)
    plain, spread = (grpo_surrogate(*given, clip=0.02, kl=0.1, impl=form) for given in (inputs, strided))
    assert all(torch.equal(getattr(plain, field), getattr(spread, field)) for field in FIELDS)


@pytest.mark.parametrize("inside", regions.AUTOCAST, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", forms.ALL)
def test_autocast_changes_no_bit(form, dtype, inside):
    logp, old, advantage, away = draw(dtype=dtype, device=forms.device_of(form))
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=dtype, device=logp.device)
    for field in ("total", "policy", "ratio"):
        options = {"clip": 0.02, "weight": weight, "kl": 0.3, "impl": form}
        regions.assert_same(
            lambda argument, field=field, options=options: getattr(
                grpo_surrogate(argument, old, advantage, away, **options), field
            ),
            logp,
            inside,
        )


def test_on_the_cpu_auto_is_the_reference():
    """A run's numbers are the same with and without a compiler."""
    inputs = draw(16, 1, dtype=torch.float32)
    chosen, reference = (grpo_surrogate(*inputs, clip=0.02, kl=0.1, impl=impl) for impl in ("auto", "reference"))
    assert all(torch.equal(getattr(chosen, field), getattr(reference, field)) for field in FIELDS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: torch.zeros(2, 3, 1)}, r"logp \[N, S\] and advantage \[N\] expected, got \(2, 3, 1\)"),
        ({2: torch.zeros(4)}, r"got \(5, 3\) and \(4,\)"),
        ({1: torch.zeros(5, 2)}, r"logp_old must have the shape of logp, \(5, 3\), got \(5, 2\)"),
        ({3: torch.zeros(5)}, r"divergence must have the shape of logp"),
        ({0: torch.zeros(5, 3, dtype=torch.bfloat16)}, "must be float32 or float64, got torch.bfloat16"),
        ({"weight": torch.zeros(2)}, r"one of each step, \(3,\), expected, got \(2,\)"),
        ({"impl": "triton"}, "impl='triton' is not available"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = [change.get(position, tensor) for position, tensor in enumerate(draw())]
    with pytest.raises(ValueError, match=message):
        grpo_surrogate(*inputs, clip=0.1, **{name: value for name, value in change.items() if isinstance(name, str)})
