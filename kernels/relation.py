"""The relation loss on a GPU: forward and gradient in one pass over the pairs, no N x N matrix beyond a fixed workspace.

With unit vectors xh, G_ij = W_ij phi'(d_ij) / sum W (symmetric) and A_ij = G_ij / (n_i n_j), n = |x|:

    h_i     = 2 sum_j G_ij xh_j                      dL/dxh
    dL/dx_i = (h_i - xh_i (xh_i . h_i)) / n_i
            = v_i - xh_i (xh_i . v_i),  v = 2 A X    no norm is left over, no normalised copy of X is made

Five launches: one prepares (norms, the weight of both classes of pairs; ``relation_prepare.py``), the pair kernel walks
the upper triangle in tiles and writes A in the student's precision, with its mirror image (``relation_pairs.py``), one adds
up the loss, cuBLAS multiplies A X into fp32, and a row kernel projects (``relation_finish.py``). Where A would pass
``WORKSPACE``, panels of rows are made one after another, from the diagonal to the right edge, and each serves twice:
v[p] += A[p] X[p0:] and v[p1:] += A[p]' X[p]. Work per N^2 is then 3 D + E, the least there is for N > D + E.

fp16 holds A only without the norms, so there G multiplies unit vectors, and the norm comes last. fp32 inputs are
multiplied in three TF32 products (fp32 accuracy), or in one if torch allows TF32 for matrix products.

What follows from the shapes is kept ready (``relation_plan.py``). Deterministic: fixed tiles, fixed order of sums, no
atomics. Nothing here waits for the GPU; after one call, further ones of the same shape can be captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldo.kernels import relation_plan
from ldo.kernels.relation_plan import FrameOrder, Key, Plan
from ldo.kernels.support import add_product, written

WORKSPACE = 256 * 2**20  # bytes of A that are held at a time


def relation_loss(
    student_BND: Tensor,
    teacher_BNE: Tensor,
    frame_N: Tensor | None,
    weight_BN: Tensor | None,
    *,
    margin: float,
    penalty: str,
    spatial: float,
    temporal: float,
) -> Tensor:
    """See ``ldo.ops.relation_loss``. The teacher is cast to the student's precision. Norms may reach 1e18."""
    gradient = student_BND.requires_grad and torch.is_grad_enabled()
    options = (float(margin), penalty, float(spatial), float(temporal))
    teacher = teacher_BNE.detach()
    weight = None if weight_BN is None else weight_BN.detach()
    if torch.compiler.is_compiling():
        return _forward(student_BND, teacher, frame_N, weight, *options, gradient)[0]
    if gradient:
        return _RelationLoss.apply(student_BND, teacher, frame_N, weight, options)
    return _run(student_BND, teacher, frame_N, weight, options, False)[0]


class _RelationLoss(torch.autograd.Function):
    """In eager mode: an operator of torch.library costs the host several times as much."""

    @staticmethod
    def forward(ctx, student, teacher, frame, weight, options):
        ctx.set_materialize_grads(False)
        loss, product, scale = _run(student, teacher, frame, weight, options, True)
        ctx.save_for_backward(product, scale, student)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        found = None if upstream is None else _project(upstream, *ctx.saved_tensors)
        return found, None, None, None, None


# ---------------------------------------------------------------------------------------------- the operators


@torch.library.custom_op("ldo::relation", mutates_args=())
def _forward(
    student: Tensor,
    teacher: Tensor,
    frame: Tensor | None,
    weight: Tensor | None,
    margin: float,
    penalty: str,
    spatial: float,
    temporal: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), A X / scale [B, N, D] where ``gradient``, else empty, and scale [B], which was kept out of A."""
    loss, product, scale = _run(student, teacher, frame, weight, (margin, penalty, spatial, temporal), gradient)
    return loss, loss.new_empty(0) if product is None else product, scale[: len(student)].clone()


@_forward.register_fake
def _(student, teacher, frame, weight, margin, penalty, spatial, temporal, gradient):
    fp32 = {"dtype": torch.float32}
    product = student.new_empty(student.shape if gradient else (0,), **fp32)
    return student.new_empty((), **fp32), product, student.new_empty(len(student), **fp32)


@torch.library.custom_op("ldo::relation_backward", mutates_args=())
def _backward(upstream: Tensor, product: Tensor, scale: Tensor, student: Tensor) -> Tensor:
    """dL/dstudent in its precision, rounded once and after it was scaled: in fp16 a loss scale must still act."""
    return _project(upstream, product, scale, student)


@_backward.register_fake
def _(upstream, product, scale, student):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2], inputs[0])
    ctx.gradient = inputs[-1]


def _gradients(ctx, upstream, *_):
    assert ctx.gradient, "ldo::relation was run without its gradient"
    found = None if upstream is None else _backward(upstream, *ctx.saved_tensors)
    return found, *[None] * 8


_forward.register_autograd(_gradients, setup_context=_save)


# ---------------------------------------------------------------------------------------------- running a plan


def _run(
    student: Tensor, teacher: Tensor, frame: Tensor | None, weight: Tensor | None, options: tuple, gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Loss (), A X / scale [B, N, D] fp32 or None, scale [B]."""
    x, t = _input(student), _input(teacher if teacher.dtype == student.dtype else teacher.to(student.dtype))
    weight = None if weight is None else _input(weight)
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    kinds = (x.dtype, x.device, frame is not None, None if weight is None else weight.dtype)
    the = relation_plan.plan(Key(*x.shape, t.shape[2], *kinds, *options, gradient, WORKSPACE, precision))
    with _on(x):
        frames = None if frame is None else relation_plan.frame_order(frame, the.padded)
        return _launch(the, x, t, frames, weight)


def _launch(the: Plan, x: Tensor, t: Tensor, frames: FrameOrder | None, weight: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    key = the.key
    scratch = torch.empty(sum(the.scratch), dtype=torch.float32, device=x.device)
    inverse, ratio, padded_weight, factor, scale, partial, observed = scratch.split(the.scratch)
    order, run_start, frame = frames if frames is not None else (None, None, None)
    cumulative = None if frames is None else torch.empty(key.clips, key.tokens, dtype=torch.float64, device=x.device)
    padded_weight = None if weight is None else padded_weight
    observed = observed.view(torch.int32) if the.skips else None
    unit = torch.empty_like(x) if the.unit else None
    the.prepare(
        x, t, weight, order, run_start, inverse, ratio, padded_weight, unit, cumulative, observed, factor, scale,
        *the.prepare_fixed,
    )  # fmt: skip
    operands = the.operands(x, t)
    product = space = None
    if key.gradient:
        product = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        space = relation_plan.new_space(the)
    per_token = (inverse, ratio, padded_weight, frame, observed, factor)
    for panel in the.panels:
        a = None if space is None else the.space_of(panel, space)
        panel.launch(*operands, *the.outputs(a), *per_token, panel.tiles, partial, *panel.fixed)
        if a is not None:
            _multiply(product[panel.clips], a, (x if unit is None else unit)[panel.clips], panel.first, panel.end)
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    the.loss(partial, scale, loss, *the.loss_fixed)
    return loss, product, scale


def _project(upstream: Tensor, product: Tensor, scale: Tensor, student: Tensor) -> Tensor:
    """dL/dstudent from A X, in the student's precision."""
    x = _input(student)
    gradient = torch.empty_like(x, dtype=written(x.dtype))
    launch, fixed = relation_plan.projection(x.shape, x.dtype, x.device)
    with _on(x):
        launch(upstream.float(), product, scale, x, gradient, *fixed)
    return gradient.to(x.dtype)


def _input(x: Tensor) -> Tensor:
    """``x`` contiguous and at a multiple of 16 bytes, as the kernels are promised."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _on(x: Tensor) -> Any:
    """A context with the tensor's GPU as the current one; no call into CUDA if it already is."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _multiply(product: Tensor, a: Tensor, x: Tensor, first: int, end: int) -> None:
    """Add a panel of A [clips, rows, N - first] and its mirror image to ``product`` = A X [clips, N, D]."""
    if first == 0 and end == x.shape[1]:
        _add_product(product, a, x, fresh=True)
        return
    _add_product(product[:, first:end], a, x[:, first:], fresh=first == 0)
    if end < x.shape[1]:
        _add_product(product[:, end:], a[:, :, end - first :].mT, x[:, first:end], fresh=first == 0)


def _add_product(total: Tensor, a: Tensor, x: Tensor, *, fresh: bool) -> None:
    """total (+)= a x in fp32, in place; ``fresh`` overwrites what was there."""
    add_product(total, a, x, beta=0 if fresh else 1)  # the interpreter wrote half precision as fp32
