"""The benchmark of a real model's step: it runs for every kind of transformer, and what it times is really done."""

import json
import sys
from types import SimpleNamespace

import models
import pretend
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import recipes
from benchmarks import bench_model, profiled, show
from ldo import lora, meta
from ldo.generator import published
from ldo.generator.folder import read_geometry
from ldo.ops import relation, residual


@pytest.mark.parametrize("kind", ["wan", "ltx", "cogvideox-2b"])
def test_both_stages_of_a_family(kind, tmp_path, vjepa_folder, monkeypatch, capsys):
    folder = models.FAMILIES[kind](tmp_path / "model")
    family, _ = read_geometry(folder)
    recipe = recipes.write(tmp_path, folder, vjepa_folder, model__family=family, rl__group_size=2)
    # as a random world model scores real sizes: all alike, so an update would pass over every group
    alike = lambda judge, frames, *_: SimpleNamespace(**dict.fromkeys(("reward", "skill", "plain"), torch.full((len(frames),), -2.0)))  # noqa: E731
    monkeypatch.setattr(bench_model.reinforce.critic, "score", alike)
    snapshots = []
    monkeypatch.setattr(bench_model.reinforce, "learn", spy(bench_model.reinforce.learn, snapshots))
    out = tmp_path / "model.json"
    monkeypatch.setattr(sys, "argv", ["x", str(recipe), "device=cpu", "align.batch=2", "--quick", "--out", str(out)])
    assert bench_model.main() == 0
    result = json.loads(out.read_text())
    assert len(result["parts"]) == 7 and all(part["seconds"] > 0 for part in result["parts"].values())
    profiles = {name: part["profile"] for name, part in result["parts"].items() if "profile" in part}
    assert (
        list(profiles) == [name for name in result["parts"] if "backward" in name or "window" in name or "optimizer" in name] and len(profiles) == 3
    )
    assert all(p["kernels"] > 100 and p["busy_s"] > 0 and len(p["top"]) == 10 for p in profiles.values())
    assert result["figures"]["zero_variance_groups"] == 2 and result["figures"]["grad_norm"] > 0
    before, after, *_ = snapshots  # of the first update; another ran under the profiler
    assert any((before[name] != after[name]).any() for name in before), "the update changed nothing"
    for kernels in result["kernels"].values():
        assert all("flash_attention_for_cpu" in name and seconds > 0 for name, seconds in kernels.items()) and kernels
    assert set(result["predicted_bytes"]) == {"load", "align", "reinforce"}
    show.summary(out)
    assert "reinforce: 2 optimizer steps" in capsys.readouterr().out


def spy(learn, snapshots):
    def learnt(here, *rest):
        snapshots.append(lora.snapshot(here.parameters))
        figures = learn(here, *rest)
        snapshots.append(lora.snapshot(here.parameters))
        return figures

    return learnt


@pytest.mark.parametrize("name", ["Lightricks/LTX-Video", "THUDM/CogVideoX-2b"])
def test_a_random_text_has_the_width_and_length_of_the_published_model(name):
    config = published.configs(name)["transformer"]
    text = bench_model.random_text(config, meta.text_length(config, 0), bench_model.torch_rng(0, "text"))
    assert text.tensors["embeds"].shape == {"Lightricks/LTX-Video": (1, 128, 4096), "THUDM/CogVideoX-2b": (1, 226, 4096)}[name]


def test_a_product_that_names_its_type_is_counted(monkeypatch):
    """As the counter meets it on a GPU, where the relation loss adds bf16 products to fp32."""
    seen = {}
    monkeypatch.setattr(bench_model, "FlopCounterMode", lambda **given: seen.update(given) or FlopCounterMode(**given))
    meter = bench_model.Meter(torch.device("cpu"), True)
    meter.part("x", lambda: None)
    meter.operations("x", lambda: torch.baddbmm(torch.zeros(2, 3, 5), torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)), 1.0)
    assert meter.found["parts"]["x"]["flop"] == 2 * 2 * 3 * 4 * 5
    c, a, b = torch.zeros(2, 3, 5), torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)
    counter = FlopCounterMode(**seen)
    counter._count_flops(torch.ops.aten.baddbmm, c, (c, a, b, torch.float32), {"out": c})
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ltx", "cogvideox-2b"])
def test_a_family_keeps_to_one_device_on_a_pretended_gpu(kind, tmp_path, vjepa_folder, monkeypatch):
    monkeypatch.setattr(bench_model.Meter, "operations", lambda *_: None)  # the counter hides operations from the pretence
    monkeypatch.setattr(profiled, "profile", lambda work, _: (work(), profiled.Profile(1.0, 0, 0.0, {}, {}))[1])  # a profiler sees only real ones
    for op in (relation, residual):  # interpreted Triton kernels add nothing here
        monkeypatch.setattr(op, "choose_triton", lambda name, impl, device, missing, forms, what: forms[-1])
    folder = models.FAMILIES[kind](tmp_path / "model")
    family, _ = read_geometry(folder)
    changes = dict(model__dtype="bfloat16", model__gradient_checkpointing=True, rl__group_size=2, rl__guidance=2.0, rl__steps=3, rl__window_range=1)
    recipe = recipes.write(tmp_path, folder, vjepa_folder, device="cuda", model__family=family, **changes)
    out = tmp_path / "model.json"
    monkeypatch.setattr(sys, "argv", ["x", str(recipe), "align.batch=2", "--quick", "--out", str(out)])
    with pretend.gpu():
        assert bench_model.main() == 0
    result = json.loads(out.read_text())
    assert result["device"] == "Pretended GPU" and len(result["parts"]) == 7 and result["figures"]["grad_norm"] > 0
