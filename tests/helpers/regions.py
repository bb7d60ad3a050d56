"""Regions of autocast to bf16 around the forward, the backward or both, which must change no bit of an operation."""

from collections.abc import Callable

import torch
from torch import Tensor

# The passes that run in the region.
AUTOCAST = [("forward",), ("forward", "backward"), ("backward",)]


def value_and_gradient(
    function: Callable[[Tensor], Tensor], argument: Tensor, inside: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor]:
    """``function(x)`` and its gradient, for an upstream from 1 to 2.

    The passes named by ``inside`` run in a region of autocast.
    """

    def region(name: str) -> torch.autocast:
        return torch.autocast(argument.device.type, torch.bfloat16, enabled=name in inside)

    argument = argument.detach().clone().requires_grad_()
    with region("forward"):
        out = function(argument)
    upstream = torch.linspace(1, 2, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    with region("backward"):
        out.backward(upstream)
    return out.detach(), argument.grad


def assert_same(function: Callable[[Tensor], Tensor], argument: Tensor, inside: tuple[str, ...]) -> None:
    """Assert that the region changes no bit and no dtype of ``function``'s value and gradient, which is not all 0."""
    expected, found = value_and_gradient(function, argument), value_and_gradient(function, argument, inside)
    for name, ours, theirs in zip(("value", "gradient"), found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), (
            f"{name}: largest difference {float((ours - theirs).abs().max()):.2e}"
        )
    assert expected[1].any()
