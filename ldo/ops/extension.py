"""The compiled module ldo._C: whether it can be used here, and if not, why.

It links against no torch, so the one built file serves every torch of this Python; ``python setup.py build_ext`` builds it.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

INTERFACE = 2  # of csrc/module.cpp as ldo/ops/native.py calls it
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # as csrc/arithmetic.h numbers them


@cache
def load() -> tuple[ModuleType | None, str]:
    """The module or None, and in a few words why it is there or not."""
    try:
        module = importlib.import_module("ldo._C")
    except ModuleNotFoundError:
        return None, "plain PyTorch; the extension is not built: python setup.py build_ext"
    except ImportError as problem:
        return None, f"plain PyTorch; the extension does not load: {problem}"
    if getattr(module, "INTERFACE", None) != INTERFACE:
        return None, "plain PyTorch; the extension is of another version of ldo: python setup.py build_ext"
    return module, "the extension"


def forms(tensor: Tensor) -> tuple[tuple[str, ...], str]:
    """The ``impl`` names that a tensor on this device has, the best first, and why."""
    module, why = load()
    if module is None:
        return ("reference",), why
    if tensor.device.type == "cpu":
        return ("cpp", "reference"), f"{why}, on the CPU"
    if tensor.device.type == "cuda" and module.CUDA:
        return ("cuda", "reference"), f"{why}, on {_name(tensor.device)}"
    if tensor.device.type == "cuda":
        return ("reference",), "plain PyTorch; the extension was built without CUDA: LDO_CUDA=1 python setup.py build_ext"
    return ("reference",), f"plain PyTorch; the extension knows no {tensor.device.type} tensors"


@cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
