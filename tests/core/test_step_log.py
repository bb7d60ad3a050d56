"""Logs: one line for each step, and after a resume the log of an undisturbed run."""

from ldo.core.files import read_json_lines
from ldo.core.step_log import StepLog


def write(run, step, count):
    step_log = StepLog(run, "align", step)
    for index in range(step, step + count):
        step_log.write(index, loss=float(index))
    step_log.close()


def test_resumed_log_is_the_undisturbed_one(tmp_path):
    undisturbed, resumed = tmp_path / "a", tmp_path / "b"
    write(undisturbed, 0, 6)
    write(resumed, 0, 5)
    # A kill can come in the middle of a line.
    with open(resumed / "align.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    # The last checkpoint was that of step 3, so steps 3 and 4 are logged a second time.
    write(resumed, 3, 3)
    assert (undisturbed / "align.jsonl").read_text() == (resumed / "align.jsonl").read_text()
    assert read_json_lines(resumed / "align.jsonl")[-1] == {"step": 5, "loss": 5.0}


def test_tensorboard_has_the_metrics_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, 4)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "align"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("align/loss")] == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_only_the_first_rank_writes(tmp_path):
    step_log = StepLog(tmp_path, "align", active=False)
    step_log.write(0, loss=1.0)
    step_log.close()
    assert list(tmp_path.iterdir()) == []
