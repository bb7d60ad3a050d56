"""What a warm call of the fused operations costs the host: kernels launched, operations dispatched, microseconds. Needs no GPU.

    python benchmarks/bench_host.py [--repeat 300] [--out FILE.json]

Launches are recorded and not made, and what is allocated is handed out again, so that only Python and PyTorch are left. Below some 8192 tokens
this is what a call takes as long as nothing else keeps the GPU busy. The least of many calls is shown: others had to share their core.
"""

from __future__ import annotations

import argparse
import json
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install
if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: it then takes CPU tensors

from benchmarks import common
from ldo.kernels import relation, relation_plan, support
from ldo.ops import relation_loss

RECIPE = (4, 4096, 1536, 1024)  # clips, tokens, student and teacher widths of recipes/wan2.1-1.3b.yaml
FRAME = 256  # tokens


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
    """Names of the kernels and products that are launched within, none of which runs; the configuration is an sm_90's."""
    names: list[str] = []
    empty, kept = torch.empty, {}

    def again(*size: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        key = (size, dtype)
        if key not in kept:
            kept[key] = empty(*size, dtype=dtype, device=device)
        return kept[key]

    def like(x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return again(*x.shape, dtype=dtype or x.dtype, device=x.device)

    def chosen(device: torch.device, dtype: torch.dtype, gradient: bool) -> relation_plan.Config:
        return (relation_plan.WITH_GRADIENT if gradient else relation_plan.CONFIGS)[90, dtype != torch.float32]

    relation_plan.plan.cache_clear()
    with (
        mock.patch.object(support.Launch, "__call__", lambda self, *_: names.append(self.name)),
        mock.patch.object(relation, "_add_product", lambda *_, **__: names.append("product")),
        mock.patch.object(relation_plan, "choose_config", chosen),
        mock.patch.object(relation, "written", lambda dtype: dtype),  # the interpreter alone writes another
        mock.patch.object(torch, "empty", again),
        mock.patch.object(torch, "empty_like", like),
    ):
        yield names
    relation_plan.plan.cache_clear()


def recipe_call() -> Callable[[bool], Any]:
    """The relation loss in the recipes' own case, with or without its gradient."""
    b, n, d, e = RECIPE
    student, teacher = (torch.zeros(b, n, width, dtype=torch.bfloat16) for width in (d, e))
    frame, weight = torch.arange(n) // FRAME, torch.ones(b, n)

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
    launched, times = list(names), []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - began))
    return {"launches": launched, "dispatched": len(seen.names), "us": min(times), "us_median": statistics.median(times)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=300)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    if not support.INSTALLED:
        parser.error("this needs Triton")
    torch.set_num_threads(1)
    rows, call = [], recipe_call()
    with recorded() as names:
        for kind, gradient in (("fwd", False), ("fwd+bwd", True)):
            found = measure(lambda gradient=gradient: call(gradient), names, args.repeat)
            shape = dict(zip(("B", "N", "Ds", "Dt"), RECIPE, strict=True))
            rows.append({"op": "relation", "pass": kind, "shape": shape, **found})
            launches, took = len(found["launches"]), f"{found['us']:.0f} us (median {found['us_median']:.0f})"
            print(f"relation {kind:7} {launches} launches, {found['dispatched']} dispatches, {took}")
    if args.out:
        args.out.write_text(json.dumps({**common.record(torch.device("cpu")), "host": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
