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
    z, h, weight = inputs(12, 33, torch.float16)
    segments = None if segments is None else torch.tensor(segments)
    for metric, w in zip(METRICS, (None, weight, weight), strict=True):
        torch.library.opcheck(residual.forward, (z.clone().requires_grad_(), h, segments, w, metric, True, True, True))
        torch.library.opcheck(residual.forward, (z, h, segments, w, metric, False, True, False))
        _, statistics, total, offsets = residual.forward(z, h, segments, w, metric, True, True, True)
        torch.library.opcheck(
            residual.backward, (torch.ones_like(total), z, h, w, statistics, total, offsets, metric, True)
        )


@pytest.mark.parametrize("segments", [None, [0, 5, 12], range(13)])
def test_compiles_in_one_graph(segments):
    def loss(z, h, segments, weight):
        return predictive_residual(z, h, segments=segments, weight_M=weight, impl="triton").square().sum()

    z, h, weight = inputs(12, 33)
    segments = None if segments is None else torch.tensor(segments)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(z, h, segments, weight), z) for f in (loss, compiled) if z.requires_grad_() is z]
    assert torch.equal(gradients[0][0], gradients[1][0]) and gradients[0][0].any()
    if segments is not None:
        with pytest.raises(ValueError, match="must rise strictly"):
            compiled(z, h, segments.flip(0), weight)


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
    z, h, _ = inputs(rows, features, torch.float16)
    far[0].copy_(z), far[1].copy_(h)
    expected = solve("triton", z, h)
    assert all(torch.equal(a, b) for a, b in zip(solve("triton", far[0], far[1]), expected, strict=True))
    _, statistics, total, offsets = residual.forward(z, h, None, None, "cosine", True, True, True)
    near = torch.zeros(rows, features)
    for z_, h_, gradient in ((z, h, near), (far[0], far[1], far[2])):
        residual_launch.launch_gradients(
            torch.ones(1), z_, h_, None, statistics, total, offsets, gradient, "cosine", True
        )
    assert torch.equal(far[2], near.half()) and near.any()


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    rows, features = 2**21 + 5, 1024
    z, h = (torch.zeros(rows, features, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    near_z, near_h, _ = inputs(5, features, torch.bfloat16)
    z[-5:], h[-5:] = near_z, near_h
    z.requires_grad_()
    near_z.requires_grad_()
    out = predictive_residual(z, h, segments=torch.tensor([0, rows - 5, rows]), impl="triton")
    near = predictive_residual(near_z, near_h, impl="triton")
    out[1].backward(), near.sum().backward()
    assert out[0] == 1 and torch.equal(out[1:], near)
    assert torch.equal(z.grad[-5:], near_z.grad) and near_z.grad.any() and not z.grad[:-5].any()
