"""Where the error of the relation loss's gradient comes from, in bf16, where few pairs pass the hinge's margin.

    python benchmarks/gradient_error.py [--sizes 8192] [--widths 1920x1024] [--out FILE.json]

Each source by itself, as the relative error of the whole gradient against fp64:

    flips      pairs that pass the margin in the kernel's arithmetic and not in exact arithmetic, or the reverse
    A          A = G / (|x_i| |x_j|) in bf16
    output     the gradient itself in bf16
    all        what the operation returns

once with the gains that compensate the tensor cores' truncation (``kernels/relation_plan.py``), and once without. On a
GPU the kernel's own A shows which pairs it took. On a CPU its arithmetic is imitated: an fp32 accumulator that adds 16
products at a time and is rounded towards zero. The share of the accumulator that a step loses, ``Config.truncation``,
is fitted there: 3.1e-8, which is what an H200 was measured to lose.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_align, flags, provenance, show
from benchmarks.harness import relative_error, write_json
from benchmarks.model import USUAL

# products that a tensor core adds at a time
STEP = 16


def truncated(exact: Tensor) -> Tensor:
    """fp64 to fp32, towards zero."""
    nearest = exact.float()
    closer_to_zero = torch.nextafter(nearest, torch.zeros_like(nearest))
    return torch.where(nearest.abs().double() > exact.abs(), closer_to_zero, nearest)


def imitated(student: Tensor, teacher: Tensor, gains: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """d_ij [N, N] in fp64 as the pair kernel computes it.

    One accumulator for both: the products of the teacher, scaled, then those of the student, truncated at every step.
    """

    def onto(accumulator: Tensor, features: Tensor) -> Tensor:
        for block in features.double().split(STEP, dim=1):
            accumulator = truncated(accumulator.double() + block @ block.T)
        return accumulator

    student_norm = student.float().norm(dim=1)
    teacher_norm = teacher.float().norm(dim=1)
    # so that dividing the sums by the student's norms normalises both
    ratio = student_norm / teacher_norm * gains[1]
    inverse = gains[0] / student_norm
    accumulator = onto(torch.zeros(len(student), len(student), device=student.device), teacher)
    accumulator = onto(accumulator * -ratio[:, None] * ratio[None, :], student)
    return (accumulator * (inverse[:, None] * inverse[None, :])).double()


def exact(student: Tensor, teacher: Tensor) -> Tensor:
    """d_ij = x_i x_j - y_i y_j of normalised tokens x and y: [N, N] in fp64, exactly 0 on the diagonal."""
    x = torch.nn.functional.normalize(student.double(), dim=1)
    y = torch.nn.functional.normalize(teacher.double(), dim=1)
    return (x @ x.T - y @ y.T).fill_diagonal_(0)


def kernel_slopes(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """The signs of A [N, N] that the pair kernel wrote: 0, 1 or -1."""
    from ldo.kernels import relation

    # A is a workspace that the operation keeps to itself; the product A X is where it can be read.
    signs = []
    product = relation._add_product

    def look(total: Tensor, a: Tensor, x: Tensor, *, fresh: bool) -> None:
        signs.append(a[0].sign().double())
        product(total, a, x, fresh=fresh)

    relation._add_product = look
    try:
        gradient(student, teacher, margin)
    finally:
        relation._add_product = product
    assert len(signs) == 1, "A came in several panels: choose a smaller N"
    return signs[0]


def gradient(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """What the operation returns, in fp64, times N^2."""
    from ldo.ops import relation_loss

    leaf = student[None].detach().requires_grad_()
    # times N^2: ``gradient_of`` has no mean over the pairs
    (len(student) ** 2 * relation_loss(leaf, teacher[None], margin=margin, impl="triton")).backward()
    return leaf.grad[0].double()


def slopes(d: Tensor, margin: float) -> Tensor:
    """The derivative of the hinge in d."""
    return d.sign() * (d.abs() > margin)


def gradient_of(slope: Tensor, student: Tensor, half: bool = False) -> Tensor:
    """The gradient [N, D] in fp64 that belongs to slopes [N, N]; ``half``: with A in bf16.

    A_ij = slope_ij / (|x_i| |x_j|), v = 2 A x, and the gradient is v less its part along x.
    """
    x = student.double()
    norm = x.norm(dim=1)
    A = slope / (norm[:, None] * norm[None, :])
    if half:
        A = A.bfloat16().double()
    v = 2 * A @ x
    return v - x * ((x * v).sum(1) / norm**2)[:, None]


def lost(d: Tensor, student: Tensor, teacher: Tensor) -> float:
    """The share of its value that the accumulator loses in a step, by least squares over all pairs.

    With s = x_i x_j and t = -y_i y_j, each loses its final value times half its own steps, since it grows step by step.
    The sum t comes first, so it also loses its whole value in every step of s.
    """
    x = torch.nn.functional.normalize(student.double(), dim=1)
    y = torch.nn.functional.normalize(teacher.double(), dim=1)
    s = x @ x.T
    t = -(y @ y.T)
    student_steps = student.shape[1] / STEP
    teacher_steps = teacher.shape[1] / STEP
    expected = s * student_steps / 2 + t * (student_steps + teacher_steps / 2)
    products = (expected * (s + t - d)).fill_diagonal_(0)
    return float(products.sum() / expected.fill_diagonal_(0).square().sum())


@contextmanager
def _gains(wanted: bool, truncation: float | None) -> Iterator[Callable[[int, int], tuple[float, float]]]:
    """With or without gains: those of the kernel are switched off in place.

    Those of the imitation are given as a function of the widths.
    """
    from ldo.kernels import relation_plan

    usual = relation_plan.gains
    config = relation_plan.Config(128, 256, 64, 2, 8, 4, True, truncation=truncation or 0.0)

    def gains(ds: int, dt: int) -> tuple[float, float]:
        return usual(config, ds, dt) if wanted else (1.0, 1.0)

    if not wanted:
        relation_plan.gains = lambda *_: (1.0, 1.0)
    # plans keep the gains that they were made with
    relation_plan.plan.cache_clear()
    try:
        yield gains
    finally:
        relation_plan.gains = usual
        relation_plan.plan.cache_clear()


def rows(n: int, ds: int, dt: int, device: torch.device) -> list[dict]:
    """One row for each treatment of truncation."""
    generator = torch.Generator(device).manual_seed(n + ds)
    student, teacher, _, _ = bench_align.inputs("few", 1, n, ds, dt, generator, torch.bfloat16)
    student = student[0]
    teacher = teacher[0]
    margin = bench_align.options("few", ds, dt)["margin"]
    wanted = slopes(exact(student, teacher), margin)
    reference = gradient_of(wanted, student)
    on_gpu = device.type == "cuda"
    # On a GPU the kernel takes the truncation from its configuration; of the imitation it is fitted.
    measured = None if on_gpu else lost(imitated(student, teacher), student, teacher)
    measured_rows = []
    for gained in (False, True):
        with _gains(gained, measured) as gains:
            if on_gpu:
                slope = kernel_slopes(student, teacher, margin)
                returned = gradient(student, teacher, margin)
            else:
                slope = slopes(imitated(student, teacher, gains(ds, dt)), margin)
                returned = gradient_of(slope, student, half=True).bfloat16().double()
        errors = {
            "flips": relative_error(gradient_of(slope, student), reference),
            "A": relative_error(gradient_of(wanted, student, half=True), reference),
            "output": relative_error(reference.bfloat16().double(), reference),
            "all": relative_error(returned, reference),
        }
        flipped = int((slope != wanted).sum())
        row = {
            "op": "gradient error",
            "shape": {"B": 1, "N": n, "Ds": ds, "Dt": dt},
            "dtype": "bf16",
            "margin": margin,
            "gains": gained,
            "arithmetic": "the kernel's" if on_gpu else "imitated",
            "active": int(wanted.abs().sum()),
            "flipped": flipped,
            "truncation": measured,
            "errors": errors,
        }
        measured_rows.append(row)
        print(show.gradient_error(row))
    return measured_rows


def main() -> int:
    parser = flags.arguments(__doc__)
    parser.add_argument("--widths", type=flags.pairs, metavar="DSxDT,...", help="student x teacher")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result = provenance.record(device) | {"rows": []}
    for size in arguments.sizes or ([8192] if device.type == "cuda" else [1024]):
        for widths in arguments.widths or [USUAL]:
            result["rows"] += rows(size, *widths, device)
            if arguments.out:
                write_json(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
