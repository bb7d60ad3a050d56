"""Who measured: the device, the versions that its numbers depend on, and the commit. The head of every result file."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> str:
    """A GPU as its driver names it; a CPU by its model and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # platform.processor() says only the architecture on Linux
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    processor = match.group(1).strip() if match else platform.machine()
    return f"{processor} CPU, {torch.get_num_threads()} threads"


def slug(device: torch.device) -> str:
    """``describe`` as a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", describe(device).lower()).strip("-")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        # one line for each GPU of the machine, all with the same driver
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return found


def commit() -> str | None:
    """The commit of the tree, with "-dirty" if the tree differs from it (results do not count); None without git.

    The environment variable LDO_COMMIT takes precedence: it names the commit in a copy of the tree that has no .git, or
    the .git of another repository.
    """
    if named := os.environ.get("LDO_COMMIT"):
        return named
    head = _output("git", "rev-parse", "HEAD")
    if not head:
        return None
    # a run writes results into the tree: they must not make the next part's tree a different one
    changed = _output("git", "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return f"{head}-dirty" if changed else head


def _output(*command: str) -> str:
    """What a command prints; empty if it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def record(device: torch.device) -> dict[str, Any]:
    """The head of every result file."""
    return {
        "device": describe(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
