"""The relation loss on a GPU: forward and gradient in one pass over the pairs, no N x N matrix beyond a fixed workspace.

With unit vectors xh, G_ij = W_ij phi'(d_ij) / sum W (symmetric) and A_ij = G_ij / (n_i n_j), n = |x|:

    h_i     = 2 sum_j G_ij xh_j                      dL/dxh
    dL/dx_i = (h_i - xh_i (xh_i . h_i)) / n_i
            = v_i - xh_i (xh_i . v_i),  v = 2 A X    no norm is left over, no normalised copy of X is made

The pair kernel (``relation_pairs.py``) walks the upper triangle of pairs in tiles and writes A in the student's
precision, with its mirror image; cuBLAS multiplies A X into fp32; a row kernel projects. Where A would pass
``WORKSPACE``, panels of rows are made one after another, from the diagonal to the right edge, and each serves twice:
v[p] += A[p] X[p0:] and v[p1:] += A[p]' X[p]. Work per N^2 is then 3 D + E, the least there is for N > D + E.

fp16 holds A only without the norms, so there G multiplies unit vectors, and the norm comes last. fp32 inputs are
multiplied in three TF32 products (fp32 accuracy), or in one if torch allows TF32 for matrix products.

Deterministic: fixed tiles, fixed order of sums, no atomics. Nothing here waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ldo.kernels import relation_pairs as device_code
from ldo.kernels.support import EPS, HUBER, INTERPRET, architecture, written

WORKSPACE = 256 * 2**20  # bytes of A that are held at a time
TOKENS = 32 if INTERPRET else 4  # of a row kernel's program: a warp each
GROUP = 8  # super-tile rows that are walked together, so that their operands stay in L2


@dataclass(frozen=True)
class Config:
    """How the pair kernel is cut for one kind of GPU; ``tests/kernels/test_relation_aot.py`` holds each to its limits."""

    rows: int
    cols: int
    depth: int
    slices: int  # 1, 2 or 4
    warps: int
    stages: int
    bulk: bool
    registers: int | None = None  # most a thread may have, so that more blocks fit a multiprocessor; None: what the compiler likes

    @property
    def super(self) -> int:
        """Side of the squares that are either above the diagonal, and mirrored, or on it, and computed whole."""
        return max(self.rows, self.cols)


# By compute capability and whether operands are half precision. sm_86, 89 and 120 have less shared memory and take sm_80's.
CONFIGS = {
    (80, True): Config(128, 128, 32, 1, 8, 4, False),
    (80, False): Config(128, 64, 32, 1, 8, 3, False),
    (90, True): Config(128, 256, 64, 2, 8, 4, True),
    (90, False): Config(128, 128, 32, 2, 8, 3, True),
    (100, True): Config(128, 256, 64, 4, 8, 3, True),
    (100, False): Config(64, 64, 32, 1, 4, 3, True),
}
ON_CPU = Config(32, 64, 32, 4, 4, 1, True)  # for the interpreter: several tiles at small N


def choose_config(device: torch.device, dtype: torch.dtype) -> Config:
    """The cut for a device: a fixed one, so that all ranks of a run take the same."""
    if device.type != "cuda":
        return ON_CPU
    return CONFIGS[architecture(device), dtype != torch.float32]


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
    teacher = teacher_BNE.detach().to(student_BND.dtype)
    weight = None if weight_BN is None else weight_BN.detach().float()
    frame = None if frame_N is None else frame_N.int()
    share = (spatial, temporal) if frame is not None else (1.0, 0.0)
    return _forward(student_BND, teacher, frame, weight, margin, penalty, *share, gradient)[0]


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
    """Loss (), A X / top [B, N, D] where ``gradient``, else empty, and top [B], the scale that was kept out of A."""
    config = choose_config(student.device, student.dtype)
    x, t = student.contiguous(), teacher.contiguous()
    frame, weight = (None if v is None else v.contiguous() for v in (frame, weight))
    b, n, d = x.shape
    padded = -(-n // config.super) * config.super
    unit = torch.empty_like(x) if gradient and x.dtype == torch.float16 else None

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    inverse, ratio, factor, top, loss = new(b, padded), new(b, padded), new(b, 2), new(b), new()
    pull = new(b, n, d) if gradient else new(0)
    with torch.cuda.device_of(x):
        device_code.prepare_kernel[(b * padded // TOKENS,)](x, t, inverse, ratio, unit, n, padded, d, t.shape[2], TOKENS, 512, unit is not None, EPS)
        blocks = -(-n // 16)
        sums = new(b, blocks, 2)
        device_code.class_sums_kernel[(blocks, b)](frame, weight, sums, n, frame is not None, weight is not None, 16, 128)
        device_code.factor_kernel[(b,)](sums, factor, top, blocks, b, spatial, temporal, 256)
        frame, weight = (v if v is None or n == padded else F.pad(v, (0, padded - n)) for v in (frame, weight))
        pairs = _Pairs(config, x, t, unit, inverse, ratio, weight, frame, factor, margin, penalty)
        partial = pairs.run(pull if gradient else None)
        device_code.loss_kernel[(1,)](partial, top, loss, partial.shape[1], b, 1024)
    return loss, pull, top


@_forward.register_fake
def _(student, teacher, frame, weight, margin, penalty, spatial, temporal, gradient):
    fp32 = {"dtype": torch.float32}
    return student.new_empty((), **fp32), student.new_empty(student.shape if gradient else (0,), **fp32), student.new_empty(len(student), **fp32)


@torch.library.custom_op("ldo::relation_backward", mutates_args=())
def _backward(upstream: Tensor, pull: Tensor, top: Tensor, student: Tensor) -> Tensor:
    """dL/dstudent in its precision, rounded once and after it was scaled: in fp16 a loss scale must still act."""
    x = student.contiguous()
    b, n, d = x.shape
    grad = torch.empty_like(x, dtype=written(x.dtype))
    with torch.cuda.device_of(x):
        scale = upstream.float()
        device_code.project_kernel[(-(-b * n // TOKENS),)](scale, pull, top, x, grad, b * n, n, d, TOKENS, 512, x.dtype == torch.float16, EPS)
    return grad.to(x.dtype)


@_backward.register_fake
def _(upstream, pull, top, student):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2], inputs[0])
    ctx.gradient = inputs[-1]


def _gradients(ctx, upstream, *_):
    assert ctx.gradient, "ldo::relation was run without its gradient"
    pull, top, student = ctx.saved_tensors
    return _backward(upstream, pull, top, student), *[None] * 8


_forward.register_autograd(_gradients, setup_context=_save)


# ---------------------------------------------------------------------------------------------- walking the pairs


@dataclass
class _Pairs:
    """Launches of the pair kernel and the products with A."""

    config: Config
    x: Tensor
    t: Tensor
    unit: Tensor | None
    inverse: Tensor
    ratio: Tensor
    weight: Tensor | None
    frame: Tensor | None
    factor: Tensor
    margin: float
    penalty: str

    def run(self, pull: Tensor | None) -> Tensor:
        """The loss's partial sums [B, tiles]; fills ``pull`` [B, N, D] with A X if there is one."""
        clips, n, _ = self.x.shape
        panels, together = ([(0, n)], clips) if pull is None else plan(clips, n, WORKSPACE // self.x.element_size(), self.config.super)
        tables = [tile_table(n, p0, p1, self.config.rows, self.config.cols, self.x.device) for p0, p1 in panels]
        partial = torch.empty(clips, sum(map(len, tables)), dtype=torch.float32, device=self.x.device)
        size = max((p1 - p0) * _aligned(n - p0) for p0, p1 in panels)
        space = None if pull is None else torch.empty(together * size, dtype=written(self.x.dtype), device=self.x.device)
        operand = self.x if self.unit is None else self.unit
        for clip in range(0, clips, together):
            count = min(together, clips - clip)
            here = slice(clip, clip + count)
            done = 0
            for (p0, p1), table in zip(panels, tables, strict=True):
                a = None
                if space is not None:
                    rows, columns = p1 - p0, _aligned(n - p0)
                    a = space[: count * rows * columns].view(count, rows, columns)[:, :, : n - p0]
                self._launch(table, partial[clip, done:], a, clip, count, p0, p1)
                done += len(table)
                if a is not None:
                    a, x = a.to(operand.dtype), operand[here]
                    _add_product(pull[here, p0:p1], a, x[:, p0:], fresh=p0 == 0)
                    if p1 < n:
                        _add_product(pull[here, p1:], a[:, :, p1 - p0 :].mT, x[:, p0:p1], fresh=p0 == 0)
        return partial

    @cached_property
    def sources(self) -> list[TensorDescriptor] | list[Tensor]:
        """x for rows, x for columns, t for rows, t for columns, as the kernel takes them; the same for every panel."""
        return [s for v in (self.x, self.t) for s in (_descriptors(v, self.config) if self.config.bulk else (v, v))]

    def _launch(self, table: Tensor, partial: Tensor, a: Tensor | None, clip: int, count: int, p0: int, p1: int) -> None:
        c, n = self.config, self.x.shape[1]
        width = c.cols // c.slices
        out = out_mirror = None
        if a is not None:
            out, out_mirror = a, a
            if c.bulk:
                out, out_mirror = (TensorDescriptor(a, list(a.shape), list(a.stride()), [1, *block]) for block in ((c.rows, width), (width, c.rows)))
        device_code.pair_kernel[(len(table), count)](
            *self.sources,
            out,
            out_mirror,
            self.inverse,
            self.ratio,
            self.weight,
            self.frame,
            self.factor,
            table,
            partial,
            n,
            self.inverse.shape[1],
            0 if a is None else a.shape[1],
            0 if a is None else a.stride(1),
            clip,
            p0,
            p1,
            self.margin,
            D=self.x.shape[2],
            E=self.t.shape[2],
            ROWS=c.rows,
            COLS=c.cols,
            DEPTH=c.depth,
            SLICES=c.slices,
            SUPER=c.super,
            PENALTY=self.penalty,
            HUBER=HUBER,
            FRAMED=self.frame is not None,
            WEIGHTED=self.weight is not None,
            WRITE=a is not None,
            UNIT=self.unit is not None,
            BULK=c.bulk,
            PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3",
            INTERPRET=INTERPRET,
            num_warps=c.warps,
            num_stages=c.stages,
            maxnreg=c.registers,
        )


def plan(clips: int, n: int, elements: int, step: int) -> tuple[list[tuple[int, int]], int]:
    """Row panels [(first, end)] whose part of A is at most ``elements``, and how many clips are taken together.

    A panel starts at a multiple of ``step`` and has at least ``step`` rows, whatever it takes.
    """
    if n * _aligned(n) <= elements:
        return [(0, n)], min(clips, elements // (n * _aligned(n)))
    panels, start = [], 0
    while start < n:
        rows = max(elements // _aligned(n - start) // step, 1) * step
        panels.append((start, min(start + rows, n)))
        start += rows
    return panels, 1


@lru_cache(maxsize=64)
def tile_table(n: int, p0: int, p1: int, rows: int, cols: int, device: torch.device) -> Tensor:
    """First row and column of every tile of a panel [tiles, 2], int32: squares on or above the diagonal, grouped for L2."""
    side = max(rows, cols)
    low, high, last = p0 // side, -(-p1 // side), -(-n // side)
    tiles = []
    for group in range(low, high, GROUP):
        for c in range(group, last):
            for r in range(group, min(group + GROUP, high, c + 1)):
                tiles += [
                    (row, col) for row in range(r * side, min((r + 1) * side, n), rows) for col in range(c * side, min((c + 1) * side, n), cols)
                ]
    return torch.tensor(tiles, dtype=torch.int32).to(device)


def _aligned(columns: int) -> int:
    """Row lengths of A: descriptors and cuBLAS want multiples of 16 bytes."""
    return -(-columns // 64) * 64


def _descriptors(x: Tensor, config: Config) -> list[TensorDescriptor]:
    """[B, N, D] for blocks of rows and of columns; rows that are no multiples of 16 bytes are padded with zeros."""
    missing = -x.shape[2] % (16 // x.element_size())
    if missing or x.data_ptr() % 16:
        x = F.pad(x, (0, missing))
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, config.depth]) for rows in (config.rows, config.cols)]


def _add_product(total: Tensor, a: Tensor, x: Tensor, *, fresh: bool) -> None:
    """total (+)= a x in fp32, in place; ``fresh`` overwrites what was there."""
    beta = 0 if fresh else 1
    if total.is_cuda and a.dtype != torch.float32:
        torch.baddbmm(total, a, x, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.baddbmm_(a.float(), x.float(), beta=beta)
