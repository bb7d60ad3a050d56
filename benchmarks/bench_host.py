"""What a warm call of the fused operations costs the host: kernels launched, operations dispatched, microseconds.

    python benchmarks/bench_host.py [--repeat 300] [--out FILE.json]

Needs no GPU. Launches are recorded instead of made, and allocations are handed out again, so that only the time of
Python and PyTorch is left. Below some 8192 tokens this is what a call takes as long as nothing else keeps the GPU busy.
The fastest of many calls is shown: slower ones had to share their core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    # Triton reads this when it is imported; only then its kernels take CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks import provenance
from benchmarks.harness import write_json
from ldo.kernels import relation, relation_plan, support
from ldo.ops import relation_loss

# clips, tokens, student and teacher widths of recipes/wan2.1-1.3b.yaml
RECIPE = (4, 4096, 1536, 1024)
# tokens of a frame
FRAME = 256


class Dispatched(TorchDispatchMode):
    """Names of the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Names of the kernels and products that are launched within, none of which runs.

    The configuration is that of an sm_90.
    """
    names: list[str] = []
    allocate = torch.empty
    allocated: dict[tuple, Tensor] = {}

    # On a GPU the caching allocator hands memory out again at once; a CPU's would be timed with the call.
    def again(*size: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        setting = (size, dtype)
        if setting not in allocated:
            allocated[setting] = allocate(*size, dtype=dtype, device=device)
        return allocated[setting]

    def like(x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return again(*x.shape, dtype=dtype or x.dtype, device=x.device)

    def chosen(device: torch.device, dtype: torch.dtype, gradient: bool) -> relation_plan.Config:
        # without a GPU there is no architecture to choose by
        configs = relation_plan.WITH_GRADIENT if gradient else relation_plan.CONFIGS
        return configs[90, dtype != torch.float32]

    relation_plan.plan.cache_clear()
    with (
        mock.patch.object(support.Launch, "__call__", lambda self, *_: names.append(self.name)),
        mock.patch.object(relation, "_add_product", lambda *_, **__: names.append("product")),
        mock.patch.object(relation_plan, "choose_config", chosen),
        # under the interpreter the kernels write another type than on a GPU
        mock.patch.object(relation, "written", lambda dtype: dtype),
        mock.patch.object(torch, "empty", again),
        mock.patch.object(torch, "empty_like", like),
    ):
        yield names
    relation_plan.plan.cache_clear()


def recipe_call() -> Callable[[bool], Any]:
    """The relation loss in the recipes' own case, with or without its gradient."""
    clips, tokens, student_width, teacher_width = RECIPE
    student = torch.zeros(clips, tokens, student_width, dtype=torch.bfloat16)
    teacher = torch.zeros(clips, tokens, teacher_width, dtype=torch.bfloat16)
    frame = torch.arange(tokens) // FRAME
    weight = torch.ones(clips, tokens)

    def call(gradient: bool) -> Any:
        loss = relation_loss(student.requires_grad_(gradient), teacher, frame_N=frame, weight_BN=weight, impl="triton")
        return torch.autograd.grad(loss, student) if gradient else loss

    return call


def measure(call: Callable[[], Any], names: list[str], repeat: int) -> dict[str, Any]:
    """Launches and dispatches of one warm call, and microseconds of ``repeat``."""
    call()
    names.clear()
    with Dispatched() as seen:
        call()
    launched = list(names)
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - started))
    return {
        "launches": launched,
        "dispatched": len(seen.names),
        "us": min(times),
        "us_median": statistics.median(times),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=300)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    if not support.INSTALLED:
        parser.error("this needs Triton")
    # The work of the host is in one thread; a pool would only add waits.
    torch.set_num_threads(1)
    loss_call = recipe_call()
    shape = dict(zip(("B", "N", "Ds", "Dt"), RECIPE, strict=True))
    rows = []
    with recorded() as launched:
        for kind, gradient in (("fwd", False), ("fwd+bwd", True)):
            measured = measure(lambda gradient=gradient: loss_call(gradient), launched, arguments.repeat)
            rows.append({"op": "relation", "pass": kind, "shape": shape, **measured})
            print(
                f"relation {kind:7} {len(measured['launches'])} launches, {measured['dispatched']} dispatches, "
                f"{measured['us']:.0f} us (median {measured['us_median']:.0f})"
            )
    if arguments.out:
        write_json(arguments.out, {**provenance.record(torch.device("cpu")), "host": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
