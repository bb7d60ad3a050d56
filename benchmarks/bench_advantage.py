"""Group advantages and the clipped surrogate against eager PyTorch, torch.compile and a CUDA graph of the eager form.

    python benchmarks/bench_advantage.py [--quick] [--sizes 64,4096,1048576] [--out FILE.json]

N samples (``--sizes``) of 3 rewards in groups of 16; the surrogate over N x 3 steps. Small sizes are bound by launches, so ``launches``
is counted too (on a GPU, from a profile); large ones by memory: the floor is the bytes of rewards, ids and advantages over the measured
copy bandwidth. ``graph`` replays a captured eager form without its checks: the least that many launches can cost. The ops check their
rewards on the host, for which they wait for the GPU once; ``launch`` is the cuda form without that wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import common
from ldo.ops import extension, group_advantage, grpo_surrogate, native

GROUP, REWARDS, STEPS = 16, 3, 3


def plain(rewards_NR: Tensor, weights_R: Tensor) -> Tensor:
    """As one writes it where all groups have one size."""
    r = rewards_NR.view(-1, GROUP, REWARDS)
    a = (r - r.mean(1, keepdim=True)) / (r.std(1, correction=0, keepdim=True) + 1e-4)
    return ((a * weights_R).sum(-1)).clamp(-5, 5).flatten()


def plain_surrogate(logp: Tensor, old: Tensor, advantage: Tensor, away: Tensor) -> Tensor:
    ratio = (logp - old).exp()
    a = advantage[:, None]
    return torch.maximum(-a * ratio, -a * ratio.clamp(0.9, 1.1)).mean() + 0.1 * away.mean()


def launches(work: Callable[[], object]) -> int:
    """Kernels that one call puts on the GPU."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name for e in seen.events())


def advantage_case(bench: common.Bench, n: int) -> None:
    device = bench.device
    ids = torch.arange(n, device=device) // GROUP
    weights = torch.tensor([1.0, 0.5, 0.25], device=device)
    moved = n * (REWARDS * 4 + 8 + 4)
    sets = [(torch.randn(n, REWARDS, device=device), weights) for _ in range(common.rotation(moved, device))]
    native_form = "cuda" if device.type == "cuda" else "cpp"
    variants = {
        native_form: lambda r, w: group_advantage(r, ids, w, impl=native_form)[0],
        "launch": lambda r, w: native.launch_advantage(r, ids, w, 0, 5.0, 1e-4, False)[0],
        "reference": lambda r, w: group_advantage(r, ids, w, impl="reference")[0],
        "eager": plain,
        "compile": common.compiled(plain),
        "graph": common.graphed(plain),
    }
    if extension.load()[0] is None:
        del variants["launch"]
    _measure(bench, "advantage", "fwd", {"N": n, "G": n // GROUP, "R": REWARDS}, sets, variants, moved)


def surrogate_case(bench: common.Bench, n: int) -> None:
    device = bench.device
    moved = n * STEPS * 4 * 5 + n * 4  # three inputs and two results of N x S
    sets = []
    for _ in range(common.rotation(moved, device)):
        logp, away = torch.randn(n, STEPS, device=device), torch.rand(n, STEPS, device=device)
        sets.append((logp, logp + 0.05 * torch.randn_like(logp), torch.randn(n, device=device), away))
    native_form = "cuda" if device.type == "cuda" else "cpp"
    losses = {
        native_form: lambda x, o, a, d: grpo_surrogate(x, o, a, d, clip=0.1, kl=0.1, impl=native_form).total,
        "eager": plain_surrogate,
        "compile": common.compiled(plain_surrogate),
    }
    variants = {name: common.passes(loss, "fwd+bwd") for name, loss in losses.items()}
    _measure(bench, "surrogate", "fwd+bwd", {"N": n, "S": STEPS}, sets, variants, moved)


def _measure(bench: common.Bench, op: str, kind: str, shape: dict, sets: list, variants: dict, moved: int) -> None:
    case = common.Case(
        op=op, kind=kind, shape=shape, dtype=torch.float32, inputs=sets, variants=variants, floor_ms=bench.floor_ms(moved=moved), moved=moved
    )
    for row in bench.measure(case):
        if bench.device.type == "cuda" and row["ms"] is not None:
            row["launches"] = launches(lambda row=row: variants[row["variant"]](*sets[0]))
            print(f"  {row['variant']}: {row['launches']} launches, {1e3 * row['ms']:.1f} us", flush=True)


def main() -> int:
    args = common.arguments(__doc__).parse_args()
    if args.model:
        print("no model: what small sizes cost is launches, and what large ones cost is bytes")
        return 0
    args.dtype = "fp32"
    bench = common.Bench(args)
    print(f"the extension: {extension.load()[1]}")
    gpu = bench.device.type == "cuda"
    for n in args.sizes or ([64, 4096, 2**20, 2**24] if gpu and not args.quick else [64, 4096, 2**20] if gpu else [64, 4096]):
        n = max(n // GROUP, 1) * GROUP
        bench.attempt(advantage_case, n)
        bench.attempt(surrogate_case, n)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
