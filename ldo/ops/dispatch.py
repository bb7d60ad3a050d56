"""Which implementation serves a call, with one log line the first time each is chosen, and in what precision it computes."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

log = logging.getLogger("ldo.ops")


def choose(op: str, impl: str, available: Collection[str], default: str, why: str) -> str:
    """Resolve ``impl`` ("auto" gives ``default``, because of ``why``); ValueError for one that ``op`` does not have here."""
    if impl == "auto":
        if not torch.compiler.is_compiling():
            _say(op, default, why)
        return default
    if impl not in available:
        raise ValueError(f"{op}: impl={impl!r} is not available; choose auto or one of {', '.join(available)} ({why})")
    return impl


def choose_triton(op: str, impl: str, device: torch.device, missing: str | None, forms: tuple[str, ...], what: str) -> str:
    """``choose`` for an operation with Triton kernels: auto takes them on a GPU, else the last of the PyTorch ``forms``, which is ``what``.

    ``missing``: why the kernels cannot serve this call, or None. Where they would only be interpreted, they must be asked for.
    """
    available = forms if missing else (*forms, "triton")
    if missing is None and device.type == "cuda":
        return choose(op, impl, available, "triton", "fused kernels")
    return choose(op, impl, available, forms[-1], f"{what}; {missing or 'Triton only interprets here'}")


AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # devices that have it; torch's own question cannot be traced by torch.compile of torch 2.11


def as_given(device: torch.device) -> AbstractContextManager:
    """A context without autocast on ``device``: the dtypes that a form chose are those it computes in. Next to free where autocast is off."""
    kind = device.type
    # a backward is compiled together with its forward: what is on then says nothing of where it will run
    if kind in AUTOCAST and (torch.is_autocast_enabled(kind) or torch.compiler.is_compiling()):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@cache
def _say(op: str, impl: str, why: str) -> None:
    log.info("%s: %s (%s)", op, impl, why)
