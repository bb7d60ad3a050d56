"""Where the error of the relation loss's gradient comes from, in bf16, where few pairs pass the hinge's margin.

    python benchmarks/gradient_error.py [--sizes 8192] [--widths 1920x1024] [--out FILE.json]

Each source alone, against fp64, as the relative error of the whole gradient:

    flips      pairs that pass the margin in the kernel's arithmetic and not exactly, or the other way round
    A          A = G / (|x_i| |x_j|) in bf16
    output     the gradient itself in bf16
    all        what the operation returns

once with the gains that make up for the tensor cores' truncation (``kernels/relation_plan.py``), and once without. On a
GPU the kernel's own A tells which pairs it took; on a CPU its arithmetic is imitated: an fp32 accumulator that takes
16 products at a time and is cut off towards zero. The share of the accumulator that a step loses, ``Config.truncation``,
is fitted there: 3.1e-8, which is what an H200 was measured to lose.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import bench_align, common, show
from benchmarks.model import USUAL

STEP = 16  # products that a tensor core adds at a time


def truncated(exact: Tensor) -> Tensor:
    """fp64 to fp32, towards zero."""
    near = exact.float()
    return torch.where(near.abs().double() > exact.abs(), torch.nextafter(near, torch.zeros_like(near)), near)


def imitated(student: Tensor, teacher: Tensor, gains: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """d_ij [N, N] in fp64 as the pair kernel finds it: teacher first, scaled, then the student on top, truncated at every step."""

    def onto(sums: Tensor, features: Tensor) -> Tensor:
        for part in features.double().split(STEP, dim=1):
            sums = truncated(sums.double() + part @ part.T)
        return sums

    student_norm, teacher_norm = (x.float().norm(dim=1) for x in (student, teacher))
    ratio, inverse = student_norm / teacher_norm * gains[1], gains[0] / student_norm
    sums = onto(torch.zeros(len(student), len(student), device=student.device), teacher)
    sums = onto(sums * -ratio[:, None] * ratio[None, :], student)
    return (sums * (inverse[:, None] * inverse[None, :])).double()


def exact(student: Tensor, teacher: Tensor) -> Tensor:
    """d_ij [N, N] in fp64; exactly 0 on the diagonal."""
    x, y = (torch.nn.functional.normalize(v.double(), dim=1) for v in (student, teacher))
    return (x @ x.T - y @ y.T).fill_diagonal_(0)


def kernel_slopes(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """The signs of A [N, N] that the pair kernel wrote: 0, 1 or -1."""
    from ldo.kernels import relation

    seen, product = [], relation._add_product

    def look(total: Tensor, a: Tensor, x: Tensor, *, fresh: bool) -> None:
        seen.append(a[0].sign().double())
        product(total, a, x, fresh=fresh)

    relation._add_product = look
    try:
        gradient(student, teacher, margin)
    finally:
        relation._add_product = product
    assert len(seen) == 1, "one panel is wanted: choose a smaller N"
    return seen[0]


def gradient(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """What the operation returns, in fp64, times N^2."""
    from ldo.ops import relation_loss

    x = student[None].detach().requires_grad_()
    (len(student) ** 2 * relation_loss(x, teacher[None], margin=margin, impl="triton")).backward()
    return x.grad[0].double()


def slopes(d: Tensor, margin: float) -> Tensor:
    """phi' of the hinge."""
    return d.sign() * (d.abs() > margin)


def gradient_of(slope: Tensor, student: Tensor, half: bool = False) -> Tensor:
    """The gradient [N, D] in fp64 that belongs to slopes [N, N]; ``half``: with A in bf16."""
    x = student.double()
    norm = x.norm(dim=1)
    a = slope / (norm[:, None] * norm[None, :])
    v = 2 * (a.bfloat16().double() if half else a) @ x
    return v - x * ((x * v).sum(1) / norm**2)[:, None]


def lost(d: Tensor, student: Tensor, teacher: Tensor) -> float:
    """The share of its value that the accumulator loses a step, fitted to pairs of which it is small: s and y told apart."""
    x, y = (torch.nn.functional.normalize(v.double(), dim=1) for v in (student, teacher))
    s, t = x @ x.T, -(y @ y.T)
    steps_s, steps_t = student.shape[1] / STEP, teacher.shape[1] / STEP
    expected = s * steps_s / 2 + t * (steps_s + steps_t / 2)
    off = (expected * (s + t - d)).fill_diagonal_(0)
    return float(off.sum() / expected.fill_diagonal_(0).square().sum())


def rows(n: int, ds: int, dt: int, device: torch.device) -> list[dict]:
    """One row for each treatment of truncation."""
    generator = torch.Generator(device).manual_seed(n + ds)
    student, teacher, _, _ = bench_align.inputs("few", 1, n, ds, dt, generator, torch.bfloat16)
    student, teacher = student[0], teacher[0]
    margin = bench_align.options("few", ds, dt)["margin"]
    true = exact(student, teacher)
    wanted = slopes(true, margin)
    reference = gradient_of(wanted, student)
    gpu = device.type == "cuda"
    measured = None if gpu else lost(imitated(student, teacher), student, teacher)
    found = []
    for gained in (False, True):
        with _gains(gained, measured) as gains:
            if gpu:
                slope, whole = kernel_slopes(student, teacher, margin), gradient(student, teacher, margin)
            else:
                slope = slopes(imitated(student, teacher, gains(ds, dt)), margin)
                whole = gradient_of(slope, student, half=True).bfloat16().double()
        errors = {
            "flips": common.relative_error(gradient_of(slope, student), reference),
            "A": common.relative_error(gradient_of(wanted, student, half=True), reference),
            "output": common.relative_error(reference.bfloat16().double(), reference),
            "all": common.relative_error(whole, reference),
        }
        flipped = int((slope != wanted).sum())
        row = {"op": "gradient error", "shape": {"B": 1, "N": n, "Ds": ds, "Dt": dt}, "dtype": "bf16", "margin": margin}
        row |= {"gains": gained, "arithmetic": "the kernel's" if gpu else "imitated", "active": int(wanted.abs().sum())}
        found.append(row | {"flipped": flipped, "truncation": measured, "errors": errors})
        print(show.gradient_error(found[-1]))
    return found


class _gains:
    """With or without gains: the kernel's are switched off in place, the imitation's returned as a function of the widths."""

    def __init__(self, wanted: bool, truncation: float | None):
        self.wanted, self.truncation = wanted, truncation

    def __enter__(self):
        from ldo.kernels import relation_plan

        self.plan, self.usual = relation_plan, relation_plan.gains
        config = relation_plan.Config(128, 256, 64, 2, 8, 4, True, truncation=self.truncation or 0.0)
        chosen = (lambda ds, dt: self.usual(config, ds, dt)) if self.wanted else lambda ds, dt: (1.0, 1.0)
        if not self.wanted:
            relation_plan.gains = lambda *_: (1.0, 1.0)
        relation_plan.plan.cache_clear()
        return chosen

    def __exit__(self, *_):
        self.plan.gains = self.usual
        self.plan.plan.cache_clear()


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--widths", type=bench_align.pairs, metavar="DSxDT,...", help="student x teacher")
    args = parser.parse_args()
    device = torch.device(args.device)
    result = common.record(device) | {"rows": []}
    for n in args.sizes or ([8192] if device.type == "cuda" else [1024]):
        for ds, dt in args.widths or [USUAL]:
            result["rows"] += rows(n, ds, dt, device)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
