"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def markdown(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; its first column is text."""
    titles = list(titles)
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)
