"""Files are written whole or not at all."""

import os

import pytest
import torch

from ldo.core.checkpoint import load_checkpoint, save_checkpoint
from ldo.core.files import write_text


def test_round_trip_on_the_cpu(tmp_path):
    state = {"step": 3, "lora": {"a": torch.randn(2, 3)}, "recent": [0.5, 1.0], "stopped": ""}
    path = tmp_path / "deep" / "x.pt"
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["lora"]["a"], state["lora"]["a"])
    assert loaded["step"] == 3
    assert loaded["recent"] == [0.5, 1.0]


def test_a_missing_checkpoint_loads_as_none(tmp_path):
    assert load_checkpoint(tmp_path / "x.pt") is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint, text_file = tmp_path / "x.pt", tmp_path / "x.json"
    save_checkpoint(checkpoint, {"step": 1})
    write_text(text_file, "old")

    def killed(*_):
        raise KeyboardInterrupt

    # The move is the last thing that either of them does, so the new content is complete by then, under another name.
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(checkpoint, {"step": 2})
    with pytest.raises(KeyboardInterrupt):
        write_text(text_file, "new")
    assert load_checkpoint(checkpoint)["step"] == 1
    assert text_file.read_text() == "old"
