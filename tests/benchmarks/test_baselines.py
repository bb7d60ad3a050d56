"""The baselines compute what the operations do: against the reference forms in fp64, values and gradients."""

from functools import partial

import pytest
import torch

from benchmarks import baselines
from ldo.ops import predictive_residual, relation_loss

FRAMES, PER_FRAME = 3, 5
PENALTIES = [{"margin": 0.1, "penalty": "hinge"}, {"margin": 0.05, "penalty": "squared"}, {"margin": 0.0, "penalty": "squared"}]

RELATION = {
    "dense": baselines.dense,
    "checkpoint": lambda **o: baselines.checkpointed(**o, rows=4),
    "chunk + compile": lambda **o: baselines.checkpointed(**o, rows=4, compiled=True),
    "panels": lambda **o: baselines.panels(**o, rows=4),
}


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    """torch.compile runs the same code here: what it computes is at stake, not how fast."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)


def inputs(b=2, n=FRAMES * PER_FRAME, d=6, e=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(b, n, k, generator=g, dtype=torch.float64).to(dtype) for k in (d, e))
    weight = (torch.rand(b, n, generator=g, dtype=torch.float64) * 1.4 - 0.4).clamp_min(0)
    return x, y, torch.arange(n) * FRAMES // n, weight


def value_and_gradient(loss, x, *rest):
    x = x.detach().clone().requires_grad_()
    value = loss(x, *rest)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def reference(**options):
    return lambda x, y, f, w: relation_loss(x, y, frame_N=f, weight_BN=w, impl="reference", **options)


def same(found, expected, tolerance=1e-11):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", PENALTIES, ids=str)
@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", RELATION.values(), ids=RELATION)
def test_relation(make, options, framed, weighted):
    x, y, frame, weight = inputs()
    rest = (y, frame if framed else None, weight if weighted else None)
    shares = {"spatial": 0.7, "temporal": 0.4}
    same(value_and_gradient(make(**options, **shares), x, *rest), value_and_gradient(reference(**options, **shares), x, *rest))


@pytest.mark.parametrize("options", PENALTIES, ids=str)
@pytest.mark.parametrize("frames", [1, FRAMES])
def test_bmm(options, frames):
    x, y, *_ = inputs()
    loss = baselines.bmm(frames=frames, **options)
    same(value_and_gradient(loss, x, y, None, None), value_and_gradient(reference(**options), x, y, None, None))


def test_bmm_refuses_what_it_does_not_know():
    x, y, frame, weight = inputs()
    for rest in ((frame, None), (None, weight)):
        with pytest.raises(ValueError, match="neither classes of pairs nor weights"):
            baselines.bmm(frames=FRAMES, margin=0.1)(x, y, *rest)


def test_a_class_without_weight_contributes_nothing():
    x, y, frame, _ = inputs()
    weight = (frame == 0).double() * torch.zeros_like(x[..., 0])
    assert baselines.dense(margin=0.0, penalty="hinge")(x, y, frame, weight) == 0
    one = torch.zeros_like(frame)
    same([baselines.dense(margin=0.0, penalty="hinge")(x, y, one, None)], [reference(margin=0.0)(x, y, one, None)])


@pytest.mark.parametrize("options", PENALTIES, ids=str)
@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_some_rows(options, framed, weighted):
    x, y, frame, weight = inputs()
    rest = (y, frame if framed else None, weight if weighted else None)
    rows = torch.tensor([7, 0, 14, 3])
    _, expected = value_and_gradient(reference(**options), x, *rest)
    same([baselines.gradient_rows(x, *rest, rows, **options, panel=3)], [expected[:, rows]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near(dtype):
    x, y, frame, weight = inputs(n=300, d=48, e=32, dtype=dtype)
    makes = (baselines.dense, partial(baselines.checkpointed, rows=128), partial(baselines.panels, rows=128))
    for loss in (make(margin=0.1, penalty="hinge") for make in makes):
        found = loss(x, y, frame, weight)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), reference(margin=0.1)(x.double(), y.double(), frame, weight), rtol=2e-2, atol=0)


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
@pytest.mark.parametrize("length", [1, 4, 12])
def test_residual(metric, length):
    g = torch.Generator().manual_seed(1)
    z, h = (torch.randn(12, 7, generator=g, dtype=torch.float64) for _ in range(2))
    cuts = torch.arange(0, 13, length)
    expected = value_and_gradient(lambda x: predictive_residual(x, h, segments=cuts, metric=metric, impl="reference"), z)
    for widen in (True, False):
        same(value_and_gradient(lambda x, widen=widen: baselines.residual(x, h, cuts, metric=metric, widen=widen), z), expected)


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
def test_residual_without_widening_stays_near(metric):
    g = torch.Generator().manual_seed(1)
    z, h = (torch.randn(64, 256, generator=g).bfloat16() for _ in range(2))
    cuts = torch.arange(0, 65, 16)
    found = baselines.residual(z, h, cuts, metric=metric, widen=False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, baselines.residual(z, h, cuts, metric=metric), rtol=1e-2, atol=0)


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
def test_exact_rows_of_the_residual_benchmark(metric):
    from benchmarks import bench_residual

    g = torch.Generator().manual_seed(1)
    z, h = (torch.randn(12, 7, generator=g, dtype=torch.float64) for _ in range(2))
    cuts, rows = torch.arange(0, 13, 4), torch.tensor([11, 2, 5])
    _, gradient = value_and_gradient(lambda x: baselines.residual(x, h, cuts, metric=metric), z)
    same([bench_residual.exact_rows(z, h, cuts, rows, metric)], [gradient[rows]])
