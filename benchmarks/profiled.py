"""What ran, by the profiler: where a piece of work spends its time, and which attention kernels it launched.

The kernels are told apart by name, to compare them with what a backend of ldo.models.attention promises. Names were
read from the CUDA library of torch 2.11 (PyTorch's own kernels) and from published traces of the others. A kernel that
sounds like attention but belongs to no family below is kept as "unknown": better a strange line than a silent gap.
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

# Each family's kernels in the forward and in the backward; some names of the last two are operators of a CPU.
FAMILIES = {
    "FlashAttention-3": ("FlashAttnFwd", "FlashAttnBwd"),
    # PyTorch has a copy of these kernels, with the same names in a namespace of its own.
    "FlashAttention-2": ("(?<!pytorch_flash::)flash_fwd", "(?<!pytorch_flash::)flash_bwd"),
    "PyTorch's FlashAttention-2": ("pytorch_flash::flash_fwd", "pytorch_flash::flash_bwd"),
    "cuDNN": ("cudnn.*sdpa(?!.*bprop)", "cudnn.*sdpa.*bprop|cudnn::fusion::(compute_dot_do_o|convert_dq)"),
    "CUTLASS, memory-efficient": ("fmha_cutlassF", "fmha_cutlassB"),
    "PyTorch's for a CPU": ("flash_attention_for_cpu$", "flash_attention_for_cpu_backward"),
    "written out": ("(?i:softmax.*forward)|aten::_softmax$", "(?i:softmax.*backward)"),
}
_FLASH2 = ("FlashAttention-2",)
_PYTORCH = ("PyTorch's FlashAttention-2", "cuDNN", "CUTLASS, memory-efficient", "PyTorch's for a CPU", "written out")
# the families that a backend of ldo.models.attention may run
PROMISED = {
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
    """Launches of one kernel and the sum of their seconds."""

    count: int
    seconds: float


def family(name: str) -> tuple[str, str] | None:
    """Family and pass ("fwd", "bwd") of a kernel, by its name.

    (UNKNOWN, "") for one that only sounds like attention, None for any other.
    """
    for candidate, patterns in FAMILIES.items():
        for kind, pattern in zip(PASSES, patterns, strict=True):
            if re.search(pattern, name):
                return candidate, kind
    return (UNKNOWN, "") if ATTENTION.search(name) else None


def ran(work: Callable[[], Any], device: torch.device) -> dict[str, Ran]:
    """The attention kernels that ``work()`` launches on a GPU, or on a CPU the operators of known families.

    The costliest comes first.
    """
    return profile(work, device).attention


@dataclass(frozen=True)
class Profile:
    """One run of some work. On a CPU operators take the place of kernels."""

    wall_s: float  # seconds by the clock
    kernels: int  # how many were launched
    busy_s: float  # seconds that they ran, summed
    top: dict[str, Ran]  # the costliest
    attention: dict[str, Ran]  # those of attention

    @property
    def busy(self) -> float:
        """The share of the time in which something ran; the rest waited for the host.

        On several streams, or threads, it may exceed 1.
        """
        return self.busy_s / self.wall_s

    def record(self) -> dict[str, Any]:
        """The profile as result files have it."""
        costliest = [
            {"name": kernel[:120], "count": launches.count, "ms": round(1e3 * launches.seconds, 3)}
            for kernel, launches in self.top.items()
        ]
        return {
            "wall_s": self.wall_s,
            "kernels": self.kernels,
            "busy_s": self.busy_s,
            "busy": round(self.busy, 4),
            "top": costliest,
        }


def profile(work: Callable[[], Any], device: torch.device, top: int = 10) -> Profile:
    """Where ``work()`` spends its time. Warm it up first."""
    # On a GPU only kernels are recorded: recording operators too would slow the host, and so leave the GPU idle.
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    # acc_events: without it PyTorch warns that only the events of the last cycle are kept, of which there is one
    with memory.quiet(), torch.profiler.profile(activities=[activity], acc_events=True) as profiled:
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall_seconds = time.perf_counter() - started
    device_type = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    by_name: dict[str, Ran] = {}
    for event in profiled.key_averages():
        if event.device_type == device_type and (on_gpu or event.key.startswith("aten::")):
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            by_name[event.key] = Ran(event.count, microseconds / 1e6)
    ordered = dict(sorted(by_name.items(), key=lambda item: -item[1].seconds))
    attention = {}
    for kernel, launches in ordered.items():
        found_family = family(kernel)
        # on a CPU many operators only sound like attention
        if found_family and (on_gpu or found_family[0] != UNKNOWN):
            attention[kernel] = launches
    kernels = [launches for kernel, launches in ordered.items() if not kernel.startswith(("Memcpy", "Memset"))]
    return Profile(
        wall_s=wall_seconds,
        kernels=sum(launches.count for launches in kernels),
        busy_s=sum(launches.seconds for launches in ordered.values()),
        top=dict(list(ordered.items())[:top]),
        attention=attention,
    )


def families(names: Iterable[str], kind: str = "") -> set[str]:
    """The families among kernels' names; with ``kind`` those of one pass (an unknown kernel may be of either)."""
    found = [family(kernel) for kernel in names]
    return {each[0] for each in found if each and (not kind or each[1] in (kind, ""))}


def wrong(backend: str, kernel_names: Iterable[str], kinds: Iterable[str] = PASSES) -> str | None:
    """How the kernels that ran differ from what ``backend`` promises in these passes, in one line, or None."""
    kernel_names = list(kernel_names)
    problems = []
    for kind in kinds:
        families_seen = families(kernel_names, kind)
        others = sorted(families_seen - set(PROMISED[backend]))
        if not families_seen:
            problems.append(f"no attention kernel in the {kind}")
        elif others:
            problems.append(f"the {kind} ran {', '.join(others)}")
    return "; ".join(problems) or None
