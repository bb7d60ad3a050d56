"""What the relation loss costs on paper: operations, bytes, and time at assumed rates. Nothing here is measured.

A multiply-add counts 2. Per N^2 of one clip, with student width Ds and teacher width Dt:

    floor            3Ds + Dt     S and T by symmetry (Ds + Dt), one full product G X (2Ds)
    ours             as the floor, with what the tiles of the diagonal compute twice
    eager, compile   6Ds + 2Dt    S and T in full, and two products in the backward
    checkpoint       8Ds + 4Dt    S and T once more

Ours: a pair kernel over the upper triangle in super-tiles of 256 x 256, those of the diagonal computed whole, writes
G in bf16; cuBLAS then multiplies G by X. While G and its mirror fit in the workspace, that is one panel and one
product. Beyond, row panels of the upper trapezoid, and per panel H[p] += G X[p0:] and H[p1:] += G' X[p] in fp32.
A stage takes the longer of its arithmetic and its bytes; stages add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

TILE = 256
WORKSPACE = 256 * 2**20
SIZES = (3600, 4096, 10240, 23040, 32768)
STUDENTS = (1536, 1920, 3072, 5120)
TEACHERS = (1024, 1408)
USUAL = (1920, 1024)  # student x teacher, of most measurements
RESIDUAL_ROWS = {"fwd": 2, "fwd+bwd": 5}  # row lengths that the residual must move: both inputs; for the backward once more, and the gradient


@dataclass(frozen=True)
class Rates:
    """Assumed, not measured. ``pair``: the pair kernel's share of the matmul rate (docs/kernels.md says why); ``launch``: seconds per kernel."""

    tflops: float = 790.0
    tbs: float = 4.3
    pair: float = 0.75
    launch: float = 5e-6

    def stage(self, flops: float, moved: float, share: float = 1.0, launches: int = 1) -> float:
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
    """Least operations of the N^2 form; forward alone needs S and T only."""
    return b * n**2 * (3 * ds + dt if kind == "fwd+bwd" else ds + dt)


def closed_flops(n: int, ds: int, dt: int, kind: str = "fwd+bwd", b: int = 1) -> float:
    """Least operations of the closed form of squared, margin 0, uniform: X'X and T'T by symmetry, X'T, and for the gradient X (X'X) and T (T'X)."""
    forward = ds**2 + dt**2 + 2 * ds * dt
    return b * n * (forward + (2 * ds**2 + 2 * ds * dt if kind == "fwd+bwd" else 0))


def ours(n: int, ds: int, dt: int, rates: Rates) -> Cost:
    """Design A with a bf16 workspace."""
    tiles = -(-n // TILE)
    if 2 * n**2 <= WORKSPACE:
        panels = [(0, tiles)]
    else:
        panels, start = [], 0
        while start < tiles:
            rows = max(1, int(WORKSPACE / (2 * TILE * TILE * (tiles - start))))
            panels.append((start, min(tiles, start + rows)))
            start = panels[-1][1]
    mirrored = len(panels) == 1
    inputs = n * (ds + dt) * 2
    flops = moved = pairs = product = 0.0
    for first, last in panels:
        rows, width = (last - first) * TILE, (tiles - first) * TILE
        count = sum(tiles - r for r in range(first, last))
        pair_flops = count * TILE**2 * 2 * (ds + dt)
        g = 2 * n**2 if mirrored else 2 * rows * width
        pair_moved = g + inputs * (width / (tiles * TILE)) + rows * (ds + dt) * 2
        if mirrored:
            product_flops, product_moved, launches = 2 * n**2 * ds, g + 2 * n * ds + 4 * n * ds, 1
        else:
            below = width - rows
            product_flops = 2 * rows * width * ds + 2 * rows * below * ds
            product_moved = 2 * g + 2 * width * ds + 2 * rows * ds + 8 * ds * (rows + below)
            launches = 2
        flops, moved = flops + pair_flops + product_flops, moved + pair_moved + product_moved
        pairs += rates.stage(pair_flops, pair_moved, rates.pair)
        product += rates.stage(product_flops, product_moved, launches=launches)
    ends = 2 * inputs + n * ds * (4 + 2 + 2)  # norms first; H and x to the gradient last
    stages = {"before": rates.stage(0, inputs, launches=3), "pairs": pairs, "product": product}
    stages["after"] = rates.stage(0, ends - inputs, launches=2)
    workspace = 2 * n**2 if mirrored else max(2 * (b - a) * TILE * (tiles - a) * TILE for a, b in panels)
    return Cost(flops, moved + ends, sum(stages.values()), workspace + 6 * n * ds, stages)


def _dense(n: int, ds: int, dt: int, rates: Rates, forward: float, backward: float, live: float, launches: int) -> Cost:
    """``forward`` and ``backward``: bf16 N x N matrices read or written by elementwise work; ``live``: held at the worst moment."""
    matrix = 2.0 * n**2
    products = [2 * n**2 * ds, 2 * n**2 * dt, 2 * n**2 * ds, 2 * n**2 * ds]
    seconds = sum(rates.stage(f, matrix) for f in products) + rates.stage(0, (forward + backward) * matrix, launches=launches)
    ends = n * (ds + dt) * 2 * 3 + n * ds * 2 * 6
    moved = (len(products) + forward + backward) * matrix + ends
    return Cost(sum(products), moved, seconds + rates.stage(0, ends, launches=4), live * matrix + 6 * n * ds + 2 * n * dt)


def eager(n: int, ds: int, dt: int, rates: Rates) -> Cost:
    """Dense autograd: subtraction, abs, shift, clamp, mean; then their backwards, one kernel each."""
    return _dense(n, ds, dt, rates, forward=3 + 2 + 2 + 2 + 1, backward=1 + 3 + 2 + 3, live=3, launches=9)


def compiled(n: int, ds: int, dt: int, rates: Rates) -> Cost:
    """The same with the elementwise chains fused: read S and T, reduce; read them again, write G."""
    return _dense(n, ds, dt, rates, forward=2, backward=3, live=2, launches=2)


def checkpointed(n: int, ds: int, dt: int, rates: Rates, rows: int = 1024) -> Cost:
    """Eager by row chunks, its forward twice."""
    once = _dense(n, ds, dt, rates, forward=2 * 10, backward=9, live=0, launches=14 * -(-n // rows))
    again = 2 * n**2 * (ds + dt)
    extra = 3 * 2 * min(rows, n) * n + 6 * n * ds + 2 * n * dt
    return Cost(once.flops + again, once.moved + 4 * n**2, once.seconds + rates.stage(again, 4 * n**2), extra)


def table(rates: Rates) -> str:
    """ms, ratio to the floor and MiB of every design, for the field's sizes."""
    designs = {"ours": ours, "compile": compiled, "eager": eager, "checkpoint": checkpointed}
    assumed = f"{rates.tflops:g} TFLOP/s, {rates.tbs:g} TB/s, pair kernel at {rates.pair:.0%}"
    lines = [
        f"static model of the relation loss, fwd+bwd, bf16; assumed, not measured: {assumed}",
        f"{'N':>6} {'Ds':>5} {'Dt':>5} {'TFLOP':>7} {'floor ms':>9} | " + " | ".join(f"{name:>10} ms  x floor   GB    MiB" for name in designs),
    ]
    for dt in TEACHERS:
        for ds in STUDENTS:
            for n in SIZES:
                flops = floor_flops(n, ds, dt)
                floor = flops / rates.tflops / 1e9
                cells = []
                for design in designs.values():
                    cost = design(n, ds, dt, rates)
                    cells.append(f"{1e3 * cost.seconds:13.3f} {1e3 * cost.seconds / floor:8.2f} {cost.moved / 1e9:5.1f} {cost.extra / 2**20:6.0f}")
                lines.append(f"{n:6} {ds:5} {dt:5} {flops / 1e12:7.2f} {floor:9.3f} | " + " | ".join(cells))
    return "\n".join([*lines, "", *split(rates)])


def split(rates: Rates, ds: int = USUAL[0], dt: int = USUAL[1], sizes: Sequence[int] = (4096, 8192, 16384, 32768)) -> list[str]:
    """Ours by stage, ms, and the forward alone, which writes no G and so ends with the pairs."""
    lines = [
        f"ours by stage, ms, {ds} x {dt}",
        f"{'N':>6} {'before':>8} {'pairs':>8} {'product':>8} {'after':>8} {'fwd':>8} x floor {'fwd+bwd':>8} x floor",
    ]
    for n in sizes:
        s = ours(n, ds, dt, rates).stages
        cells = []
        for kind, seconds in (("fwd", s["before"] + s["pairs"]), ("fwd+bwd", sum(s.values()))):
            cells.append(f"{1e3 * seconds:8.3f} {seconds * rates.tflops * 1e12 / floor_flops(n, ds, dt, kind):7.2f}")
        lines.append(f"{n:6} " + " ".join(f"{1e3 * v:8.3f}" for v in s.values()) + " " + " ".join(cells))
    return lines
