"""Logs: a line a step, and after a resume the log of an undisturbed run."""

from ldo.metrics import Log, read


def write(run, step, count):
    log = Log(run, "align", step)
    for i in range(step, step + count):
        log.write(i, loss=float(i))
    log.close()


def test_resumed_log_is_the_undisturbed_one(tmp_path):
    write(tmp_path / "a", 0, 6)
    write(tmp_path / "b", 0, 5)
    with open(tmp_path / "b" / "align.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    write(tmp_path / "b", 3, 3)  # the last checkpoint was that of step 3
    assert (tmp_path / "a" / "align.jsonl").read_text() == (tmp_path / "b" / "align.jsonl").read_text()
    assert read(tmp_path / "b" / "align.jsonl")[-1] == {"step": 5, "loss": 5.0}


def test_tensorboard_has_the_figures_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, 4)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "align"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("align/loss")] == [(i, float(i)) for i in range(4)]


def test_only_the_first_rank_writes(tmp_path):
    log = Log(tmp_path, "align", active=False)
    log.write(0, loss=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []
