"""Results for people: the table of a running benchmark, its plot, and a short summary of result files.

``python benchmarks/show.py FILE.json ...`` prints the summary.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

COMPARED = (
    "eager",
    "compile",
    "panels",
    "triton-graph",
    "compile-graph",
    "checkpoint",
    "chunk-compile",
    "bmm",
    "graph",
    "launch",
)
HEADER = (
    f"{'op':9} {'case':14} {'pass':7} {'shape':26} {'dtype':5} {'variant':14} {'ms':>9} {'quartiles':>17} "
    f"{'x floor':>8} {'/eager':>7} {'/compile':>8} {'extra MiB':>10} {'grad error':>10} {'noise':>6}"
)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def short(dtype: torch.dtype) -> str:
    """fp32, bf16, fp16, fp64; PyTorch's own name of any other type."""
    return SHORT.get(dtype, str(dtype))


def brief(commit: str | None) -> str:
    """Enough of a commit to recognise it, and whether the tree differed."""
    if not commit:
        return "unknown"
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def setting(row: dict[str, Any]) -> tuple:
    """What is equal in all rows of one comparison."""
    return (row["op"], row.get("case", ""), row["pass"], json.dumps(row["shape"]), row["dtype"])


def _shape(row: dict[str, Any]) -> str:
    return " ".join(f"{dimension}{size}" for dimension, size in row["shape"].items() if dimension != "B" or size != 1)


def _number(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def milliseconds(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """ms of each variant that was timed, among the rows of one comparison."""
    return {row["variant"]: row["ms"] for row in rows if row["ms"]}


def print_rows(rows: list[dict[str, Any]], header: bool = True) -> None:
    """One line for each row. "/eager" and "/compile": how many times faster than eager and compile the row is."""
    if header:
        print(HEADER, flush=True)
    times = milliseconds(rows)
    for row in rows:
        took = row["ms"]
        middle = row.get("error") or _number(took, ".3f", 9)
        quartiles = f"{row['ms_low']:.3f} {row['ms_high']:.3f}" if took else ""
        eager, compiled = (
            times[baseline] / took if took and baseline in times else None for baseline in ("eager", "compile")
        )
        print(
            f"{row['op']:9} {row.get('case', ''):14} {row['pass']:7} {_shape(row):26} {row['dtype']:5} "
            f"{row['variant']:14} {middle:>9} {quartiles:>17} {_number(row.get('ratio_to_floor'), '.2f', 8)} "
            f"{_number(eager, '.2f', 7)} {_number(compiled, '.2f', 8)} {_number(row['extra_mib'], '.1f', 10)} "
            f"{_number(row['grad_error'], '.1e', 10)} {_number(row.get('spread'), '.1%', 6)}",
            flush=True,
        )


def plot(result: dict[str, Any], path: Path) -> None:
    """Milliseconds against the first size of the shape that varies, with the floor: a panel for each case and pass."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'ldo[bench]')")
        return
    # no display is needed to write a file
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["ms"]]
    axis = next((dimension for dimension in ("N", "M") if any(dimension in row["shape"] for row in rows)), "B")
    panels: dict[str, list[dict]] = {}
    for row in rows:
        panels.setdefault(_panel_title(row, axis), []).append(row)
    panel_columns = min(3, len(panels)) or 1
    panel_rows = -(-len(panels) // panel_columns) or 1
    figure, axes = pyplot.subplots(
        panel_rows, panel_columns, figsize=(5 * panel_columns, 3.6 * panel_rows), squeeze=False, constrained_layout=True
    )
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    # not strict: the last row of the grid may have empty places
    for panel, (title, members) in zip(axes.flat, panels.items(), strict=False):
        for variant in dict.fromkeys(member["variant"] for member in members):
            points = sorted((member["shape"][axis], member["ms"]) for member in members if member["variant"] == variant)
            panel.plot(*zip(*points, strict=True), marker="o", label=variant)
        floor = sorted({(member["shape"][axis], member["floor_ms"]) for member in members if member["floor_ms"]})
        if floor:
            panel.plot(*zip(*floor, strict=True), "k--", label="floor")
        panel.set(title=title, xlabel=axis, ylabel="ms", xscale="log", yscale="log")
        panel.title.set_fontsize(9)
        panel.legend(fontsize=7)
    figure.suptitle(f"{result['device']}, commit {brief(result['commit'])}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"plot: {path}")


def _panel_title(row: dict[str, Any], axis: str) -> str:
    """What a row has in common with the others of its panel: all but the variant and the size along the axis."""
    # G, the number of groups, follows from N
    sizes = [f"{dimension}{size}" for dimension, size in row["shape"].items() if dimension not in (axis, "B", "G")]
    return " ".join(filter(None, (row["op"], row.get("case"), row["pass"], " ".join(sizes), row["dtype"])))


def summary(path: Path, ours: tuple[str, ...] = ("triton", "cuda", "cpp", "chunked")) -> None:
    """Print what a result file says in a few lines; of a comparison, our best variant against floor, eager and compile.

    The keys of a file tell which benchmark wrote it.
    """
    result = json.loads(path.read_text())
    rows = result.get("rows")
    if "seconds" in result:
        cells = [f"{part} {statistics.median(times):.3g} s" for part, times in result["seconds"].items()]
        print(f"{path.name}: {'; '.join(cells)}")
    elif "parts" in result:
        print(f"{path.name}: {'; '.join(_part(name, row) for name, row in result['parts'].items())}")
    elif not rows:
        print(f"{path.name}: nothing measured")
    elif "config" in rows[0]:
        _print_tuned(path.name, rows)
    elif "predicted" in rows[0]:
        ratios = [row["predicted"] / row["measured"] for row in rows]
        print(f"{path.name}: {len(ratios)} passes, predicted / measured {min(ratios):.3f} to {max(ratios):.3f}")
    elif rows[0]["op"] == "gradient error":
        for row in rows:
            print(f"{path.name}: {gradient_error(row)}")
    elif "auto" in result:
        print(f"{path.name}: {result['device']}, {brief(result['commit'])}, {result['matmul_tflops']:.4g} TFLOP/s")
        print_auto(result)
    else:
        print(
            f"{path.name}: {result['device']}, {brief(result['commit'])}, {result['matmul_tflops']:.4g} TFLOP/s, "
            f"{result['copy_gbps']:.4g} GB/s"
        )
        _print_comparisons(rows, ours)


def _part(name: str, row: dict[str, Any]) -> str:
    """One part of ``bench_model.py``: seconds, and on a GPU the peak of its memory."""
    # None on a CPU
    memory_peak = f", {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
    return f"{name} {row['seconds']:.3g} s{memory_peak}"


def _print_tuned(name: str, rows: list[dict[str, Any]]) -> None:
    """Of the tuner, the three fastest configurations of each size."""
    for size in dict.fromkeys(row["N"] for row in rows):
        timed = [row for row in rows if row["N"] == size and "fwd_bwd_ms" in row]
        ranked = sorted(timed, key=lambda row: row["fwd_bwd_ms"])
        cells = [f"{row['fwd_bwd_ms']:.3f} ms {tuple(row['config'].values())}" for row in ranked[:3]]
        print(f"{name}: {size}: {'; '.join(cells) or 'nothing timed'}")


def _print_comparisons(rows: list[dict[str, Any]], ours: tuple[str, ...]) -> None:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(setting(row), []).append(row)
    for members in groups.values():
        times = milliseconds(members)
        our_variant = next((candidate for candidate in ours if candidate in times), None)
        row = next((member for member in members if member["variant"] == our_variant), members[0])
        ratios = ""
        if our_variant:
            ratios = " ".join(f"{times[other] / row['ms']:.2f}x {other}" for other in COMPARED if other in times)
        failed = [member["variant"] for member in members if member.get("error") == "OOM"]
        print(
            f"  {row.get('case', ''):14} {row['pass']:7} {_shape(row):24} {row['variant']:7} "
            f"{_number(row['ms'], '.3f', 8)} ms "
            f"{_number(row.get('ratio_to_floor'), '.2f', 6)} F {_number(row['extra_mib'], '.0f', 6)} MiB err "
            f"{_number(row['grad_error'], '.1e', 7)} "
            f"| {ratios}{' | OOM ' + ' '.join(failed) if failed else ''}"
        )


def gradient_error(row: dict[str, Any]) -> str:
    """One row of ``gradient_error.py``."""
    gains = "with gains" if row["gains"] else "without gains"
    shares = ", ".join(f"{source} {error:.2e}" for source, error in row["errors"].items())
    return f"{_shape(row)} {gains}: {row['flipped']} of {row['active']} flipped; {shares}"


def print_auto(result: dict[str, Any]) -> None:
    """Print what the attention benchmark found: for each comparison the fastest backend, and how good ``auto`` is.

    Then the profiles with other kernels than promised.
    """
    for row in result["auto"]:
        if row["was_fastest"]:
            verdict = "is the fastest"
        elif row["slower"] is None:
            verdict = "was not timed"
        else:
            verdict = f"takes {row['slower']:.2f} times as long"
        fastest = f"{row['fastest']:14} {row['ms']:9.3f} ms {row['tflops']:7.4g} TFLOP/s {row['share']:6.1%} of matmul"
        print(f"  {row['case']:9} {row['pass']:7} {_shape(row):26} {fastest} | auto, {row['auto']}, {verdict}")
    strange = [row for row in result["kernels"] if row["wrong"]]
    print(f"  {len(result['kernels'])} profiles of kernels, {len(strange)} not as the backend's name promises")
    for row in strange:
        print(f"  NOT AS PROMISED {row['model']} {row['size']} {row['backend']}: {row['wrong']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print a short summary of result files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    for file in parser.parse_args().files:
        summary(file)
