"""The flags that all benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser with the shared flags; the first line of ``doc`` describes the script."""
    parser = argparse.ArgumentParser(description=doc.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write results here, and a plot next to them")
    parser.add_argument("--quick", action="store_true", help="few shapes and repeats: under two minutes on a GPU")
    parser.add_argument("--sizes", type=integers, metavar="N,N,...", help="replace the sizes")
    parser.add_argument("--dtype", choices=DTYPES, help="default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    parser.add_argument("--variants", type=words, metavar="A,B,...", help="only these")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write a torch profiler trace of every variant")
    parser.add_argument("--model", action="store_true", help="print what a static model predicts, and run nothing")
    return parser


def words(text: str) -> list[str]:
    """The type of a flag that takes a comma-separated list."""
    return text.split(",")


def integers(text: str) -> list[int]:
    """The type of a flag that takes a comma-separated list of numbers."""
    return [int(part) for part in text.split(",")]


def pairs(text: str) -> list[tuple[int, ...]]:
    """The type of a flag that takes widths of student and teacher, such as 1920x1024,1536x1024."""
    return [tuple(int(part) for part in pair.split("x")) for pair in text.split(",")]
