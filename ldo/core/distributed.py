"""Processes: torchrun starts them, this joins them. The frozen base is replicated, LoRA gradients are averaged."""

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
class Processes:
    """This process, one of ``size``; the one with ``rank`` 0 writes files and reports."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Is this the process that writes and reports?"""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The indices of ``count`` items that fall to this rank, in contiguous blocks."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)


def join_processes(device: str = "auto") -> Processes:
    """Join the process group that torchrun describes in the environment; without one, run as a single process."""
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    uses_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    own_device = torch.device("cpu")
    if uses_cuda:
        own_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(own_device)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if uses_cuda else "gloo"
        # a long timeout: at the gate and while clips are written, the others wait for the first
        dist.init_process_group(backend, device_id=own_device if uses_cuda else None, timeout=timedelta(hours=3))
    return Processes(rank, size, own_device)


def leave_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; ``x`` may be any view, also one that repeats its elements (``expand``)."""
    if device.type == "cuda" and x.device.type == "cpu":
        # through pinned memory, so that the host does not wait for the GPU's pending work; pinned memory cannot
        # hold a view as it is
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)


def average_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Average gradients over ranks in one flat all-reduce; a parameter without gradient counts as zero."""
    if processes.size == 1:
        return
    parameters = list(parameters)
    gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
    # one all-reduce of everything: LoRA gradients are many and small
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= processes.size
    pieces = flat.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter).clone()


def gather_rows(values: Tensor, processes: Processes) -> Tensor:
    """Concatenate [n, ...] over ranks in rank order, the same on every rank; n may differ between ranks."""
    if processes.size == 1:
        return values
    return torch.cat(gather_objects(values.cpu(), processes)).to(values.device)


def gather_objects(value: Any, processes: Processes) -> list[Any]:
    """Every rank's ``value``, which can be pickled, in rank order, the same on every rank."""
    if processes.size == 1:
        return [value]
    everyone: list[Any] = [None] * processes.size
    dist.all_gather_object(everyone, value)
    return everyone


def barrier(processes: Processes) -> None:
    """Wait for every rank."""
    if processes.size > 1:
        dist.barrier()
