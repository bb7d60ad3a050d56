"""Loading a run: prompts, embeddings made once."""

import pytest
import torch

from ldo import cache


def test_texts_are_embedded_once_and_as_the_pipeline_does(open_run, monkeypatch):
    run = open_run()
    first = run.texts(["a red ball", "a blue ball", "a red ball"]).tensors["embeds"]
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    stock, _ = run.generator.pipeline.encode_prompt("a blue ball", do_classifier_free_guidance=False, max_sequence_length=16)
    assert torch.equal(first[1], stock[0])
    monkeypatch.setattr(run.generator, "encode_text", lambda _: pytest.fail("embedded twice"))
    assert torch.equal(run.texts(["a blue ball"]).tensors["embeds"][0], first[1])


def test_texts_are_read_from_disk_once(open_run, monkeypatch):
    prompts = ["a red ball", "", "a red ball"]
    expected = open_run().texts(prompts)
    again, read, seen = open_run(), cache.read, []
    monkeypatch.setattr(again.generator, "encode_text", lambda _: pytest.fail("embedded twice"))
    monkeypatch.setattr(cache, "read", lambda path: seen.append(path) or read(path))
    for _ in range(2):
        assert torch.equal(again.texts(prompts).tensors["embeds"], expected.tensors["embeds"])
    assert len(seen) == len(set(seen)) == 2


def test_adapter_starts_as_the_base(open_run):
    run = open_run()
    assert run.parameters and all((v == 0).all() for k, v in run.fresh.items() if "lora_B" in k)
    assert all(not p.requires_grad for n, p in run.generator.transformer.named_parameters() if "lora" not in n)


def test_sandbox_prompts_move_and_have_what_metrics_need(open_run):
    lines = open_run().prompts
    assert len(lines) == 8 and all(line.extra["kind"] != "stack" and line.extra["path_length"] > 0 for line in lines)
