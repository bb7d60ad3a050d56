"""Loggers: what each is told, that none can stop a run, and that a resumed run goes on in the same place."""

import json
import logging
import sqlite3
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import yaml

from ldo import loggers, train
from ldo.check import check
from ldo.config import Recipe, RecipeError
from ldo.distributed import World
from ldo.loggers import Loggers
from ldo.metrics import Log, read


class Fake(types.ModuleType):
    """A module like wandb or trackio that writes down what it is told, or fails at a call of ``broken``."""

    def __init__(self, name, broken=()):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin="fake")
        self.calls, self.broken = [], broken
        for call in ("log", "finish", "define_metric"):
            setattr(self, call, lambda *a, call=call, **k: self.note(call, *a, **k))

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
    log = Log(folder, stage, step, True, recipe)
    for i in range(step, step + count):
        log.write(i, loss=float(i))
    log.close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_same_place(fake, tmp_path, name):
    module, recipe = fake(name), Recipe(name="trial", log=(name,), log_project="mine")
    session(tmp_path / "trial", recipe, 0, 2)
    session(tmp_path / "trial", recipe, 1, 1)
    session(tmp_path / "other", recipe, 0, 1)
    begun = [named for call, *_, named in module.calls if call == "init"]
    keys = [n["id" if name == "wandb" else "name"] for n in begun]
    assert keys[0] == keys[1] != keys[2] and keys[0].startswith("trial-") and keys[2].startswith("other-")
    assert all(n["resume"] == "allow" and n["project"] == "mine" and n["config"]["log_project"] == "mine" for n in begun)
    assert json.dumps(begun[0]["config"])
    told = [(values[0], named) for call, *values, named in module.calls if call == "log"]
    if name == "wandb":  # steps that come again are no steps back: W&B's own counter is left alone
        assert told[2] == told[1] == ({"align/step": 1, "align/loss": 1.0}, {})
        assert ("define_metric", "align/*", {"step_metric": "align/step"}) in module.calls
    else:
        assert told[2] == told[1] == ({"align/loss": 1.0}, {"step": 1})
    assert [call for call, *_ in module.calls].count("finish") == 3


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_logger_that_fails_is_warned_of_once(fake, tmp_path, caplog, call):
    bad, good = fake("wandb", broken=(call,)), fake("trackio")
    with caplog.at_level(logging.WARNING):
        session(tmp_path, Recipe(log=("wandb", "trackio", "tensorboard")), 0, 3)
    warned = [r.message for r in caplog.records if r.name == "ldo.loggers"]
    assert warned == [f"log: wandb failed (no {call} today); the run goes on without it"]
    assert [r["loss"] for r in read(tmp_path / "align.jsonl")] == [0, 1, 2]
    assert [c[0] for c in good.calls] == ["init", "log", "log", "log", "finish"] and call not in [c[0] for c in bad.calls]
    assert list((tmp_path / "tensorboard" / "align").iterdir())


def test_none_but_json_lines(tmp_path):
    session(tmp_path, Recipe(log=()), 0, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["align.jsonl"]


def test_other_ranks_stay_silent(fake, tmp_path):
    module = fake("wandb")
    log = Log(tmp_path, "align", 0, False, Recipe(log=("wandb",)))
    log.write(0, loss=1.0)
    log.close()
    assert module.calls == [] and list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_said_before_anything_loads(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"log is \['wandb', 'mlflow'\]; choose from tensorboard, wandb, trackio"):
        monkeypatch.setitem(sys.modules, "wandb", Fake("wandb"))
        check(Recipe(log=("wandb", "mlflow")))
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == "trackio" else ModuleSpec(name, None, origin="x"))
    with pytest.raises(RecipeError, match=r"trackio, which is not installed; pip install 'ldo\[trackio\]'"):
        check(Recipe(log=("tensorboard", "trackio")))
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))  # a folder wandb/ and no package
    with pytest.raises(RecipeError, match="wandb, which is not installed"):
        loggers.check(["wandb"])


def test_a_resumed_run_may_log_elsewhere(tmp_path):
    recipe = Recipe(out=str(tmp_path))
    train.claim(recipe, World())
    train.claim(replace(recipe, log=(), log_project="x"), World())
    with pytest.raises(RecipeError, match="was begun with seed=0"):
        train.claim(replace(recipe, seed=1), World())
    assert yaml.safe_load((recipe.run / "recipe.yaml").read_text())["log"] == ["tensorboard"]


def test_the_real_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed here")
    if not hasattr(wandb, "init"):
        pytest.skip("wandb is not installed here")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = Recipe(name="trial", log=("wandb",))
    (tmp_path / "trial").mkdir()
    session(tmp_path / "trial", recipe, 0, 3)
    session(tmp_path / "trial", recipe, 2, 2)  # resumed from a checkpoint before the kill
    session(tmp_path / "trial", recipe, 0, 1, "reinforce")
    runs = list((tmp_path / "trial" / "wandb").glob("offline-run-*/run-*.wandb"))
    name = (tmp_path / "trial" / "log-id").read_text()
    assert len(runs) == 3 and {p.name for p in runs} == {f"run-{name}.wandb"}
    assert sorted(row for path in runs for row in history(path)) == sorted(
        [*(("align", i, float(i)) for i in (0, 1, 2, 2, 3)), ("reinforce", 0, 0.0)]
    )


def history(path):
    """(stage, step, loss) of every line that W&B keeps in a file: blocks of 32 KiB, in them pieces with a header of crc, length and kind."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if -at % 32768 < 7:  # too little of the block is left for a header
            at += -at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its end
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                stage = next(k for k in items if k.endswith("/loss")).split("/")[0]
                yield stage, items[f"{stage}/step"], items[f"{stage}/loss"]


def test_the_real_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed here")
    if not hasattr(trackio, "init"):
        pytest.skip("trackio is not installed here")
    (tmp_path / "trial").mkdir()
    for step in (0, 1):  # resumed
        told = Loggers(Recipe(name="trial", log=("trackio",), log_project="mine"), tmp_path / "trial", "align", step)
        told.scalars(step, {"loss": step / 2})
        assert list(told.live) == ["trackio"]
        told.close()
    with sqlite3.connect(tmp_path / "store" / "mine.db") as store:
        assert len(store.execute("select distinct run_id from metrics").fetchall()) == 1
        rows = store.execute("select run_name, step, metrics from metrics order by step").fetchall()
    name = (tmp_path / "trial" / "log-id").read_text()
    assert [(n, s, json.loads(m)) for n, s, m in rows] == [(name, 0, {"align/loss": 0.0}), (name, 1, {"align/loss": 0.5})]
