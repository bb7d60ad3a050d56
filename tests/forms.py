"""The forms of an operation to run a test over: those that are not built here, or have no device, are skipped with a reason."""

import pytest
import torch

from ldo.ops import extension

ALL = ["reference", pytest.param("cpp", marks=pytest.mark.skipif(extension.load()[0] is None, reason=extension.load()[1]))]
ALL.append(pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not getattr(extension.load()[0], "CUDA", False), reason="no CUDA part")]))
NATIVE = ALL[1:]


def device_of(form: str) -> torch.device:
    """Where the tensors of a form live."""
    return torch.device("cuda" if form == "cuda" else "cpu")
