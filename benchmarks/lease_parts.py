"""The parts of ``benchmarks/lease.py``, the most valuable first.

Each has three sizes: tiny, to try it on a CPU; short, within minutes on a GPU; full, for the published tables.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

TINY, SHORT, FULL = "tiny", "short", "full"
# seconds that every part may take at full size, at least
FULL_LIMIT = 470
MODELS = ("diffusers", "pydantic")
# Without tests/conftest.py, which imports the model libraries: the tests of the operations need none of them.
NATIVE = "-m pytest -p no:cacheprovider --confcutdir=tests/ops"


@dataclass(frozen=True)
class Part:
    """One process: ``command`` after the interpreter, and further arguments for each size."""

    name: str
    limit: int  # seconds, of a short run
    command: str
    tiny: str | None = ""  # None: there is nothing to try without a GPU
    short: str = ""
    full: str = ""  # empty: as short
    writes: bool = True  # takes --out FILE.json
    needs: tuple[str, ...] = ()  # modules
    extension: bool = False  # waits for the extension to be built
    interprets: bool = False  # runs Triton's kernels under the interpreter at size tiny


def arguments(part: Part, size: str, out: Path) -> list[str]:
    """The command of a part at a size; its results go to ``out``, if it has any."""
    further = getattr(part, size) or (part.short if size == FULL else "")
    command = [sys.executable, *shlex.split(f"{part.command} {further}")]
    return [*command, "--out", str(out)] if part.writes else command


def _align(name: str, limit: int, tiny: str, short: str, full: str) -> Part:
    return Part(name, limit, "benchmarks/bench_align.py", f"--quick {tiny}", f"--quick {short}", full)


def _model(name: str, limit: int, recipe: str, short: str, full: str = "", tiny: str | None = None) -> Part:
    file = f"recipes/{recipe}.yaml"
    at_short = f"{file} {short}"
    at_full = f"{file} {full or short}"
    return Part(name, limit, "benchmarks/bench_model.py", tiny, at_short, at_full, needs=MODELS)


_FAST = "triton,compile,eager,panels,triton-graph,compile-graph"
_LONG = (
    "data.frames=81 data.height=480 data.width=832 rl.micro_batch=1 rl.group_size=2 align.micro_batch=1 align.batch=2"
)
PARTS = (
    _align(
        "recipe",
        110,
        "--batch 2 --sizes 256 --widths 64x48 --cases framed",
        f"--batch 4 --sizes 4096 --widths 1536x1024 --cases framed --variants {_FAST}",
        "--batch 4 --sizes 4096 --widths 1536x1024 --cases framed,few,many",
    ),
    Part("residual", 60, "benchmarks/bench_residual.py", "--quick --sizes 1568 --widths 64", "--quick"),
    Part(
        "advantage",
        60,
        "benchmarks/bench_advantage.py",
        "--quick --sizes 64",
        "--quick --sizes 64,4096",
        extension=True,
    ),
    _model(
        "model",
        130,
        "wan2.1-1.3b",
        "rl.group_size=2 rl.micro_batch=2 rl.steps=8 rl.window=2 rl.window_range=2",
        tiny="recipes/sandbox.yaml rl.group_size=2 align.batch=2 --quick",
    ),
    _align(
        "align-long",
        60,
        "--sizes 512 --widths 64x48 --cases few",
        "--sizes 16384 --cases framed,few --variants triton,compile,panels",
        "--sizes 4096,8192,16384,32768 --cases many,framed",
    ),
    Part(
        "tests",
        150,
        NATIVE,
        "tests/ops/test_surrogate.py -m 'not gpu'",
        # -k leaves out to_the_31, a part of its own, and what is the same without a GPU
        "-n auto --maxprocesses 14 tests/kernels tests/ops --ignore=tests/kernels/test_relation_aot.py "
        "-k 'not (architecture or 16_bytes or within_a_warp or to_the_31 or opcheck or gradcheck)'",
        writes=False,
        extension=True,
    ),
    Part("gradient", 30, "benchmarks/gradient_error.py", "--sizes 128 --widths 24x16", interprets=True),
    _align(
        "squared",
        40,
        "--sizes 512 --widths 32x24 --cases squared",
        "--sizes 16384 --cases squared --variants triton,compile",
        "--sizes 8192,16384,32768 --cases squared",
    ),
    _align(
        "align-sizes",
        60,
        "--sizes 256,512 --widths 64x48",
        "--sizes 8192 --cases few,framed,many",
        "--sizes 3600,4096,8192,10240,16384,23040,32768",
    ),
    Part(
        "tests-trainer",
        60,
        "-m pytest -p no:cacheprovider -m gpu --ignore tests/kernels --ignore tests/ops",
        None,
        writes=False,
        needs=(*MODELS, "av"),
    ),
    Part("large", 60, f"{NATIVE} tests/kernels -k to_the_31", None, writes=False),
    Part(
        "attention",
        70,
        "benchmarks/bench_attention.py",
        "--quick --variants native --sizes 256",
        "--quick --variants native,sdpa_cudnn,sdpa_flash,sdpa_efficient",
        "--quick",
        needs=MODELS,
    ),
    Part("sanitizer", 90, "benchmarks/lease.py --sanitizer", None, writes=False),
    Part(
        "tune",
        70,
        "benchmarks/tune_pairs.py",
        "--sizes 65 --widths 16x12 --minutes 0.2",
        "--sizes 16384 --minutes 0.7",
        "--minutes 6",
        interprets=True,
    ),
    Part(
        "sandbox",
        130,
        "-m ldo.sandbox.build.further --form eager",
        "--clips 8 --batch 2 --warmup 3 --minutes 0.1",
        "--minutes 1.5",
        "--minutes 5",
        writes=False,
        needs=MODELS,
    ),
    _align(
        "align-widths",
        90,
        "--sizes 256 --widths 48x32",
        "--sizes 4096 --widths 3072x1024,5120x1408",
        "--sizes 4096,10240 --widths 1536x1024,3072x1024,5120x1408",
    ),
    Part("stages", 60, "benchmarks/bench_stages.py", "--sizes 33 --widths 16x8", "--quick", interprets=True),
    Part(
        "step",
        120,
        "benchmarks/bench_step.py",
        "recipes/sandbox.yaml align.batch=4 rl.prompts=2 rl.group_size=2 rl.steps=4 --quick",
        "--quick",
        needs=MODELS,
    ),
    Part("memory", 120, "benchmarks/bench_memory.py", "--quick", "--quick", needs=MODELS),
    _model("model-long", 300, "wan2.1-1.3b", f"{_LONG} rl.steps=6 rl.window=2 rl.window_range=2"),
    _model("model-ltx", 200, "ltx-video", ""),
    _model("model-cogvideox", 200, "cogvideox-2b", "rl.group_size=2 rl.steps=8"),
)
KNOWN = {part.name: part for part in PARTS}
# Deadline in seconds, and parts. Some of the 200 and 500 seconds are left for the end of the last part and the summary.
MODES = {
    "probe": (190, ("recipe", "residual", "tests")),
    "main": (485, tuple(KNOWN)[: tuple(KNOWN).index("align-widths")]),
    "all": (None, tuple(KNOWN)),
}
