"""Loggers: what each receives, that none can stop a run, and that a resumed run continues in the same place."""

import json
import logging
import sqlite3
import sys
import types
from functools import partial
from importlib.machinery import ModuleSpec

import pytest
import yaml

from ldo.core import loggers
from ldo.core.config import Recipe
from ldo.core.distributed import Processes
from ldo.core.errors import RecipeError
from ldo.core.files import read_json_lines
from ldo.core.loggers import Loggers, check_loggers
from ldo.core.step_log import StepLog
from ldo.run.claim import claim_run
from ldo.run.validate import validate


class Fake(types.ModuleType):
    """A module like wandb or trackio that records its calls, and fails at those named in ``broken``."""

    def __init__(self, name, broken=()):
        super().__init__(name)
        # Only a module with an origin counts as installed.
        self.__spec__ = ModuleSpec(name, None, origin="fake")
        self.calls = []
        self.broken = broken
        for call in ("log", "finish", "define_metric"):
            setattr(self, call, partial(self.note, call))

    def note(self, call, *values, **named):
        if call in self.broken:
            raise OSError(f"no {call}\ntoday")
        self.calls.append((call, *values, named))

    def init(self, **named):
        self.note("init", **named)
        return self

    def Settings(self, **named):
        return named


@pytest.fixture
def fake(monkeypatch):
    def make(name, broken=()):
        module = Fake(name, broken)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


def session(folder, recipe, step, count, stage="align"):
    step_log = StepLog(folder, stage, step, True, recipe)
    for index in range(step, step + count):
        step_log.write(index, loss=float(index))
    step_log.close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_continues_in_the_same_place(fake, tmp_path, name):
    module = fake(name)
    recipe = Recipe(name="trial", log=(name,), log_project="mine")
    session(tmp_path / "trial", recipe, 0, 2)
    session(tmp_path / "trial", recipe, 1, 1)
    session(tmp_path / "other", recipe, 0, 1)
    started = [options for call, *_, options in module.calls if call == "init"]
    identities = [options["id" if name == "wandb" else "name"] for options in started]
    assert identities[0] == identities[1]
    assert identities[0] != identities[2]
    assert identities[0].startswith("trial-")
    assert identities[2].startswith("other-")
    for options in started:
        assert options["resume"] == "allow"
        assert options["project"] == "mine"
        assert options["config"]["log_project"] == "mine"
    assert json.dumps(started[0]["config"])
    logged = [(values[0], options) for call, *values, options in module.calls if call == "log"]
    if name == "wandb":
        # W&B's own counter only grows, so the step of a resumed run is a metric like the others.
        assert logged[1] == ({"align/step": 1, "align/loss": 1.0}, {})
        assert ("define_metric", "align/*", {"step_metric": "align/step"}) in module.calls
    else:
        assert logged[1] == ({"align/loss": 1.0}, {"step": 1})
    assert logged[2] == logged[1]
    assert [call for call, *_ in module.calls].count("finish") == 3


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_failing_logger_causes_one_warning(fake, tmp_path, caplog, call):
    failing, sound = fake("wandb", broken=(call,)), fake("trackio")
    with caplog.at_level(logging.WARNING):
        session(tmp_path, Recipe(log=("wandb", "trackio", "tensorboard")), 0, 3)
    warnings = [entry.message for entry in caplog.records if entry.name == "ldo.core.loggers"]
    # The error's message has two lines, the warning only one.
    assert warnings == [f"log: wandb failed (no {call} today); the run continues without it"]
    assert [row["loss"] for row in read_json_lines(tmp_path / "align.jsonl")] == [0, 1, 2]
    assert [name for name, *_ in sound.calls] == ["init", "log", "log", "log", "finish"]
    assert call not in [name for name, *_ in failing.calls]
    assert list((tmp_path / "tensorboard" / "align").iterdir())


def test_only_json_lines_without_loggers(tmp_path):
    session(tmp_path, Recipe(log=()), 0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["align.jsonl"]


def test_other_ranks_stay_silent(fake, tmp_path):
    module = fake("wandb")
    step_log = StepLog(tmp_path, "align", 0, False, Recipe(log=("wandb",)))
    step_log.write(0, loss=1.0)
    step_log.close()
    assert module.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_missing_logger_is_reported_before_anything_loads(monkeypatch):
    # A stand-in for wandb, so that the unknown logger is the recipe's only mistake.
    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb"))
    with pytest.raises(RecipeError, match=r"log is \['wandb', 'mlflow'\]; choose from tensorboard, wandb, trackio"):
        validate(Recipe(log=("wandb", "mlflow")))

    def all_but_trackio(name):
        return None if name == "trackio" else ModuleSpec(name, None, origin="x")

    monkeypatch.setattr(loggers.importlib.util, "find_spec", all_but_trackio)
    with pytest.raises(RecipeError, match=r"trackio, which is not installed; pip install 'ldo\[trackio\]'"):
        validate(Recipe(log=("tensorboard", "trackio")))

    def only_a_folder(name):
        return ModuleSpec(name, None)

    # wandb leaves a folder of its own name where it was started, and Python can import any folder.
    monkeypatch.setattr(loggers.importlib.util, "find_spec", only_a_folder)
    with pytest.raises(RecipeError, match="wandb, which is not installed"):
        check_loggers(["wandb"])


def test_a_resumed_run_may_log_elsewhere(tmp_path):
    recipe = Recipe(out=str(tmp_path))
    claim_run(recipe, Processes())
    claim_run(recipe.changed(log=(), log_project="x"), Processes())
    with pytest.raises(RecipeError, match="was begun with seed=0"):
        claim_run(recipe.changed(seed=1), Processes())
    assert yaml.safe_load((recipe.run / "recipe.yaml").read_text())["log"] == ["tensorboard"]


def test_the_real_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed here")
    # A folder wandb/ in the current directory imports too.
    if not hasattr(wandb, "init"):
        pytest.skip("wandb is not installed here")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = Recipe(name="trial", log=("wandb",))
    (tmp_path / "trial").mkdir()
    session(tmp_path / "trial", recipe, 0, 3)
    # Resumed from a checkpoint before the kill, so that step 2 is logged twice.
    session(tmp_path / "trial", recipe, 2, 2)
    session(tmp_path / "trial", recipe, 0, 1, "reinforce")
    runs = list((tmp_path / "trial" / "wandb").glob("offline-run-*/run-*.wandb"))
    name = (tmp_path / "trial" / "log-id").read_text()
    assert len(runs) == 3
    assert {path.name for path in runs} == {f"run-{name}.wandb"}
    rows = []
    for path in runs:
        rows += history(path)
    aligned = [("align", step, float(step)) for step in (0, 1, 2, 2, 3)]
    # "align" sorts before "reinforce".
    assert sorted(rows) == [*aligned, ("reinforce", 0, 0.0)]


def history(path):
    """(stage, step, loss) of every logged step in a file that W&B writes.

    The file is a sequence of blocks of 32 KiB. A record is one or more pieces, each with a header of seven bytes:
    checksum, length and kind.
    """
    from wandb.proto import wandb_internal_pb2

    data, record_bytes = path.read_bytes(), b""
    # The file itself begins with seven bytes of its own.
    offset = 7
    while offset + 7 <= len(data):
        left_in_block = -offset % 32768
        # A header is never split: where it does not fit, the rest of the block is padding.
        if left_in_block < 7:
            offset += left_in_block
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        record_bytes += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        # Kind 1 is a whole record and kind 4 the last piece of one; after any other kind there is more to come.
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(record_bytes)
            record_bytes = b""
            if record.WhichOneof("record_type") == "history":
                items = {}
                for item in record.history.item:
                    items[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
                stage = next(key for key in items if key.endswith("/loss")).split("/")[0]
                yield stage, items[f"{stage}/step"], items[f"{stage}/loss"]


def test_the_real_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed here")
    if not hasattr(trackio, "init"):
        pytest.skip("trackio is not installed here")
    (tmp_path / "trial").mkdir()
    recipe = Recipe(name="trial", log=("trackio",), log_project="mine")
    # Opened anew for each step, as by a run that is resumed.
    for step in (0, 1):
        resumed = Loggers(recipe, tmp_path / "trial", "align", step)
        resumed.scalars(step, {"loss": step / 2})
        # A logger that failed would be left out without an error.
        assert list(resumed.live) == ["trackio"]
        resumed.close()
    with sqlite3.connect(tmp_path / "store" / "mine.db") as store:
        assert len(store.execute("select distinct run_id from metrics").fetchall()) == 1
        rows = store.execute("select run_name, step, metrics from metrics order by step").fetchall()
    name = (tmp_path / "trial" / "log-id").read_text()
    found = [(run_name, step, json.loads(metrics)) for run_name, step, metrics in rows]
    assert found == [(name, 0, {"align/loss": 0.0}), (name, 1, {"align/loss": 0.5})]
