"""The compiled module ldo._C: whether it can be used here, and if not, why.

It does not link against torch, so one built file serves every torch of this Python. ``python setup.py build_ext``
builds it.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

# The version of the interface of csrc/module.cpp that ldo/ops/native.py calls.
INTERFACE = 2

# As csrc/arithmetic.h numbers them.
EXTENSION_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


@cache
def load() -> tuple[ModuleType | None, str]:
    """The module, or None, and in a few words why."""
    try:
        module = importlib.import_module("ldo._C")
    except ModuleNotFoundError:
        return None, "plain PyTorch; the extension is not built: python setup.py build_ext"
    except ImportError as problem:
        return None, f"plain PyTorch; the extension does not load: {problem}"
    # a file built for another version would take other arguments
    if getattr(module, "INTERFACE", None) != INTERFACE:
        return None, "plain PyTorch; the extension is of another version of ldo: python setup.py build_ext"
    return module, "the extension"


def forms(tensor: Tensor) -> tuple[tuple[str, ...], str]:
    """The ``impl`` names available for a tensor on this device, the best first, and why."""
    module, why = load()
    if module is None:
        return ("reference",), why
    kind = tensor.device.type
    if kind == "cpu":
        return ("cpp", "reference"), f"{why}, on the CPU"
    if kind == "cuda" and module.CUDA:
        return ("cuda", "reference"), f"{why}, on {_name(tensor.device)}"
    if kind == "cuda":
        why = "plain PyTorch; the extension was built without CUDA: LDO_CUDA=1 python setup.py build_ext"
        return ("reference",), why
    return ("reference",), f"plain PyTorch; the extension knows no {kind} tensors"


@cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
