"""The build of the sandbox's models: every part runs, stops and goes on, and writes folders that load as real ones."""

import json

import pytest
import torch

from ldo import generator
from ldo.sandbox.build import base, calibrate, pool, vae, world
from ldo.sandbox.build.__main__ import save
from ldo.sandbox.build.loop import OutOfTime, cosine, fit
from ldo.world_model import WorldModel


def test_loop_goes_on_where_it_stopped(tmp_path):
    def train(path, stops):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

        def step(i):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss.item()}

        for deadline in stops:
            try:
                fit(path, {"model": model}, [optimizer], step, 12, deadline, log_every=4)
            except OutOfTime:
                model.reset_parameters()  # nothing but the file may carry over
        return model.weight.detach().clone()

    forever = float("inf")
    whole = train(tmp_path / "whole.pt", [forever])
    parts = train(tmp_path / "parts.pt", [0.0, 0.0, 0.0, forever])  # each slice of no time is one step
    assert torch.equal(whole, parts)


def test_learning_rate_rises_then_falls():
    assert cosine(0, 1000) < 0.01 and cosine(200, 1000) == pytest.approx(1) and cosine(999, 1000) == pytest.approx(0.02, abs=1e-3)


def test_pools_are_a_function_of_their_arguments(tmp_path):
    a, captions = pool.pool(tmp_path / "a", "mix", 6, workers=1)
    b, _ = pool.pool(tmp_path / "b", "mix", 6, workers=1)
    c, _ = pool.pool(tmp_path / "b", "mix", 6, seed=1, workers=1)
    assert (a == b).all() and (a != c).any() and len(captions) == 6 and a.shape == (6, 17, 3, 32, 32)


def test_valid_pool_is_valid():
    assert all(pool.valid_clip(0, i).violation is None for i in range(40))
    assert any(pool.mix_clip(0, i).violation for i in range(40))


def test_every_part_from_nothing_to_folders(tmp_path, monkeypatch):
    for module in (vae, base, world):
        monkeypatch.setattr(module, "CLIPS", 24)
    monkeypatch.setattr(base, "ENCODED", 16)
    monkeypatch.setattr(world, "RECONSTRUCTED", 8)
    for name, value in (("CLIPS", 3), ("CHECKED", 3), ("BROKEN", 1)):
        monkeypatch.setattr(calibrate, name, value)
    work, forever = tmp_path / "work", float("inf")
    work.mkdir()
    vae.train(work, "cpu", forever, steps=2, fine=1, colour=1, batch=2)
    limits = calibrate.thresholds(vae.load(work))
    assert limits["vae"] == calibrate.fingerprint(vae.load(work)) and json.dumps(limits)
    world.train_encoder(work, "cpu", forever, steps=2, batch=2)
    world.train_predictor(work, "cpu", forever, vae.load(work), steps=2, batch=2)
    base.train(work, "cpu", forever, vae.load(work), steps=2, fine=2, batch=2)
    save(work, tmp_path / "wan", tmp_path / "vjepa2")
    model = generator.load("wan", tmp_path / "wan", options=generator.Options(text_length=base.LENGTH))
    assert calibrate.fingerprint(model.pipeline.vae) == limits["vae"]
    judge = WorldModel.load(tmp_path / "vjepa2")
    assert judge.crop == 32 and judge.tubelet == 2
    text = model.encode_text(["a red ball"])
    assert torch.isfinite(model.velocity(torch.randn(1, 8, 5, 8, 8), torch.ones(1) * 0.5, text)).all()
