"""Facts about files, found once and kept in a journal until the file changes; and locks between processes.

Nothing here needs PyTorch: clips are probed before anything else is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from ldo.core.errors import RecipeError
from ldo.core.progress import Bar

THREADS = 16


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its process, however that ends.

    Has no effect where a file system has no locks. RecipeError where the folder takes no files.
    """
    # its fallback, a file that is there while the lock is held, would outlive a killed process, and so block for ever
    lock = FileLock(path, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # opened here first: a folder that takes no files is a mistake of the recipe, one without locks is not
        with open(path, "a"):
            pass
    except OSError as error:
        raise RecipeError(
            f"data.cache: {path.parent} cannot be written ({error.strerror}); set data.cache to a folder that can"
        ) from None
    with contextlib.suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def file_facts(files: Sequence[Path], journal: Path, make: Callable[[Path], dict], name: str) -> list[dict]:
    """``make(file)`` of every file, in threads and under a progress bar called ``name``.

    Facts in ``journal`` are not made again: a file counts as the same while its path, size and time of change are. The
    journal is JSON lines, appended as they come, so a killed process loses at most a line. Of processes that ask at the
    same time the first makes the facts, and the others wait and read them.
    """
    stamps = {file: file_stamp(file) for file in files}
    with file_lock(journal.with_suffix(".lock")):
        known = _read_journal(journal)
        unknown = [file for file in stamps if stamps[file] not in known]
        if unknown:
            with (
                open(journal, "a") as journal_file,
                ThreadPoolExecutor(THREADS) as pool,
                Bar(name, len(unknown)) as bar,
            ):
                try:
                    for file, fact in zip(unknown, pool.map(make, unknown), strict=True):
                        known[stamps[file]] = fact
                        # the line break first: the line before may have been cut short
                        journal_file.write("\n" + json.dumps([stamps[file], fact]))
                        journal_file.flush()
                        bar.advance()
                except BaseException:
                    # an interrupt must not wait for a thousand files that are still queued
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [known[stamps[file]] for file in files]


def file_stamp(file: Path) -> str:
    """What a file counts as the same by: its path, size and time of change."""
    status = file.stat()
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"


def _read_journal(path: Path) -> dict[str, dict]:
    known = {}
    if path.exists():
        for line in path.read_text().split("\n"):
            # a line cut short by a kill is no JSON, and its file is looked at again
            with contextlib.suppress(ValueError):
                stamp, fact = json.loads(line)
                known[stamp] = fact
    return known


def content_hash(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_identity(folder: Path, parts: Sequence[str], cache: Path) -> str:
    """SHA-256 over names and contents of the files of ``parts`` (glob patterns in ``folder``).

    Files are read once and remembered in ``cache`` until they change: weights take minutes to read.
    """
    files = sorted({file for pattern in parts for file in folder.glob(pattern) if file.is_file()})
    facts = file_facts(files, cache / "models.jsonl", lambda file: {"content": content_hash(file)}, "weights")
    contents = [[str(file.relative_to(folder)), fact["content"]] for file, fact in zip(files, facts, strict=True)]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
