"""Live memory of a program, counted storage by storage, while it runs on tensors without data.

A dispatch mode sees every operator that autograd, modules and checkpointing call, forward and backward. It adds a new
storage's bytes when an operator returns it and takes them off when the storage dies; the greatest sum is the peak. On the
meta device nothing is computed, so a 14-billion-parameter model takes seconds. What a kernel allocates and frees within
itself is not seen; for attention and the relation loss, where it is much, stand-ins allocate what the kernels do.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
WORKSPACE = 256 * 2**20  # bytes of pair matrix that kernels/relation.py holds at a time


class Live(TorchDispatchMode):
    """Within the context, ``now`` is the bytes of living tensors made in it and ``peak`` the most there were; what was made before does not count.

    A program that reads a number out of a tensor without data gets ``number``, and one that asks for a truth value gets False.
    """

    def __init__(self, number: int | None = None):
        super().__init__()
        self.number = number
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def adopt(self, model: torch.nn.Module) -> int:
        """Count a model's weights too, for a program that replaces them; returns their bytes."""
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.untyped_storage()._cdata not in self._known:
                self._note(tensor.untyped_storage(), foreign=False)
        return self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else self.number
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                inputs = (a for a in tree_iter((args, kwargs)) if isinstance(a, Tensor))
                self._note(tensor.untyped_storage(), foreign=any(a.untyped_storage()._cdata == key for a in inputs))
        return out

    def _note(self, storage: torch.UntypedStorage, foreign: bool) -> None:
        """Count a storage until it dies; a foreign one, such as a weight that a view was taken of, counts nothing."""
        key, size = storage._cdata, 0 if foreign else storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def dead(_, key=key, size=size):
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, dead)


# ---------------------------------------------------------------------------------------------- what kernels allocate


class _Attention(torch.autograd.Function):
    """Memory of a fused attention: q, k, v, the output and one fp32 number a row are saved, N x N matrices never made.

    FlashAttention-2's backward adds an fp32 accumulator of q's size on a GPU.
    """

    @staticmethod
    def forward(ctx, q, k, v, cuda):
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        rows = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, rows)
        ctx.cuda = cuda
        return out

    @staticmethod
    def backward(ctx, _upstream):
        q, k, v, _, rows = ctx.saved_tensors
        extra = [torch.empty_like(rows), q.new_empty(q.shape, dtype=torch.float32)] if ctx.cuda else []
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del extra
        return *gradients, None


class _Relation(torch.autograd.Function):
    """Memory of the relation loss's Triton form (``kernels/relation.py``): A X in fp32, and A panel by panel."""

    @staticmethod
    def forward(ctx, student, teacher):
        teacher = teacher.to(student.dtype)
        b, n, _ = student.shape
        pull = student.new_empty(student.shape, dtype=torch.float32)
        workspace = student.new_empty(min(b * n * n, WORKSPACE // student.element_size()))
        ctx.save_for_backward(pull, student)
        del workspace, teacher
        return student.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _upstream):
        return torch.empty_like(ctx.saved_tensors[1]), None


def relation(student_BND: Tensor, teacher_BNE: Tensor, **_options) -> Tensor:
    """Stands in for ``ldo.ops.relation_loss``: its memory on a GPU, no value."""
    return _Relation.apply(student_BND, teacher_BNE)


@contextlib.contextmanager
def kernels(device: str = "cuda") -> Iterator[None]:
    """Within the context, attention and RMS norm on meta tensors take the memory of ``device``'s fused kernels ("cuda" or "cpu").

    Left to itself the meta device would take attention's unfused path, with its N x N matrices, and write the norm out.
    """
    attention, norm = F.scaled_dot_product_attention, F.rms_norm

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        return _Attention.apply(query, key, value, device == "cuda")

    def fused_norm(input, normalized_shape, weight=None, eps=None):
        return aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]

    F.scaled_dot_product_attention = fused
    if device == "cuda":
        F.rms_norm = fused_norm
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attention, norm
