"""A cache on disk: tensors named by what they were made from, and facts about files; safe under many processes and kill -9.

An entry is one safetensors file whose name is the SHA-256 of its *key*: everything that its values depend on. So nothing
is ever stale: what changes gets another name. Entries are written under a name of their own, synced and moved into
place. A reader meets a whole entry or none; of two writers of one entry the later wins, with the same values.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldo.config import RecipeError
from ldo.progress import Bar

THREADS = 16
KEPT = 256  # prompts whose embeddings stay in memory once read, of those asked for last
DAY = 86400.0  # seconds


# ---------------------------------------------------------------------------------------------- entries


def entry(folder: Path, kind: str, key: dict[str, Any]) -> Path:
    """Where the entry of ``key`` (JSON values) lies; ``kind`` is its sub-folder and part of the key."""
    name = hashlib.sha256(json.dumps({"kind": kind, **key}, sort_keys=True).encode()).hexdigest()
    return folder / kind / name[:2] / f"{name}.safetensors"


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write an entry, whole or not at all. RecipeError where the folder takes no files."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    part = path.with_name(f"{path.stem}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(save(tensors, {"entry": path.stem, "crc": str(_crc(tensors))}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise RecipeError(f"data.cache: {path.parent} cannot be written ({error.strerror}); free space there, or set data.cache") from None


def present(path: Path) -> bool:
    """Is there an entry of the right name and length? Its values are not read."""
    try:
        with safe_open(path, "pt") as file:  # refuses a file whose length is not what its header says
            return (file.metadata() or {}).get("entry") == path.stem
    except (OSError, SafetensorError):
        return False


def read(path: Path) -> dict[str, Tensor] | None:
    """An entry's tensors; None where there is none, or one that is cut short, not ours, or damaged."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if about.get("entry") == path.stem else {}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):
        return None
    return tensors if tensors and about["crc"] == str(_crc(tensors)) else None


def _crc(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return crc


def tidy(folder: Path) -> None:
    """Remove what killed writers left behind more than a day ago."""
    for part in folder.rglob("*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > DAY:
                part.unlink()


# ---------------------------------------------------------------------------------------------- facts about files


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its process, however that ends. Without effect where a file system has no locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 - the lock lives as long as the file is open
    except OSError as error:
        raise RecipeError(f"data.cache: {path.parent} cannot be written ({error.strerror}); set data.cache to a folder that can") from None
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def facts(files: Sequence[Path], journal: Path, make: Callable[[Path], dict], name: str) -> list[dict]:
    """``make(file)`` of every file, by threads and with a bar called ``name``; what ``journal`` knows is not made again.

    A file counts as the same while its path, size and time of change are. The journal is JSON lines, appended as they
    come, so a killed process loses at most a line. Processes that ask together wait for the first and then read.
    """
    stamps = {file: _stamp(file) for file in files}
    with locked(journal.with_suffix(".lock")):
        known = _journal(journal)
        new = [file for file in stamps if stamps[file] not in known]
        if new:
            with open(journal, "a") as out, ThreadPoolExecutor(THREADS) as pool, Bar(name, len(new)) as bar:
                try:
                    for file, found in zip(new, pool.map(make, new), strict=True):
                        known[stamps[file]] = found
                        out.write("\n" + json.dumps([stamps[file], found]))  # the line before may have been cut short
                        out.flush()
                        bar.advance()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [known[stamps[file]] for file in files]


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"


def _journal(path: Path) -> dict[str, dict]:
    known = {}
    if path.exists():
        for line in path.read_text().split("\n"):
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                stamp, found = json.loads(line)
                known[stamp] = found
    return known


def content(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_identity(folder: Path, parts: Sequence[str], cache: Path) -> str:
    """SHA-256 over names and contents of the files of ``parts`` (glob patterns in ``folder``); large files are read once."""
    files = sorted({file for part in parts for file in folder.glob(part) if file.is_file()})
    found = facts(files, cache / "models.jsonl", lambda file: {"content": content(file)}, "weights")
    pairs = [[str(file.relative_to(folder)), fact["content"]] for file, fact in zip(files, found, strict=True)]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
