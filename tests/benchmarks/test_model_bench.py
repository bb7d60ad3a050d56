"""The benchmark of a real model's step: it runs for every kind of transformer, and really does what it times."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_model, profiled, show
from ldo.memory.meta_models import prompt_length
from ldo.models import lora
from ldo.models.generator.folder import read_geometry
from ldo.models.generator.published import model_configs
from ldo.ops import relation, residual
from ldo.stages import collect
from tests.helpers import models, pretend, recipes


@pytest.mark.parametrize("kind", ["wan", "ltx", "cogvideox-2b"])
def test_both_stages_of_a_family(kind, tmp_path, vjepa_folder, monkeypatch, capsys):
    folder = models.FAMILIES[kind](tmp_path / "model")
    family, _ = read_geometry(folder)
    recipe = recipes.write(tmp_path, folder, vjepa_folder, model__family=family, rl__group_size=2)

    # as a random world model scores videos of real sizes: all equal, so that an update would skip every group
    def equal_scores(judge, frames, *_):
        scores = torch.full((len(frames),), -2.0)
        return SimpleNamespace(reward=scores, skill=scores, plain=scores)

    monkeypatch.setattr(collect, "score_clips", equal_scores)
    snapshots = []
    monkeypatch.setattr(bench_model, "learn_from_rollout", spy(bench_model.learn_from_rollout, snapshots))
    result_path = tmp_path / "model.json"
    arguments = [str(recipe), "device=cpu", "align.batch=2", "--quick", "--out", str(result_path)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    assert bench_model.main() == 0
    result = json.loads(result_path.read_text())
    assert len(result["parts"]) == 7 and all(part["seconds"] > 0 for part in result["parts"].values())
    profiles = {part_name: part["profile"] for part_name, part in result["parts"].items() if "profile" in part}
    # only these: under the profiler a part takes much longer
    profiled_words = ("backward", "window", "optimizer")
    expected_names = [name for name in result["parts"] if any(word in name for word in profiled_words)]
    assert list(profiles) == expected_names and len(profiles) == 3
    for profile in profiles.values():
        assert profile["kernels"] > 100 and profile["busy_s"] > 0 and len(profile["top"]) == 10
    assert result["metrics"]["zero_variance_groups"] == 2 and result["metrics"]["grad_norm"] > 0
    # of the first update; another ran under the profiler
    before, after, *_ = snapshots
    assert any((before[name] != after[name]).any() for name in before), "the update changed nothing"
    for kernels in result["kernels"].values():
        assert kernels
        assert all("flash_attention_for_cpu" in kernel and seconds > 0 for kernel, seconds in kernels.items())
    assert set(result["predicted_bytes"]) == {"load", "align", "reinforce"}
    show.summary(result_path)
    assert "reinforce: 2 optimizer steps" in capsys.readouterr().out


def spy(learn, snapshots):
    def learnt(here, *rest):
        snapshots.append(lora.snapshot(here.parameters))
        metrics = learn(here, *rest)
        snapshots.append(lora.snapshot(here.parameters))
        return metrics

    return learnt


@pytest.mark.parametrize("name", ["Lightricks/LTX-Video", "THUDM/CogVideoX-2b"])
def test_a_random_text_has_the_width_and_length_of_the_published_model(name):
    config = model_configs(name)["transformer"]
    text = bench_model.random_text(config, prompt_length(config, 0), bench_model.torch_rng(0, "text"))
    shapes = {"Lightricks/LTX-Video": (1, 128, 4096), "THUDM/CogVideoX-2b": (1, 226, 4096)}
    assert text.tensors["embeds"].shape == shapes[name]


def test_a_product_that_names_its_type_is_counted(monkeypatch):
    """As the counter meets it on a GPU, where the relation loss adds bf16 products to fp32."""
    counter_options = {}

    def counter_mode(**given):
        counter_options.update(given)
        return FlopCounterMode(**given)

    monkeypatch.setattr(bench_model, "FlopCounterMode", counter_mode)
    meter = bench_model.Meter(torch.device("cpu"), True)
    meter.part("x", lambda: None)
    meter.operations("x", lambda: torch.baddbmm(torch.zeros(2, 3, 5), torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)), 1.0)
    assert meter.found["parts"]["x"]["flop"] == 2 * 2 * 3 * 4 * 5
    total, left, right = torch.zeros(2, 3, 5), torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)
    counter = FlopCounterMode(**counter_options)
    counter._count_flops(torch.ops.aten.baddbmm, total, (total, left, right, torch.float32), {"out": total})
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ltx", "cogvideox-2b"])
def test_a_family_keeps_to_one_device_on_a_pretended_gpu(kind, tmp_path, vjepa_folder, monkeypatch):
    def empty_profile(work, _):
        work()
        return profiled.Profile(1.0, 0, 0.0, {}, {})

    # the counter would hide operations from the pretended GPU
    monkeypatch.setattr(bench_model.Meter, "operations", lambda *_: None)
    # a profiler sees only the kernels of a real GPU
    monkeypatch.setattr(profiled, "profile", empty_profile)
    # interpreted Triton kernels add nothing here
    for operation in (relation, residual):
        monkeypatch.setattr(operation, "choose_triton", lambda name, impl, device, missing, forms, what: forms[-1])
    folder = models.FAMILIES[kind](tmp_path / "model")
    family, _ = read_geometry(folder)
    changes = dict(
        model__dtype="bfloat16",
        model__gradient_checkpointing=True,
        rl__group_size=2,
        rl__guidance=2.0,
        rl__steps=3,
        rl__window_range=1,
    )
    recipe = recipes.write(tmp_path, folder, vjepa_folder, device="cuda", model__family=family, **changes)
    result_path = tmp_path / "model.json"
    monkeypatch.setattr(sys, "argv", ["x", str(recipe), "align.batch=2", "--quick", "--out", str(result_path)])
    with pretend.gpu():
        assert bench_model.main() == 0
    result = json.loads(result_path.read_text())
    assert result["device"] == "Pretended GPU" and len(result["parts"]) == 7 and result["metrics"]["grad_norm"] > 0
