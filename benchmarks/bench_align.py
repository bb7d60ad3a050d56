"""The relation loss against what people write without it: time, memory, gradient error, and the distance to the floor.

    python benchmarks/bench_align.py [--quick] [--sizes 4096,8192] [--widths 1920x1024] [--cases few,many] [--out FILE.json]
    python benchmarks/bench_align.py --model        a static model of operations and bytes; runs nothing

Cases, all with randn features of which the margin leaves a known share of pairs active (``active``, measured on 256 rows):

    few       hinge, all pairs alike, 0.9% active          squared   squared penalty, margin 0, all pairs alike: a closed form exists
    many      hinge, a student of rank 8: most active      framed    hinge, same-frame and other pairs apart, token weights: the real use

Variants: triton, chunked (ours); eager (dense autograd), compile (torch.compile of it), checkpoint (row chunks), chunk-compile (chunks that
torch.compile fuses), panels (the upper triangle by cuBLAS with a compiled epilogue and a backward by hand: the best of PyTorch's own parts),
bmm (each frame against a copy of the clip, as the field has it: uniform pairs, so not in ``framed``). Below 8192 tokens the host's time to
launch decides between them, so each but chunked is there as a replayed CUDA graph as well ("triton-graph"). In ``squared`` ours is the
closed form, whatever the impl, where that is less work. The floor of forward and backward is B N^2 (3Ds + Dt) / r, of the forward alone
B N^2 (Ds + Dt) / r, with r the measured matmul rate; of ``squared`` the closed form's where that is less.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import baselines, common, model
from benchmarks.model import USUAL
from ldo.ops import relation_loss

CASES = ("few", "many", "squared", "framed")
SIZES = (3600, 4096, 8192, 10240, 16384, 23040, 32768)
WIDTHS = ((1536, 1024), (3072, 1024), (5120, 1408))
FRAMES = 16
HOST_BOUND = 8192  # tokens below which launches may take longer than what they launch
GRAPHED = ("triton", "eager", "compile", "checkpoint", "chunk-compile", "panels", "bmm")  # chunked looks at frames on the host
RANK = 8  # of the student with many active pairs
FEW = 2.612  # standard deviations beyond which 0.9% of a normal lies
EXACT_ROWS = {"cuda": 16384, "cpu": 512}  # beyond, the gradient is checked on a sample of as many rows


def features(case: str, b: int, n: int, d: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[B, N, D], on the generator's device and then moved; rows of very different length, which must not matter."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x = draw(b, n, RANK) @ draw(b, RANK, d) + 0.3 * draw(b, n, d) if case == "many" else draw(b, n, d)
    return (x * (0.5 + 3 * torch.rand(b, n, 1, generator=generator, device=device))).to(dtype)


def inputs(
    case: str, b: int, n: int, ds: int, dt: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Student [B, N, Ds] and teacher [B, N, Dt] on the generator's device; of ``framed`` also frames [N] and weights [B, N] from 0.1 to 1."""
    device = generator.device
    x, y = features(case, b, n, ds, generator, device, dtype), features("few", b, n, dt, generator, device, dtype)
    if case != "framed":
        return x, y, None, None
    return x, y, torch.arange(n, device=device) * FRAMES // n, torch.rand(b, n, generator=generator, device=device) * 0.9 + 0.1


def options(case: str, ds: int, dt: int) -> dict:
    """The loss's keywords. ``few``: the margin that 0.9% of the differences of two random geometries exceed (0.1 at 1920 x 1024)."""
    if case == "squared":
        return {"margin": 0.0, "penalty": "squared"}
    return {"margin": 0.1 if case == "many" else round(FEW * (1 / ds + 1 / dt) ** 0.5, 4), "penalty": "hinge"}


def active(x: Tensor, y: Tensor, margin: float) -> float:
    """The share of pairs beyond the margin, among 256 rows of the first clip."""
    unit_x, unit_y = (torch.nn.functional.normalize(z[0].float(), dim=-1) for z in (x, y))
    d = unit_x[:256] @ unit_x.T - unit_y[:256] @ unit_y.T
    return float((d.abs() > margin).double().mean())


def variants(case: str, n: int, keywords: dict, kind: str) -> dict[str, Callable[..., Tensor]]:
    """All ways to compute one case."""
    dense = baselines.dense(**keywords)
    losses = {
        "triton": lambda x, y, f, w: relation_loss(x, y, frame_N=f, weight_BN=w, impl="triton", **keywords),
        "chunked": lambda x, y, f, w: relation_loss(x, y, frame_N=f, weight_BN=w, impl="chunked", **keywords),
        "eager": dense,
        "compile": common.compiled(dense),
        "checkpoint": baselines.checkpointed(**keywords),
        "chunk-compile": baselines.checkpointed(**keywords, compiled=True),
        "panels": baselines.panels(**keywords),
    }
    if case != "framed" and n % FRAMES == 0:
        losses["bmm"] = baselines.bmm(frames=FRAMES, **keywords)
    works = {name: common.passes(loss, kind) for name, loss in losses.items()}
    if n < HOST_BOUND:
        works |= {f"{name}-graph": common.graphed(works[name]) for name in GRAPHED if name in works}
    return works


def measure(bench: common.Bench, name: str, n: int, ds: int, dt: int, kinds: list[str]) -> None:
    """One case on one shape, its passes on the same inputs."""
    device, dtype, b = bench.device, bench.dtype, bench.args.batch
    generator = torch.Generator(device).manual_seed(n + ds)
    sets = []
    for _ in range(common.rotation(b * n * (ds + dt) * dtype.itemsize, device)):
        x, y, frame, weight = inputs(name, b, n, ds, dt, generator, dtype)
        if weight is not None:
            weight[:, frame < FRAMES // 4] = 0  # observed tokens teach nothing
        sets.append((x, y, frame, weight))
    keywords = options(name, ds, dt)
    extra = {"case": name, **keywords, "active": active(*sets[0][:2], keywords["margin"])}
    for kind in kinds:
        error = None
        if kind == "fwd+bwd":
            rows = torch.randperm(n, generator=generator, device=device)[: EXACT_ROWS[device.type]]
            extra["grad_rows"] = len(rows)
            exact = baselines.gradient_rows(*sets[0], rows, **keywords)
            error = lambda g, rows=rows, exact=exact: common.relative_error(g[:, rows], exact)  # noqa: E731
        flops = model.floor_flops(n, ds, dt, kind, b)
        if name == "squared":
            flops = min(flops, model.closed_flops(n, ds, dt, kind, b))
        case = common.Case(
            op="relation",
            kind=kind,
            shape={"B": b, "N": n, "Ds": ds, "Dt": dt},
            dtype=dtype,
            inputs=sets,
            variants=variants(name, n, keywords, kind),
            floor_ms=bench.floor_ms(flops),
            flops=flops,
            error=error,
            extra=dict(extra),
        )
        bench.measure(case)


def plan(args: argparse.Namespace, gpu: bool) -> list[tuple[str, int, int, int]]:
    """Case and shape of each measurement. Any of --sizes, --widths, --cases asks for the product of what is given."""
    if args.sizes or args.widths or args.cases:
        sizes = args.sizes or ([4096, 8192] if gpu else [1024])
        return [(c, n, ds, dt) for ds, dt in args.widths or [USUAL] for c in args.cases or ["few"] for n in sizes]
    if not gpu:
        return [("few", 1024, 1536, 1024), ("framed", 1024, 1536, 1024), ("squared", 2048, 256, 256)]
    if args.quick:
        return [("few", 8192, *USUAL), ("squared", 16384, *USUAL), ("framed", 8192, *USUAL)]
    by_size = [("few", n, *USUAL) for n in SIZES]
    by_case = [(c, n, *USUAL) for c in ("many", "squared", "framed") for n in (4096, 8192, 16384, 32768)]
    return by_size + by_case + [("few", 10240, ds, dt) for ds, dt in WIDTHS]


def pairs(text: str) -> list[tuple[int, ...]]:
    """The type of --widths."""
    return [tuple(int(n) for n in pair.split("x")) for pair in text.split(",")]


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--widths", type=pairs, metavar="DSxDT,...", help="student x teacher")
    parser.add_argument("--cases", type=common.words, metavar=",".join(CASES))
    parser.add_argument("--passes", type=common.words, default=["fwd", "fwd+bwd"], metavar="fwd,fwd+bwd")
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    parser.add_argument("--assume-tflops", type=float, default=model.Rates.tflops, help="of the static model")
    parser.add_argument("--assume-tbs", type=float, default=model.Rates.tbs, help="of the static model")
    parser.add_argument("--assume-pair", type=float, default=model.Rates.pair, help="share of the matmul rate, of the model's pair kernel")
    args = parser.parse_args()
    if set(args.cases or ()) - set(CASES):
        parser.error(f"cases are {', '.join(CASES)}")
    gpu = torch.device(args.device).type == "cuda"
    if args.model or not (gpu or args.quick):
        print(model.table(model.Rates(args.assume_tflops, args.assume_tbs, args.assume_pair)))
    if args.model:
        return 0
    bench = common.Bench(args)
    for case, n, ds, dt in plan(args, gpu):
        bench.attempt(measure, case, n, ds, dt, args.passes)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
