"""Results for people: the table, the plot, and, run as ``python benchmarks/show.py FILE.json ...``, a short summary of result files."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

COMPARED = ("eager", "compile", "panels", "triton-graph", "compile-graph", "checkpoint", "chunk-compile", "bmm", "graph", "launch")
HEADER = (
    f"{'op':9} {'case':14} {'pass':7} {'shape':26} {'dtype':5} {'variant':14} {'ms':>9} {'quartiles':>17} {'x floor':>8} "
    f"{'/eager':>7} {'/compile':>8} {'extra MiB':>10} {'grad error':>10} {'noise':>6}"
)


def short(dtype: torch.dtype) -> str:
    """fp32, bf16, fp16, fp64."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}.get(dtype, str(dtype))


def brief(commit: str | None) -> str:
    """Enough of a commit to recognise it, and whether the tree differed."""
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "") if commit else "unknown"


def setting(row: dict[str, Any]) -> tuple:
    """What the rows of one comparison have in common."""
    return (row["op"], row.get("case", ""), row["pass"], json.dumps(row["shape"]), row["dtype"])


def _shape(row: dict[str, Any]) -> str:
    return " ".join(f"{k}{v}" for k, v in row["shape"].items() if k != "B" or v != 1)


def _number(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def speedups(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """ms of each baseline among the rows of one comparison."""
    return {r["variant"]: r["ms"] for r in rows if r["ms"]}


def print_rows(rows: list[dict[str, Any]], header: bool = True) -> None:
    """One line a row. "/eager" and "/compile": how many times faster than they the row is."""
    if header:
        print(HEADER, flush=True)
    ms = speedups(rows)
    for row in rows:
        took = row["ms"]
        middle = row.get("error") or _number(took, ".3f", 9)
        quartiles = f"{row['ms_low']:.3f} {row['ms_high']:.3f}" if took else ""
        against = [ms[name] / took if took and name in ms else None for name in ("eager", "compile")]
        print(
            f"{row['op']:9} {row.get('case', ''):14} {row['pass']:7} {_shape(row):26} {row['dtype']:5} "
            f"{row['variant']:14} {middle:>9} {quartiles:>17} "
            f"{_number(row.get('ratio_to_floor'), '.2f', 8)} {_number(against[0], '.2f', 7)} {_number(against[1], '.2f', 8)} "
            f"{_number(row['extra_mib'], '.1f', 10)} {_number(row['grad_error'], '.1e', 10)} {_number(row.get('spread'), '.1%', 6)}",
            flush=True,
        )


def plot(result: dict[str, Any], path: Path) -> None:
    """Milliseconds against the first number of the shape that varies, one panel a case and pass, with the floor."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'ldo[bench]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in result["rows"] if r["ms"]]
    axis = next((k for k in ("N", "M") if any(k in r["shape"] for r in rows)), "B")
    panels: dict[str, list[dict]] = {}
    for row in rows:
        rest = " ".join(f"{k}{v}" for k, v in row["shape"].items() if k not in (axis, "B", "G"))
        panels.setdefault(" ".join(filter(None, (row["op"], row.get("case"), row["pass"], rest, row["dtype"]))), []).append(row)
    across = min(3, len(panels)) or 1
    down = -(-len(panels) // across) or 1
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 3.6 * down), squeeze=False, constrained_layout=True)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    for place, (title, members) in zip(axes.flat, panels.items(), strict=False):
        for variant in dict.fromkeys(r["variant"] for r in members):
            points = sorted((r["shape"][axis], r["ms"]) for r in members if r["variant"] == variant)
            place.plot(*zip(*points, strict=True), marker="o", label=variant)
        floor = sorted({(r["shape"][axis], r["floor_ms"]) for r in members if r["floor_ms"]})
        if floor:
            place.plot(*zip(*floor, strict=True), "k--", label="floor")
        place.set(title=title, xlabel=axis, ylabel="ms", xscale="log", yscale="log")
        place.title.set_fontsize(9)
        place.legend(fontsize=7)
    figure.suptitle(f"{result['device']}, commit {brief(result['commit'])}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"plot: {path}")


def summary(path: Path, ours: tuple[str, ...] = ("triton", "cuda", "cpp", "chunked")) -> None:
    """One line a comparison: our best variant against floor, eager and compile."""
    result = json.loads(path.read_text())
    if "seconds" in result:
        print(f"{path.name}: " + "; ".join(f"{part} {statistics.median(s):.3g} s" for part, s in result["seconds"].items()))
        return
    if "parts" in result:
        peak = lambda row: f", {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""  # noqa: E731
        print(f"{path.name}: " + "; ".join(f"{part} {row['seconds']:.3g} s{peak(row)}" for part, row in result["parts"].items()))
        return
    if not result.get("rows"):
        print(f"{path.name}: nothing measured")
        return
    if "config" in result["rows"][0]:
        for n in dict.fromkeys(row["N"] for row in result["rows"]):
            ranked = sorted((r for r in result["rows"] if r["N"] == n and "fwd_bwd_ms" in r), key=lambda r: r["fwd_bwd_ms"])
            print(
                f"{path.name}: {n}: " + ("; ".join(f"{r['fwd_bwd_ms']:.3f} ms {tuple(r['config'].values())}" for r in ranked[:3]) or "nothing timed")
            )
        return
    if "predicted" in result["rows"][0]:
        ratios = [row["predicted"] / row["measured"] for row in result["rows"]]
        print(f"{path.name}: {len(ratios)} passes, predicted / measured {min(ratios):.3f} to {max(ratios):.3f}")
        return
    if result["rows"][0]["op"] == "gradient error":
        for row in result["rows"]:
            print(f"{path.name}: {gradient_error(row)}")
        return
    if "auto" in result:
        print(f"{path.name}: {result['device']}, {brief(result['commit'])}, {result['matmul_tflops']:.4g} TFLOP/s")
        print_auto(result)
        return
    groups: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault(setting(row), []).append(row)
    print(f"{path.name}: {result['device']}, {brief(result['commit'])}, {result['matmul_tflops']:.4g} TFLOP/s, {result['copy_gbps']:.4g} GB/s")
    for rows in groups.values():
        ms = speedups(rows)
        name = next((o for o in ours if o in ms), None)
        row = next((r for r in rows if r["variant"] == name), rows[0])
        ratios = " ".join(f"{ms[v] / row['ms']:.2f}x {v}" for v in COMPARED if v in ms and name)
        oom = [r["variant"] for r in rows if r.get("error") == "OOM"]
        print(
            f"  {row.get('case', ''):14} {row['pass']:7} {_shape(row):24} {row['variant']:7} {_number(row['ms'], '.3f', 8)} ms "
            f"{_number(row.get('ratio_to_floor'), '.2f', 6)} F {_number(row['extra_mib'], '.0f', 6)} MiB err {_number(row['grad_error'], '.1e', 7)} "
            f"| {ratios}{' | OOM ' + ' '.join(oom) if oom else ''}"
        )


def gradient_error(row: dict[str, Any]) -> str:
    """One row of ``gradient_error.py``."""
    shares = ", ".join(f"{name} {error:.2e}" for name, error in row["errors"].items())
    return f"{_shape(row)} {'with' if row['gains'] else 'without'} gains: {row['flipped']} of {row['active']} flipped; {shares}"


def print_auto(result: dict[str, Any]) -> None:
    """Of the attention benchmark, one line a comparison: the fastest backend, and ``auto``'s; then the profiles with other kernels than promised."""
    for v in result["auto"]:
        slower = "was not timed" if v["slower"] is None else f"takes {v['slower']:.2f} times as long"
        best = f"{v['fastest']:14} {v['ms']:9.3f} ms {v['tflops']:7.4g} TFLOP/s {v['share']:6.1%} of matmul"
        print(f"  {v['case']:9} {v['pass']:7} {_shape(v):26} {best} | auto, {v['auto']}, {'is the fastest' if v['was_fastest'] else slower}")
    strange = [row for row in result["kernels"] if row["wrong"]]
    print(f"  {len(result['kernels'])} profiles of kernels, {len(strange)} not as the backend's name promises")
    for row in strange:
        print(f"  NOT AS PROMISED {row['model']} {row['size']} {row['backend']}: {row['wrong']}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        summary(Path(name))
