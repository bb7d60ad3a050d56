"""What the tests of the Triton residual share: inputs, results of a form, and the comparison of errors."""

import torch

from ldo.ops import predictive_residual

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMALISATIONS = [(True, True), (True, False), (False, True), (False, False)]


def inputs(rows, features, dtype=torch.float32, seed=0):
    """Predicted and target [M, D], weights [M]."""
    generator = torch.Generator().manual_seed(seed)
    predicted, target = (torch.randn(rows, features, generator=generator) * 2 + 0.5 for _ in range(2))
    weights = torch.rand(rows, generator=generator) + 0.1
    return predicted.to(DEVICE, dtype), target.to(DEVICE, dtype), weights.to(DEVICE)


def solve(impl, predicted, target, dtype=None, scale=1.0, **options):
    """Means and gradient, for an upstream that differs between segments."""
    predicted, target = (
        tensor.detach() if dtype is None else tensor.detach().to(dtype) for tensor in (predicted, target)
    )
    predicted.requires_grad_()
    out = predictive_residual(predicted, target, impl=impl, **options)
    upstream = scale * torch.linspace(0.5, 1.5, len(out), dtype=out.dtype, device=out.device)
    (gradient,) = torch.autograd.grad(out, predicted, upstream)
    return out.detach(), gradient


def assert_no_worse(predicted, target, factor=1.1, **options):
    """Assert that the kernel's largest error is at most ``factor`` times the reference's in the same dtype.

    Eight fp32 roundings of the largest number are allowed on top.
    """
    truth = solve("reference", predicted, target, torch.float64, **options)
    theirs, ours = solve("reference", predicted, target, **options), solve("triton", predicted, target, **options)
    for name, found, reference, exact in zip(("value", "gradient"), ours, theirs, truth, strict=True):
        assert found.dtype == reference.dtype and found.shape == reference.shape
        scale = exact.abs().max().item()
        # a cosine's residual is 1 minus a number that was rounded
        if name == "value" and options.get("metric", "cosine") == "cosine":
            scale = max(scale, 1)
        error, allowed = ((value.double() - exact).abs().max().item() for value in (found, reference))
        assert error <= factor * allowed + 2**-21 * scale, (
            f"{name}: {error:.2e}, reference {allowed:.2e}, largest {scale:.2e}; {options}"
        )


def cuts(rows):
    """Offsets of one segment, of one segment a row, and of ragged segments."""
    return [None, torch.arange(rows + 1), torch.tensor(sorted({0, 1, rows // 3, rows // 2, rows}))]
