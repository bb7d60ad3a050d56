"""Runs in processes of their own, forked from one that has imported everything: imports take longer than the runs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.process import BaseProcess


def start_run(arguments: Sequence[str], **environment: str) -> BaseProcess:
    """Start ``ldo.train`` with ``arguments``, silently; its exit code is the process's."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.helpers.forked", "ldo.stages.sequence"])
    process = processes.Process(target=_run, args=(list(arguments), environment))
    process.start()
    return process


def _run(arguments: list[str], environment: dict[str, str]) -> None:
    from ldo.train import main

    os.environ.update(environment)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(nowhere, output)
    raise SystemExit(main(arguments))
