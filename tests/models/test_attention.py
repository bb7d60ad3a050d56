"""Attention of the models: every layer that a backend is said to reach calls it, and numbers stay the same.

What needs a GPU or a package that is not installed is replaced by the same arithmetic in PyTorch, so that layouts,
scales and masks are checked here; the kernels themselves are named by the profiler in the tests marked ``gpu``.
"""

import json
import logging
import shutil

import pytest
import torch

from benchmarks import profiled
from ldo.core import config
from ldo.core.config import ModelConfig
from ldo.core.errors import RecipeError
from ldo.models.attention import (
    JointProcessor,
    attention_layers,
    set_generator_attention,
    set_world_model_attention,
)
from ldo.models.attention_backends import BACKENDS, refusal
from ldo.models.world_model import WorldModel
from tests.helpers import models

FAMILIES = ("wan", "cogvideox", "ltx", "hunyuan")
CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
MATH, FLASH_CPU = "aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_flash_attention_for_cpu"


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs)[0]


def profiled_counts(work):
    """How often each operator ran while ``work()`` did."""
    with torch.profiler.profile() as profile:
        work()
    return {event.key: event.count for event in profile.key_averages()}


# ---------------------------------------------------------------------------------------------- numbers and reach


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["auto", "native"])
def test_on_a_cpu_nothing_changes(family, name):
    transformer, inputs = models.transformer(family)
    before = run(transformer, inputs)
    kinds = [type(layer.processor) for _, layer in attention_layers(transformer)]
    effect = set_generator_attention(transformer, name, F32, CPU)
    assert (effect.backend, effect.reached) == ("native", effect.layers) and effect.layers == len(kinds) >= 2
    assert [type(layer.processor) for _, layer in attention_layers(transformer)] == kinds
    assert torch.equal(run(transformer, inputs), before)


def test_the_processor_of_cogvideox_is_the_stock_one_in_numbers_and_gradients():
    transformer, inputs = models.transformer("cogvideox")
    parameters = list(transformer.parameters())
    stock = transformer(**inputs)[0]
    stock_gradients = torch.autograd.grad(stock.square().sum(), parameters, allow_unused=True)
    for _, layer in attention_layers(transformer):
        layer.set_processor(JointProcessor())
    ours = transformer(**inputs)[0]
    assert torch.equal(ours, stock)
    gradients = torch.autograd.grad(ours.square().sum(), parameters, allow_unused=True)
    for gradient, expected in zip(gradients, stock_gradients, strict=True):
        # a weight that the output does not depend on has none
        if expected is not None:
            assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "name", "reached", "layers", "forms"),
    [
        ("wan", "flash2", 4, 4, {"flash": 4}),
        ("cogvideox", "flash2", 2, 2, {"flash": 2}),
        # cross-attention passes an additive mask
        ("ltx", "flash2", 2, 4, {"flash": 2}),
        # the text refiner asks PyTorch itself
        ("hunyuan", "flash2", 4, 5, {"flash_varlen": 4}),
        ("wan", "xformers", 4, 4, {"xformers": 4}),
        ("cogvideox", "xformers", 2, 2, {"xformers": 2}),
        ("ltx", "xformers", 4, 4, {"xformers": 4}),
    ],
)
def test_the_layers_counted_are_the_layers_that_call_the_backend(pretend, family, name, reached, layers, forms):
    transformer, inputs = models.transformer(family)
    before = run(transformer, inputs)
    effect = set_generator_attention(transformer, name, F32, CPU)
    note = "" if reached == layers else ", the others native"
    assert str(effect) == f"{name} ({reached} of {layers} layers{note})"
    # choosing a backend has tried it
    pretend.clear()
    after = run(transformer, inputs)
    assert {form: pretend.count(form) for form in set(pretend)} == forms
    assert torch.allclose(after, before, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_profiler_sees_another_kernel_in_every_layer_counted(family):
    transformer, inputs = models.transformer(family)
    inputs["hidden_states"].requires_grad_()
    effect = set_generator_attention(transformer, "sdpa_math", F32, CPU)
    counts = profiled_counts(lambda: transformer(**inputs)[0].sum().backward())
    assert counts[MATH] == effect.reached
    # only HunyuanVideo's text refiner cannot be set
    assert counts.get(FLASH_CPU, 0) == effect.layers - effect.reached == (family == "hunyuan")


@pytest.mark.parametrize("name", ["flash2", "xformers", "sdpa_flash"])
def test_the_world_model_attends_by_it_too(vjepa_folder, frames, pretend, name):
    stock, judge = WorldModel.load(vjepa_folder), WorldModel.load(vjepa_folder)
    effect = set_world_model_attention(judge.model, name, F32, CPU)
    assert (effect.backend, effect.reached, effect.layers) == (name, 4, 4)
    pretend.clear()
    clips = frames[:, 1:]
    # the context's features and the forecast
    for ours, theirs in zip(judge.forecast(clips, 8), stock.forecast(clips, 8), strict=True):
        assert torch.allclose(ours.x_BND, theirs.x_BND, atol=1e-5)
    # two layers of the encoder, two of the predictor
    assert len(pretend) == (0 if name == "sdpa_flash" else 4)
    clips = clips.clone().requires_grad_()
    judge.encode(clips).x_BND.square().mean().backward()
    assert clips.grad.abs().sum() > 0


def test_the_profiler_sees_another_kernel_in_the_world_model(vjepa_folder, frames):
    judge = WorldModel.load(vjepa_folder)
    set_world_model_attention(judge.model, "sdpa_math", F32, CPU)
    counts = profiled_counts(lambda: judge.forecast(frames[:, 1:], 8))
    assert counts[MATH] == 4 and FLASH_CPU not in counts


def test_a_choice_for_one_model_leaves_others_as_they_are(vjepa_folder, pretend):
    """diffusers' own ``set_attention_backend`` would switch every model of the process that names none."""
    chosen, inputs = models.transformer("wan")
    other, _ = models.transformer("wan")
    judge = WorldModel.load(vjepa_folder)
    set_generator_attention(chosen, "xformers", F32, CPU)
    set_world_model_attention(WorldModel.load(vjepa_folder).model, "xformers", F32, CPU)
    pretend.clear()
    run(other, inputs)
    judge.encode(torch.rand(1, 4, 3, 32, 32))
    assert not pretend
    run(chosen, inputs)
    assert len(pretend) == 4


# ---------------------------------------------------------------------------------------------- in a run


def test_a_run_says_what_it_attends_with(open_run, caplog):
    caplog.set_level(logging.INFO)
    open_run()
    assert "attention: generator native (4 of 4 layers)" in caplog.messages
    assert "attention: world model native (4 of 4 layers)" in caplog.messages
    open_run(model__attention="sdpa_math", world_model__attention="sdpa_flash")
    assert "attention: generator sdpa_math (4 of 4 layers)" in caplog.messages
    assert "attention: world model sdpa_flash (4 of 4 layers)" in caplog.messages


def test_a_recipe_is_refused_before_anything_loads(tmp_path, wan_folder, vjepa_folder, capsys):
    from ldo.check import main
    from tests.helpers import recipes

    path = str(recipes.write(tmp_path, wan_folder, vjepa_folder))
    for change, words in {
        "model.attention=sdpa_cudnn": "model.attention is 'sdpa_cudnn': it needs a GPU",
        "world_model.attention=hub_flash3": "world_model.attention is 'hub_flash3': kernels is not installed",
        "model.attention=fastest": "model.attention is 'fastest'; choose one of auto, native",
    }.items():
        assert main([path, "device=cpu", change]) == 2
        assert words in capsys.readouterr().err


def test_the_class_that_decides_over_masks_is_read_from_the_folder(wan_folder, tmp_path):
    from ldo.run import validate

    # only the class is looked at: the weights stay Wan's, and are not loaded
    folder = shutil.copytree(wan_folder, tmp_path / "wan")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "HunyuanVideoTransformer3DModel"}))
    recipe = config.Recipe(device="cpu", model=ModelConfig(attention="sdpa_flash"))
    validate._attention(recipe, wan_folder)
    with pytest.raises(RecipeError, match="masks its text in every layer"):
        validate._attention(recipe, folder)


# ---------------------------------------------------------------------------------------------- kernels by name

KERNELS = [name for name in BACKENDS if name not in ("native", "sdpa_math")]


def moved(value, *where):
    """A call's argument, where it is a tensor or several, after ``to(*where)``."""
    if isinstance(value, tuple):
        return tuple(moved(part, *where) for part in value)
    return value.to(*where) if torch.is_tensor(value) else value


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", *KERNELS])
def test_the_kernels_that_run_on_a_gpu(name, vjepa_folder):
    cuda = torch.device("cuda")
    if name != "auto" and (reason := refusal(BACKENDS[name], BF16, cuda)):
        pytest.skip(reason)
    transformer, inputs = models.transformer("wan")
    transformer.to(cuda, BF16)
    inputs = {argument: moved(value, cuda, BF16) for argument, value in inputs.items()}
    judge = WorldModel.load(vjepa_folder, BF16).to(cuda)
    inputs["hidden_states"].requires_grad_()
    frames = torch.rand(1, 16, 3, 32, 32, device=cuda, requires_grad=True)

    def generate():
        transformer(**inputs)[0].float().square().sum().backward()

    def encode():
        judge.encode(frames).x_BND.square().sum().backward()

    steps = {
        set_generator_attention(transformer, name, BF16, cuda): generate,
        set_world_model_attention(judge.model, name, BF16, cuda): encode,
    }
    for effect, step in steps.items():
        assert effect.reached == effect.layers
        if name == "auto":
            assert effect.backend != "native"
        # the first call of a shape may try several kernels
        step()
        kernels = profiled.ran(step, cuda)
        assert profiled.wrong(effect.backend, kernels) is None, (effect.backend, sorted(kernels))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", KERNELS)
def test_backends_agree_on_a_gpu(family, name):
    cuda = torch.device("cuda")
    if reason := refusal(BACKENDS[name], BF16, cuda):
        pytest.skip(reason)
    transformer, inputs = models.transformer(family)
    transformer.to(cuda, BF16)
    for argument, value in inputs.items():
        # rotary tables, which come as a tuple, stay in fp32
        is_real = torch.is_tensor(value) and value.is_floating_point()
        inputs[argument] = moved(value, cuda, BF16) if is_real else moved(value, cuda)
    before = run(transformer, inputs).float()
    if family == "hunyuan" and not BACKENDS[name].form("keys"):
        with pytest.raises(RecipeError):
            set_generator_attention(transformer, name, BF16, cuda)
        return
    set_generator_attention(transformer, name, BF16, cuda)
    assert (run(transformer, inputs).float() - before).abs().max() < 0.05 * before.abs().max()
