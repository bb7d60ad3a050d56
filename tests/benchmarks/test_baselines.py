"""The baselines compute what the operations do: against the reference forms in fp64, values and gradients."""

from functools import partial

import pytest
import torch

from benchmarks import baselines
from ldo.ops import predictive_residual, relation_loss

FRAMES, PER_FRAME = 3, 5
PENALTIES = [
    {"margin": 0.1, "penalty": "hinge"},
    {"margin": 0.05, "penalty": "squared"},
    {"margin": 0.0, "penalty": "squared"},
]

# rows=4: panels that do not divide the 15 tokens
RELATION = {
    "dense": baselines.dense,
    "checkpoint": lambda **o: baselines.checkpointed(**o, rows=4),
    "chunk + compile": lambda **o: baselines.checkpointed(**o, rows=4, compiled=True),
    "panels": lambda **o: baselines.panels(**o, rows=4),
}


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    """torch.compile returns the function itself: the tests are about values, not about speed."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)


def inputs(b=2, n=FRAMES * PER_FRAME, d=6, e=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(b, n, d, generator=generator, dtype=torch.float64).to(dtype)
    teacher = torch.randn(b, n, e, generator=generator, dtype=torch.float64).to(dtype)
    # more than a quarter of the weights are 0, as those of observed tokens are
    weight = (torch.rand(b, n, generator=generator, dtype=torch.float64) * 1.4 - 0.4).clamp_min(0)
    return student, teacher, torch.arange(n) * FRAMES // n, weight


def value_and_gradient(loss, leaf, *rest):
    leaf = leaf.detach().clone().requires_grad_()
    result = loss(leaf, *rest)
    return result.detach(), torch.autograd.grad(result.sum(), leaf)[0]


def reference(**options):
    return lambda x, y, f, w: relation_loss(x, y, frame_N=f, weight_BN=w, impl="reference", **options)


def same(found, expected, tolerance=1e-11):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", PENALTIES, ids=str)
@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", RELATION.values(), ids=RELATION)
def test_relation(make, options, framed, weighted):
    student, teacher, frame, weight = inputs()
    rest = (teacher, frame if framed else None, weight if weighted else None)
    shares = {"spatial": 0.7, "temporal": 0.4}
    same(
        value_and_gradient(make(**options, **shares), student, *rest),
        value_and_gradient(reference(**options, **shares), student, *rest),
    )


@pytest.mark.parametrize("options", PENALTIES, ids=str)
@pytest.mark.parametrize("frames", [1, FRAMES])
def test_bmm(options, frames):
    student, teacher, *_ = inputs()
    loss = baselines.bmm(frames=frames, **options)
    expected = value_and_gradient(reference(**options), student, teacher, None, None)
    # its copies of the clip change nothing but the order of sums
    same(value_and_gradient(loss, student, teacher, None, None), expected)


def test_bmm_refuses_what_it_does_not_know():
    student, teacher, frame, weight = inputs()
    for rest in ((frame, None), (None, weight)):
        with pytest.raises(ValueError, match="neither classes of pairs nor weights"):
            baselines.bmm(frames=FRAMES, margin=0.1)(student, teacher, *rest)


def test_a_class_without_weight_contributes_nothing():
    student, teacher, frame, _ = inputs()
    # no weight in any frame
    weight = (frame == 0).double() * torch.zeros_like(student[..., 0])
    assert baselines.dense(margin=0.0, penalty="hinge")(student, teacher, frame, weight) == 0
    single_frame = torch.zeros_like(frame)
    computed = baselines.dense(margin=0.0, penalty="hinge")(student, teacher, single_frame, None)
    same([computed], [reference(margin=0.0)(student, teacher, single_frame, None)])


@pytest.mark.parametrize("options", PENALTIES, ids=str)
@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_some_rows(options, framed, weighted):
    student, teacher, frame, weight = inputs()
    rest = (teacher, frame if framed else None, weight if weighted else None)
    # in no order, and over the edges of the panels of 3
    rows = torch.tensor([7, 0, 14, 3])
    _, expected = value_and_gradient(reference(**options), student, *rest)
    same([baselines.gradient_rows(student, *rest, rows, **options, panel=3)], [expected[:, rows]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near(dtype):
    student, teacher, frame, weight = inputs(n=300, d=48, e=32, dtype=dtype)
    expected = reference(margin=0.1)(student.double(), teacher.double(), frame, weight)
    for baseline in (baselines.dense, partial(baselines.checkpointed, rows=128), partial(baselines.panels, rows=128)):
        computed = baseline(margin=0.1, penalty="hinge")(student, teacher, frame, weight)
        assert computed.dtype == torch.float32
        torch.testing.assert_close(computed.double(), expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
@pytest.mark.parametrize("length", [1, 4, 12])
def test_residual(metric, length):
    generator = torch.Generator().manual_seed(1)
    predicted, target = (torch.randn(12, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    segments = torch.arange(0, 13, length)
    ours = partial(predictive_residual, segments=segments, metric=metric, impl="reference")
    expected = value_and_gradient(ours, predicted, target)
    for widen in (True, False):
        baseline = partial(baselines.residual, segments=segments, metric=metric, widen=widen)
        same(value_and_gradient(baseline, predicted, target), expected)


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
def test_residual_without_widening_stays_near(metric):
    generator = torch.Generator().manual_seed(1)
    predicted, target = (torch.randn(64, 256, generator=generator).bfloat16() for _ in range(2))
    segments = torch.arange(0, 65, 16)
    computed = baselines.residual(predicted, target, segments, metric=metric, widen=False)
    assert computed.dtype == torch.float32
    widened = baselines.residual(predicted, target, segments, metric=metric)
    torch.testing.assert_close(computed, widened, rtol=1e-2, atol=0)


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
def test_exact_rows_of_the_residual_benchmark(metric):
    from benchmarks import bench_residual

    generator = torch.Generator().manual_seed(1)
    predicted, target = (torch.randn(12, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    segments, rows = torch.arange(0, 13, 4), torch.tensor([11, 2, 5])
    _, gradient = value_and_gradient(lambda x: baselines.residual(x, target, segments, metric=metric), predicted)
    same([bench_residual.exact_rows(predicted, target, segments, rows, metric)], [gradient[rows]])
