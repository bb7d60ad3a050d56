"""Recipes on the tiny random models, small enough for a test."""

from pathlib import Path

import yaml

SMALL = {
    "threads": 1,
    "save_every": 2,
    "stages": ["sft", "align", "reinforce"],
    "data": {"clips": 16, "prompt_count": 8},
    "critic": {"reward": "plain"},  # the skill of a random world model is -2 whatever it sees
    "lora": {"rank": 4, "alpha": 8},
    "align": {"steps": 6, "batch": 4, "lr": 1e-3},
    "rl": {"updates": 4, "prompts": 2, "group_size": 4, "steps": 5, "window": 2, "lr": 1e-3, "ema_every": 1},
    "gate": {"pairs": 2, "prompts": 2, "samples": 4, "override": True},
    "evaluate": {"count": 4, "seeds": 2, "batch": 4, "steps": 3},
}


def merge(tree: dict, changes: dict) -> dict:
    """``tree`` with ``changes`` ({"rl.updates": 2}) put in."""
    out = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = out
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return out


def write(folder: Path, wan: Path, vjepa: Path, **changes) -> Path:
    """A recipe file; the run goes to ``folder``/runs/small."""
    paths = {
        "name": "small",
        "out": str(folder / "runs"),
        "model.path": str(wan),
        "model.text_length": 16,
        "world_model.path": str(vjepa),
    }
    tree = merge(SMALL, paths | {name.replace("__", "."): value for name, value in changes.items()})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
