"""Autocast to bf16 around the forward, the backward or both: what must change no bit of an operation."""

from collections.abc import Callable

import torch
from torch import Tensor

AUTOCAST = [("forward",), ("forward", "backward"), ("backward",)]  # what runs in the region


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor, inside: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
    """``function(x)`` and its gradient, for an upstream of 1 to 2, with the passes named by ``inside`` in a region of autocast."""

    def region(name: str) -> torch.autocast:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=name in inside)

    x = x.detach().clone().requires_grad_()
    with region("forward"):
        out = function(x)
    upstream = torch.linspace(1, 2, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    with region("backward"):
        out.backward(upstream)
    return out.detach(), x.grad


def assert_same(function: Callable[[Tensor], Tensor], x: Tensor, inside: tuple[str, ...]) -> None:
    """The region changes no bit of ``function``'s value and gradient, and no dtype; the gradient is one."""
    expected, found = value_and_gradient(function, x), value_and_gradient(function, x, inside)
    for name, a, b in zip(("value", "gradient"), found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{name}: largest difference {float((a - b).abs().max()):.2e}"
    assert expected[1].any()
