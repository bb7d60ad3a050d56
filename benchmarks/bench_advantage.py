"""Group advantages and the clipped surrogate against eager PyTorch, torch.compile and a CUDA graph of the eager form.

    python benchmarks/bench_advantage.py [--quick] [--sizes 64,4096,1048576] [--out FILE.json]

N samples (``--sizes``) of 3 rewards in groups of 16; the surrogate over N x 3 steps. Small sizes are bound by launches,
so ``launches`` is counted too (on a GPU, from a profile). Large ones are bound by memory: the floor is the bytes of
rewards, ids and advantages over the measured copy bandwidth. ``graph`` replays a captured eager form without its
checks: the least that so many launches can cost. The operations check their rewards on the host, for which they wait
for the GPU once; ``launch`` is the cuda form without that wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import flags, timing
from benchmarks.harness import Bench, Case
from benchmarks.variant import compiled, graphed, passes
from ldo.ops import extension, group_advantage, grpo_surrogate, native

GROUP, REWARDS, STEPS = 16, 3, 3


def plain(rewards_NR: Tensor, weights_R: Tensor) -> Tensor:
    """The group advantage written down for groups of one size."""
    grouped = rewards_NR.view(-1, GROUP, REWARDS)
    deviation = grouped.std(1, correction=0, keepdim=True) + 1e-4
    normalised = (grouped - grouped.mean(1, keepdim=True)) / deviation
    return ((normalised * weights_R).sum(-1)).clamp(-5, 5).flatten()


def plain_surrogate(logp: Tensor, old: Tensor, advantage: Tensor, away: Tensor) -> Tensor:
    """The clipped surrogate written down, with a penalty on the distance ``away`` from the reference policy."""
    ratio = (logp - old).exp()
    advantages = advantage[:, None]
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.9, 1.1)).mean() + 0.1 * away.mean()


def launches(work: Callable[[], object]) -> int:
    """Kernels that one call puts on the GPU."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # copies and fills are no kernels
    return sum("Mem" not in name for name in on_gpu)


def advantage_case(bench: Bench, samples: int) -> None:
    """Group advantages of ``samples`` samples in all their forms."""
    device = bench.device
    ids = torch.arange(samples, device=device) // GROUP
    weights = torch.tensor([1.0, 0.5, 0.25], device=device)
    bytes_moved = samples * (REWARDS * 4 + 8 + 4)
    count = timing.rotation(bytes_moved, device)
    input_sets = [(torch.randn(samples, REWARDS, device=device), weights) for _ in range(count)]
    native_form = "cuda" if device.type == "cuda" else "cpp"
    variants = {
        native_form: lambda rewards, weights: group_advantage(rewards, ids, weights, impl=native_form)[0],
        "launch": lambda rewards, weights: native.launch_advantage(rewards, ids, weights, 0, 5.0, 1e-4, False)[0],
        "reference": lambda rewards, weights: group_advantage(rewards, ids, weights, impl="reference")[0],
        "eager": plain,
        "compile": compiled(plain),
        "graph": graphed(plain),
    }
    # this variant calls the extension directly, with no other form to fall back to
    if extension.load()[0] is None:
        del variants["launch"]
    shape = {"N": samples, "G": samples // GROUP, "R": REWARDS}
    _measure(bench, "advantage", "fwd", shape, input_sets, variants, bytes_moved)


def surrogate_case(bench: Bench, samples: int) -> None:
    """The clipped surrogate with its gradient over ``samples`` samples in all its forms."""
    device = bench.device
    # three inputs and two results of N x S, and N advantages, all fp32
    bytes_moved = samples * STEPS * 4 * 5 + samples * 4
    input_sets = []
    for _ in range(timing.rotation(bytes_moved, device)):
        log_probs = torch.randn(samples, STEPS, device=device)
        away = torch.rand(samples, STEPS, device=device)
        old = log_probs + 0.05 * torch.randn_like(log_probs)
        input_sets.append((log_probs, old, torch.randn(samples, device=device), away))
    native_form = "cuda" if device.type == "cuda" else "cpp"
    losses = {
        native_form: lambda *given: grpo_surrogate(*given, clip=0.1, kl=0.1, impl=native_form).total,
        "eager": plain_surrogate,
        "compile": compiled(plain_surrogate),
    }
    variants = {variant: passes(loss, "fwd+bwd") for variant, loss in losses.items()}
    _measure(bench, "surrogate", "fwd+bwd", {"N": samples, "S": STEPS}, input_sets, variants, bytes_moved)


def _measure(bench: Bench, op: str, kind: str, shape: dict, input_sets: list, variants: dict, moved: int) -> None:
    case = Case(
        op=op,
        kind=kind,
        shape=shape,
        dtype=torch.float32,
        inputs=input_sets,
        variants=variants,
        floor_ms=bench.floor_ms(moved=moved),
        moved=moved,
    )
    for row in bench.measure(case):
        if bench.device.type == "cuda" and row["ms"] is not None:
            row["launches"] = launches(lambda row=row: variants[row["variant"]](*input_sets[0]))
            print(f"  {row['variant']}: {row['launches']} launches, {1e3 * row['ms']:.1f} us", flush=True)


def main() -> int:
    arguments = flags.arguments(__doc__).parse_args()
    if arguments.model:
        print("no model: small sizes cost launches, large ones cost bytes")
        return 0
    # the bytes that count as moved are those of fp32
    arguments.dtype = "fp32"
    bench = Bench(arguments)
    print(f"the extension: {extension.load()[1]}")
    sizes = [64, 4096]
    if bench.device.type == "cuda":
        sizes += [2**20] if arguments.quick else [2**20, 2**24]
    for size in arguments.sizes or sizes:
        # whole groups
        samples = max(size // GROUP, 1) * GROUP
        bench.attempt(advantage_case, samples)
        bench.attempt(surrogate_case, samples)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
