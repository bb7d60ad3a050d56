"""The Triton residual as an operator of PyTorch, and at sizes where offsets pass 2^31."""

import mmap

import pytest
import torch

pytest.importorskip("triton")

from ldo.kernels import residual, residual_launch
from ldo.ops import predictive_residual
from ldo.ops.residual import METRICS
from tests.helpers.residuals import DEVICE, inputs, solve


@pytest.mark.parametrize("segments", [None, [0, 5, 12], range(13)])
def test_opcheck(segments):
    predicted, target, weight = inputs(12, 33, torch.float16)
    segments = None if segments is None else torch.tensor(segments)
    for metric, given in zip(METRICS, (None, weight, weight), strict=True):
        torch.library.opcheck(
            residual.forward, (predicted.clone().requires_grad_(), target, segments, given, metric, True, True, True)
        )
        torch.library.opcheck(residual.forward, (predicted, target, segments, given, metric, False, True, False))
        _, statistics, total, offsets = residual.forward(predicted, target, segments, given, metric, True, True, True)
        torch.library.opcheck(
            residual.backward,
            (torch.ones_like(total), predicted, target, given, statistics, total, offsets, metric, True),
        )


@pytest.mark.parametrize("segments", [None, [0, 5, 12], range(13)])
def test_compiles_in_one_graph(segments):
    def loss(predicted, target, segments, weight):
        return predictive_residual(predicted, target, segments=segments, weight_M=weight, impl="triton").square().sum()

    predicted, target, weight = inputs(12, 33)
    segments = None if segments is None else torch.tensor(segments)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    predicted.requires_grad_()
    gradients = [
        torch.autograd.grad(function(predicted, target, segments, weight), predicted) for function in (loss, compiled)
    ]
    assert torch.equal(gradients[0][0], gradients[1][0]) and gradients[0][0].any()
    if segments is not None:
        with pytest.raises(ValueError, match="must rise strictly"):
            compiled(predicted, target, segments.flip(0), weight)


# -------------------------------------------------------------------------------------------------- large offsets


def sparse(elements, dtype):
    """A tensor of zeros that takes memory only where something is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="the real thing is tested instead")
def test_offsets_pass_2_to_the_31():
    """Rows 2^30 elements apart: the third is where 32-bit offsets wrap around, to memory before the first row."""
    rows, features, stride = 3, 24, 2**30
    far = [
        sparse(2**31 + 2 * stride + features, torch.float16)[2**31 :].as_strided((rows, features), (stride, 1))
        for _ in range(3)
    ]
    predicted, target, _ = inputs(rows, features, torch.float16)
    far[0].copy_(predicted), far[1].copy_(target)
    expected = solve("triton", predicted, target)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(solve("triton", far[0], far[1]), expected, strict=True)
    )
    _, statistics, total, offsets = residual.forward(predicted, target, None, None, "cosine", True, True, True)
    near = torch.zeros(rows, features)
    for given_predicted, given_target, gradient in ((predicted, target, near), (far[0], far[1], far[2])):
        residual_launch.launch_gradients(
            torch.ones(1), given_predicted, given_target, None, statistics, total, offsets, gradient, "cosine", True
        )
    assert torch.equal(far[2], near.half()) and near.any()


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    rows, features = 2**21 + 5, 1024
    predicted, target = (torch.zeros(rows, features, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    near_predicted, near_target, _ = inputs(5, features, torch.bfloat16)
    predicted[-5:], target[-5:] = near_predicted, near_target
    predicted.requires_grad_()
    near_predicted.requires_grad_()
    out = predictive_residual(predicted, target, segments=torch.tensor([0, rows - 5, rows]), impl="triton")
    near = predictive_residual(near_predicted, near_target, impl="triton")
    out[1].backward(), near.sum().backward()
    assert out[0] == 1 and torch.equal(out[1:], near)
    assert (
        torch.equal(predicted.grad[-5:], near_predicted.grad)
        and near_predicted.grad.any()
        and not predicted.grad[:-5].any()
    )
