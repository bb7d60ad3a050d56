"""Files are written whole or not at all."""

import os

import pytest
import torch

from ldo import checkpoint


def test_round_trip_on_the_cpu(tmp_path):
    state = {"step": 3, "lora": {"a": torch.randn(2, 3)}, "recent": [0.5, 1.0], "stopped": ""}
    path = tmp_path / "deep" / "x.pt"
    checkpoint.save(path, state)
    back = checkpoint.load(path)
    assert torch.equal(back["lora"]["a"], state["lora"]["a"]) and back["step"] == 3 and back["recent"] == [0.5, 1.0]


def test_none_where_there_is_none(tmp_path):
    assert checkpoint.load(tmp_path / "x.pt") is None


def test_a_write_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"step": 1})
    checkpoint.write_text(tmp_path / "x.json", "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    for write in (lambda: checkpoint.save(path, {"step": 2}), lambda: checkpoint.write_text(tmp_path / "x.json", "new")):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert checkpoint.load(path)["step"] == 1 and (tmp_path / "x.json").read_text() == "old"
