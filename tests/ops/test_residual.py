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
    generator = torch.Generator().manual_seed(seed)
    predicted, target = (
        torch.randn(rows, features, generator=generator, dtype=torch.float64) * 2 + 0.5 for _ in range(2)
    )
    return predicted.to(dtype), target.to(dtype), torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1


def by_loop(predicted, target, segments, metric, normalize_target, normalize_predicted, weight):
    """The weighted mean residual of each segment, row by row in NumPy."""

    def layer_norm(row):
        return (row - row.mean()) / np.sqrt(row.var() + 1e-5)

    def residual(forecast, truth):
        if normalize_predicted:
            forecast = layer_norm(forecast)
        if normalize_target:
            truth = layer_norm(truth)
        if metric == "cosine":
            return 1 - forecast @ truth / np.linalg.norm(forecast) / np.linalg.norm(truth)
        return np.mean(np.abs(forecast - truth)) if metric == "l1" else np.mean((forecast - truth) ** 2)

    rows = [
        residual(forecast, truth)
        for forecast, truth in zip(predicted.double().numpy(), target.double().numpy(), strict=True)
    ]
    weights = np.ones(len(rows)) if weight is None else weight.double().numpy()
    cuts = segments or [0, len(rows)]
    means = []
    for start, end in pairwise(cuts):
        total = sum(weights[row] * rows[row] for row in range(start, end))
        means.append(total / sum(weights[start:end]))
    return means


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalize_target", [True, False])
@pytest.mark.parametrize("normalize_predicted", [True, False, None])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("weighted", [True, False])
def test_value_is_the_formula(metric, normalize_target, normalize_predicted, segments, weighted):
    predicted, target, weight = inputs()
    options = {"metric": metric, "normalize_target": normalize_target, "normalize_predicted": normalize_predicted}
    weight = weight if weighted else None
    result = predictive_residual(
        predicted, target, segments=None if segments is None else torch.tensor(segments), weight_M=weight, **options
    )
    if normalize_predicted is None:
        options["normalize_predicted"] = metric == "cosine"
    np.testing.assert_allclose(
        result.numpy(), by_loop(predicted, target, segments, weight=weight, **options), rtol=1e-10
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
def test_arithmetic_is_fp32_whatever_the_input(metric, dtype, tolerance):
    predicted, target, weight = inputs(dtype, rows=300, features=200)
    segments = [0, 120, 121, 300]
    result = predictive_residual(
        predicted, target, segments=torch.tensor(segments), metric=metric, weight_M=weight.to(torch.float32)
    )
    assert result.dtype == torch.float32
    np.testing.assert_allclose(
        result.numpy(), by_loop(predicted, target, segments, metric, True, metric == "cosine", weight), rtol=tolerance
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalize_predicted", [True, False])
def test_gradcheck(metric, normalize_predicted):
    predicted, target, weight = inputs()
    options = {
        "segments": torch.tensor([0, 4, 11]),
        "metric": metric,
        "normalize_predicted": normalize_predicted,
        "weight_M": weight,
    }
    assert torch.autograd.gradcheck(
        lambda forecast: predictive_residual(forecast, target, **options), predicted.requires_grad_()
    )


def test_gradient_reaches_only_the_forecast():
    predicted, target, _ = inputs(torch.bfloat16)
    predicted.requires_grad_(), target.requires_grad_()
    predictive_residual(predicted, target).sum().backward()
    assert predicted.grad.dtype == torch.bfloat16 and predicted.grad.abs().sum() > 0 and target.grad is None


def test_row_without_weight_has_no_influence():
    predicted, target, weight = inputs()
    weight[[1, 5]] = 0
    before = predictive_residual(predicted, target, weight_M=weight)
    predicted[[1, 5]] = 100.0
    assert torch.equal(predictive_residual(predicted, target, weight_M=weight), before)


@pytest.mark.parametrize("normalize", [True, False])
def test_zero_vector_has_cosine_zero(normalize):
    predicted, target, _ = inputs(torch.float32)
    predicted[:] = 0
    predicted.requires_grad_()
    loss = predictive_residual(predicted, target, normalize_predicted=normalize)
    loss.backward()
    assert loss.item() == 1 and (predicted.grad == 0).all()


def test_cosine_does_not_depend_on_length():
    predicted, target, _ = inputs(torch.float32)
    # so short that an epsilon in the denominator would show
    options = {"normalize_predicted": False, "normalize_target": False}
    torch.testing.assert_close(
        predictive_residual(1e-5 * predicted, 1e-5 * target, **options),
        predictive_residual(predicted, target, **options),
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("metric, worst", [("cosine", 2.0), ("l1", None), ("l2", None)])
def test_perfect_and_opposite_forecast(metric, worst):
    _, target, _ = inputs()
    assert predictive_residual(target, target, metric=metric, normalize_predicted=True).item() == pytest.approx(
        0, abs=1e-12
    )
    opposite = predictive_residual(-target, target, metric=metric, normalize_predicted=True).item()
    assert opposite == pytest.approx(worst) if worst else opposite > 1


@pytest.mark.parametrize("inside", regions.AUTOCAST, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_autocast_changes_no_bit(metric, dtype, inside):
    predicted, target, weight = inputs(dtype)
    options = {"segments": torch.tensor([0, 1, 4, 11]), "metric": metric, "weight_M": weight, "impl": "reference"}
    regions.assert_same(lambda forecast: predictive_residual(forecast, target, **options), predicted, inside)


def test_autocast_is_off_while_it_computes(monkeypatch):
    """This holds even though the present arithmetic has nothing that autocast would round."""
    seen = []
    monkeypatch.setattr(residual, "_reference", lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    predicted, target, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        predictive_residual(predicted, target)
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
