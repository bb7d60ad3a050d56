"""Can the Triton kernels run here?"""

from __future__ import annotations

import importlib.util

import torch


def unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot serve tensors on ``device``; None if they can."""
    if device.type != "cuda":
        return f"no Triton on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
