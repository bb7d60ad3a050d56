"""What ran, by the profiler: where a piece of work spends its time, which attention kernels it launched and whether a backend promised them.

Names were read from the CUDA library of torch 2.11 (PyTorch's own kernels) and from published traces of the others. A
kernel that sounds like attention but belongs to no family below is kept too, as "unknown": better a strange line than a
silent gap.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import memory

PASSES = ("fwd", "bwd")
ATTENTION = re.compile(r"attention|flash|fmha|sdpa", re.IGNORECASE)
UNKNOWN = "unknown"

# Each family's kernels in the forward and in the backward; the last two are operators of a CPU, or partly.
FAMILIES = {
    "FlashAttention-3": ("FlashAttnFwd", "FlashAttnBwd"),
    "FlashAttention-2": ("(?<!pytorch_flash::)flash_fwd", "(?<!pytorch_flash::)flash_bwd"),
    "PyTorch's FlashAttention-2": ("pytorch_flash::flash_fwd", "pytorch_flash::flash_bwd"),
    "cuDNN": ("cudnn.*sdpa(?!.*bprop)", "cudnn.*sdpa.*bprop|cudnn::fusion::(compute_dot_do_o|convert_dq)"),
    "CUTLASS, memory-efficient": ("fmha_cutlassF", "fmha_cutlassB"),
    "PyTorch's for a CPU": ("flash_attention_for_cpu$", "flash_attention_for_cpu_backward"),
    "written out": ("(?i:softmax.*forward)|aten::_softmax$", "(?i:softmax.*backward)"),
}
_FLASH2 = ("FlashAttention-2",)
_PYTORCH = ("PyTorch's FlashAttention-2", "cuDNN", "CUTLASS, memory-efficient", "PyTorch's for a CPU", "written out")
PROMISED = {  # the families that a backend of ldo.attention may run
    "native": _PYTORCH,
    "flash3": ("FlashAttention-3",),
    "flash2": _FLASH2,
    "hub_flash3": ("FlashAttention-3",),
    "hub_flash2": _FLASH2,
    "xformers": ("FlashAttention-3", "FlashAttention-2", "PyTorch's FlashAttention-2", "CUTLASS, memory-efficient"),
    "sdpa_cudnn": ("cuDNN",),
    "sdpa_flash": ("PyTorch's FlashAttention-2", "PyTorch's for a CPU"),
    "sdpa_efficient": ("CUTLASS, memory-efficient",),
    "sdpa_math": ("written out",),
}


@dataclass(frozen=True)
class Ran:
    """Launches of one kernel and their seconds together."""

    count: int
    seconds: float


def family(name: str) -> tuple[str, str] | None:
    """Family and pass ("fwd", "bwd") of a kernel's name; (UNKNOWN, "") for one that only sounds like attention, None for any other."""
    for found, patterns in FAMILIES.items():
        for kind, pattern in zip(PASSES, patterns, strict=True):
            if re.search(pattern, name):
                return found, kind
    return (UNKNOWN, "") if ATTENTION.search(name) else None


def ran(work: Callable[[], Any], device: torch.device) -> dict[str, Ran]:
    """The attention kernels that ``work()`` launches on a GPU, or the operators of known families on a CPU; the costliest first."""
    return profile(work, device).attention


@dataclass(frozen=True)
class Profile:
    """Of one run of some work: seconds by the clock, kernels (on a CPU operators), the seconds they ran, the costliest of them, attention's own."""

    wall_s: float
    kernels: int
    busy_s: float
    top: dict[str, Ran]
    attention: dict[str, Ran]

    @property
    def busy(self) -> float:
        """The share of the time in which something ran; the rest waited for the host. On several streams, or threads, it may exceed 1."""
        return self.busy_s / self.wall_s

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        top = [{"name": name[:120], "count": r.count, "ms": round(1e3 * r.seconds, 3)} for name, r in self.top.items()]
        return {"wall_s": self.wall_s, "kernels": self.kernels, "busy_s": self.busy_s, "busy": round(self.busy, 4), "top": top}


def profile(work: Callable[[], Any], device: torch.device, top: int = 10) -> Profile:
    """Where ``work()`` spends its time. On a GPU only its kernels are recorded, which slows the host least; warm it up first."""
    gpu = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with memory.quiet(), torch.profiler.profile(activities=[kind], acc_events=True) as found:
        began = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize(device)
        wall = time.perf_counter() - began
    where = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    ran: dict[str, Ran] = {}
    for event in found.key_averages():
        if event.device_type == where and (gpu or event.key.startswith("aten::")):
            ran[event.key] = Ran(event.count, (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6)
    ordered = dict(sorted(ran.items(), key=lambda row: -row[1].seconds))
    attention = {name: r for name, r in ordered.items() if (told := family(name)) and (gpu or told[0] != UNKNOWN)}
    kernels = {name: r for name, r in ordered.items() if not name.startswith(("Memcpy", "Memset"))}
    count = sum(r.count for r in kernels.values())
    return Profile(wall, count, sum(r.seconds for r in ordered.values()), dict(list(ordered.items())[:top]), attention)


def families(names: Iterable[str], kind: str = "") -> set[str]:
    """The families among kernels' names; with ``kind`` those of one pass (an unknown kernel may be of either)."""
    told = [family(name) for name in names]
    return {t[0] for t in told if t and (not kind or t[1] in (kind, ""))}


def wrong(backend: str, names: Iterable[str], kinds: Iterable[str] = PASSES) -> str | None:
    """How the kernels that ran differ from what ``backend`` promises in these passes, in one line; None if they do not."""
    names = list(names)
    problems = []
    for kind in kinds:
        found = families(names, kind)
        others = sorted(found - set(PROMISED[backend]))
        if not found:
            problems.append(f"no attention kernel in the {kind}")
        elif others:
            problems.append(f"the {kind} ran {', '.join(others)}")
    return "; ".join(problems) or None
