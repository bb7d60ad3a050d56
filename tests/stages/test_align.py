"""Stage 1 and its control: what is learnt, held-out losses, bitwise resume, the finite check, self mode."""

import dataclasses
import json
import shutil

import pytest
import torch

from ldo.core.checkpoint import load_checkpoint
from ldo.core.errors import TrainingError
from ldo.core.files import read_json_lines
from ldo.models.lora import read_lora
from ldo.stages import align, self_clips
from ldo.stages.align import clip_losses, train_align
from ldo.stages.clips import prepare_clips
from ldo.stages.self_clips import sample_own_clips
from tests.helpers.interrupt import interrupted


def test_loss_falls_and_the_adapter_is_exported(open_run):
    run = open_run(align__steps=12)
    values = train_align(run, "align")
    rows = read_json_lines(run.folder / "align.jsonl")
    assert [row["step"] for row in rows] == list(range(12))
    held_out = [row["held_out_pda"] for row in rows if "held_out_pda" in row]
    assert len(held_out) == 6 and held_out[-1] < held_out[0]
    exported = read_lora(run.lora_folder("aligned"))
    assert all(torch.equal(exported[name], value) for name, value in values.items())
    assert any((value != run.fresh[name]).any() for name, value in values.items())


def test_control_sees_the_same_batches_without_the_teacher(open_run):
    run = open_run()
    train_align(run, "sft")
    train_align(run, "align")
    sft, aligned = read_json_lines(run.folder / "sft.jsonl"), read_json_lines(run.folder / "align.jsonl")
    # the same clips, noise and times from the same adapter
    assert sft[0]["flow_loss"] == aligned[0]["flow_loss"]
    assert sft[-1]["flow_loss"] != aligned[-1]["flow_loss"]
    assert all(row["pda_loss"] == 0 for row in sft) and all(row["pda_loss"] > 0 for row in aligned)


@pytest.mark.parametrize("projector", ["none", "mlp"])
def test_resume_is_bitwise(open_run, projector):
    whole = open_run(teacher__projector=projector)
    expected = train_align(whole, "align")
    log = (whole.folder / "align.jsonl").read_text()
    shutil.rmtree(whole.folder)

    first = open_run(teacher__projector=projector)
    # after step 5: one step past the checkpoint at 4
    with interrupted(align, "optimizer_step", 6):
        train_align(first, "align")
    assert load_checkpoint(first.checkpoint("align"))["step"] == 4
    found = train_align(open_run(teacher__projector=projector), "align")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (whole.folder / "align.jsonl").read_text() == log


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_its_state(open_run):
    run = open_run()
    train_align(run, "sft")
    before = load_checkpoint(run.checkpoint("sft"))
    shutil.rmtree(run.folder / "checkpoints")
    clips = prepare_clips(run)

    def spoilt(rows):
        values = clips.read(rows)
        return values | {"latents": values["latents"] * float("nan")}

    run.prepared = dataclasses.replace(clips, read=spoilt)
    with pytest.raises(TrainingError, match=r"not finite at sft step 0, clips \["):
        train_align(run, "sft")
    assert all(torch.isfinite(parameter).all() for parameter in run.parameters.values())
    assert before["step"] == 6 and not run.checkpoint("sft").exists()


def test_held_out_clips_are_never_trained_on(open_run, monkeypatch):
    run = open_run()
    seen = set()

    def spy(run, aligner, clips, rows, noise, times_B):
        if torch.is_grad_enabled():
            seen.update(rows.tolist())
        return clip_losses(run, aligner, clips, rows, noise, times_B)

    monkeypatch.setattr(align, "clip_losses", spy)
    train_align(run, "sft")
    # of 16 clips the last two are held out
    assert seen and max(seen) < 14


def test_block_is_a_share_of_depth(open_run):
    assert [align.block_index(open_run(teacher__block=share)) for share in (0.0, 0.4, 0.5, 0.9)] == [0, 0, 1, 1]


def test_micro_batches_add_up_to_the_step(open_run):
    """Without the teacher, whose pairs are averaged over a forward pass, the same steps but for rounding."""
    whole = train_align(open_run(), "sft")
    shutil.rmtree(open_run().folder)
    parts = train_align(open_run(align__micro_batch=1), "sft")
    assert align.micro_batches([5, 6, 7, 8, 9], 2) == [[5, 6], [7, 8], [9]]
    assert all(torch.allclose(parts[name], value, atol=1e-4) for name, value in whole.items())
    assert any(not torch.equal(value, open_run().fresh[name]) for name, value in whole.items())


def test_self_mode_trains_on_the_models_own_videos(open_run):
    run = open_run(data__source="self", data__clips=20)
    train_align(run, "align")
    lines = [json.loads(line) for line in (run.folder / "self" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [f"{index:05d}.mp4" for index in range(20)]
    assert [line["text"] for line in lines] == [run.prompts[index % 8].text for index in range(20)]
    assert len(prepare_clips(run)) == 20
    frames = run.frames_of(run_clips := sample_own_clips(run))
    assert len(run_clips) == 20 and frames.shape == (20, 17, 3, 32, 32)


def test_best_of_keeps_the_sample_that_the_critic_likes_best(open_run):
    run = open_run(data__source="self", data__clips=4, data__best_of=3)
    clips, captions = [0, 1, 2, 3], [line.text for line in run.prompts[:4]]
    samples = [self_clips._sampled_videos(run, clips, captions, candidate) for candidate in range(3)]
    rewards = torch.stack([self_clips._rewards(run, videos) for videos in samples])
    chosen = rewards.argmax(0).tolist()
    # Otherwise the first sample would do.
    assert len(set(chosen)) > 1
    best = self_clips._best_videos(run, clips, captions)
    assert all(torch.equal(best[clip], samples[candidate][clip]) for clip, candidate in enumerate(chosen))
    # What is written is what was chosen, but for the video file's rounding.
    written = run.frames_of(sample_own_clips(run))
    assert (written - best).abs().max() < 0.01
