"""The Triton residual against the reference: by its error against fp64, bit for bit, and in odd shapes.

Without a GPU, Triton interprets the kernels, which shows what they compute.
"""

import pytest
import torch

pytest.importorskip("triton")

from ldo.kernels import residual, residual_launch, residual_rows
from ldo.ops import predictive_residual
from ldo.ops.residual import METRICS
from tests.helpers import regions
from tests.helpers.residuals import DEVICE, DTYPES, NORMALISATIONS, assert_no_worse, cuts, inputs, solve


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalised", NORMALISATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_the_references(metric, normalised, dtype):
    predicted, target, weight = inputs(37, 97, dtype)
    for segments in cuts(37):
        for given in (None, weight):
            normalize_predicted, normalize_target = normalised
            assert_no_worse(
                predicted,
                target,
                segments=segments,
                weight_M=given,
                metric=metric,
                normalize_predicted=normalize_predicted,
                normalize_target=normalize_target,
            )


@pytest.mark.parametrize("features", [1, 7, 97, 130, 1024, 1408])
@pytest.mark.parametrize("rows", [1, 5, 37, 130])
def test_odd_shapes(rows, features):
    for metric, dtype in zip(METRICS, DTYPES, strict=True):
        predicted, target, weight = inputs(rows, features, dtype)
        assert_no_worse(predicted, target, segments=cuts(rows)[2], weight_M=weight, metric=metric)


@pytest.mark.parametrize("segments", [None, [0, 9000], [0, 1, 8700, 9000]])
def test_long_segments_are_summed_in_slices(segments, monkeypatch):
    assert residual.SLICE < 8699
    # few steps for the interpreter
    monkeypatch.setattr(residual_launch, "tile", lambda features, bare: (2048, 16, 4))
    predicted, target, weight = inputs(9000, 3)
    segments = None if segments is None else torch.tensor(segments)
    for given in (None, weight):
        assert_no_worse(predicted, target, segments=segments, weight_M=given, metric="l2", normalize_target=False)


@pytest.mark.parametrize("rows", [16, 17, 130])
def test_every_way_to_slice(rows, monkeypatch):
    """Slices, segments and tiles whose borders fall together, or one apart."""
    monkeypatch.setattr(residual, "SLICE", 16)
    predicted, target, weight = inputs(rows, 5)
    options = {"metric": "l1", "normalize_target": False}
    for segments in (
        None,
        [0, rows],
        [0, 15, rows],
        [0, 1, 2, rows],
        [*range(0, rows - 1, 2), rows],
        [0, *range(rows - 9, rows + 1)],
    ):
        for given in (None, weight):
            assert_no_worse(
                predicted,
                target,
                segments=None if segments is None else torch.tensor(segments),
                weight_M=given,
                **options,
            )


@pytest.mark.parametrize("metric", METRICS)
def test_nearly_perfect_forecast(metric):
    """Where prediction and target cancel, their difference is about as accurate as in the reference.

    Only about: autograd of the layer norm wipes out rounding along the prediction, which changes only its length.
    """
    target, noise, _ = inputs(37, 384)
    options = {"metric": metric, "normalize_predicted": metric == "cosine", "normalize_target": metric == "cosine"}
    for size in (1e-1, 1e-3):
        assert_no_worse(target + size * noise, target, factor=2.5, segments=torch.arange(38), **options)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalised", NORMALISATIONS)
def test_zero_rows(metric, normalised):
    for dtype in DTYPES:
        predicted, target, _ = inputs(6, 33, dtype)
        predicted[[0, 2]] = 0
        target[[1, 2]] = 0
        options = {
            "metric": metric,
            "normalize_predicted": normalised[0],
            "normalize_target": normalised[1],
            "segments": torch.arange(7),
        }
        assert_no_worse(predicted, target, **options)
        if metric == "cosine":
            out, gradient = solve("triton", predicted, target, **options)
            assert (out[:3] == 1).all() and (gradient[:3] == 0).all() and (gradient[3:] != 0).any(1).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalised", NORMALISATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_far_as_in_the_reference(metric, normalised, value):
    predicted, target, weight = inputs(9, 33)
    predicted[1, 4] = value
    target[3, 7] = value
    weight[6] = float("nan")
    for segments in (torch.tensor([0, 2, 4, 6, 9]), torch.arange(10)):
        weight[3] = len(segments) == 10  # in a segment of several rows weight 0 does not hide it
        options = {"metric": metric, "normalize_predicted": normalised[0], "normalize_target": normalised[1]}
        options |= {"segments": segments, "weight_M": weight}
        for ours, theirs in zip(
            solve("triton", predicted, target, **options), solve("reference", predicted, target, **options), strict=True
        ):
            # from an infinity, one form may make NaN where the other keeps infinity
            if value != value:
                assert torch.equal(ours.isnan(), theirs.isnan()) and theirs.isnan().any()
            assert torch.equal(ours.isfinite(), theirs.isfinite()) and not theirs.isfinite().all()
            torch.testing.assert_close(ours[theirs.isfinite()], theirs[theirs.isfinite()])


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_is_read_that_was_not_written(metric, monkeypatch):
    predicted, target, weight = inputs(37, 97)
    empty = torch.empty
    monkeypatch.setattr(residual, "SLICE", 16)
    for segments in [*cuts(37), torch.tensor([0, 37])]:
        options = {"segments": segments, "weight_M": weight, "metric": metric}
        clean = solve("triton", predicted, target, **options)
        # new memory is poisoned: what is read before it is written shows in the results
        with monkeypatch.context() as patch:
            patch.setattr(
                torch,
                "empty",
                lambda *arguments, **keywords: empty(*arguments, **keywords).fill_(
                    float("nan") if keywords["dtype"].is_floating_point else -1
                ),
            )
            poisoned = solve("triton", predicted, target, **options)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_repeats_bit_for_bit(metric):
    predicted, target, weight = inputs(300, 40, torch.bfloat16)
    options = {"metric": metric, "weight_M": weight, "segments": torch.tensor([0, 3, 290, 300])}
    first, second = solve("triton", predicted, target, **options), solve("triton", predicted, target, **options)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_of_the_inputs_does_not_matter(dtype):
    predicted, target, weight = inputs(37, 40, dtype)
    options = {"segments": torch.tensor([0, 5, 37])}
    expected = solve("triton", predicted, target, weight_M=weight, **options)
    # every other row of a wider tensor, with NaN in between: a wrong stride would show
    wide = torch.full((37 * 2, 51), float("nan"), dtype=dtype, device=DEVICE)
    wide[::2, 3:43] = predicted
    spread = torch.zeros(37, 3, device=DEVICE)
    spread[:, 1] = weight
    for given_predicted, given_target in (
        (wide[::2, 3:43], target),
        (predicted.T.contiguous().T, target),
        (predicted, target.T.contiguous().T),
    ):
        result = solve("triton", given_predicted, given_target, weight_M=spread[:, 1], **options)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, expected, strict=True))
    same = target[:1].expand(37, 40)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(solve("triton", predicted, same), solve("triton", predicted, same.clone()), strict=True)
    )


def test_layout_of_the_upstream_does_not_matter():
    predicted, target, _ = inputs(12, 20)
    predicted.requires_grad_()
    out = predictive_residual(predicted, target, segments=torch.tensor([0, 2, 7, 12]), impl="triton")
    upstream = torch.tensor([[1.0, 9], [2, 9], [3, 9]], device=DEVICE)
    for odd in (upstream[:, 0], torch.tensor(0.5, device=DEVICE).expand(3)):
        (one,), (two,) = (torch.autograd.grad(out, predicted, given, retain_graph=True) for given in (odd, odd.clone()))
        assert torch.equal(one, two) and one.any()


@pytest.mark.parametrize("inside", regions.AUTOCAST, ids="+".join)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_no_bit(metric, dtype, inside):
    predicted, target, weight = inputs(12, 20, dtype)
    options = {"segments": torch.tensor([0, 2, 7, 12]), "metric": metric, "weight_M": weight}
    regions.assert_same(
        lambda argument: predictive_residual(argument, target, impl="triton", **options), predicted, inside
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float64, torch.bfloat16])
def test_weights_may_be_of_any_type(dtype):
    predicted, target, _ = inputs(12, 20)
    weight = torch.tensor([1.0, 0, 1, 1] * 3, device=DEVICE)
    result = solve("triton", predicted, target, weight_M=weight.to(dtype))
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(result, solve("triton", predicted, target, weight_M=weight), strict=True)
    )


def test_fp16_loss_scale_acts_before_rounding():
    predicted, target, _ = inputs(37, 97, torch.float16)
    predicted, scale = predicted * 2000, 2.0**14
    options = {"segments": torch.tensor([0, 5, 37]), "normalize_predicted": False}
    assert_no_worse(predicted, target, scale=scale, **options)
    truth = solve("reference", predicted, target, torch.float64, **options)[1]
    scaled = solve("triton", predicted, target, scale=scale, **options)[1].double() / scale
    plain = solve("triton", predicted, target, **options)[1].double()
    # unscaled, these gradients are too small for fp16
    assert (plain - truth).abs().max() > 10 * (scaled - truth).abs().max()


@pytest.mark.parametrize("normalised", NORMALISATIONS)
def test_l1_has_no_slope_where_nothing_differs(normalised):
    predicted, _, _ = inputs(9, 130)
    same = normalised[0] == normalised[1]
    out, gradient = solve(
        "triton",
        predicted,
        predicted.clone(),
        metric="l1",
        normalize_predicted=normalised[0],
        normalize_target=normalised[1],
    )
    assert (out == 0).all() == same and (gradient == 0).all() == same


def test_sums_taken_together_are_those_taken_apart(monkeypatch):
    """On a GPU, a row's sums take one exchange between warps together; the interpreter usually sums one by one."""
    for metric in METRICS:
        predicted, target, _ = inputs(5, 33)
        for normalize_predicted, normalize_target in NORMALISATIONS:
            options = {
                "metric": metric,
                "normalize_predicted": normalize_predicted,
                "normalize_target": normalize_target,
            }
            with monkeypatch.context() as patch:
                patch.setattr(residual_launch, "INTERPRET", False)
                together = solve("triton", predicted, target, **options)
            for ours, theirs in zip(together, solve("triton", predicted, target, **options), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"segments": torch.tensor([0, 2, 2, 6])}, r"must rise strictly from 0 to 6, got \[0, 2, 2, 6\]"),
        ({"segments": torch.tensor([0, 7])}, "must rise strictly from 0 to 6"),
        ({"segments": torch.tensor([0.0, 6])}, "two integer offsets"),
        (
            {"segments": torch.tensor([0, 2, 6]), "weight_M": torch.tensor([1.0, 1, 0, 0, 0, 0])},
            "segment 1 has no weight",
        ),
        ({"segments": torch.arange(7), "weight_M": torch.tensor([1.0, 1, 1, 0, 1, 1])}, "segment 3 has no weight"),
        ({"weight_M": torch.zeros(6)}, "segment 0 has no weight"),
    ],
)
def test_bad_input_is_named(change, message):
    change = {name: value.to(DEVICE) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        predictive_residual(torch.ones(6, 3, device=DEVICE), torch.ones(6, 3, device=DEVICE), impl="triton", **change)


def test_what_triton_does_not_take():
    predicted = torch.ones(2, 3, device=DEVICE, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"impl='triton' is not available.*Triton kernels take fp32, bf16, fp16, not float64"
    ):
        predictive_residual(predicted, predicted, impl="triton")
    wide = torch.ones(1, residual_rows.WIDEST + 1, device=DEVICE)
    with pytest.raises(ValueError, match="rows of more than 16384 features"):
        predictive_residual(wide, wide, impl="triton")
    assert predictive_residual(wide, wide, metric="l1", normalize_target=False).item() == 0  # auto: the reference


def test_auto_takes_triton_only_on_a_gpu(monkeypatch):
    calls = []
    forward = residual.forward
    monkeypatch.setattr(residual, "forward", lambda *arguments: calls.append(arguments) or forward(*arguments))
    predicted, target, _ = inputs(4, 5)
    predictive_residual(predicted, target)
    assert len(calls) == (DEVICE == "cuda")
    predictive_residual(predicted.cpu(), target.cpu())
    assert len(calls) == (DEVICE == "cuda")
    predictive_residual(predicted, target, impl="triton")
    assert len(calls) == 1 + (DEVICE == "cuda")
