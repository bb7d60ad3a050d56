"""What the kernels are meant to reach, beside what a device's results say: ``python benchmarks/goals.py [FOLDER] [--markdown]``.

FOLDER holds the JSON files of one run of ``lease.sh`` (default: every run of a GPU in benchmarks/results). A goal whose
measurement is missing says so and counts as open. Ratios are of medians of one run on one device; F is the floor, the operations that no
implementation avoids at the device's own matmul rate. Exit code 1 if a measured goal is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import show
from benchmarks.model import RESIDUAL_ROWS, USUAL

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (8192, 16384, 32768)
Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A goal's measurement: the value in its worst comparison, and the file that it comes from."""

    value: float
    file: str


@dataclass(frozen=True)
class Goal:
    """``values`` takes the rows of all files and gives each comparison's value and file; ``least``: at least ``must`` is wanted, else at most."""

    name: str
    must: float
    stretch: float
    least: bool
    form: str
    values: Callable[[list[Row]], list[tuple[float, str]]]

    def measure(self, rows: list[Row]) -> Found | None:
        """The worst comparison; None if there is none."""
        values = self.values(rows)
        return Found(*(min if self.least else max)(values)) if values else None

    def verdict(self, found: Found | None) -> str:
        """not measured, missed, met or stretch."""
        if found is None:
            return "not measured"
        beyond = (lambda limit: found.value >= limit) if self.least else (lambda limit: found.value <= limit)
        return "stretch" if beyond(self.stretch) else "met" if beyond(self.must) else "missed"


def runs(results: Path = RESULTS) -> list[Path]:
    """The folders of all runs on GPUs, by date."""
    return sorted((f for f in results.glob("*/*") if f.is_dir() and "cpu" not in f.parent.name), key=lambda f: (f.name, f.parent.name))


def read(folder: Path) -> list[Row]:
    """All rows of a device's kernel benchmarks, each with its file and that file's copy rate."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except json.JSONDecodeError as problem:
            raise ValueError(f"{path}: this is no JSON ({problem}); measure it again, or delete it") from None
        kept = [row for row in result.get("rows", ()) if "variant" in row or "errors" in row]
        if not any(row.get("variant") == "widened" for row in kept):  # before there were two of them, "eager" of the residual was in fp32
            kept = [{**row, "variant": "widened"} if _eager_in_fp32(row) else row for row in kept]
        rows += [{**row, "file": path.name, "copy_gbps": result.get("copy_gbps")} for row in kept]
    return rows


def _eager_in_fp32(row: Row) -> bool:
    return row["op"] == "residual" and row.get("variant") == "eager" and "eager_precision" not in row


def _comparisons(rows: list[Row], ours: str, **wanted: Any) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Our row and all variants of each comparison that has it; ``wanted`` values may be tuples of those allowed, N is looked up in the shape."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if "variant" not in row:
            continue
        known = {**row["shape"], **row}
        if all(known.get(k) in v if isinstance(v, tuple) else known.get(k) == v for k, v in wanted.items()):
            groups.setdefault((row["file"], show.setting(row)), {})[row["variant"]] = row
    for variants in groups.values():
        if ours in variants and variants[ours]["ms"]:
            yield variants[ours], variants


def against(ours: str, baseline: str, **wanted: Any) -> Callable[[list[Row]], list[tuple[float, str]]]:
    """How many times faster than a baseline; comparisons that the baseline had no memory for are left out."""

    def values(rows: list[Row]) -> list[tuple[float, str]]:
        return [(v[baseline]["ms"] / row["ms"], row["file"]) for row, v in _comparisons(rows, ours, **wanted) if v.get(baseline, {}).get("ms")]

    return values


def each(ours: str, value: Callable[[Row], float | None], **wanted: Any) -> Callable[[list[Row]], list[tuple[float, str]]]:
    """A value of our own rows, where it is known."""

    def values(rows: list[Row]) -> list[tuple[float, str]]:
        return [(value(row), row["file"]) for row, _ in _comparisons(rows, ours, **wanted) if value(row) is not None]

    return values


def few_errors(rows: list[Row]) -> list[tuple[float, str]]:
    """The gradient's error where few pairs are active: of all benchmarks, and of ``gradient_error.py`` that takes it apart."""
    measured = each("triton", _error, op="relation", case=("few", "framed"), **{"pass": "fwd+bwd"})(rows)
    return measured + [(row["errors"]["all"], row["file"]) for row in rows if row["op"] == "gradient error" and row["gains"]]


def _memory(row: Row) -> float:
    """Extra peak memory over what the design allows: 256 MiB of workspace and six bytes for each of the student's elements."""
    shape = row["shape"]
    return row["extra_mib"] / (256 + 6 * shape["B"] * shape["N"] * shape["Ds"] / 2**20)


def _floors(row: Row) -> float | None:
    return row.get("ratio_to_floor")


def _error(row: Row) -> float | None:
    return row["grad_error"]


BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def copy_share(row: Row) -> float:
    """The share of the measured copy rate at which the residual moves what its passes cannot do without."""
    moved = RESIDUAL_ROWS[row["pass"]] * row["shape"]["M"] * row["shape"]["D"] * BYTES[row["dtype"]]
    return moved / row["ms"] / 1e6 / row["copy_gbps"]


RESIDUAL = {"op": "residual", "pass": ("fwd", "fwd+bwd")}
BOTH = {"op": "relation", "case": "few", "pass": "fwd+bwd", "N": SIZES, "Ds": USUAL[0], "Dt": USUAL[1]}
SQUARED = {**BOTH, "case": "squared", "N": 16384}
MANY, ALONE = {**BOTH, "case": "many"}, {**BOTH, "pass": "fwd"}
RECIPE = {"op": "relation", "case": "framed", "B": 4, "N": 4096, "pass": ("fwd", "fwd+bwd")}  # of recipes/wan2.1-1.3b.yaml
FRAMED = {**BOTH, "case": "framed", "N": 16384}
SMALL = {"op": "advantage", "N": (64, 4096)}
GOALS = (
    Goal("the recipes' own case, over the floor", 1.6, 1.4, False, "{:.2f} F", each("triton", _floors, **RECIPE)),
    Goal("that case, as a CUDA graph", 1.6, 1.4, False, "{:.2f} F", each("triton-graph", _floors, **RECIPE)),
    Goal("that case, against torch.compile", 1.6, 2.0, True, "{:.2f}x", against("triton", "compile", **RECIPE)),
    Goal("relation loss and gradient, framed, 16k, over the floor", 1.25, 1.2, False, "{:.2f} F", each("triton", _floors, **FRAMED)),
    Goal("relation loss and gradient, 8k to 32k, over the floor", 1.5, 1.25, False, "{:.2f} F", each("triton", _floors, **BOTH)),
    Goal("the same, against torch.compile", 1.5, 1.85, True, "{:.2f}x", against("triton", "compile", **BOTH)),
    Goal("the same, against eager bf16", 2.0, 2.4, True, "{:.2f}x", against("triton", "eager", **BOTH)),
    Goal("the same, against chunks with checkpointing", 3.0, 3.5, True, "{:.2f}x", against("triton", "checkpoint", **BOTH)),
    Goal("relation loss alone, against torch.compile", 1.5, 1.8, True, "{:.2f}x", against("triton", "compile", **ALONE)),
    Goal("its extra memory over 256 MiB + 6 bytes an element", 1.0, 1.0, False, "{:.2f}", each("triton", _memory, **BOTH)),
    Goal("its gradient's error, few pairs active", 5e-3, 2.5e-3, False, "{:.1e}", few_errors),
    Goal("its gradient's error, many pairs active", 5e-3, 2.5e-3, False, "{:.1e}", each("triton", _error, **MANY)),
    Goal("squared differences at 16k, against torch.compile", 5.0, 8.0, True, "{:.1f}x", against("triton", "compile", **SQUARED)),
    Goal("residual, share of the copy rate", 0.92, 0.95, True, "{:.2f}", each("triton", copy_share, **RESIDUAL)),
    Goal("residual, against torch.compile", 1.0, 1.5, True, "{:.2f}x", against("triton", "compile", **RESIDUAL)),
    Goal("residual, against eager in bf16", 3.5, 5.0, True, "{:.2f}x", against("triton", "eager", **RESIDUAL)),
    Goal("group advantage: launches", 1, 1, False, "{:.0f}", each("launch", lambda r: r.get("launches"), **SMALL)),
    Goal("group advantage, against eager", 5.0, 8.0, True, "{:.1f}x", against("cuda", "eager", **SMALL)),
    Goal("group advantage, against a CUDA graph of eager", 1.0, 1.5, True, "{:.2f}x", against("cuda", "graph", **SMALL)),
)


def judge(folder: Path) -> list[tuple[Goal, Found | None]]:
    """Every goal with its measurement among a folder's results."""
    rows = read(folder)
    return [(goal, goal.measure(rows)) for goal in GOALS]


def lines(judged: list[tuple[Goal, Found | None]], markdown: bool) -> list[str]:
    """The table of goals and what was found of each."""
    out = ["| goal | must | stretch | found | | file |", "| --- | --- | --- | --- | --- | --- |"] if markdown else []
    for goal, found in judged:
        sign = ">= " if goal.least else "<= "
        cells = [goal.name, *(sign + goal.form.format(v) for v in (goal.must, goal.stretch))]
        cells += [goal.form.format(found.value) if found else "-", goal.verdict(found), found.file if found else ""]
        out.append(f"| {' | '.join(cells)} |" if markdown else "{:55} {:>11} {:>11} {:>11}  {:12} {}".format(*cells).rstrip())
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    folders = args.folders or runs()
    if not folders:
        print("no results of a GPU yet: sh benchmarks/lease.sh main")
    missed = False
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder of results")
        judged = judge(folder)
        print(f"{folder.parent.name} {folder.name}", *lines(judged, args.markdown), sep="\n")
        missed |= any(goal.verdict(found) == "missed" for goal, found in judged)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
