"""What is read from the records of evaluated videos, without the code that made them."""

from __future__ import annotations


def broken_laws(record: dict) -> list[str]:
    """Names of the metrics in which a recorded video is visibly wrong.

    Records of earlier versions know strict thresholds only; then it is those that are passed.
    """
    return record.get("visible", record["violations"])
