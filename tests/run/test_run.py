"""Loading a run: its prompts, whose embeddings are made once, and its fresh adapter."""

import pytest
import torch

from ldo.data.cache import read_entry
from ldo.run import prompts as run_prompts


def test_texts_are_embedded_once_and_as_the_pipeline_does(open_run, monkeypatch):
    run = open_run()
    first = run.texts(["a red ball", "a blue ball", "a red ball"]).tensors["embeds"]
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    stock, _ = run.generator.pipeline.encode_prompt(
        "a blue ball", do_classifier_free_guidance=False, max_sequence_length=16
    )
    assert torch.equal(first[1], stock[0])
    monkeypatch.setattr(run.generator, "encode_text", lambda _: pytest.fail("embedded twice"))
    assert torch.equal(run.texts(["a blue ball"]).tensors["embeds"][0], first[1])


def test_texts_are_read_from_disk_once(open_run, monkeypatch):
    prompts = ["a red ball", "", "a red ball"]
    expected = open_run().texts(prompts)
    again = open_run()
    paths_read = []

    def counted(path):
        paths_read.append(path)
        return read_entry(path)

    monkeypatch.setattr(again.generator, "encode_text", lambda _: pytest.fail("embedded twice"))
    monkeypatch.setattr(run_prompts, "read_entry", counted)
    for _ in range(2):
        assert torch.equal(again.texts(prompts).tensors["embeds"], expected.tensors["embeds"])
    # Two different prompts in six look-ups.
    assert len(paths_read) == 2
    assert len(set(paths_read)) == 2


def test_adapter_starts_as_the_base(open_run):
    run = open_run()
    assert run.parameters
    # An adapter adds the product of its two matrices, so one that is zero is enough.
    assert all((weight == 0).all() for name, weight in run.fresh.items() if "lora_B" in name)
    for name, parameter in run.generator.transformer.named_parameters():
        assert "lora" in name or not parameter.requires_grad


def test_sandbox_prompts_move_and_have_what_metrics_need(open_run):
    lines = open_run().prompts
    assert len(lines) == 8
    assert all(line.extra["kind"] != "stack" for line in lines)
    assert all(line.extra["path_length"] > 0 for line in lines)
