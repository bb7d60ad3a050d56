"""Live memory of a program, counted storage by storage, while it runs on tensors without data.

A dispatch mode sees every operator that autograd, modules and checkpointing call, forward and backward. It adds a new
storage's bytes when an operator returns it and subtracts them when the storage dies; the greatest sum is the peak. On
the meta device nothing is computed, so a 14-billion-parameter model takes seconds. What a kernel allocates and frees
within itself is not seen. For attention and the relation loss that is much, so stand-ins allocate what the kernels do.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from ldo.kernels.support import WORKSPACE

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Within the context, ``now`` is the bytes of live tensors made in it and ``peak`` the most there were.

    What was made before does not count. A program that reads a number out of a tensor without data gets ``number``, and
    one that asks for a truth value gets False.
    """

    def __init__(self, number: int | None = None):
        super().__init__()
        self.number = number
        self.now = 0
        self.peak = 0
        # By the storage's address, since several tensors share one storage.
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
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            address = tensor.untyped_storage()._cdata
            if address not in self._known:
                # An unknown storage that was an input too is older than the context: a view was taken of it.
                inputs = _tensors((args, kwargs))
                foreign = any(argument.untyped_storage()._cdata == address for argument in inputs)
                self._note(tensor.untyped_storage(), foreign)
        return output

    def _note(self, storage: torch.UntypedStorage, foreign: bool) -> None:
        """Count a storage until it dies; a foreign one, such as a weight that a view was taken of, counts nothing."""
        address = storage._cdata
        size = 0 if foreign else storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget(_reference: weakref.ref) -> None:
            # Addresses are given out again, so a dead storage must not hide a new one.
            self._known.pop(address, None)
            self.now -= size

        self._known[address] = weakref.ref(storage, forget)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of an operator's arguments or results."""
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


# ---------------------------------------------------------------------------------------------- what kernels allocate


class _Attention(torch.autograd.Function):
    """Memory of a fused attention, softmax(q k') v = output, which never makes the N x N matrix.

    It saves q, k, v, the output and one fp32 number per row.
    """

    @staticmethod
    def forward(ctx, q, k, v, cuda):
        # The kernels put out rows [B, N, H, D], so that joining the heads afterwards is free.
        output = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        row_sums = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, output, row_sums)
        ctx.cuda = cuda
        return output

    @staticmethod
    def backward(ctx, _upstream):
        q, k, v, _, row_sums = ctx.saved_tensors
        # On a GPU, FlashAttention-2 needs a number per row and an fp32 accumulator of q's size while it works.
        workspace = [torch.empty_like(row_sums), q.new_empty(q.shape, dtype=torch.float32)] if ctx.cuda else []
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del workspace
        return *gradients, None


class _Relation(torch.autograd.Function):
    """Memory of the relation loss's Triton form (``kernels/relation.py``): A X in fp32, and A panel by panel."""

    @staticmethod
    def forward(ctx, student, teacher):
        teacher = teacher.to(student.dtype)
        batch, tokens, _ = student.shape
        pull = student.new_empty(student.shape, dtype=torch.float32)
        # The kernel computes A panel by panel, in a workspace of bounded size.
        workspace = student.new_empty(min(batch * tokens * tokens, WORKSPACE // student.element_size()))
        ctx.save_for_backward(pull, student)
        del workspace, teacher
        return student.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _upstream):
        return torch.empty_like(ctx.saved_tensors[1]), None


def relation_stand_in(student_BND: Tensor, teacher_BNE: Tensor, **_options) -> Tensor:
    """Stands in for ``ldo.ops.relation_loss``: its memory on a GPU, no value."""
    return _Relation.apply(student_BND, teacher_BNE)


class FusedKernels(TorchFunctionMode):
    """Within the context, attention and RMS norm on meta tensors take the memory of fused kernels.

    ``device`` says whose: "cuda" or "cpu". By itself the meta device takes attention's unfused path, with its N x N
    matrices, and computes the norm operator by operator. A backward pass leaves the context; what it computes again
    needs ``checkpointed``.
    """

    def __init__(self, device: str = "cuda"):
        super().__init__()
        self.cuda = device == "cuda"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.rms_norm and self.cuda:
            return self._norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        return _Attention.apply(query, key, value, self.cuda)

    @staticmethod
    def _norm(input, normalized_shape, weight=None, eps=None):
        return aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]

    def checkpointed(self, module: torch.nn.Module, *arguments):
        """Gradient checkpointing of a block, its second computation within the context too."""
        recomputation = type(self)("cuda" if self.cuda else "cpu")
        return checkpoint(
            module.__call__, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputation)
        )
