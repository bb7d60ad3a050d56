"""What the relation loss costs on paper: operations, bytes, and time at assumed rates. Nothing here is measured.

A multiply-add counts as 2. Per N^2 of one clip, with student width Ds and teacher width Dt:

    floor            3Ds + Dt     S and T by symmetry (Ds + Dt), one full product G X (2Ds)
    ours             as the floor, plus what the tiles on the diagonal compute twice
    eager, compile   6Ds + 2Dt    S and T in full, and two products in the backward
    checkpoint       8Ds + 4Dt    S and T once more

Ours: a pair kernel over the upper triangle in super-tiles of 256 x 256, those on the diagonal computed whole, writes
G in bf16; cuBLAS then multiplies G by X. While G and its mirror image fit in the workspace, that is one panel and one
product. Beyond that there are row panels of the upper trapezoid, each with H[p] += G X[p0:] and H[p1:] += G' X[p] in
fp32. A stage takes the longer of its arithmetic and its bytes; the times of stages add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

TILE = 256
WORKSPACE = 256 * 2**20
SIZES = (3600, 4096, 10240, 23040, 32768)
STUDENTS = (1536, 1920, 3072, 5120)
TEACHERS = (1024, 1408)
# student x teacher width of most measurements
USUAL = (1920, 1024)
# Row lengths that the residual must move: both inputs; for the backward both once more, and the gradient.
RESIDUAL_ROWS = {"fwd": 2, "fwd+bwd": 5}


@dataclass(frozen=True)
class Rates:
    """Rates that are assumed, not measured.

    ``tflops`` of a product, ``tbs`` of device memory; ``pair``: the pair kernel's share of the matmul rate
    (docs/kernels.md says why); ``launch``: seconds per kernel.
    """

    tflops: float = 790.0
    tbs: float = 4.3
    pair: float = 0.75
    launch: float = 5e-6

    def stage(self, flops: float, moved: float, share: float = 1.0, launches: int = 1) -> float:
        """Seconds of a stage: the longer of its arithmetic and its bytes, and its launches."""
        return max(flops / (self.tflops * 1e12 * share), moved / (self.tbs * 1e12)) + launches * self.launch


@dataclass(frozen=True)
class Cost:
    """One implementation on one shape, forward and backward."""

    flops: float
    moved: float  # bytes through device memory
    seconds: float
    extra: float  # bytes live at the worst moment beyond the inputs, gradient included
    stages: dict[str, float] = field(default_factory=dict)  # seconds of ours: before, pairs, product, after


def floor_flops(n: int, ds: int, dt: int, kind: str = "fwd+bwd", b: int = 1) -> float:
    """Least operations of the N^2 form; only the forward needs S and T."""
    return b * n**2 * (3 * ds + dt if kind == "fwd+bwd" else ds + dt)


def closed_flops(n: int, ds: int, dt: int, kind: str = "fwd+bwd", b: int = 1) -> float:
    """Least operations of the closed form of squared, margin 0, uniform.

    X'X and T'T by symmetry, X'T, and for the gradient X (X'X) and T (T'X).
    """
    forward = ds**2 + dt**2 + 2 * ds * dt
    return b * n * (forward + (2 * ds**2 + 2 * ds * dt if kind == "fwd+bwd" else 0))


def ours(n: int, ds: int, dt: int, rates: Rates) -> Cost:
    """Our design: a pair kernel and products by cuBLAS, with a bf16 workspace."""
    tiles = -(-n // TILE)
    panels = _panels(n)
    mirrored = len(panels) == 1
    input_bytes = n * (ds + dt) * 2
    operations = bytes_moved = pairs = product = 0.0
    for first, last in panels:
        rows = (last - first) * TILE
        width = (tiles - first) * TILE
        squares = sum(tiles - index for index in range(first, last))
        pair_operations = squares * TILE**2 * 2 * (ds + dt)
        matrix = 2 * n**2 if mirrored else 2 * rows * width
        pair_bytes = matrix + input_bytes * (width / (tiles * TILE)) + rows * (ds + dt) * 2
        if mirrored:
            product_operations = 2 * n**2 * ds
            product_bytes = matrix + 2 * n * ds + 4 * n * ds
            launches = 1
        else:
            below = width - rows
            product_operations = 2 * rows * width * ds + 2 * rows * below * ds
            product_bytes = 2 * matrix + 2 * width * ds + 2 * rows * ds + 8 * ds * (rows + below)
            launches = 2
        operations = operations + pair_operations + product_operations
        bytes_moved = bytes_moved + pair_bytes + product_bytes
        pairs += rates.stage(pair_operations, pair_bytes, rates.pair)
        product += rates.stage(product_operations, product_bytes, launches=launches)
    # norms first; H and x to the gradient last
    end_bytes = 2 * input_bytes + n * ds * (4 + 2 + 2)
    stages = {
        "before": rates.stage(0, input_bytes, launches=3),
        "pairs": pairs,
        "product": product,
        "after": rates.stage(0, end_bytes - input_bytes, launches=2),
    }
    if mirrored:
        workspace = 2 * n**2
    else:
        workspace = max(2 * (last - first) * TILE * (tiles - first) * TILE for first, last in panels)
    return Cost(operations, bytes_moved + end_bytes, sum(stages.values()), workspace + 6 * n * ds, stages)


def _panels(n: int) -> list[tuple[int, int]]:
    """First and last tile row of each panel: one of all rows if G fits in the workspace, else as many rows as fit."""
    tiles = -(-n // TILE)
    if 2 * n**2 <= WORKSPACE:
        return [(0, tiles)]
    panels = []
    start = 0
    while start < tiles:
        # a panel starts at its own diagonal, so that later, narrower panels have more rows
        rows = max(1, int(WORKSPACE / (2 * TILE * TILE * (tiles - start))))
        end = min(tiles, start + rows)
        panels.append((start, end))
        start = end
    return panels


def _dense(n: int, ds: int, dt: int, rates: Rates, forward: float, backward: float, live: float, launches: int) -> Cost:
    """A design with whole N x N matrices in bf16.

    ``forward`` and ``backward``: how many of them elementwise work reads or writes. ``live``: how many are held at the
    worst moment.
    """
    matrix = 2.0 * n**2
    products = [2 * n**2 * ds, 2 * n**2 * dt, 2 * n**2 * ds, 2 * n**2 * ds]
    elementwise = (forward + backward) * matrix
    seconds = sum(rates.stage(product, matrix) for product in products)
    seconds = seconds + rates.stage(0, elementwise, launches=launches)
    end_bytes = n * (ds + dt) * 2 * 3 + n * ds * 2 * 6
    bytes_moved = (len(products) + forward + backward) * matrix + end_bytes
    extra_bytes = live * matrix + 6 * n * ds + 2 * n * dt
    return Cost(sum(products), bytes_moved, seconds + rates.stage(0, end_bytes, launches=4), extra_bytes)


def eager(n: int, ds: int, dt: int, rates: Rates) -> Cost:
    """Dense autograd: subtraction, abs, shift, clamp, mean; then their backwards, one kernel each."""
    return _dense(n, ds, dt, rates, forward=3 + 2 + 2 + 2 + 1, backward=1 + 3 + 2 + 3, live=3, launches=9)


def compiled(n: int, ds: int, dt: int, rates: Rates) -> Cost:
    """The same with the elementwise chains fused: read S and T, reduce; read them again, write G."""
    return _dense(n, ds, dt, rates, forward=2, backward=3, live=2, launches=2)


def checkpointed(n: int, ds: int, dt: int, rates: Rates, rows: int = 1024) -> Cost:
    """Eager by row chunks, its forward twice."""
    single_forward = _dense(n, ds, dt, rates, forward=2 * 10, backward=9, live=0, launches=14 * -(-n // rows))
    repeated = 2 * n**2 * (ds + dt)
    extra_bytes = 3 * 2 * min(rows, n) * n + 6 * n * ds + 2 * n * dt
    return Cost(
        single_forward.flops + repeated,
        single_forward.moved + 4 * n**2,
        single_forward.seconds + rates.stage(repeated, 4 * n**2),
        extra_bytes,
    )


def table(rates: Rates) -> str:
    """ms, ratio to the floor and MiB of every design, for the sizes of common models."""
    designs = {"ours": ours, "compile": compiled, "eager": eager, "checkpoint": checkpointed}
    assumed = f"{rates.tflops:g} TFLOP/s, {rates.tbs:g} TB/s, pair kernel at {rates.pair:.0%}"
    lines = [
        f"static model of the relation loss, fwd+bwd, bf16; assumed, not measured: {assumed}",
        f"{'N':>6} {'Ds':>5} {'Dt':>5} {'TFLOP':>7} {'floor ms':>9} | "
        + " | ".join(f"{design_name:>10} ms  x floor   GB    MiB" for design_name in designs),
    ]
    for teacher, student, size in itertools.product(TEACHERS, STUDENTS, SIZES):
        operations = floor_flops(size, student, teacher)
        floor_ms = operations / rates.tflops / 1e9
        cells = []
        for design in designs.values():
            estimate = design(size, student, teacher, rates)
            cells.append(
                f"{1e3 * estimate.seconds:13.3f} {1e3 * estimate.seconds / floor_ms:8.2f} {estimate.moved / 1e9:5.1f} "
                f"{estimate.extra / 2**20:6.0f}"
            )
        lines.append(
            f"{size:6} {student:5} {teacher:5} {operations / 1e12:7.2f} {floor_ms:9.3f} | " + " | ".join(cells)
        )
    return "\n".join([*lines, "", *split(rates)])


def split(
    rates: Rates, ds: int = USUAL[0], dt: int = USUAL[1], sizes: Sequence[int] = (4096, 8192, 16384, 32768)
) -> list[str]:
    """Milliseconds of ours by stage, and of the forward, which writes no G and so ends with the pairs."""
    lines = [
        f"ours by stage, ms, {ds} x {dt}",
        f"{'N':>6} {'before':>8} {'pairs':>8} {'product':>8} {'after':>8} {'fwd':>8} x floor {'fwd+bwd':>8} x floor",
    ]
    for size in sizes:
        stages = ours(size, ds, dt, rates).stages
        cells = [f"{1e3 * seconds:8.3f}" for seconds in stages.values()]
        for kind, seconds in (("fwd", stages["before"] + stages["pairs"]), ("fwd+bwd", sum(stages.values()))):
            floor_operations = floor_flops(size, ds, dt, kind)
            cells.append(f"{1e3 * seconds:8.3f} {seconds * rates.tflops * 1e12 / floor_operations:7.2f}")
        lines.append(f"{size:6} " + " ".join(cells))
    return lines
