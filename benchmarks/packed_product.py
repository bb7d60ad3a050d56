"""G X with a ternary G of one byte or two bits a value, as an experiment: the operation itself multiplies a bf16 G.

With the hinge and all pairs alike, G_ij is 0, 1 or -1 times a constant. A bf16 of 2.0 has one bit set, the one below the sign,
so the two upper bits of its upper byte say it all: a byte is widened by one shift, two bits by a shift and a mask, and no
table or conversion is needed. The factor of 2 is taken out at the end.

    bytes    [M, K]       the upper bytes of bf16
    crumbs   [M, K / 4]   four a byte; of every block of 4 DEPTH columns byte c holds columns c, c + DEPTH, c + 2 DEPTH, c + 3 DEPTH,
                          so that a block of bytes unpacks into four operands in place, without moving a value between threads
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ldo.kernels.support import INTERPRET, architecture


@dataclass(frozen=True)
class Cut:
    """A tile of the product is rows x cols; depth is what one step multiplies. ``bulk``: X comes through a tensor descriptor."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    bulk: bool


CUTS = {80: Cut(128, 128, 32, 8, 3, False), 90: Cut(128, 256, 64, 8, 3, True), 100: Cut(128, 128, 64, 4, 3, True)}
ON_CPU = Cut(32, 32, 16, 4, 1, True)
GROUP = 8  # rows of tiles that are walked together, so that X stays in L2


def choose_cut(device: torch.device) -> Cut:
    return CUTS[architecture(device)] if device.type == "cuda" else ON_CPU


def pack(g_MK: Tensor, bits: int, depth: int) -> Tensor:
    """The signs of ``g_MK`` at 8 or 2 ``bits`` a value, uint8 [M, K'], with zeros up to what the kernel walks and 16-byte rows."""
    planes = 8 // bits
    step = max(planes * depth, 16 * planes)
    code = (g_MK > 0).to(torch.uint8) * 1 + (g_MK < 0).to(torch.uint8) * 3
    code = F.pad(code, (0, -code.shape[1] % step))
    if bits == 8:
        return code << 6
    code = code.view(len(code), -1, planes, depth)
    packed = code[:, :, 0].clone()
    for plane in range(1, planes):
        packed |= code[:, :, plane] << 2 * plane
    return packed.flatten(1)


def product(packed: Tensor, x_KN: Tensor, bits: int, cut: Cut | None = None) -> Tensor:
    """G X, fp32 [M, N], of a ``pack``-ed G and a bf16 X whose rows are multiples of 16 bytes."""
    cut = cut or choose_cut(x_KN.device)
    (m, _), (k, n) = packed.shape, x_KN.shape
    out = torch.empty(m, n, dtype=torch.float32, device=x_KN.device)
    x = TensorDescriptor(x_KN, [k, n], [n, 1], [cut.depth, cut.cols]) if cut.bulk else x_KN
    product_kernel[(-(-m // cut.rows) * -(-n // cut.cols),)](
        packed,
        x,
        out,
        m,
        n,
        k,
        packed.shape[1],
        ROWS=cut.rows,
        COLS=cut.cols,
        DEPTH=cut.depth,
        BITS=bits,
        GROUP=GROUP,
        BULK=cut.bulk,
        INTERPRET=INTERPRET,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return out


@triton.jit
def product_kernel(
    packed,
    x,
    out,
    M,
    N,
    K,
    stride,  # bytes of a row of ``packed``
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,  # 8 or 2
    GROUP: tl.constexpr,
    BULK: tl.constexpr,  # x is a tensor descriptor, else a pointer
    INTERPRET: tl.constexpr,
):
    """One tile of out [M, N] = G X. Rows of X past K are read as zeros, and so are columns of G."""
    across = tl.cdiv(N, COLS)
    band = tl.program_id(0) // (GROUP * across)
    high = tl.minimum(tl.cdiv(M, ROWS) - band * GROUP, GROUP)
    inside_band = tl.program_id(0) % (GROUP * across)
    row, col = (band * GROUP + inside_band % high) * ROWS, (inside_band // high) * COLS
    i = row + tl.arange(0, ROWS)
    bytes_at = packed + tl.minimum(i, M - 1).to(tl.int64)[:, None] * stride + tl.arange(0, DEPTH)[None, :]
    acc = tl.zeros((ROWS, COLS), tl.float32)
    PLANES: tl.constexpr = 8 // BITS
    for step in range(stride // DEPTH * PLANES):
        code = tl.load(bytes_at + step // PLANES * DEPTH).to(tl.uint16)  # from the L1 in three of four steps where PLANES is 4
        if BITS == 2:
            left = (code << tl.full((1, 1), 14 - step % PLANES * 2, tl.uint16)) & 0xC000
        else:
            left = code << 8
        k = step * DEPTH
        if BULK:
            right = x.load([k, col])
        else:
            r, c = k + tl.arange(0, DEPTH), col + tl.arange(0, COLS)
            right = tl.load(x + r.to(tl.int64)[:, None] * N + c[None, :], mask=(r < K)[:, None] & (c < N)[None, :], other=0.0)
        if INTERPRET:  # Triton's interpreter multiplies bf16 wrongly
            acc = tl.dot((left.to(tl.uint32) << 16).to(tl.float32, bitcast=True), right.to(tl.float32), acc)
        else:
            acc = tl.dot(left.to(tl.bfloat16, bitcast=True), right, acc)
    j = col + tl.arange(0, COLS)
    tl.store(out + i.to(tl.int64)[:, None] * N + j[None, :], acc * 0.5, mask=(i < M)[:, None] & (j < N)[None, :])
