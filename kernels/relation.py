"""The relation loss on a GPU: loss and gradient in one pass over the pairs, in a workspace of fixed size.

With unit vectors xh, G_ij = W_ij phi'(d_ij) / sum W (symmetric) and A_ij = G_ij / (n_i n_j), n = |x|:

    h_i     = 2 sum_j G_ij xh_j                      dL/dxh
    dL/dx_i = (h_i - xh_i (xh_i . h_i)) / n_i
            = v_i - xh_i (xh_i . v_i),  v = 2 A X    the norms cancel, so no normalised copy of X is needed

A call makes five launches:

1. ``relation_prepare.py`` computes the norms and the weight of both classes of pairs.
2. ``relation_pairs.py`` walks the upper triangle of pairs in tiles. It writes A, with its mirror image, in the
   student's precision.
3. cuBLAS multiplies A X into fp32.
4. ``relation_finish.py`` adds up the loss.
5. ``relation_finish.py`` projects A X to the gradient.

If A is larger than ``WORKSPACE``, it is computed in panels of rows, one after another. A panel spans from the diagonal
to the right edge and is used twice: v[p] += A[p] X[p0:] and v[p1:] += A[p]' X[p]. Work per N^2 is then 3 D + E, the
minimum for N > D + E.

The range of fp16 is too small for A. For fp16, G multiplies unit vectors and the norm is divided out at the end. fp32
inputs are multiplied in three TF32 products (fp32 accuracy), or in one if torch allows TF32 for matrix products.

Everything that follows only from the shapes is cached (``relation_plan.py``). Results are deterministic: tiles and the
order of sums are fixed, and there are no atomics. Nothing here waits for the GPU. After a first call, further calls of
the same shape can be captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldo.kernels import relation_frames, relation_plan
from ldo.kernels.relation_frames import FrameOrder
from ldo.kernels.relation_plan import Key, Plan
from ldo.kernels.support import WORKSPACE, add_product, written


def fused_relation_loss(
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
    """The Triton form of ``ldo.ops.relation_loss``, which explains the arguments.

    The teacher is cast to the student's precision. Norms up to 1e18 are supported.
    """
    gradient = student_BND.requires_grad and torch.is_grad_enabled()
    options = (float(margin), penalty, float(spatial), float(temporal))
    teacher = teacher_BNE.detach()
    weight = None if weight_BN is None else weight_BN.detach()
    # torch.compile needs an operator of torch.library; in eager mode that costs the host several times as much
    if torch.compiler.is_compiling():
        return _forward(student_BND, teacher, frame_N, weight, *options, gradient)[0]
    if gradient:
        return _RelationLoss.apply(student_BND, teacher, frame_N, weight, options)
    return _run(student_BND, teacher, frame_N, weight, options, False)[0]


class _RelationLoss(torch.autograd.Function):
    """The relation loss with its gradient in eager mode."""

    @staticmethod
    def forward(ctx, student, teacher, frame, weight, options):
        ctx.set_materialize_grads(False)
        loss, product, scale = _run(student, teacher, frame, weight, options, True)
        ctx.save_for_backward(product, scale, student)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if upstream is None:
            return None, None, None, None, None
        product, scale, student = ctx.saved_tensors
        return _project(upstream, product, scale, student), None, None, None, None


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
    """Loss [], A X / scale [B, N, D] if ``gradient`` (else empty), and scale [B], which A does not contain."""
    options = (margin, penalty, spatial, temporal)
    loss, product, scale = _run(student, teacher, frame, weight, options, gradient)
    if product is None:
        product = loss.new_empty(0)
    # cloned, since the results of an operator must not share memory: scale is a view of the scratch buffer
    return loss, product, scale[: len(student)].clone()


@_forward.register_fake
def _(student, teacher, frame, weight, margin, penalty, spatial, temporal, gradient):
    fp32 = {"dtype": torch.float32}
    product = student.new_empty(student.shape if gradient else (0,), **fp32)
    return student.new_empty((), **fp32), product, student.new_empty(len(student), **fp32)


@torch.library.custom_op("ldo::relation_backward", mutates_args=())
def _backward(upstream: Tensor, product: Tensor, scale: Tensor, student: Tensor) -> Tensor:
    """dL/dstudent in the student's precision, rounded once, after scaling: an fp16 loss scale must take effect."""
    return _project(upstream, product, scale, student)


@_backward.register_fake
def _(upstream, product, scale, student):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    student, *_, gradient = inputs
    _, product, scale = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(product, scale, student)
    ctx.gradient = gradient


def _gradients(ctx, upstream, *_):
    assert ctx.gradient, "ldo::relation was run without its gradient"
    found = None
    if upstream is not None:
        product, scale, student = ctx.saved_tensors
        found = _backward(upstream, product, scale, student)
    # none for teacher, frame, weight, the four options and the flag
    return found, None, None, None, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


# ---------------------------------------------------------------------------------------------- running a plan


def _run(
    student: Tensor, teacher: Tensor, frame: Tensor | None, weight: Tensor | None, options: tuple, gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Loss [], A X / scale [B, N, D] fp32 or None, and scale [B]."""
    student = _input(student)
    if teacher.dtype != student.dtype:
        teacher = teacher.to(student.dtype)
    teacher = _input(teacher)
    if weight is not None:
        weight = _input(weight)
    margin, penalty, spatial, temporal = options
    clips, tokens, features = student.shape
    key = Key(
        clips=clips,
        tokens=tokens,
        student=features,
        teacher=teacher.shape[2],
        dtype=student.dtype,
        device=student.device,
        framed=frame is not None,
        weight=None if weight is None else weight.dtype,
        margin=margin,
        penalty=penalty,
        spatial=spatial,
        temporal=temporal,
        gradient=gradient,
        workspace=WORKSPACE,
        precision="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3",
    )
    plan = relation_plan.plan(key)
    with _on(student):
        frames = None if frame is None else relation_frames.frame_order(frame, plan.padded)
        return _launch(plan, student, teacher, frames, weight)


def _launch(
    plan: Plan, student: Tensor, teacher: Tensor, frames: FrameOrder | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    key, device = plan.key, student.device
    # one allocation for all small buffers, since each allocation costs the host time
    scratch = torch.empty(sum(plan.scratch), dtype=torch.float32, device=device)
    inverse, ratio, padded_weight, factor, scale, partial, observed = scratch.split(plan.scratch)
    padded_weight = None if weight is None else padded_weight
    observed = observed.view(torch.int32) if plan.skips else None
    order = run_start = frame = cumulative = None
    if frames is not None:
        order, run_start, frame = frames
        cumulative = torch.empty(key.clips, key.tokens, dtype=torch.float64, device=device)
    unit = torch.empty_like(student) if plan.unit else None
    plan.prepare(
        student,
        teacher,
        weight,
        order,
        run_start,
        inverse,
        ratio,
        padded_weight,
        unit,
        cumulative,
        observed,
        factor,
        scale,
        *plan.prepare_fixed,
    )
    product = space = None
    if key.gradient:
        product = torch.empty(student.shape, dtype=torch.float32, device=device)
        space = plan.new_space()
    operands = plan.operands(student, teacher)
    per_token = (inverse, ratio, padded_weight, frame, observed, factor)
    multiplied = student if unit is None else unit
    for panel in plan.panels:
        matrix = None if space is None else plan.space_of(panel, space)
        panel.launch(*operands, *plan.outputs(matrix), *per_token, panel.tiles, partial, *panel.fixed)
        # at once, since the next panel overwrites the workspace
        if matrix is not None:
            _multiply(product[panel.clips], matrix, multiplied[panel.clips], panel.first, panel.end)
    loss = torch.empty((), dtype=torch.float32, device=device)
    plan.loss(partial, scale, loss, *plan.loss_fixed)
    return loss, product, scale


def _project(upstream: Tensor, product: Tensor, scale: Tensor, student: Tensor) -> Tensor:
    """dL/dstudent from A X, in the student's precision."""
    student = _input(student)
    gradient = torch.empty_like(student, dtype=written(student.dtype))
    launch, fixed = relation_plan.projection(student.shape, student.dtype, student.device)
    with _on(student):
        launch(upstream.float(), product, scale, student, gradient, *fixed)
    return gradient.to(student.dtype)


def _input(tensor: Tensor) -> Tensor:
    """``tensor``, contiguous and at an address that is a multiple of 16 bytes, as ``Launch`` promises the kernels."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _on(tensor: Tensor) -> Any:
    """A context in which the tensor's GPU is the current one; no call into CUDA if it already is."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def _multiply(product: Tensor, matrix: Tensor, features: Tensor, first: int, end: int) -> None:
    """Add a panel of A [clips, rows, N - first] and its mirror image to ``product`` = A X [clips, N, D]."""
    tokens = features.shape[1]
    if first == 0 and end == tokens:
        _add_product(product, matrix, features, fresh=True)
        return
    # the first panel reaches every row of the product, so it overwrites and no buffer has to be cleared
    fresh = first == 0
    _add_product(product[:, first:end], matrix, features[:, first:], fresh=fresh)
    if end < tokens:
        below = matrix[:, :, end - first :].mT
        _add_product(product[:, end:], below, features[:, first:end], fresh=fresh)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, fresh: bool) -> None:
    """total (+)= left right in fp32, in place; ``fresh`` overwrites what was there."""
    add_product(total, left, right, beta=0 if fresh else 1)
