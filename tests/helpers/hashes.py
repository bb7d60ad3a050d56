"""Two shortened sandbox runs, and a hash of everything they wrote: ``python -m tests.helpers.hashes [--against FILE]``.

A change that is meant to keep all numbers must print the same hashes before and after, on one machine: keep the output
of the version before (``> before.txt``) and give it to the version after. The first run is the recipe's own; the second
takes the other branches: GRPO instead of NFT, the base's own samples as clips, guidance, micro-batches, a projector.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    *("log=[]", "threads=2", "save_every=2", "data.clips=48", "data.prompt_count=16", "teacher.projector=mlp"),
    *("gate.pairs=8", "gate.prompts=2", "gate.samples=4", "gate.override=true"),
    *("align.steps=4", "align.batch=8", "align.warmup=2", "rl.updates=3", "rl.prompts=2", "rl.group_size=4"),
    *("evaluate.count=6", "evaluate.seeds=1", "evaluate.steps=4", "evaluate.batch=6"),
)
OTHER = (
    *("rl.objective=grpo", "rl.kl=1e-4", "rl.guidance=1.5", "rl.epochs=2", "rl.micro_batch=2", "rl.align_weight=0.1"),
    *("rl.flow_weight=0.1", "align.micro_batch=3", "data.source=self", "data.clips=18", "teacher.mode=delta"),
    *("critic.aggregation=mean", "evaluate.guidance=2"),
)
RUNS = {"short": SHORT, "other": (*SHORT, *OTHER)}
HASHED = (".safetensors", ".jsonl", ".mp4", ".json")


def hash_value(digest: Any, value: Any) -> None:
    """Feed a checkpoint's nested dicts, lists, tensors and numbers into a digest."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            hash_value(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            hash_value(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        digest.update(repr(value).encode())


def hash_file(path: Path) -> str:
    """Hash of what a file says: of checkpoints their values, of the report all but where the run lies."""
    digest = hashlib.sha256()
    if path.suffix == ".pt":
        hash_value(digest, torch.load(path, map_location="cpu", weights_only=True))
    elif path.name == "report.json":
        report = json.loads(path.read_text())
        report["config"].pop("out")
        digest.update(json.dumps(report, sort_keys=True).encode())
    else:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def hashes(run: Path) -> dict[str, str]:
    """Hashes of a finished run's files, by their path in it."""
    files = [path for path in sorted(run.rglob("*")) if path.suffix in (*HASHED, ".pt")]
    return {str(path.relative_to(run)): hash_file(path) for path in files}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.hashes", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="hashes of the version before; exit code 1 if any differs"
    )
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in RUNS.items():
            command = [sys.executable, "-m", "ldo.train", "recipes/sandbox.yaml", *overrides]
            subprocess.run([*command, f"name={name}", f"out={folder}/{name}"], cwd=ROOT, check=True, stdout=sys.stderr)
            lines += [f"{value}  {name}/{path}" for path, value in hashes(Path(folder) / name / name).items()]
    print(*lines, sep="\n")
    if args.against is None:
        return 0
    before = set(args.against.read_text().splitlines())
    changed = [line for line in lines if line not in before]
    print(f"{len(changed)} of {len(lines)} differ", *changed, sep="\n  ", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
