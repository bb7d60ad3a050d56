"""The relation loss against what people write without it: time, memory, gradient error, and the distance to the floor.

    python benchmarks/bench_align.py [--quick] [--sizes 4096,8192] [--widths 1920x1024] [--cases few,many]
                                     [--out FILE.json]
    python benchmarks/bench_align.py --model        a static model of operations and bytes; runs nothing

Cases, all with randn features; the margin leaves a known share of pairs active (``active``, measured on 256 rows):

    few       hinge, all pairs equal, 0.9% active
    many      hinge, a student of rank 8: most pairs active
    squared   squared penalty, margin 0, all pairs equal: a closed form exists
    framed    hinge, same-frame and other pairs counted separately, token weights: the real use

Variants:

    triton, chunked     ours
    eager, compile      dense autograd, and torch.compile of it
    checkpoint          row chunks, computed again in the backward
    chunk-compile       the same with chunks that torch.compile fuses
    panels              the upper triangle by cuBLAS, a compiled epilogue, a manual backward: the best of PyTorch's own
    bmm                 each frame against a copy of the clip, as the field does it: uniform pairs, so not in ``framed``

Below 8192 tokens the host's time to launch decides between them, so all but chunked are also measured as a replayed
CUDA graph ("triton-graph"). In ``squared`` ours is the closed form, whatever the impl, where that is less work. The
floor of forward and backward is B N^2 (3Ds + Dt) / r, of only the forward B N^2 (Ds + Dt) / r, with r the measured
matmul rate; of ``squared`` it is that of the closed form where that is less.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import baselines, flags, model, timing
from benchmarks.harness import Bench, Case, relative_error
from benchmarks.model import USUAL
from benchmarks.variant import compiled, graphed, passes
from ldo.ops import relation_loss

CASES = ("few", "many", "squared", "framed")
SIZES = (3600, 4096, 8192, 10240, 16384, 23040, 32768)
WIDTHS = ((1536, 1024), (3072, 1024), (5120, 1408))
FRAMES = 16
# tokens below which launches may take longer than what they launch
HOST_BOUND = 8192
# not chunked: it looks at frames on the host, which a CUDA graph cannot
GRAPHED = ("triton", "eager", "compile", "checkpoint", "chunk-compile", "panels", "bmm")
# of the student with many active pairs
RANK = 8
# standard deviations beyond which 0.9% of a normal distribution lies
FEW = 2.612
# More tokens than these are checked on a sample of as many rows: fp64 is slow, on a GPU too.
EXACT_ROWS = {"cuda": 16384, "cpu": 512}


def features(
    case: str, b: int, n: int, d: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Features [B, N, D] on the generator's device, with rows of very different length, which must not matter."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if case == "many":
        # tokens of a low rank are similar to each other, as those of the teacher are not: most pairs differ
        tokens = draw(b, n, RANK) @ draw(b, RANK, d) + 0.3 * draw(b, n, d)
    else:
        tokens = draw(b, n, d)
    return (tokens * (0.5 + 3 * torch.rand(b, n, 1, generator=generator, device=device))).to(dtype)


def inputs(
    case: str, b: int, n: int, ds: int, dt: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Student [B, N, Ds] and teacher [B, N, Dt] on the generator's device.

    The case ``framed`` adds frames [N] and weights [B, N] from 0.1 to 1.
    """
    device = generator.device
    student = features(case, b, n, ds, generator, device, dtype)
    teacher = features("few", b, n, dt, generator, device, dtype)
    if case != "framed":
        return student, teacher, None, None
    frame = torch.arange(n, device=device) * FRAMES // n
    weight = torch.rand(b, n, generator=generator, device=device) * 0.9 + 0.1
    return student, teacher, frame, weight


def options(case: str, ds: int, dt: int) -> dict:
    """The keywords of the loss.

    ``few``: the margin that 0.9% of the differences of two random geometries exceed (0.1 at 1920 x 1024).
    """
    if case == "squared":
        return {"margin": 0.0, "penalty": "squared"}
    if case == "many":
        return {"margin": 0.1, "penalty": "hinge"}
    # the cosine of two random directions in D dimensions has a variance of 1 / D
    return {"margin": round(FEW * (1 / ds + 1 / dt) ** 0.5, 4), "penalty": "hinge"}


def active(student: Tensor, teacher: Tensor, margin: float) -> float:
    """The share of pairs beyond the margin, among 256 rows of the first clip."""
    unit_student = torch.nn.functional.normalize(student[0].float(), dim=-1)
    unit_teacher = torch.nn.functional.normalize(teacher[0].float(), dim=-1)
    differences = unit_student[:256] @ unit_student.T - unit_teacher[:256] @ unit_teacher.T
    return float((differences.abs() > margin).double().mean())


def variants(case: str, tokens: int, keywords: dict, kind: str) -> dict[str, Callable[..., Tensor]]:
    """All ways to compute one case."""
    dense = baselines.dense(**keywords)

    def ours(impl: str) -> baselines.RelationLoss:
        return lambda student, teacher, frame, weight: relation_loss(
            student, teacher, frame_N=frame, weight_BN=weight, impl=impl, **keywords
        )

    losses = {
        "triton": ours("triton"),
        "chunked": ours("chunked"),
        "eager": dense,
        "compile": compiled(dense),
        "checkpoint": baselines.checkpointed(**keywords),
        "chunk-compile": baselines.checkpointed(**keywords, compiled=True),
        "panels": baselines.panels(**keywords),
    }
    if case != "framed" and tokens % FRAMES == 0:
        losses["bmm"] = baselines.bmm(frames=FRAMES, **keywords)
    calls = {variant: passes(loss, kind) for variant, loss in losses.items()}
    if tokens < HOST_BOUND:
        calls |= {f"{variant}-graph": graphed(calls[variant]) for variant in GRAPHED if variant in calls}
    return calls


def measure(bench: Bench, name: str, n: int, ds: int, dt: int, kinds: list[str]) -> None:
    """One case on one shape, its passes on the same inputs."""
    device, dtype, batch = bench.device, bench.dtype, bench.args.batch
    # from the shape, so that a case has the same features whatever is measured before it
    generator = torch.Generator(device).manual_seed(n + ds)
    input_sets = []
    for _ in range(timing.rotation(batch * n * (ds + dt) * dtype.itemsize, device)):
        student, teacher, frame, weight = inputs(name, batch, n, ds, dt, generator, dtype)
        if weight is not None:
            # as in training: the frames that the teacher has seen are no forecast and teach nothing
            weight[:, frame < FRAMES // 4] = 0
        input_sets.append((student, teacher, frame, weight))
    keywords = options(name, ds, dt)
    extra = {"case": name, **keywords, "active": active(*input_sets[0][:2], keywords["margin"])}
    for kind in kinds:
        error = None
        if kind == "fwd+bwd":
            rows = torch.randperm(n, generator=generator, device=device)[: EXACT_ROWS[device.type]]
            extra["grad_rows"] = len(rows)
            exact = baselines.gradient_rows(*input_sets[0], rows, **keywords)

            def error(gradient: Tensor, rows: Tensor = rows, exact: Tensor = exact) -> float:
                return relative_error(gradient[:, rows], exact)

        operations = model.floor_flops(n, ds, dt, kind, batch)
        if name == "squared":
            operations = min(operations, model.closed_flops(n, ds, dt, kind, batch))
        case = Case(
            op="relation",
            kind=kind,
            shape={"B": batch, "N": n, "Ds": ds, "Dt": dt},
            dtype=dtype,
            inputs=input_sets,
            variants=variants(name, n, keywords, kind),
            floor_ms=bench.floor_ms(operations),
            flops=operations,
            error=error,
            extra=dict(extra),
        )
        bench.measure(case)


def plan(args: argparse.Namespace, gpu: bool) -> list[tuple[str, int, int, int]]:
    """Case and shape of each measurement. Any of --sizes, --widths, --cases asks for all combinations of them."""
    if args.sizes or args.widths or args.cases:
        sizes = args.sizes or ([4096, 8192] if gpu else [1024])
        cases = args.cases or ["few"]
        return [(case, size, *widths) for widths in args.widths or [USUAL] for case in cases for size in sizes]
    if not gpu:
        return [("few", 1024, 1536, 1024), ("framed", 1024, 1536, 1024), ("squared", 2048, 256, 256)]
    if args.quick:
        return [("few", 8192, *USUAL), ("squared", 16384, *USUAL), ("framed", 8192, *USUAL)]
    by_size = [("few", size, *USUAL) for size in SIZES]
    by_case = [(case, size, *USUAL) for case in ("many", "squared", "framed") for size in (4096, 8192, 16384, 32768)]
    by_width = [("few", 10240, *widths) for widths in WIDTHS]
    return by_size + by_case + by_width


def main() -> int:
    parser = flags.arguments(__doc__)
    parser.add_argument("--widths", type=flags.pairs, metavar="DSxDT,...", help="student x teacher")
    parser.add_argument("--cases", type=flags.words, metavar=",".join(CASES))
    parser.add_argument("--passes", type=flags.words, default=["fwd", "fwd+bwd"], metavar="fwd,fwd+bwd")
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    parser.add_argument("--assume-tflops", type=float, default=model.Rates.tflops, help="of the static model")
    parser.add_argument("--assume-tbs", type=float, default=model.Rates.tbs, help="of the static model")
    parser.add_argument(
        "--assume-pair",
        type=float,
        default=model.Rates.pair,
        help="share of the matmul rate, of the model's pair kernel",
    )
    arguments = parser.parse_args()
    if set(arguments.cases or ()) - set(CASES):
        parser.error(f"cases are {', '.join(CASES)}")
    gpu = torch.device(arguments.device).type == "cuda"
    # Times of a CPU say nothing about a GPU: the model is at least a prediction.
    if arguments.model or not (gpu or arguments.quick):
        print(model.table(model.Rates(arguments.assume_tflops, arguments.assume_tbs, arguments.assume_pair)))
    if arguments.model:
        return 0
    bench = Bench(arguments)
    for case_and_shape in plan(arguments, gpu):
        bench.attempt(measure, *case_and_shape, arguments.passes)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
