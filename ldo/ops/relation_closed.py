"""The relation loss of equally weighted squares without visiting pairs, and the arithmetic that its forms share.

``ldo/ops/relation.py`` states the formulas. Shapes: B clips, N tokens, D and E features of student and teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldo.kernels import support
from ldo.kernels.support import EPS


class ClosedForm(torch.autograd.Function):
    """The squared penalty over all pairs, from D x D, E x E and D x E matrices.

    Half precision costs little accuracy here. The rows that are multiplied are the inputs as given, and the matrices
    are split into two parts. Of Xh' Xh the multiple of the identity, which only moves rows along themselves, is left
    out.
    """

    @staticmethod
    def forward(ctx, student, teacher, operand):
        dtype = accumulator(student)
        clips, tokens, _ = student.shape
        x, y = student.to(operand), teacher.to(operand)
        unit_x, inverse_x = normalised(x, dtype)
        unit_y, inverse_y = normalised(y, dtype)
        within_x = matrix_product(unit_x.mT, unit_x).div_(tokens)
        within_y = matrix_product(unit_y.mT, unit_y).div_(tokens)
        across = matrix_product(unit_x.mT, unit_y).div_(tokens)
        of_x, of_y, of_both = (matrix.square().sum(dtype=torch.float64) for matrix in (within_x, within_y, across))
        gradient = None
        if ctx.needs_input_grad[0]:
            # without the multiple of the identity, the matrix loses less to half precision
            diagonal = within_x.diagonal(dim1=-2, dim2=-1)
            diagonal -= diagonal.mean(-1, keepdim=True)
            gradient = _product_split(x, within_x).mul_(inverse_x)
            gradient.addcmul_(_product_split(y, across.mT), inverse_y, value=-1)
            project(gradient, x, inverse_x, 4 / (clips * tokens))
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        # rounding can take a difference of sums below 0
        return ((of_x + of_y - 2 * of_both).clamp_min(0) / clips).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return scaled(ctx, upstream), None, None


def closed_form_is_cheaper(student: Tensor, teacher: Tensor) -> bool:
    """Whether the closed form takes fewer multiplications than a walk over all pairs."""
    tokens, width, teacher_width = student.shape[1], student.shape[2], teacher.shape[2]
    closed = 2 * (width * width + teacher_width * teacher_width + width * teacher_width)
    pairs = tokens * (width + teacher_width)
    if student.requires_grad and torch.is_grad_enabled():
        closed += 2 * (width * width + width * teacher_width)
        pairs += 2 * tokens * width
    return closed < pairs


# -------------------------------------------------------------------------------------------- shared arithmetic


def accumulator(student: Tensor) -> torch.dtype:
    """The dtype in which sums are taken: fp64 for fp64 input, else fp32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def normalised(rows: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Unit vectors, rounded once to the dtype of ``rows``, and 1 / norm in ``dtype`` (or that of ``rows``).

    Both are 0 for zero vectors.
    """
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype)
    inverse = torch.where(norm > EPS, 1 / norm.clamp_min(EPS), 0)
    if dtype in (None, rows.dtype):
        return rows * inverse, inverse
    # ``out`` rounds once, where a cast of the product would need a copy; but it is not differentiable
    return torch.mul(rows, inverse, out=torch.empty_like(rows)), inverse


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """left right, accumulated and returned in fp32 if the operands are half precision."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    dtype = accumulator(left)
    return left.to(dtype) @ right.to(dtype)


def _product_split(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows matrix, as the sum of two products: rounding the matrix to the rows' precision would lose too much of it."""
    high = matrix.to(rows.dtype)
    whole = matrix_product(rows, high)
    if high.dtype != matrix.dtype:
        support.add_product(whole, rows, (matrix - high).to(rows.dtype))
    return whole


def project(gradient: Tensor, rows: Tensor, inverse: Tensor, scale: float) -> None:
    """The gradient in unit vectors u = rows / norm becomes that in ``rows`` themselves, in place and times ``scale``:

        h = gradient:    scale (h - u (u . h)) / norm

    ``inverse`` is 1 / norm.
    """
    along = (rows * gradient).sum(-1, keepdim=True).mul_(inverse).mul_(inverse)
    gradient.addcmul_(rows, along, value=-1).mul_(inverse * scale)


def scaled(ctx: Any, upstream: Tensor) -> Tensor | None:
    """The saved gradient times ``upstream``, scaled before it is rounded: an fp16 loss scale must take effect."""
    (gradient,) = ctx.saved_tensors
    if gradient is None:
        return None
    return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=ctx.dtype))
