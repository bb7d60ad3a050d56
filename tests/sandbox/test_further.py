"""Training the shipped generator further: the stacked optimizer, slices that resume bit for bit, and their files."""

import copy
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from ldo.core.distributed import Processes
from ldo.core.errors import RecipeError, TrainingError
from ldo.models.flow import noisy
from ldo.sandbox.build import base, stacked
from ldo.sandbox.build.further import slices
from ldo.sandbox.build.further.__main__ import _command_line, main
from ldo.sandbox.build.further.checkpoint import read_training
from ldo.sandbox.build.further.clips import load_latent_clips
from ldo.sandbox.build.further.settings import Settings
from ldo.sandbox.build.further.slices import load_generator_folder, rate_factor, train_slice, write_average
from ldo.sandbox.build.further.step import draw_inputs, start_training, training_step
from ldo.sandbox.measure import EXACT_METRICS
from ldo.sandbox.shipped import GENERATOR
from ldo.stages import generator_quality as quality

FOREVER = float("inf")
SMALL = Settings(clips=6, batch=2, warmup=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    load_latent_clips(folder, load_generator_folder(), SMALL.clips, "cpu")
    return folder


def train_slices(work, cache, deadlines, settings=SMALL, **options):
    """One slice for each deadline, checking the clock after every step; the progress, and the tensors by part."""
    for deadline in deadlines:
        progress = train_slice(work, cache, GENERATOR, "cpu", deadline, settings, every=1, **options)
    return progress, {path.name.split("-")[0]: load_file(path) for path in work.glob("*.safetensors")}


# ---------------------------------------------------------------------------------------------- the optimizer


def test_orthogonal_is_the_quintic_on_singular_values():
    """Each step is s' = a s + b s^3 + c s^5 on the singular values s."""
    wide = torch.randn(3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for matrices in (wide, wide.mT):
        left, s, right = torch.linalg.svd(matrices, full_matrices=False)
        s = s / matrices.norm(dim=(1, 2))[:, None]
        a, b, c = stacked.QUINTIC
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        assert torch.allclose(stacked.orthogonal(matrices), left @ torch.diag_embed(s) @ right, atol=1e-9)


def test_steps_are_those_of_muon_and_adamw():
    torch.manual_seed(0)
    # Tall, wide and square matrices, since tall ones are transposed before they are orthogonalised.
    ours = torch.nn.Sequential(
        torch.nn.Linear(16, 48), torch.nn.GELU(), torch.nn.Linear(48, 16), torch.nn.Linear(16, 16)
    )
    theirs = copy.deepcopy(ours)

    def of_dimension(model, dimension):
        return [parameter for parameter in model.parameters() if parameter.ndim == dimension]

    our_matrices, our_biases = of_dimension(ours, 2), of_dimension(ours, 1)
    their_matrices, their_biases = of_dimension(theirs, 2), of_dimension(theirs, 1)
    optimizer = stacked.stacked_optimizer(our_matrices, our_biases)
    muon = torch.optim.Muon(their_matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(their_biases, lr=0.01, betas=stacked.BETAS, weight_decay=0.1)
    inputs = torch.randn(64, 16)
    start = [parameter.detach().clone() for parameter in our_matrices]
    for step in range(3):
        (ours(inputs) - inputs.flip(1)).square().mean().backward()
        # The same gradients for both, so that only the steps are compared.
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = own.grad.clone()
        stacked.set_rates(optimizer, step, 0.02, 0.01, 0.1)
        stacked.update_parameters(optimizer)
        muon.step()
        adamw.step()
        ours.zero_grad()
    for own, other in zip(our_biases, their_biases, strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-6)
    for own, other, before in zip(our_matrices, their_matrices, start, strict=True):
        # Relative to the distance moved. It cannot be closer: torch's Newton-Schulz runs in bf16.
        assert (own - other).norm() < 0.02 * (own - before).norm()


def test_rate_rises_stays_and_falls_to_zero():
    assert [rate_factor(step, 4, None) for step in (0, 1, 3, 4, 10**6)] == [0.25, 0.5, 1, 1, 1]
    decaying = [rate_factor(step, 4, (100, 10)) for step in (99, 100, 105, 109, 110)]
    assert decaying == [1, 1, 0.5, pytest.approx(0.1), 0]


# ---------------------------------------------------------------------------------------------- slices


def test_slices_end_with_the_bits_of_the_whole(tmp_path, cache):
    # A slice without time still takes one step.
    past = time.monotonic() - 1
    whole, tensors = train_slices(tmp_path / "whole", cache, [FOREVER], decay=6)
    train_slices(tmp_path / "parts", cache, [past], decay=6)
    first, _ = read_training(tmp_path / "parts")
    assert first.step == 1
    parts, again = train_slices(tmp_path / "parts", cache, [past, past, FOREVER])
    assert whole.done
    assert parts.done
    assert whole.step == 6
    assert parts.step == 6
    for part in ("weights", "average", "optimizer"):
        assert tensors[part].keys() == again[part].keys()
        for name, tensor in tensors[part].items():
            assert torch.equal(tensor, again[part][name])


def test_training_moves_every_weight_from_the_shipped_ones(tmp_path, cache):
    shipped = dict(load_generator_folder().transformer.named_parameters())
    _, tensors = train_slices(tmp_path / "work", cache, [FOREVER], decay=3)
    weights, average = tensors["weights"], tensors["average"]
    assert weights.keys() == average.keys() == shipped.keys()
    for name, start in shipped.items():
        moved = (weights[name] - start).norm()
        # The average follows at once, but stays between where it began and the weights.
        trailing = (average[name] - weights[name]).norm()
        assert 0 < trailing < moved, name


def test_a_decay_is_planned_into_the_time_left(tmp_path, cache, monkeypatch):
    # Half a second passes with every look at the clock, of which there is one for each step.
    ticks = itertools.count(step=0.5)
    monkeypatch.setattr(slices, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    progress, _ = train_slices(tmp_path / "work", cache, [10.0], decay=0)
    first, count = progress.decay
    assert progress.done
    assert first == 1
    assert count == pytest.approx(slices.SPARE * 18, abs=2)


def test_the_files_of_a_slice_are_few_and_small(tmp_path, cache):
    work = tmp_path / "work"
    train_slices(work, cache, [time.monotonic(), time.monotonic()])
    files = sorted(path.name for path in work.iterdir())
    assert files == ["average-2.safetensors", "further.json", "optimizer-2.safetensors", "weights-2.safetensors"]
    # Small, since a run on a GPU packs them into its archive.
    assert max(path.stat().st_size for path in work.iterdir()) < 8 * 2**20


def test_other_settings_are_refused(tmp_path, cache):
    work = tmp_path / "work"
    train_slices(work, cache, [time.monotonic()])
    with pytest.raises(RecipeError, match="begun with batch = 2"):
        train_slice(work, cache, GENERATOR, "cpu", FOREVER, replace(SMALL, batch=3))
    with pytest.raises(RecipeError, match="holds no training"):
        write_average(tmp_path / "none", GENERATOR, tmp_path / "wan")


def test_a_training_that_is_not_finite_is_not_saved(tmp_path, cache):
    work, settings = tmp_path / "work", replace(SMALL, muon_lr=1e30)
    # The loss of the first step is computed before its update, and is still finite.
    train_slice(work, cache, GENERATOR, "cpu", time.monotonic() - 1, settings, every=1)
    with pytest.raises(TrainingError, match="before step 2"):
        train_slice(work, cache, GENERATOR, "cpu", FOREVER, settings, every=1)
    progress, _ = read_training(work)
    assert progress.step == 1


def test_two_processes_share_a_batch(tmp_path, cache):
    """They take the steps of one process, but for rounding."""
    _, alone = train_slices(tmp_path / "alone", cache, [FOREVER], decay=3)
    options = ["--work", tmp_path / "pair", "--cache", cache, "--device", "cpu", "--decay", 3]
    options += ["--clips", SMALL.clips, "--batch", SMALL.batch, "--warmup", SMALL.warmup]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "ldo.sandbox.build.further", *map(str, options)]
    found = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, timeout=300, capture_output=True, check=True
    )
    # Only the first process speaks.
    assert found.stdout.count("step 3: done") == 1
    weights = load_file(tmp_path / "pair" / "weights-3.safetensors")
    shipped = dict(load_generator_folder().transformer.named_parameters())
    for name, expected in alone["weights"].items():
        moved = (expected - shipped[name]).norm()
        # The first steps of AdamW are as long as its rate, whatever the gradient, so rounding can turn single ones.
        assert (weights[name] - expected).norm() < 0.1 * moved + 1e-6, name


def test_guidance_moves_the_target_of_named_clips_by_what_the_caption_changes(cache):
    data = load_latent_clips(cache, load_generator_folder(), SMALL.clips, "cpu")
    losses = {}
    for guidance in (0.0, 0.5):
        state = start_training(load_generator_folder().transformer)
        inputs = list(draw_inputs(data, torch.Generator(), 0, SMALL))
        for kind, named in (("named", 1.0), ("unnamed", 0.0)):
            inputs[5] = torch.full_like(inputs[5], named)
            state.loss.zero_()
            stacked.set_rates(state.optimizer, 0, 0.0, 0.0, 0.0)
            training_step(state, tuple(inputs), replace(SMALL, guidance=guidance))
            losses[kind, guidance] = state.loss.item()
    clean, noise, times, texts, empty, _ = inputs
    latents = noisy(clean, noise, times)
    with torch.no_grad():
        own, without = (state.transformer(latents, times * 1000, text, return_dict=False)[0] for text in (texts, empty))
    # The average is the model itself as long as nothing has moved.
    expected = (own - (noise - clean) - 0.5 * (own - without)).square().mean().item()
    assert losses["named", 0.5] == pytest.approx(expected, rel=1e-4)
    assert losses["named", 0.5] != pytest.approx(losses["named", 0.0], rel=1e-4)
    assert losses["unnamed", 0.5] == pytest.approx(losses["unnamed", 0.0], rel=1e-6)


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path, cache):
    with pytest.raises(RecipeError, match="--batch 2 does not divide by 3 processes"):
        train_slice(tmp_path, cache, GENERATOR, "cpu", FOREVER, SMALL, processes=Processes(0, 3))


def test_the_command_continues_with_the_settings_it_began_with(tmp_path, cache, capsys):
    work = tmp_path / "work"
    same = ["--work", str(work), "--cache", str(cache), "--device", "cpu"]
    assert main([*same, "--clips", "6", "--batch", "2", "--warmup", "3", "--decay", "2"]) == 0
    assert "step 2: done" in capsys.readouterr().out
    _, settings = read_training(work)
    assert settings == SMALL
    assert main(same) == 0
    assert "step 2: done" in capsys.readouterr().out
    assert main([*same, "--batch", "3"]) == 2
    assert "begun with batch = 2" in capsys.readouterr().err


def test_a_step_asks_the_device_for_nothing():
    """On tensors without values, a step that reads one fails as it would inside a CUDA graph.

    A tensor that was left on the CPU fails too.
    """
    latents = (4, 12, 5, 8, 8)
    with torch.device("meta"):
        state = start_training(WanTransformer3DModel(**base.TRANSFORMER))
        texts = torch.empty(4, base.LENGTH, 64)
        inputs = (torch.empty(latents), torch.empty(latents), torch.empty(4), texts, texts, torch.empty(4))
    stacked.set_rates(state.optimizer, 0, 1e-3, 1e-3, 0.01)
    training_step(state, inputs, SMALL)
    training_step(state, inputs, replace(SMALL, guidance=0.5))
    assert {tensor.device.type for tensor in state.tensors} == {"meta"}
    # Reading a value does fail here: otherwise the test would show nothing.
    with pytest.raises(RuntimeError):
        state.loss.item()


# ---------------------------------------------------------------------------------------------- the comparison


def test_the_written_average_is_compared_with_the_shipped(tmp_path, cache, monkeypatch):
    slow = replace(SMALL, lr=1e-5, muon_lr=1e-5)
    _, tensors = train_slices(tmp_path / "work", cache, [FOREVER], slow, decay=2)
    write_average(tmp_path / "work", GENERATOR, tmp_path / "wan")
    written = load_generator_folder(tmp_path / "wan")
    for name, parameter in written.transformer.named_parameters():
        # The shipped format is half precision.
        assert torch.equal(parameter, tensors["average"][name].half().float())
    monkeypatch.setattr(quality, "PLANTED_CLIPS", 1)
    comparison = quality.compare_generators(
        {"base": GENERATOR, "new": tmp_path / "wan"}, cache, "cpu", loss_clips=4, sound_clips=2, prompts=2
    )
    # The comparison is written as JSON, which must not change it.
    assert json.loads(json.dumps(comparison)) == comparison
    shipped, trained = comparison["models"]["base"], comparison["models"]["new"]
    assert shipped["flow_loss"].keys() == {"0.2", "0.45", "0.7", "0.9"}
    assert shipped["flow_loss"] != shipped["flow_loss_seen"]
    for level, loss in shipped["flow_loss"].items():
        assert 0 < loss < 2
        # Two steps at such rates hardly move the model.
        assert trained["flow_loss"][level] == pytest.approx(loss, rel=0.02)
    assert set(EXACT_METRICS) | {"any"} == shipped["samples_visible"].keys()
    assert shipped["samples"]["visible_violation_rate"]["mean"] == shipped["samples_visible"]["any"]
    assert {"law_residual_median", "as_strong_as_planted"} < shipped["samples_precision"].keys()
    assert not shipped["samples_minus_base"]
    assert trained["samples_minus_base"].keys() == trained["samples"].keys()


def test_precision_tells_planted_strength_from_wobble():
    prompts = [SimpleNamespace(extra={"colours": [0]}), SimpleNamespace(extra={"colours": [0, 1]})]

    def record(prompt, existence, severity, visible):
        return {
            "prompt": prompt,
            "existence": existence,
            "severity": severity,
            "visible": visible,
            "law_residual": severity,
        }

    records = [
        record(0, 1.0, 0.1, []),
        record(0, 0.8, 1.0, ["law_residual"]),
        record(1, 0.5, 3.0, ["missing"]),
        record(1, 0.7, 4.0, ["missing"]),
    ]
    found = quality.sample_precision(records, prompts, planted=2.0)
    assert found == {
        "law_residual_median": 2.0,
        "existence_1_balls": pytest.approx(0.9),
        "existence_2_balls": pytest.approx(0.6),
        "as_strong_as_planted": pytest.approx(2 / 3),
    }


def test_resampling_from_hardly_any_noise_is_the_vae(cache):
    """At a noise level near zero, nothing is left to sample and valid clips stay valid."""
    model = load_generator_folder()
    clips = quality.valid_clips(1, "quality", 8)
    nearly_clean = quality.resampled(model, clips, 0.01, 2)
    assert not any(clip.visible for clip in nearly_clean)
    resampled = quality.resampled(model, clips, 0.9, 2)
    assert sum(clip.law_residual for clip in resampled) > 2 * sum(clip.law_residual for clip in nearly_clean)


# ---------------------------------------------------------------------------------------------- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["graph", "compiled"])
def test_a_graph_takes_the_steps_of_the_eager_form(tmp_path, cache, form):
    # In fp32, so that rounding hides no difference between the forms.
    settings = replace(SMALL, precision="fp32")
    weights = {}
    for each in ("eager", form):
        train_slice(tmp_path / each, cache, GENERATOR, "cuda", FOREVER, settings, decay=6, form=each)
        weights[each] = load_file(tmp_path / each / "weights-6.safetensors")
    moved, apart = 0.0, 0.0
    for name, start in load_generator_folder().transformer.named_parameters():
        moved += (weights["eager"][name] - start).square().sum().item()
        apart += (weights["eager"][name] - weights[form][name]).square().sum().item()
    assert moved > 0
    assert apart < 0.02**2 * moved


@pytest.mark.gpu
def test_slices_on_a_gpu_resume_where_they_stopped(tmp_path, cache):
    settings = replace(SMALL, precision="fp32")

    def train(folder, deadline):
        return train_slice(
            tmp_path / folder, cache, GENERATOR, "cuda", deadline, settings, decay=6, form="graph", every=1
        )

    whole = train("whole", FOREVER)
    train("parts", time.monotonic() - 1)
    parts = train("parts", FOREVER)
    assert whole.step == parts.step == 6
    for part in ("weights", "average", "optimizer"):
        of_whole = load_file(tmp_path / "whole" / f"{part}-6.safetensors")
        of_parts = load_file(tmp_path / "parts" / f"{part}-6.safetensors")
        for name, tensor in of_whole.items():
            assert torch.allclose(tensor, of_parts[name], rtol=1e-3, atol=1e-5), (part, name)


def test_torchrun_takes_none_of_the_options_for_its_own():
    # It refuses a command's option that begins like two of its own, even after the module's name.
    for action in _command_line()._actions:
        for option in action.option_strings:
            if option not in ("-h", "--help"):
                arguments = get_args_parser().parse_args(["-m", "ldo.sandbox.build.further", option, "1"])
                assert arguments.training_script_args == [option, "1"]
