"""One contract for every family: what the stock pipeline does, the adapter does too, and both stages run."""

import json
import shutil

import diffusers
import pytest
import torch

from ldo.method.rollout import SamplingPlan, decode_videos, draw_step_noise, sample_videos
from ldo.models import lora
from ldo.models.generator.families import family_adapter
from ldo.models.generator.folder import read_geometry
from ldo.models.lora import read_lora, restore_values
from ldo.stages import align, feature_paths, reinforce
from ldo.stages.align import train_align
from ldo.stages.reinforce import train_reinforce
from ldo.train import main
from tests.helpers import models
from tests.helpers.families import FRAMES, PROMPTS, SIDE, comfy, generate, latents, stock, velocities
from tests.helpers.interrupt import interrupted

# ---------------------------------------------------------------------------------------------- the stock pipeline


def test_geometry_is_the_one_in_the_json_files(model, folder):
    assert read_geometry(folder)[1] == model.geometry
    encoded = model.encode_video(torch.rand(1, FRAMES, 3, SIDE, SIDE))
    assert encoded.shape[1:] == model.geometry.latents(FRAMES, SIDE, SIDE)


def take_euler_steps(pipeline, model):
    """Let Wan's pipeline sample at first order and the model round its times as that pipeline does."""
    first_order = {"solver_order": 1, "lower_order_final": True, "disable_corrector": list(range(9))}
    config = {**pipeline.scheduler.config, **first_order}
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(config)
    exact = model.velocity
    # the pipeline rounds the model's time down to whole thousandths
    model.velocity = lambda x, t, text: exact(x, (t * 1000).floor() / 1000, text)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_rollout_without_noise_is_the_stock_pipeline(model, folder, guidance):
    """Text, times, velocity, guidance and decoding at once.

    The same video comes out of the pipeline's own first-order sampler.
    """
    pipeline = stock(folder)
    if model.family == "wan":
        take_euler_steps(pipeline, model)
    noise = latents(model)
    expected = generate(pipeline, model, noise, guidance)
    plan = SamplingPlan(tuple(model.times(8, noise.shape[1:])), (), "flow", 0.0, guidance)
    text, null_text = model.encode_text(PROMPTS), model.encode_text([""])
    no_noise = draw_step_noise(noise.shape, 0, torch.Generator())
    sampled = sample_videos(model, noise, text, null_text, plan, no_noise, 2).final_N
    videos = decode_videos(model, sampled, 2)
    # a video of one grey would agree too
    assert expected.std() > 0.02 and (videos - expected).abs().max() < 2e-4


def test_encoding_is_undone_by_decoding(model):
    frames = torch.rand(2, FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    raw = model.vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mode()
    encoded = model.encode_video(frames)
    assert torch.allclose(model.restore(encoded), raw, atol=1e-5) and not torch.allclose(encoded, raw, atol=1e-2)
    with pytest.raises(ValueError, match=rf"{model.family}: 16 frames; its VAE takes {model.geometry.time}K\+1"):
        model.encode_video(frames[:, :16])


# ---------------------------------------------------------------------------------------------- the tap


def test_tapped_grid_is_where_things_are(model):
    """A latent changed at one place is a token changed at that place of the grid, most of all."""
    plain, text = latents(model, 1), model.encode_text(PROMPTS[:1])
    grid = model.geometry.tokens(plain.shape)
    frame, row, column = grid[0] - 2, 0, grid[2] - 1
    _, patch_height, patch_width = model.geometry.patch
    planted = plain.clone()
    rows = slice(row * patch_height, (row + 1) * patch_height)
    columns = slice(column * patch_width, (column + 1) * patch_width)
    planted[:, :, frame, rows, columns] += 5
    tapped = []
    for noisy in (plain, planted):
        with model.tap(0) as tap, torch.no_grad():
            model.velocity(noisy, torch.tensor([0.5]), text)
        tapped.append(tap.take())
    assert tapped[0].grid == grid
    assert tapped[0].x_BND.shape == (1, grid[0] * grid[1] * grid[2], model.geometry.width)
    change = (tapped[1].x_BND - tapped[0].x_BND).norm(dim=-1)
    assert int(change.argmax()) == (frame * grid[1] + row) * grid[2] + column


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tap_carries_gradient_and_is_taken_once(model, checkpointing):
    if checkpointing:
        for transformer in model.transformers.values():
            transformer.enable_gradient_checkpointing()
    parameters = models.adapter(model)
    with model.tap(0) as tap:
        velocity = model.velocity(latents(model), torch.tensor([0.3, 0.95]), model.encode_text(PROMPTS))
        before = tap.take().x_BND.detach().clone()
        # checkpointing runs the blocks again here
        velocity.sum().backward(retain_graph=True)
        tapped = tap.take().x_BND
    assert torch.equal(tapped, before)
    for parameter in parameters.values():
        parameter.grad = None
    tapped.square().sum().backward()
    # the first block has a gradient; the second comes after the tap, as do HunyuanVideo's single-stream blocks
    first_block, later_blocks = [], []
    for name, parameter in parameters.items():
        if "blocks.0." in name and "single" not in name:
            first_block.append(parameter.grad)
        if "blocks.1." in name or "single" in name:
            later_blocks.append(parameter.grad)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in first_block)
    assert all(gradient is None for gradient in later_blocks)


def test_a_batch_gives_each_sample_what_it_gets_by_itself(model):
    """Mixed times in one batch, which two experts share, and the tap's rows in order."""
    noisy, times = latents(model, 4), torch.tensor([0.95, 0.2, 0.9, 0.6])
    text = model.encode_text(PROMPTS * 2)
    with torch.no_grad(), model.tap(1) as tap:
        together = model.velocity(noisy, times, text)
    tokens = tap.take().x_BND
    for index in range(4):
        row = slice(index, index + 1)
        with torch.no_grad(), model.tap(1) as single_tap:
            single = model.velocity(noisy[row], times[row], text[[index]])
        assert torch.allclose(single, together[row], atol=1e-5)
        assert torch.allclose(single_tap.take().x_BND, tokens[row], atol=1e-5)


# ---------------------------------------------------------------------------------------------- the LoRA


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (6, 10.0)])
def test_stock_pipeline_reproduces_the_lora_exactly(model, folder, tmp_path, rank, alpha):
    values = lora.snapshot(models.adapter(model, rank, alpha))
    expected = velocities(model)
    lora.export(tmp_path, values, rank, alpha, model.lora_targets, comfy(model, values))
    shapes = {name: value.shape for name, value in values.items()}
    assert {name: value.shape for name, value in read_lora(tmp_path).items()} == shapes
    pipeline = stock(folder)
    fresh = family_adapter(model.family)(pipeline, model.options)
    assert not torch.allclose(velocities(fresh), expected, atol=1e-2)
    lora.load_into(pipeline, tmp_path)
    assert (velocities(fresh) - expected).abs().max() == 0.0
    assert torch.isfinite(generate(pipeline, model, latents(model), steps=2)).all()


# ---------------------------------------------------------------------------------------------- both stages


@pytest.mark.slow
def test_both_stages_resume_to_the_bit_and_end_in_a_lora_for_the_stock_pipeline(folder, open_run):
    family, _ = read_geometry(folder)
    changes = dict(
        model__path=str(folder),
        model__family=family,
        align__steps=2,
        align__batch=2,
        rl__updates=2,
        rl__group_size=2,
        rl__prompts=2,
        save_every=1,
        data__clips=8,
        critic__contexts=[4],
    )
    changes |= dict(rl__guidance=2.0, rl__window_range=2, model__gradient_checkpointing=True)
    whole = open_run(**changes)
    train_align(whole, "align")
    expected = train_reinforce(whole)
    logs = {n: (whole.folder / n).read_text() for n in ("align.jsonl", "reinforce.jsonl")}
    rows = [json.loads(line) for line in logs["reinforce.jsonl"].splitlines()]
    assert rows[0]["ratio_off"] < 1e-3 and all(r["reward_std"] > 0 for r in rows)
    assert any((v != whole.fresh[k]).any() for k, v in expected.items())
    shutil.rmtree(whole.folder)

    for module, name, stage in (
        (align, "optimizer_step", lambda run: train_align(run, "align")),
        (reinforce, "learn_from_rollout", train_reinforce),
    ):
        with interrupted(module, name, 2):  # past the checkpoint at 1
            stage(open_run(**changes))
        found = stage(open_run(**changes))
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert logs == {n: (whole.folder / n).read_text() for n in logs}

    pipeline = stock(folder)
    lora.load_into(pipeline, whole.lora_folder("ldo"))
    run = open_run(**changes)
    restore_values(run.parameters, expected)
    assert (
        velocities(family_adapter(family)(pipeline, run.generator.options)) - velocities(run.generator)
    ).abs().max() == 0.0


@pytest.mark.slow
def test_evaluate_samples_with_the_family_s_own_arguments(folder, tmp_path, vjepa_folder, monkeypatch):
    """From the command line: stage 1, stage 2 and the stock pipeline's videos of every arm."""
    from tests.helpers import recipes

    monkeypatch.setattr(feature_paths, "PATH_CLIPS", 6)
    family, _ = read_geometry(folder)
    changes = dict(
        model__path=str(folder), model__family=family, align__steps=1, align__batch=2, rl__updates=1, rl__group_size=2
    )
    changes |= dict(
        stages=["align", "reinforce", "evaluate"],
        data__clips=4,
        evaluate__count=2,
        evaluate__seeds=1,
        evaluate__batch=2,
    )
    path = recipes.write(tmp_path, folder, vjepa_folder, **changes)
    assert main([str(path)]) == 0
    summary = json.loads((tmp_path / "runs" / "small" / "eval" / "summary.json").read_text())
    assert set(summary["metrics"]) == {"base", "aligned", "ldo"}
