"""Processes: torchrun starts them, this joins them. The frozen base is replicated, LoRA gradients are averaged flat."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among ``size``; ``rank`` 0 writes files and speaks."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """The indices of ``count`` items that fall to this rank, in contiguous blocks."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)


def join(device: str = "auto") -> World:
    """Join the process group that torchrun announces in the environment; alone without one."""
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        # long: at the gate and while clips are written, the others wait for the first
        dist.init_process_group("nccl" if cuda else "gloo", device_id=place if cuda else None, timeout=timedelta(hours=3))
    return World(rank, size, place)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def send(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; from the host to a GPU through pinned memory, so that the host does not wait for what the GPU still has to do.

    ``x`` may be any view, also one that repeats its elements (``expand``), which pinned memory cannot hold as it is.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Average gradients over ranks in one flat all-reduce; a parameter without gradient counts as zero."""
    if world.size == 1:
        return
    parameters = list(parameters)
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= world.size
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p).clone()


def gather(values: Tensor, world: World) -> Tensor:
    """Concatenate [n, ...] over ranks in rank order, the same on every rank; n may differ between ranks."""
    if world.size == 1:
        return values
    out: list = [None] * world.size
    dist.all_gather_object(out, values.cpu())
    return torch.cat(out).to(values.device)


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's ``value``, which can be pickled, in rank order, the same on every rank."""
    if world.size == 1:
        return [value]
    out: list[Any] = [None] * world.size
    dist.all_gather_object(out, value)
    return out


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        dist.barrier()
