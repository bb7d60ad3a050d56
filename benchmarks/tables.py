"""The tables of measurements in the docs, filled from the committed results: ``python -m benchmarks.tables [--check]``.

A table is in README.md or docs/*.md between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what lies between
is replaced. The results of every run on a GPU are read (``benchmarks/results/<device>/<date>-<commit>/*.json``); runs
that measured the same thing have a row each, one under the other. --check writes nothing and exits 1 if a table differs
from the results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import goals, sandbox_tables
from benchmarks.goals import RESULTS, Row
from benchmarks.markdown import markdown

ROOT = Path(__file__).resolve().parents[1]
BEGIN = re.compile(r"<!-- table: ([\w-]+) -->\n")
END = "<!-- end of table -->"
NONE = "–"
CASES = ("framed", "few", "many", "squared")


class Wrong(Exception):
    """The tables of a document cannot be filled; the message says where and why."""


@dataclass(frozen=True)
class Run:
    """One run: where it was made and the rows of its files."""

    folder: Path
    rows: list[Row]
    label: str  # date and commit, the folder's name; with the device where runs are of several


def read_runs(results: Path = RESULTS) -> list[Run]:
    """All runs on GPUs, by date."""
    folders = goals.runs(results)
    several = len({folder.parent for folder in folders}) > 1
    return [
        Run(folder, goals.read(folder), f"{folder.parent.name} {folder.name}" if several else folder.name)
        for folder in folders
    ]


# ---------------------------------------------------------------------------------------------- cells


def number(value: float | None, form: str) -> str:
    """A number, or a dash if there is none."""
    return NONE if value is None else format(value, form)


def by_key(found: list[tuple[tuple, list[str]]]) -> list[list[str]]:
    """The cells of rows that are given with what to sort them by; runs of one key stay in order of date."""
    return [cells for _, cells in sorted(found, key=lambda row: row[0])]


def comparisons(run: Run, op: str) -> dict[tuple, dict[str, Row]]:
    """The variants of each setting (case, model, shape, pass) of an operation.

    Of a setting measured twice, the comparison with more variants.
    """
    files: dict[tuple, dict[str, dict[str, Row]]] = {}
    for row in run.rows:
        if row["op"] == op and "variant" in row:
            setting = (row.get("case", ""), row.get("model", ""), tuple(row["shape"].items()), row["pass"])
            files.setdefault(setting, {}).setdefault(row["file"], {})[row["variant"]] = row
    # a short run may repeat a setting with fewer variants than the full one
    return {setting: max(by_file.values(), key=len) for setting, by_file in files.items()}


def faster(variants: dict[str, Row], ours: str, other: str) -> float | None:
    """How many times faster than another variant."""
    our_time, other_time = (variants.get(variant, {}).get("ms") for variant in (ours, other))
    return other_time / our_time if our_time and other_time else None


def times(variants: dict[str, Row], ours: str, *others: str) -> list[str]:
    """How many times faster than each of some variants, as cells."""
    return [number(faster(variants, ours, baseline), ".2f") for baseline in others]


# ---------------------------------------------------------------------------------------------- tables


def relation(runs: list[Run]) -> str:
    """Forward, and forward with backward, of every case and shape."""
    table_rows: list[tuple[tuple, list[str]]] = []
    for run in runs:
        settings = comparisons(run, "relation")
        for case, shape in dict.fromkeys((case, shape) for case, _, shape, _ in settings):
            passes = [settings.get((case, "", shape, kind), {}) for kind in ("fwd", "fwd+bwd")]
            # ours by itself is no comparison
            if all(variants.keys() <= {"triton"} for variants in passes):
                continue
            sizes = dict(shape)
            cells = [f"{case}, {sizes['B']} x {sizes['N']:,}", f"{sizes['Ds']} x {sizes['Dt']}"]
            error = None
            noise = []
            for variants in passes:
                row = variants.get("triton", {})
                graph = variants.get("triton-graph", {}).get("ratio_to_floor")
                floor = number(row.get("ratio_to_floor"), ".2f") + (f" ({graph:.2f})" if graph else "")
                cells += [number(row.get("ms"), ".3f"), floor, *times(variants, "triton", "compile", "eager", "panels")]
                error = row.get("grad_error") or error
                noise.append(number(row.get("spread"), ".0%"))
            cells += [number(error, ".1e"), ", ".join(noise), run.label]
            # a case that is new comes last
            order = CASES.index(case) if case in CASES else len(CASES)
            table_rows.append(((order, sizes["B"] == 1, sizes["N"], sizes["Ds"]), cells))
    columns = ("ms", "x floor", "/compile", "/eager", "/panels")
    titles = [
        "case, clips x tokens",
        "widths",
        *(f"fwd {column}" for column in columns),
        *(f"both {column}" for column in columns),
        "gradient's error",
        "noise",
        "run",
    ]
    return markdown(titles, by_key(table_rows))


def residual(runs: list[Run]) -> str:
    """Forward, and forward with backward, of every case."""
    table_rows = []
    for run in runs:
        for (case, _, shape, kind), variants in comparisons(run, "residual").items():
            row = variants.get("triton", {})
            sizes = dict(shape)
            if row.get("ms"):
                cells = [
                    f"{case}, {sizes['M']:,} x {sizes['D']:,}, {kind}",
                    f"{row['ms']:.3f}",
                    f"{goals.copy_share(row):.2f}",
                    *times(variants, "triton", "compile", "eager", "widened"),
                    run.label,
                ]
                table_rows.append(((case, kind, sizes["M"], sizes["D"]), cells))
    titles = ["case, rows x features, pass", "ms", "of the copy rate", "/compile", "/eager", "/eager in fp32", "run"]
    return markdown(titles, by_key(table_rows))


FORMS = ("cuda", "launch", "eager", "compile", "graph")


def advantage(runs: list[Run]) -> str:
    """Microseconds of each form, and launches."""
    table_rows = []
    for run in runs:
        for operation in ("advantage", "surrogate"):
            for (_, _, shape, _), variants in comparisons(run, operation).items():
                samples = dict(shape)["N"]
                cells = [f"{operation}, {samples:,} samples"]
                for form in FORMS:
                    took = variants.get(form, {}).get("ms")
                    cells.append(number(1e3 * took if took else None, ".0f"))
                cells += [str(variants.get("cuda", {}).get("launches", NONE)), run.label]
                table_rows.append(((operation, samples), cells))
    return markdown(["", *(f"{form}, us" for form in FORMS), "launches", "run"], by_key(table_rows))


BACKENDS = ("native", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math")


def attention(runs: list[Run]) -> str:
    """Milliseconds of each backend that was measured, and the best one's time over the floor."""
    table_rows = []
    measured = [(run, key, variants) for run in runs for key, variants in comparisons(run, "attention").items()]
    others = [backend for _, _, variants in measured for backend in variants]
    backends = list(dict.fromkeys([*BACKENDS, *others]))
    for run, (case, _, shape, kind), variants in measured:
        sizes = dict(shape)
        keys = f" over {sizes['M']:,}" if sizes.get("M", sizes["N"]) != sizes["N"] else ""
        cells = [f"{case}, {sizes['B']} x {sizes['H']} x {sizes['N']:,}{keys} x {sizes['D']}, {kind}"]
        cells += [number(variants.get(backend, {}).get("ms"), ".2f") for backend in backends]
        best = min((row for row in variants.values() if row["ms"]), key=lambda row: row["ms"], default={})
        table_rows.append([*cells, number(best.get("ratio_to_floor"), ".2f"), run.label])
    return markdown(["layer, clips x heads x tokens x width, pass", *backends, "best, x floor", "run"], table_rows)


def gradient(runs: list[Run]) -> str:
    """Where the gradient's error comes from."""
    sources = ("flips", "A", "output", "all")
    table_rows = []
    for run in runs:
        for row in run.rows:
            if row["op"] == "gradient error":
                sizes = row["shape"]
                gains = "with gains" if row["gains"] else "without gains"
                label = f"{sizes['N']:,} tokens, {sizes['Ds']} x {sizes['Dt']}, {gains}"
                errors = [f"{row['errors'][source]:.1e}" for source in sources]
                table_rows.append([label, f"{row['flipped']} of {row['active']:,}", *errors, run.label])
    return markdown(["", "pairs flipped", *sources, "run"], table_rows)


def step(runs: list[Run]) -> str:
    """Seconds, memory and kernels of a real model's parts."""
    table_rows = []
    for run in runs:
        for path in sorted(run.folder.glob("model*.json")):
            result = json.loads(path.read_text())
            for part_name, measured in result["parts"].items():
                profile = measured.get("profile", {})
                # over the time without the profiler, which slows the host
                busy = f"{profile['busy_s'] / measured['seconds']:.0%}" if profile else NONE
                cells = [
                    part_name,
                    f"{measured['seconds']:.2f}",
                    f"{measured['peak_bytes'] / 2**30:.1f}",
                    f"{profile['kernels']:,}" if profile else NONE,
                    busy,
                    number(measured.get("mfu"), ".1%"),
                    run.label,
                ]
                table_rows.append(cells)
    return markdown(["part", "s", "peak, GiB", "kernels", "kernels' time", "MFU", "run"], table_rows)


def judged(runs: list[Run]) -> str:
    """Every goal, with the value and verdict of each run."""
    table_rows = []
    for goal in goals.GOALS:
        cells = [goal.name, f"{'>=' if goal.least else '<='} {goal.form.format(goal.must)}"]
        for run in runs:
            measured = goal.measure(run.rows)
            cells.append(f"{goal.form.format(measured.value)}, {goal.verdict(measured)}" if measured else NONE)
        table_rows.append(cells)
    return markdown(["goal", "", *(run.label for run in runs)], table_rows)


# operation, its case and shape, pass; the words for it
HEADLINE = (
    (
        "relation",
        {"case": "framed", "B": 4, "N": 4096},
        "fwd+bwd",
        "relation loss and gradient, the Wan recipe's: 4 clips of 4,096 tokens",
    ),
    ("relation", {"case": "framed", "B": 4, "N": 4096}, "fwd", "the same, only the loss"),
    ("relation", {"case": "few", "B": 1, "N": 8192}, "fwd+bwd", "relation loss and gradient, 8,192 tokens"),
    ("relation", {"case": "few", "B": 1, "N": 32768}, "fwd+bwd", "the same, 32,768 tokens"),
    ("residual", {"case": "cosine/windows", "D": 1024}, "fwd", "predictive residual, 401,408 rows of 1,024"),
    ("residual", {"case": "cosine/windows", "D": 1024}, "fwd+bwd", "the same, with its gradient"),
    ("residual", {"case": "l1/rows", "D": 1408}, "fwd+bwd", "the same in l1, rows of 1,408"),
)


def headline(runs: list[Run]) -> str:
    """The newest measurement of what matters most."""
    table_rows = []
    for operation, setting, kind, description in HEADLINE:
        newest = None
        for run in runs:
            for (case, _, shape, passes), variants in comparisons(run, operation).items():
                known = {**dict(shape), "case": case}
                if passes == kind and setting.items() <= known.items() and variants.get("triton", {}).get("ms"):
                    newest = variants, run
        if newest is None:
            continue
        variants, run = newest
        row = variants["triton"]
        if operation == "residual":
            limit = f"{goals.copy_share(row):.2f} of the copy rate"
        else:
            limit = f"{row['ratio_to_floor']:.2f} x the floor"
        ratios = times(variants, "triton", "compile", "eager")
        faster_than = [ratio if ratio == NONE else f"{ratio}x" for ratio in ratios]
        table_rows.append([description, f"{row['ms']:.2f} ms", limit, *faster_than, run.label])
    return markdown(["", "takes", "of what is possible", "faster than torch.compile", "than eager", "run"], table_rows)


TABLES: dict[str, Callable[[list[Run]], str]] = {
    "headline": headline,
    "goals": judged,
    "relation": relation,
    "residual": residual,
    "advantage": advantage,
    "attention": attention,
    "gradient-error": gradient,
    "step": step,
    # These come from runs on the sandbox, whichever machine they were made on.
    **{name: (lambda runs, fill=fill: fill()) for name, fill in sandbox_tables.TABLES.items()},
}


# ---------------------------------------------------------------------------------------------- documents


def pieces(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """The text in order: ("", text between tables) and (name, content of a table)."""
    position = 0
    for opening in BEGIN.finditer(text):
        end = text.find(END, opening.end())
        if end < 0 or BEGIN.search(text, opening.end(), end):
            raise Wrong(f"{path}: the table {opening[1]} has no {END}")
        if opening[1] not in TABLES:
            raise Wrong(f"{path}: there is no table {opening[1]}; one of {', '.join(TABLES)}")
        yield "", text[position : opening.end()]
        yield opening[1], text[opening.end() : end]
        position = end
    yield "", text[position:]


def filled(text: str, path: Path, runs: list[Run]) -> tuple[str, list[str]]:
    """The text with its tables as the results have them, and the names of those that differed."""
    fresh_pieces = []
    changed = []
    for table, content in pieces(text, path):
        fresh = TABLES[table](runs) + "\n" if table else content
        fresh_pieces.append(fresh)
        if fresh != content:
            changed.append(table)
    return "".join(fresh_pieces), changed


def documents(root: Path) -> list[Path]:
    """The documents that may have tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a table differs from the results"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        runs = read_runs(arguments.root / "benchmarks" / "results")
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    status = 0
    for path in documents(arguments.root):
        text = path.read_text()
        try:
            filled_text, changed = filled(text, path.relative_to(arguments.root), runs)
        except Wrong as problem:
            print(problem, file=sys.stderr)
            return 2
        for table in changed:
            outcome = "differs from the results; run python -m benchmarks.tables" if arguments.check else "was filled"
            print(f"{path.relative_to(arguments.root)}: the table {table} {outcome}")
        if changed and not arguments.check:
            path.write_text(filled_text)
        status |= int(bool(changed) and arguments.check)
    return status


if __name__ == "__main__":
    sys.exit(main())
