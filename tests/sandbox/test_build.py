"""Building the sandbox's models: every part runs, stops and resumes, and the folders load like those of real models."""

import json

import pytest
import torch

from ldo.models.generator.families import load_generator
from ldo.models.generator.protocol import Options
from ldo.models.world_model import WorldModel
from ldo.sandbox.build import base, calibrate, pool, vae, world
from ldo.sandbox.build.__main__ import save_models
from ldo.sandbox.build.base import train_base
from ldo.sandbox.build.calibrate import calibrate_thresholds
from ldo.sandbox.build.loop import OutOfTime, cosine, fit
from ldo.sandbox.build.vae import load_vae, train_vae
from ldo.sandbox.shipped import GENERATOR


def test_loop_resumes_where_it_stopped(tmp_path):
    def train(path, deadlines):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

        def step(index):
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(index))
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss.item()}

        for deadline in deadlines:
            try:
                fit(path, {"model": model}, [optimizer], step, 12, deadline, log_every=4)
            except OutOfTime:
                model.reset_parameters()  # nothing but the file may carry over
        return model.weight.detach().clone()

    forever = float("inf")
    whole = train(tmp_path / "whole.pt", [forever])
    # A slice whose deadline has passed still takes one step.
    parts = train(tmp_path / "parts.pt", [0.0, 0.0, 0.0, forever])
    assert torch.equal(whole, parts)


def test_learning_rate_rises_then_falls():
    assert cosine(0, 1000) < 0.01
    assert cosine(200, 1000) == pytest.approx(1)
    assert cosine(999, 1000) == pytest.approx(0.02, abs=1e-3)


def test_pools_are_a_function_of_their_arguments(tmp_path):
    frames, captions = pool.pool(tmp_path / "first", "mix", 6, workers=1)
    again, _ = pool.pool(tmp_path / "second", "mix", 6, workers=1)
    other_seed, _ = pool.pool(tmp_path / "second", "mix", 6, seed=1, workers=1)
    assert frames.shape == (6, 17, 3, 32, 32)
    assert len(captions) == 6
    # Into different folders, so that the second pool is drawn and not read.
    assert (frames == again).all()
    assert (frames != other_seed).any()


def test_valid_pool_is_valid():
    assert all(pool.valid_clip(0, index).violation is None for index in range(40))
    # Without violations in the mix, the line above would pass even if both pools were the same.
    assert any(pool.mix_clip(0, index).violation for index in range(40))


@pytest.mark.parametrize(("frames", "half", "error"), [(17, False, 1e-3), (17, True, 5e-3), (5, False, 1e-3)])
def test_the_built_encoder_gives_tied_latents(frames, half, error):
    clips = torch.rand(2, 3, frames, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = vae.new_vae()
    if half:
        model.half().float()  # as it ships
    posterior = model.encode(clips).latent_dist
    torch.testing.assert_close(posterior.mean, vae.tied_latents(clips), rtol=0, atol=error)
    assert posterior.std.max() < 1.01 * vae.NOISE


def test_the_shipped_encoder_is_the_built_one():
    shipped = load_generator("wan", GENERATOR, options=Options(text_length=base.LENGTH)).pipeline.vae
    built = vae.new_vae().half().float().encoder.state_dict()
    for name, weights in shipped.encoder.state_dict().items():
        assert torch.equal(weights.float(), built[name]), name


def test_every_part_from_nothing_to_folders(tmp_path, monkeypatch):
    # As few clips and steps as possible: what is trained matters less than that each part accepts the one before.
    monkeypatch.setattr(vae, "VAE_CLIPS", 24)
    monkeypatch.setattr(base, "BASE_CLIPS", 24)
    monkeypatch.setattr(world, "WORLD_CLIPS", 24)
    monkeypatch.setattr(world, "RECONSTRUCTED", 8)
    monkeypatch.setattr(calibrate, "CALIBRATION_CLIPS", 3)
    monkeypatch.setattr(calibrate, "CHECKED", 3)
    monkeypatch.setattr(calibrate, "BROKEN", 1)
    work, forever = tmp_path / "work", float("inf")
    work.mkdir()
    train_vae(work, "cpu", forever, steps=3, batch=2)
    limits = calibrate_thresholds(load_vae(work))
    assert limits["vae"] == calibrate.fingerprint(load_vae(work))
    # The thresholds are shipped as a JSON file, which holds no arrays or tensors.
    assert json.dumps(limits)
    world.train_encoder(work, "cpu", forever, steps=2, batch=2)
    world.train_predictor(work, "cpu", forever, load_vae(work), steps=2, batch=2)
    train_base(work, "cpu", forever, load_vae(work), steps=2, batch=2)
    save_models(work, tmp_path / "wan", tmp_path / "vjepa2")
    model = load_generator("wan", tmp_path / "wan", options=Options(text_length=base.LENGTH))
    # The thresholds hold only for the VAE that they were measured with.
    assert calibrate.fingerprint(model.pipeline.vae) == limits["vae"]
    judge = WorldModel.load(tmp_path / "vjepa2")
    assert judge.crop == 32
    assert judge.tubelet == 2
    text = model.encode_text(["a red ball"])
    velocity = model.velocity(torch.randn(1, 12, 5, 8, 8), torch.ones(1) * 0.5, text)
    assert torch.isfinite(velocity).all()
