"""Training the shipped generator further: the stacked optimizer, slices that go on bit for bit, what travels, and the comparison."""

import copy
import itertools
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel

from ldo.config import RecipeError
from ldo.sandbox.build import base, further, quality, stacked
from ldo.sandbox.dataset import GENERATOR
from ldo.sandbox.measure import METRICS
from ldo.update import TrainingError

FOREVER = float("inf")
SMALL = further.Settings(clips=6, batch=2, warmup=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    further.clips(folder, further.load(), SMALL.clips, "cpu")
    return folder


def slices(work, cache, deadlines, **settings):
    """A training of four steps and a decay of four, a step between looks at the clock; a slice for each deadline."""
    for deadline in deadlines:
        progress = further.train(work, cache, GENERATOR, "cpu", deadline, SMALL, every=1, **settings)
    return progress, {p.name.split("-")[0]: further.load_file(p) for p in work.glob("*.safetensors")}


# ---------------------------------------------------------------------------------------------- the optimizer


def test_orthogonal_is_the_quintic_on_singular_values():
    wide = torch.randn(3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for x in (wide, wide.mT):
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        s = s / x.norm(dim=(1, 2))[:, None]
        a, b, c = stacked.QUINTIC
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        assert torch.allclose(stacked.orthogonal(x), u @ torch.diag_embed(s) @ v, atol=1e-9)


def test_steps_are_those_of_muon_and_adamw():
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(16, 48), torch.nn.GELU(), torch.nn.Linear(48, 16), torch.nn.Linear(16, 16))
    theirs = copy.deepcopy(ours)
    split = [([p for p in m.parameters() if p.ndim == 2], [p for p in m.parameters() if p.ndim == 1]) for m in (ours, theirs)]
    optimizer = stacked.stacked(*split[0])
    muon = torch.optim.Muon(split[1][0], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(split[1][1], lr=0.01, betas=stacked.BETAS, weight_decay=0.1)
    x = torch.randn(64, 16)
    start = [p.detach().clone() for p in split[0][0]]
    for i in range(3):
        (ours(x) - x.flip(1)).square().mean().backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone()  # the same gradients, so that only the steps are compared
        stacked.set_rates(optimizer, i, 0.02, 0.01, 0.1)
        stacked.update(optimizer)
        muon.step(), adamw.step()
        ours.zero_grad()
    for p, q in zip(split[0][1], split[1][1], strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    for p, q, p0 in zip(split[0][0], split[1][0], start, strict=True):
        assert (p - q).norm() < 0.02 * (p - p0).norm()  # torch's Newton-Schulz runs in bf16


def test_rate_rises_stays_and_falls_to_zero():
    assert [further.rate(i, 4, None) for i in (0, 1, 3, 4, 10**6)] == [0.25, 0.5, 1, 1, 1]
    assert [further.rate(i, 4, (100, 10)) for i in (99, 100, 105, 109, 110)] == [1, 1, 0.5, pytest.approx(0.1), 0]


# ---------------------------------------------------------------------------------------------- slices


def test_slices_end_with_the_bits_of_the_whole(tmp_path, cache):
    past = time.monotonic() - 1  # a slice of no time is one step
    whole, tensors = slices(tmp_path / "whole", cache, [FOREVER], decay=6)
    _, _ = slices(tmp_path / "parts", cache, [past], decay=6)
    assert further.read(tmp_path / "parts")[0].step == 1
    parts, again = slices(tmp_path / "parts", cache, [past, past, FOREVER])
    assert whole.done and parts.done and parts.step == whole.step == 6
    for part in ("weights", "average", "optimizer"):
        assert tensors[part].keys() == again[part].keys() and all(torch.equal(v, again[part][k]) for k, v in tensors[part].items())


def test_training_moves_every_weight_from_the_shipped_ones(tmp_path, cache):
    shipped = dict(further.load().transformer.named_parameters())
    _, tensors = slices(tmp_path / "work", cache, [FOREVER], decay=3)
    for part in ("weights", "average"):
        assert tensors[part].keys() == shipped.keys() and all(not torch.equal(v, shipped[k]) for k, v in tensors[part].items())
    for k, v in shipped.items():  # the average trails behind
        assert (tensors["average"][k] - v).norm() < 0.1 * (tensors["weights"][k] - v).norm()


def test_a_decay_is_planned_into_the_time_left(tmp_path, cache, monkeypatch):
    ticks = itertools.count(step=0.5)  # every look at the clock, of which there is one a step, takes half a second
    monkeypatch.setattr(further, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    progress, _ = slices(tmp_path / "work", cache, [10.0], decay=0)
    first, count = progress.decay
    assert progress.done and first == 1 and count == pytest.approx(further.SPARE * 18, abs=2)


def test_what_travels_is_small(tmp_path, cache):
    work = tmp_path / "work"
    slices(work, cache, [time.monotonic(), time.monotonic()])
    files = sorted(p.name for p in work.iterdir())
    assert files == ["average-2.safetensors", "further.json", "optimizer-2.safetensors", "weights-2.safetensors"]
    assert max(p.stat().st_size for p in work.iterdir()) < 8 * 2**20


def test_other_settings_are_refused(tmp_path, cache):
    slices(tmp_path / "work", cache, [time.monotonic()])
    with pytest.raises(RecipeError, match="begun with batch = 2"):
        further.train(tmp_path / "work", cache, GENERATOR, "cpu", FOREVER, further.Settings(clips=6, batch=3, warmup=3))
    with pytest.raises(RecipeError, match="holds no training"):
        further.write(tmp_path / "none", GENERATOR, tmp_path / "wan")


def test_what_is_not_finite_is_not_saved(tmp_path, cache):
    work, settings = tmp_path / "work", replace(SMALL, muon_lr=1e30)
    further.train(work, cache, GENERATOR, "cpu", time.monotonic() - 1, settings, every=1)  # its loss is that before the step
    with pytest.raises(TrainingError, match="before step 2"):
        further.train(work, cache, GENERATOR, "cpu", FOREVER, settings, every=1)
    assert further.read(work)[0].step == 1


def test_a_step_asks_the_device_for_nothing():
    """On tensors without values a step that read one would fail, as it would inside a CUDA graph; so would a tensor left on the CPU."""
    with torch.device("meta"):
        state = further.trained(WanTransformer3DModel(**base.TRANSFORMER))
        inputs = (torch.empty(4, 8, 5, 8, 8), torch.empty(4, 8, 5, 8, 8), torch.empty(4), torch.empty(4, base.LENGTH, 64))
    stacked.set_rates(state.optimizer, 0, 1e-3, 1e-3, 0.01)
    further.step(state, inputs, SMALL)
    assert {t.device.type for t in state.tensors} == {"meta"}
    with pytest.raises(RuntimeError):
        state.loss.item()


# ---------------------------------------------------------------------------------------------- the comparison


def test_the_written_average_is_compared_with_the_shipped(tmp_path, cache):
    _, tensors = slices(tmp_path / "work", cache, [FOREVER], decay=2)
    further.write(tmp_path / "work", GENERATOR, tmp_path / "wan")
    written = further.load(tmp_path / "wan")
    for k, v in written.transformer.named_parameters():
        assert torch.equal(v, tensors["average"][k].half().float())
    found = quality.judge({"base": GENERATOR, "new": tmp_path / "wan"}, cache, "cpu", loss_clips=4, sound_clips=2, prompts=2)
    assert json.loads(json.dumps(found)) == found
    old, new = found["models"]["base"], found["models"]["new"]
    assert old["flow_loss"].keys() == {"0.2", "0.45", "0.7", "0.9"} and old["flow_loss"] != old["flow_loss_seen"]
    for t in old["flow_loss"]:  # two steps hardly move the average
        assert 0 < old["flow_loss"][t] < 2 and new["flow_loss"][t] == pytest.approx(old["flow_loss"][t], rel=0.02)
    assert set(METRICS) | {"any"} == old["samples_past"].keys()
    assert old["samples"]["violation_rate"]["mean"] == old["samples_past"]["any"]
    assert not old["samples_minus_base"] and new["samples_minus_base"].keys() == new["samples"].keys()


def test_resampling_from_hardly_any_noise_is_the_vae(cache):
    """At a level near zero nothing is left to sample, and sound clips stay sound."""
    model = further.load()
    found = quality.resampled(model, quality.valid(1, "quality", 8), 0.01, 2)
    assert sum(bool(m.violations) for m in found) <= 2
    worse = quality.resampled(model, quality.valid(1, "quality", 8), 0.9, 2)
    assert sum(m.law_residual for m in worse) > 2 * sum(m.law_residual for m in found)


# ---------------------------------------------------------------------------------------------- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["graph", "compiled"])
def test_a_graph_takes_the_steps_of_the_eager_form(tmp_path, cache, form):
    settings = replace(SMALL, precision="fp32")
    runs = {}
    for each in ("eager", form):
        further.train(tmp_path / each, cache, GENERATOR, "cuda", FOREVER, settings, decay=6, form=each)
        runs[each] = further.load_file(tmp_path / each / "weights-6.safetensors")
    start = dict(further.load().transformer.named_parameters())
    moved, apart = 0.0, 0.0
    for k, v in runs["eager"].items():
        moved += (v - start[k]).square().sum().item()
        apart += (v - runs[form][k]).square().sum().item()
    assert moved > 0 and apart < 0.02**2 * moved


@pytest.mark.gpu
def test_slices_on_a_gpu_go_on_where_they_stopped(tmp_path, cache):
    settings = replace(SMALL, precision="fp32")
    whole = further.train(tmp_path / "whole", cache, GENERATOR, "cuda", FOREVER, settings, decay=6, form="graph", every=1)
    for deadline in (time.monotonic() - 1, FOREVER):
        parts = further.train(tmp_path / "parts", cache, GENERATOR, "cuda", deadline, settings, decay=6, form="graph", every=1)
    assert whole.step == parts.step == 6
    for part in ("weights", "average", "optimizer"):
        a, b = (further.load_file(tmp_path / name / f"{part}-6.safetensors") for name in ("whole", "parts"))
        for k, v in a.items():
            assert torch.allclose(v, b[k], rtol=1e-3, atol=1e-5), (part, k)
