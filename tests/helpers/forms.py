"""The forms of an operation to run a test over; those that are not built or have no device here are skipped."""

import pytest
import torch

from ldo.ops import extension

MODULE, WHY = extension.load()
needs_extension = pytest.mark.skipif(MODULE is None, reason=WHY)
needs_cuda_part = pytest.mark.skipif(not getattr(MODULE, "CUDA", False), reason="no CUDA part")

ALL = [
    "reference",
    pytest.param("cpp", marks=needs_extension),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda_part]),
]
NATIVE = ALL[1:]


def device_of(form: str) -> torch.device:
    """Where the tensors of a form live."""
    return torch.device("cuda" if form == "cuda" else "cpu")
