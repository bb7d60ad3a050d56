"""What each rank of a few gloo processes does for tests/core/test_distributed.py.

A file of its own, for every rank imports it and nothing else of the tests.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from ldo.core.distributed import Processes, average_gradients, barrier, gather_rows, join_processes, leave_processes
from ldo.ops import group_advantage

SPREADS = ("blocks", "cards")


def small_problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, inputs and targets, the same on every rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1), nn.Linear(5, 5))  # the last is never used
    return model, torch.randn(12, 4), torch.randn(12, 1)


def spanning() -> tuple[Tensor, Tensor, Tensor]:
    """Rewards [24, 2] in five groups that span ranks, the groups' ids, and the rewards' weights."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([7, -2, 7, 40, 7, 7, -2, 3, 40, 40, 3, 3, 9, 7, 40, 3, -2, -2, 7, 40, 3, 7, 40, -2])
    return torch.randn(24, 2, generator=generator) * 3, ids, torch.tensor([1.0, 0.5])


def work(rank: int, size: int, port: int, out: str) -> None:
    """Average gradients, gather rows and take advantages; what this rank gets goes to files in ``out``."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    world = join_processes("cpu")
    torch.save(_gradients(world), f"{out}/gradients-{rank}.pt")
    for spread in SPREADS:
        torch.save(_advantages(world, spread), f"{out}/{spread}-{rank}.pt")
    barrier(world)
    leave_processes()
    os._exit(0)  # torch's threads can abort a process whose interpreter is already gone


def _gradients(world: Processes) -> dict:
    model, inputs, targets = small_problem()
    mine = list(world.share(12))
    (model[1](model[0](inputs[mine])) - targets[mine]).square().mean().backward()
    if world.rank == 0:
        model[1].bias.grad = None  # a parameter without gradient on one rank counts as zero there
    average_gradients(list(model.parameters()), world)
    gathered = gather_rows(torch.arange(world.rank + 1) + 10 * world.rank, world)
    return {"grads": [parameter.grad for parameter in model.parameters()], "gathered": gathered}


def _advantages(world: Processes, spread: str) -> dict:
    """This rank's part of the samples, dealt out in blocks or like cards."""
    rewards, ids, weights = spanning()
    mine = list(world.share(24)) if spread == "blocks" else list(range(world.rank, 24, world.size))
    advantage, stats = group_advantage(rewards[mine], ids[mine], weights, world=world)
    last = world.rank == world.size - 1
    broken = rewards.clone()
    broken[mine[0] if last else 0, 1] = float("nan") if last else 0.0
    message = ""
    try:
        group_advantage(broken[mine], ids[mine], weights, world=world)
    except ValueError as error:
        message = str(error)
    return {"mine": mine, "advantage": advantage, "stats": vars(stats), "message": message}
