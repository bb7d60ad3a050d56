"""The docs' tables of measured figures, filled from the committed results: ``python -m benchmarks.tables [--check]``.

A table stands in README.md or docs/*.md between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what lies between is replaced. Figures of
every run on a GPU are read (``benchmarks/results/<device>/<date>-<commit>/*.json``); runs that measured the same stand under each other. --check
writes nothing and exits 1 if a table is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import goals
from benchmarks.goals import RESULTS, Row

ROOT = Path(__file__).resolve().parents[1]
BEGIN = re.compile(r"<!-- table: ([\w-]+) -->\n")
END = "<!-- end of table -->"
NONE = "–"
CASES = ("framed", "few", "many", "squared")


class Wrong(Exception):
    """A document's tables cannot be filled; the message says where and why."""


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
    return [Run(f, goals.read(f), f"{f.parent.name} {f.name}" if several else f.name) for f in folders]


# ---------------------------------------------------------------------------------------------- cells


def number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def markdown(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; its first column is text."""
    titles = list(titles)
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def comparisons(run: Run, op: str) -> dict[tuple, dict[str, Row]]:
    """The variants of each setting (case, shape, pass) of an operation; of a setting measured twice, the fuller comparison."""
    files: dict[tuple, dict[str, dict[str, Row]]] = {}
    for row in run.rows:
        if row["op"] == op and "variant" in row:
            key = (row.get("case", ""), row.get("model", ""), tuple(row["shape"].items()), row["pass"])
            files.setdefault(key, {}).setdefault(row["file"], {})[row["variant"]] = row
    return {key: max(found.values(), key=len) for key, found in files.items()}


def faster(variants: dict[str, Row], ours: str, other: str) -> float | None:
    """How many times faster than another variant."""
    mine, theirs = (variants.get(name, {}).get("ms") for name in (ours, other))
    return theirs / mine if mine and theirs else None


def times(variants: dict[str, Row], ours: str, *others: str) -> list[str]:
    return [number(faster(variants, ours, other), ".2f") for other in others]


# ---------------------------------------------------------------------------------------------- tables


def relation(runs: list[Run]) -> str:
    """Forward, and forward with backward, of every case and shape."""
    found: list[tuple[tuple, list[str]]] = []
    for run in runs:
        settings = comparisons(run, "relation")
        for case, shape in dict.fromkeys((key[0], key[2]) for key in settings):
            cells, error, noise = [], None, []
            for kind in ("fwd", "fwd+bwd"):
                variants = settings.get((case, "", shape, kind), {})
                row = variants.get("triton", {})
                graph = variants.get("triton-graph", {}).get("ratio_to_floor")
                floor = number(row.get("ratio_to_floor"), ".2f") + (f" ({graph:.2f})" if graph else "")
                cells += [number(row.get("ms"), ".3f"), floor, *times(variants, "triton", "compile", "eager", "panels")]
                error = row.get("grad_error") or error
                noise += [number(row.get("spread"), ".0%")]
            if all(settings.get((case, "", shape, kind), {}).keys() <= {"triton"} for kind in ("fwd", "fwd+bwd")):
                continue  # alone, it was no comparison
            d = dict(shape)
            what = [f"{case}, {d['B']} x {d['N']:,}", f"{d['Ds']} x {d['Dt']}"]
            order = CASES.index(case) if case in CASES else len(CASES)
            found.append(((order, d["B"] == 1, d["N"], d["Ds"]), [*what, *cells, number(error, ".1e"), ", ".join(noise), run.label]))
    columns = ("ms", "x floor", "/compile", "/eager", "/panels")
    titles = ["case, clips x tokens", "widths", *(f"fwd {c}" for c in columns), *(f"both {c}" for c in columns), "gradient's error", "noise", "run"]
    return markdown(titles, (cells for _, cells in sorted(found, key=lambda f: f[0])))


def residual(runs: list[Run]) -> str:
    """Forward, and forward with backward, of every case."""
    found = []
    for run in runs:
        for (case, _, shape, kind), variants in comparisons(run, "residual").items():
            row, d = variants.get("triton", {}), dict(shape)
            if row.get("ms"):
                cells = [f"{row['ms']:.3f}", f"{goals.copy_share(row):.2f}", *times(variants, "triton", "compile", "eager", "widened")]
                found.append(((case, kind, d["M"], d["D"]), [f"{case}, {d['M']:,} x {d['D']:,}, {kind}", *cells, run.label]))
    titles = ["case, rows x features, pass", "ms", "of the copy rate", "/compile", "/eager", "/eager in fp32", "run"]
    return markdown(titles, (cells for _, cells in sorted(found, key=lambda f: f[0])))


FORMS = ("cuda", "launch", "eager", "compile", "graph")


def advantage(runs: list[Run]) -> str:
    """Microseconds of each form, and launches."""
    found = []
    for run in runs:
        for op in ("advantage", "surrogate"):
            for (_, _, shape, _), variants in comparisons(run, op).items():
                took = [number(1e3 * variants[f]["ms"] if variants.get(f, {}).get("ms") else None, ".0f") for f in FORMS]
                launches = str(variants.get("cuda", {}).get("launches", NONE))
                found.append(((op, dict(shape)["N"]), [f"{op}, {dict(shape)['N']:,} samples", *took, launches, run.label]))
    return markdown(["", *(f"{f}, us" for f in FORMS), "launches", "run"], (cells for _, cells in sorted(found, key=lambda f: f[0])))


BACKENDS = ("native", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math")


def attention(runs: list[Run]) -> str:
    """Milliseconds of each backend that was measured, and those of the best over the floor."""
    found = []
    measured = [(run, key, variants) for run in runs for key, variants in comparisons(run, "attention").items()]
    backends = list(dict.fromkeys([*BACKENDS, *(name for _, _, variants in measured for name in variants)]))
    for run, (case, _, shape, kind), variants in measured:
        d = dict(shape)
        ms = [variants.get(b, {}).get("ms") for b in backends]
        best = min((row for row in variants.values() if row["ms"]), key=lambda row: row["ms"], default=None)
        keys = f" over {d['M']:,}" if d.get("M", d["N"]) != d["N"] else ""
        what = f"{case}, {d['B']} x {d['H']} x {d['N']:,}{keys} x {d['D']}, {kind}"
        found.append([what, *(number(m, ".2f") for m in ms), number(best and best.get("ratio_to_floor"), ".2f"), run.label])
    return markdown(["layer, clips x heads x tokens x width, pass", *backends, "best, x floor", "run"], found)


def gradient(runs: list[Run]) -> str:
    """Where the gradient's error comes from."""
    sources = ("flips", "A", "output", "all")
    found = []
    for run in runs:
        for row in run.rows:
            if row["op"] == "gradient error":
                d, cells = row["shape"], [f"{row['errors'][s]:.1e}" for s in sources]
                what = f"{d['N']:,} tokens, {d['Ds']} x {d['Dt']}, {'with' if row['gains'] else 'without'} gains"
                found.append([what, f"{row['flipped']} of {row['active']:,}", *cells, run.label])
    return markdown(["", "pairs flipped", *sources, "run"], found)


def step(runs: list[Run]) -> str:
    """Seconds, memory and kernels of a real model's parts."""
    found = []
    for run in runs:
        for path in sorted(run.folder.glob("model*.json")):
            result = json.loads(path.read_text())
            for name, part in result["parts"].items():
                seen = part.get("profile", {})
                busy = f"{seen['busy_s'] / part['seconds']:.0%}" if seen else NONE
                figures = [f"{part['seconds']:.2f}", f"{part['peak_bytes'] / 2**30:.1f}", f"{seen['kernels']:,}" if seen else NONE, busy]
                found.append([name, *figures, number(part.get("mfu"), ".1%"), run.label])
    return markdown(["part", "s", "peak, GiB", "kernels", "kernels' time", "MFU", "run"], found)


def judged(runs: list[Run]) -> str:
    """Every goal, with each run's figure and verdict."""
    each = [[goal.measure(run.rows) for goal in goals.GOALS] for run in runs]
    found = []
    for k, goal in enumerate(goals.GOALS):
        cells = [f"{goal.form.format(f.value)}, {goal.verdict(f)}" if (f := measured[k]) else NONE for measured in each]
        found.append([goal.name, f"{'>=' if goal.least else '<='} {goal.form.format(goal.must)}", *cells])
    return markdown(["goal", "", *(run.label for run in runs)], found)


HEADLINE = (  # operation, its case and shape, pass; the words for it
    ("relation", {"case": "framed", "B": 4, "N": 4096}, "fwd+bwd", "relation loss and gradient, the Wan recipe's: 4 clips of 4,096 tokens"),
    ("relation", {"case": "framed", "B": 4, "N": 4096}, "fwd", "the same, the loss alone"),
    ("relation", {"case": "few", "B": 1, "N": 8192}, "fwd+bwd", "relation loss and gradient, 8,192 tokens"),
    ("relation", {"case": "few", "B": 1, "N": 32768}, "fwd+bwd", "the same, 32,768 tokens"),
    ("residual", {"case": "cosine/windows", "D": 1024}, "fwd", "predictive residual, 401,408 rows of 1,024"),
    ("residual", {"case": "cosine/windows", "D": 1024}, "fwd+bwd", "the same, with its gradient"),
    ("residual", {"case": "l1/rows", "D": 1408}, "fwd+bwd", "the same in l1, rows of 1,408"),
)


def headline(runs: list[Run]) -> str:
    """The newest figure of what matters most."""
    found = []
    for op, wanted, kind, words in HEADLINE:
        newest = None
        for run in runs:
            for (case, _, shape, passes), variants in comparisons(run, op).items():
                known = {**dict(shape), "case": case}
                if passes == kind and wanted.items() <= known.items() and variants.get("triton", {}).get("ms"):
                    newest = variants, run
        if newest:
            variants, run = newest
            row = variants["triton"]
            limit = f"{goals.copy_share(row):.2f} of the copy rate" if op == "residual" else f"{row['ratio_to_floor']:.2f} x the floor"
            faster_than = (t if t == NONE else f"{t}x" for t in times(variants, "triton", "compile", "eager"))
            found.append([words, f"{row['ms']:.2f} ms", limit, *faster_than, run.label])
    return markdown(["", "takes", "of what is possible", "faster than torch.compile", "than eager", "run"], found)


TABLES: dict[str, Callable[[list[Run]], str]] = {
    "headline": headline,
    "goals": judged,
    "relation": relation,
    "residual": residual,
    "advantage": advantage,
    "attention": attention,
    "gradient-error": gradient,
    "step": step,
}


# ---------------------------------------------------------------------------------------------- documents


def pieces(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """The text in order: ("", words between tables) and (name, a table's content)."""
    at = 0
    while begin := BEGIN.search(text, at):
        end = text.find(END, begin.end())
        if end < 0 or BEGIN.search(text, begin.end(), end):
            raise Wrong(f"{path}: the table {begin[1]} has no {END}")
        if begin[1] not in TABLES:
            raise Wrong(f"{path}: there is no table {begin[1]}; one of {', '.join(TABLES)}")
        yield "", text[at : begin.end()]
        yield begin[1], text[begin.end() : end]
        at = end
    yield "", text[at:]


def filled(text: str, path: Path, runs: list[Run]) -> tuple[str, list[str]]:
    """The text with its tables as the results have them, and the names of those that were not."""
    out, changed = [], []
    for name, content in pieces(text, path):
        fresh = TABLES[name](runs) + "\n" if name else content
        out.append(fresh)
        changed += [name] if fresh != content else []
    return "".join(out), changed


def documents(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is not what the results say")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.root / "benchmarks" / "results")
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    status = 0
    for path in documents(args.root):
        text = path.read_text()
        try:
            new, changed = filled(text, path.relative_to(args.root), runs)
        except Wrong as problem:
            print(problem, file=sys.stderr)
            return 2
        for name in changed:
            print(f"{path.relative_to(args.root)}: the table {name} {'is not what the results say' if args.check else 'was filled'}")
        if changed and not args.check:
            path.write_text(new)
        status |= int(bool(changed) and args.check)
    return status


if __name__ == "__main__":
    sys.exit(main())
