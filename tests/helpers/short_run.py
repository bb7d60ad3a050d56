"""A run of both stages that takes a few steps, for tests of what a recipe switches on."""

from ldo.core.files import read_json_lines
from ldo.stages.align import train_align
from ldo.stages.reinforce import train_reinforce

SHORT = {
    "stages": ["align", "reinforce"],
    "align__steps": 2,
    "align__batch": 2,
    "rl__updates": 1,
    "rl__group_size": 2,
    "rl__steps": 4,
}


def train_both_stages(run):
    """Train both stages of a run with the changes ``SHORT``; what they export, stage 2 under names with ``rl``."""
    values = train_align(run, "align") | {f"rl {name}": value for name, value in train_reinforce(run).items()}
    rows = read_json_lines(run.folder / "align.jsonl") + read_json_lines(run.folder / "reinforce.jsonl")
    # two steps and an update, each of which moved the adapter
    assert len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows)
    return values
