"""The predictive residual against loops over rows, in every metric, normalisation, weighting and segmentation."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from ldo.ops import predictive_residual, residual
from ldo.ops.residual import METRICS
from tests.helpers import regions

SEGMENTS = [None, [0, 11], [0, 1, 4, 11]]


def inputs(dtype=torch.float64, rows=11, features=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, h = (torch.randn(rows, features, generator=g, dtype=torch.float64) * 2 + 0.5 for _ in range(2))
    return z.to(dtype), h.to(dtype), torch.rand(rows, generator=g, dtype=torch.float64) + 0.1


def by_loop(z, h, segments, metric, normalize_target, normalize_predicted, weight):
    def layer_norm(row):
        return (row - row.mean()) / np.sqrt(row.var() + 1e-5)

    def residual(a, b):
        if normalize_predicted:
            a = layer_norm(a)
        if normalize_target:
            b = layer_norm(b)
        if metric == "cosine":
            return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return np.mean(np.abs(a - b)) if metric == "l1" else np.mean((a - b) ** 2)

    rows = [residual(a, b) for a, b in zip(z.double().numpy(), h.double().numpy(), strict=True)]
    w = np.ones(len(rows)) if weight is None else weight.double().numpy()
    cuts = segments or [0, len(rows)]
    return [sum(w[i] * rows[i] for i in range(a, b)) / sum(w[a:b]) for a, b in pairwise(cuts)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalize_target", [True, False])
@pytest.mark.parametrize("normalize_predicted", [True, False, None])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("weighted", [True, False])
def test_value_is_the_formula(metric, normalize_target, normalize_predicted, segments, weighted):
    z, h, weight = inputs()
    options = {"metric": metric, "normalize_target": normalize_target, "normalize_predicted": normalize_predicted}
    weight = weight if weighted else None
    result = predictive_residual(
        z, h, segments=None if segments is None else torch.tensor(segments), weight_M=weight, **options
    )
    if normalize_predicted is None:
        options["normalize_predicted"] = metric == "cosine"
    np.testing.assert_allclose(result.numpy(), by_loop(z, h, segments, weight=weight, **options), rtol=1e-10)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
def test_arithmetic_is_fp32_whatever_the_input(metric, dtype, tolerance):
    z, h, weight = inputs(dtype, rows=300, features=200)
    segments = [0, 120, 121, 300]
    result = predictive_residual(
        z, h, segments=torch.tensor(segments), metric=metric, weight_M=weight.to(torch.float32)
    )
    assert result.dtype == torch.float32
    np.testing.assert_allclose(
        result.numpy(), by_loop(z, h, segments, metric, True, metric == "cosine", weight), rtol=tolerance
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalize_predicted", [True, False])
def test_gradcheck(metric, normalize_predicted):
    z, h, weight = inputs()
    options = {
        "segments": torch.tensor([0, 4, 11]),
        "metric": metric,
        "normalize_predicted": normalize_predicted,
        "weight_M": weight,
    }
    assert torch.autograd.gradcheck(lambda x: predictive_residual(x, h, **options), z.requires_grad_())


def test_gradient_reaches_the_forecast_alone():
    z, h, _ = inputs(torch.bfloat16)
    z.requires_grad_(), h.requires_grad_()
    predictive_residual(z, h).sum().backward()
    assert z.grad.dtype == torch.bfloat16 and z.grad.abs().sum() > 0 and h.grad is None


def test_row_without_weight_has_no_say():
    z, h, weight = inputs()
    weight[[1, 5]] = 0
    before = predictive_residual(z, h, weight_M=weight)
    z[[1, 5]] = 100.0
    assert torch.equal(predictive_residual(z, h, weight_M=weight), before)


@pytest.mark.parametrize("normalize", [True, False])
def test_zero_vector_has_cosine_zero(normalize):
    z, h, _ = inputs(torch.float32)
    z[:] = 0
    z.requires_grad_()
    loss = predictive_residual(z, h, normalize_predicted=normalize)
    loss.backward()
    assert loss.item() == 1 and (z.grad == 0).all()


def test_cosine_does_not_depend_on_length():
    z, h, _ = inputs(torch.float32)
    options = {"normalize_predicted": False, "normalize_target": False}
    torch.testing.assert_close(
        predictive_residual(1e-5 * z, 1e-5 * h, **options), predictive_residual(z, h, **options), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("metric, worst", [("cosine", 2.0), ("l1", None), ("l2", None)])
def test_perfect_and_opposite_forecast(metric, worst):
    _, h, _ = inputs()
    assert predictive_residual(h, h, metric=metric, normalize_predicted=True).item() == pytest.approx(0, abs=1e-12)
    opposite = predictive_residual(-h, h, metric=metric, normalize_predicted=True).item()
    assert opposite == pytest.approx(worst) if worst else opposite > 1


@pytest.mark.parametrize("inside", regions.AUTOCAST, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_autocast_changes_no_bit(metric, dtype, inside):
    z, h, weight = inputs(dtype)
    options = {"segments": torch.tensor([0, 1, 4, 11]), "metric": metric, "weight_M": weight, "impl": "reference"}
    regions.assert_same(lambda x: predictive_residual(x, h, **options), z, inside)


def test_autocast_is_off_while_it_computes(monkeypatch):
    """This holds even though the present arithmetic has nothing that autocast would round."""
    seen = []
    monkeypatch.setattr(residual, "_reference", lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    z, h, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        predictive_residual(z, h)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"predicted_MD": torch.ones(4)}, r"two equal shapes \[M, D\] expected, got \(4,\) and \(6, 3\)"),
        ({"target_MD": torch.ones(5, 3)}, r"\(6, 3\) and \(5, 3\)"),
        ({"predicted_MD": torch.ones(0, 3), "target_MD": torch.ones(0, 3)}, "two equal shapes"),
        ({"metric": "mse"}, "unknown metric 'mse'; one of cosine, l1, l2"),
        ({"impl": "cuda"}, "impl='cuda' is not available; choose auto or one of reference"),
        ({"segments": torch.tensor([0, 2, 2, 6])}, r"must rise strictly from 0 to 6, got \[0, 2, 2, 6\]"),
        ({"segments": torch.tensor([0, 4, 2, 6])}, "must rise strictly"),
        ({"segments": torch.tensor([1, 6])}, "must rise strictly from 0 to 6"),
        ({"segments": torch.tensor([0, 7])}, "must rise strictly from 0 to 6"),
        ({"weight_M": torch.ones(5)}, "weight_M must have 6 entries, got"),
        (
            {"segments": torch.tensor([0, 2, 6]), "weight_M": torch.tensor([1.0, 1, 0, 0, 0, 0])},
            "segment 1 has no weight",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        predictive_residual(**{"predicted_MD": torch.ones(6, 3), "target_MD": torch.ones(6, 3), **change})
