"""Progress of long work, with the time left: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY = 15.0  # seconds between lines where there is no terminal


class Bar:
    """``with Bar("align", 200, done=20) as bar: bar.advance("loss 0.21")``. Silent where ``active`` is False."""

    def __init__(self, name: str, total: int, done: int = 0, active: bool = True):
        self.name, self.total, self.done, self.first, self.active = name, total, done, done, active
        self._rich: Progress | None = None

    def __enter__(self) -> Bar:
        self._began = self._spoke = time.monotonic()
        if self.active and sys.stderr.isatty():
            self._rich = _rich_bar()
            self._task = self._rich.add_task(self.name, total=self.total, completed=self.done, note="")
            self._rich.start()
        return self

    def advance(self, note: str = "", by: int = 1) -> None:
        self.done += by
        if self._rich:
            self._rich.update(self._task, completed=self.done, note=note)
        # In a log file a bar would be thousands of lines: one every few seconds, and the last.
        elif self.active and (time.monotonic() - self._spoke > LINE_EVERY or self.done >= self.total):
            self._spoke = time.monotonic()
            elapsed = self._spoke - self._began
            left = elapsed / max(self.done - self.first, 1) * (self.total - self.done)
            print(
                f"{self.name:10} {self.done}/{self.total}  {_clock(elapsed)} passed, {_clock(left)} left  {note}",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich:
            self._rich.stop()


def _rich_bar() -> Progress:
    # imported where there is a terminal: rich takes a tenth of a second, and a mistake in a recipe needs no bar
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def batches(name: str, count: int, size: int, active: bool = True) -> Iterator[slice]:
    """Slices of ``size`` over ``count`` items, with a bar."""
    with Bar(name, count, active=active) as progress_bar:
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))
            progress_bar.advance(by=min(size, count - start))


def with_bar(name: str, items: Iterable, total: int, active: bool = True) -> Iterator:
    """Items, with a bar."""
    with Bar(name, total, active=active) as progress_bar:
        for item in items:
            yield item
            progress_bar.advance()


def quiet_libraries() -> None:
    """Silence the loading bars of diffusers and transformers: ours say what is going on."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
