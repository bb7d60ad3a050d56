"""The goals of the kernels, next to the results of a device.

    python benchmarks/goals.py [FOLDER] [--markdown]

FOLDER holds the JSON files of one run of ``lease.sh`` (default: every run on a GPU in benchmarks/results). A goal whose
measurement is missing says so and counts as open. Ratios are of medians of one run on one device; F is the floor, the
operations that no implementation avoids at the device's own matmul rate. Exit code 1 if a measured goal is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import show
from benchmarks.model import RESIDUAL_ROWS, USUAL

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (8192, 16384, 32768)
Row = dict[str, Any]
Values = Callable[[list[Row]], list[tuple[float, str]]]


@dataclass(frozen=True)
class Found:
    """The measurement of a goal: the value in its worst comparison, and the file that it comes from."""

    value: float
    file: str


@dataclass(frozen=True)
class Goal:
    """A limit on a measured value.

    ``values`` takes the rows of all files and returns the value and the file of each comparison. ``least``: the value
    must be at least ``must``, else at most.
    """

    name: str
    must: float
    stretch: float
    least: bool
    form: str
    values: Values

    def measure(self, rows: list[Row]) -> Found | None:
        """The worst comparison; None if there is none."""
        values = self.values(rows)
        if not values:
            return None
        worst = min(values) if self.least else max(values)
        return Found(*worst)

    def verdict(self, found: Found | None) -> str:
        """not measured, missed, met or stretch."""
        if found is None:
            return "not measured"
        if self._reached(found.value, self.stretch):
            return "stretch"
        return "met" if self._reached(found.value, self.must) else "missed"

    def _reached(self, value: float, limit: float) -> bool:
        return value >= limit if self.least else value <= limit


def runs(results: Path = RESULTS) -> list[Path]:
    """The folders of all runs on GPUs, by date."""
    folders = [path for path in results.glob("*/*") if path.is_dir() and "cpu" not in path.parent.name]
    return sorted(folders, key=lambda folder: (folder.name, folder.parent.name))


def read(folder: Path) -> list[Row]:
    """All rows of a run's kernel benchmarks, each with its file and that file's copy rate."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except json.JSONDecodeError as problem:
            raise ValueError(f"{path}: not valid JSON ({problem}); measure it again, or delete it") from None
        # the files of other benchmarks have rows of another kind, without either
        kernel_rows = [row for row in result.get("rows", ()) if "variant" in row or "errors" in row]
        # The first results have no "widened" variant of the residual: their "eager" computes in fp32, as it does.
        if not any(row.get("variant") == "widened" for row in kernel_rows):
            kernel_rows = [{**row, "variant": "widened"} if _eager_in_fp32(row) else row for row in kernel_rows]
        rows += [{**row, "file": path.name, "copy_gbps": result.get("copy_gbps")} for row in kernel_rows]
    return rows


def _eager_in_fp32(row: Row) -> bool:
    return row["op"] == "residual" and row.get("variant") == "eager" and "eager_precision" not in row


def _comparisons(rows: list[Row], ours: str, **wanted: Any) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Our row and all variants of each comparison that has it.

    ``wanted``: values of the row or of its shape; a tuple lists those allowed.
    """
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if "variant" in row and _matches(row, wanted):
            groups.setdefault((row["file"], show.setting(row)), {})[row["variant"]] = row
    for variants in groups.values():
        # no time: out of memory
        if ours in variants and variants[ours]["ms"]:
            yield variants[ours], variants


def _matches(row: Row, wanted: dict[str, Any]) -> bool:
    row_values = {**row["shape"], **row}
    for field, wanted_value in wanted.items():
        allowed = wanted_value if isinstance(wanted_value, tuple) else (wanted_value,)
        if row_values.get(field) not in allowed:
            return False
    return True


def against(ours: str, baseline: str, **wanted: Any) -> Values:
    """How many times faster than a baseline; comparisons for which the baseline had no memory are left out."""

    def values(rows: list[Row]) -> list[tuple[float, str]]:
        return [
            (variants[baseline]["ms"] / row["ms"], row["file"])
            for row, variants in _comparisons(rows, ours, **wanted)
            if variants.get(baseline, {}).get("ms")
        ]

    return values


def each(ours: str, value: Callable[[Row], float | None], **wanted: Any) -> Values:
    """A value of our own rows, where it is known."""

    def values(rows: list[Row]) -> list[tuple[float, str]]:
        return [(value(row), row["file"]) for row, _ in _comparisons(rows, ours, **wanted) if value(row) is not None]

    return values


def few_errors(rows: list[Row]) -> list[tuple[float, str]]:
    """The error of the gradient where few pairs are active: in all benchmarks, ``gradient_error.py`` among them."""
    measured = each("triton", _error, op="relation", case=("few", "framed"), **{"pass": "fwd+bwd"})(rows)
    decomposed = [row for row in rows if row["op"] == "gradient error" and row["gains"]]
    return measured + [(row["errors"]["all"], row["file"]) for row in decomposed]


def _memory(row: Row) -> float:
    """Extra peak memory over what the design allows: 256 MiB of workspace and six bytes per element of the student."""
    shape = row["shape"]
    return row["extra_mib"] / (256 + 6 * shape["B"] * shape["N"] * shape["Ds"] / 2**20)


def _floors(row: Row) -> float | None:
    return row.get("ratio_to_floor")


def _error(row: Row) -> float | None:
    return row["grad_error"]


def _launches(row: Row) -> int | None:
    return row.get("launches")


BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def copy_share(row: Row) -> float:
    """The share of the measured copy rate at which the residual moves the bytes of its floor."""
    moved = RESIDUAL_ROWS[row["pass"]] * row["shape"]["M"] * row["shape"]["D"] * BYTES[row["dtype"]]
    return moved / row["ms"] / 1e6 / row["copy_gbps"]


RESIDUAL = {"op": "residual", "pass": ("fwd", "fwd+bwd")}
BOTH = {"op": "relation", "case": "few", "pass": "fwd+bwd", "N": SIZES, "Ds": USUAL[0], "Dt": USUAL[1]}
SQUARED = {**BOTH, "case": "squared", "N": 16384}
MANY = {**BOTH, "case": "many"}
FORWARD = {**BOTH, "pass": "fwd"}
# the case of recipes/wan2.1-1.3b.yaml
RECIPE = {"op": "relation", "case": "framed", "B": 4, "N": 4096, "pass": ("fwd", "fwd+bwd")}
FRAMED = {**BOTH, "case": "framed", "N": 16384}
SMALL = {"op": "advantage", "N": (64, 4096)}
GOALS = (
    Goal("the recipes' own case, over the floor", 1.6, 1.4, False, "{:.2f} F", each("triton", _floors, **RECIPE)),
    Goal("that case, as a CUDA graph", 1.6, 1.4, False, "{:.2f} F", each("triton-graph", _floors, **RECIPE)),
    Goal("that case, against torch.compile", 1.6, 2.0, True, "{:.2f}x", against("triton", "compile", **RECIPE)),
    Goal(
        "relation loss and gradient, framed, 16k, over the floor",
        1.25,
        1.2,
        False,
        "{:.2f} F",
        each("triton", _floors, **FRAMED),
    ),
    Goal(
        "relation loss and gradient, 8k to 32k, over the floor",
        1.5,
        1.25,
        False,
        "{:.2f} F",
        each("triton", _floors, **BOTH),
    ),
    Goal("the same, against torch.compile", 1.5, 1.85, True, "{:.2f}x", against("triton", "compile", **BOTH)),
    Goal("the same, against eager bf16", 2.0, 2.4, True, "{:.2f}x", against("triton", "eager", **BOTH)),
    Goal(
        "the same, against chunks with checkpointing",
        3.0,
        3.5,
        True,
        "{:.2f}x",
        against("triton", "checkpoint", **BOTH),
    ),
    Goal(
        "relation loss without gradient, against torch.compile",
        1.5,
        1.8,
        True,
        "{:.2f}x",
        against("triton", "compile", **FORWARD),
    ),
    Goal(
        "its extra memory over 256 MiB + 6 bytes an element", 1.0, 1.0, False, "{:.2f}", each("triton", _memory, **BOTH)
    ),
    Goal("its gradient's error, few pairs active", 5e-3, 2.5e-3, False, "{:.1e}", few_errors),
    Goal("its gradient's error, many pairs active", 5e-3, 2.5e-3, False, "{:.1e}", each("triton", _error, **MANY)),
    Goal(
        "squared differences at 16k, against torch.compile",
        5.0,
        8.0,
        True,
        "{:.1f}x",
        against("triton", "compile", **SQUARED),
    ),
    Goal("residual, share of the copy rate", 0.92, 0.95, True, "{:.2f}", each("triton", copy_share, **RESIDUAL)),
    Goal("residual, against torch.compile", 1.0, 1.5, True, "{:.2f}x", against("triton", "compile", **RESIDUAL)),
    Goal("residual, against eager in bf16", 3.5, 5.0, True, "{:.2f}x", against("triton", "eager", **RESIDUAL)),
    Goal("group advantage: launches", 1, 1, False, "{:.0f}", each("launch", _launches, **SMALL)),
    Goal("group advantage, against eager", 5.0, 8.0, True, "{:.1f}x", against("cuda", "eager", **SMALL)),
    Goal(
        "group advantage, against a CUDA graph of eager", 1.0, 1.5, True, "{:.2f}x", against("cuda", "graph", **SMALL)
    ),
)


def judge(folder: Path) -> list[tuple[Goal, Found | None]]:
    """Every goal with its measurement among a folder's results."""
    rows = read(folder)
    return [(goal, goal.measure(rows)) for goal in GOALS]


def lines(judged: list[tuple[Goal, Found | None]], markdown: bool) -> list[str]:
    """The table of goals with the measurement of each."""
    table = ["| goal | must | stretch | found | | file |", "| --- | --- | --- | --- | --- | --- |"] if markdown else []
    for goal, measurement in judged:
        comparison = ">= " if goal.least else "<= "
        cells = [
            goal.name,
            comparison + goal.form.format(goal.must),
            comparison + goal.form.format(goal.stretch),
            goal.form.format(measurement.value) if measurement else "-",
            goal.verdict(measurement),
            measurement.file if measurement else "",
        ]
        if markdown:
            table.append(f"| {' | '.join(cells)} |")
        else:
            table.append("{:55} {:>11} {:>11} {:>11}  {:12} {}".format(*cells).rstrip())
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    folders = arguments.folders or runs()
    if not folders:
        print("no results of a GPU yet: sh benchmarks/lease.sh main")
    missed = False
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder of results")
        judged = judge(folder)
        print(f"{folder.parent.name} {folder.name}", *lines(judged, arguments.markdown), sep="\n")
        missed |= any(goal.verdict(measurement) == "missed" for goal, measurement in judged)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
