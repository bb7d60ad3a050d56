"""Precision and memory of a transformer with its adapter: 16-bit products, recomputed blocks, weights in 8 bits."""

import shutil
from itertools import chain
from typing import NamedTuple

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ldo.core.checkpoint import load_checkpoint
from ldo.core.config import ModelConfig, Recipe
from ldo.core.errors import RecipeError
from ldo.memory.meta_models import TRANSFORMERS
from ldo.models import lora
from ldo.models.efficiency import store_in_fp8
from ldo.models.lora import read_lora
from ldo.run.rules import check_rules
from ldo.stages import align
from ldo.stages.align import train_align
from tests.helpers import models
from tests.helpers.interrupt import interrupted
from tests.helpers.short_run import SHORT, train_both_stages


def adapted(dtype, family="wan"):
    """A tiny transformer in ``dtype`` with a filled fp32 adapter, the adapter's parameters, and inputs."""
    transformer, inputs = models.transformer(family)
    transformer.requires_grad_(False)
    for name, parameter in transformer.named_parameters():
        if not any(part in name for part in transformer._keep_in_fp32_modules or ()):
            parameter.data = parameter.data.to(dtype)
    targets = TRANSFORMERS[type(transformer).__name__].targets
    parameters = lora.add({"transformer": transformer}, 4, 8.0, targets, seed=0)
    # a fresh adapter adds nothing, so that its products would not show
    rng = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data.normal_(0, 0.1, generator=rng)
    for argument, value in inputs.items():
        if "states" in argument or "projections" in argument:
            inputs[argument] = value.to(dtype)
    return transformer, parameters, inputs


class Step(NamedTuple):
    """What a forward and a backward give, and the bytes that autograd keeps between them besides the parameters."""

    output: Tensor
    gradient: Tensor
    kept_bytes: int


def take_step(transformer, parameters, inputs):
    """One forward and backward of the mean square, without an update."""
    # storages by their address; the tensors are held, or an address might be taken again
    weights = {parameter.untyped_storage().data_ptr(): parameter.data for parameter in transformer.parameters()}
    kept = {}

    def pack(saved):
        address = saved.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = transformer(**inputs)[0]
    kept_bytes = sum(saved.untyped_storage().nbytes() for saved in kept.values())
    exact = output if output.dtype == torch.float64 else output.float()
    exact.square().sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
    return Step(output.detach(), gradient, kept_bytes)


def weights_in_fp8(transformer):
    return {name: weight for name, weight in transformer.named_parameters() if weight.dtype == torch.float8_e4m3fn}


# ---------------------------------------------------------------------------------------------- the adapter in 16 bits


def test_bf16_base_fp32_adapter(open_run):
    run = open_run(model__dtype="bfloat16", world_model__dtype="bfloat16", **SHORT)
    transformer, vae = run.generator.transformer, run.generator.vae
    assert transformer.dtype == vae.dtype == torch.bfloat16
    assert next(run.world_model.model.parameters()).dtype == torch.bfloat16
    adapted_layers = [layer for layer in transformer.modules() if hasattr(layer, "base_layer")]
    assert all(layer.base_layer.weight.dtype == torch.bfloat16 for layer in adapted_layers)
    values = train_both_stages(run)
    assert {tensor.dtype for tensor in chain(run.parameters.values(), values.values())} == {torch.float32}
    for stage in ("align", "reinforce"):
        moments = load_checkpoint(run.checkpoint(stage))["optimizer"]["state"].values()
        assert {tensor.dtype for state in moments for tensor in state.values()} == {torch.float32}
    for folder in ("aligned", "ldo"):
        assert {tensor.dtype for tensor in read_lora(run.lora_folder(folder)).values()} == {torch.float32}


def as_peft(transformer):
    """The adapter as peft runs it: inputs and products in the precision of the adapter's weights."""
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = True
            for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
                linear.__class__ = nn.Linear


def in_fp64(value):
    """An argument of a call, its real numbers in double precision."""
    if isinstance(value, tuple):
        return tuple(in_fp64(part) for part in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def relative_errors(step, exact):
    """How far output and gradient are from those in fp64."""
    pairs = ((step.output, exact.output), (step.gradient, exact.gradient))
    return [float((found.double() - truth).norm() / truth.norm()) for found, truth in pairs]


@pytest.mark.parametrize("family", ["wan", "cogvideox", "hunyuan", "ltx"])
def test_the_adapters_products_in_bf16_keep_less_and_are_as_exact(family):
    """Measured against fp64: the rounding of the products is small next to the base's own."""
    transformer, parameters, inputs = adapted(torch.bfloat16, family)
    transformer.double()
    exact = take_step(transformer, parameters, {argument: in_fp64(value) for argument, value in inputs.items()})
    ours = take_step(*adapted(torch.bfloat16, family))
    transformer, parameters, inputs = adapted(torch.bfloat16, family)
    as_peft(transformer)
    theirs = take_step(transformer, parameters, inputs)
    assert ours.gradient.dtype == torch.float32 and exact.gradient.dtype == torch.float64
    assert ours.kept_bytes < 0.8 * theirs.kept_bytes
    # above zero, or this would compare fp64 with itself
    for error, error_of_peft in zip(relative_errors(ours, exact), relative_errors(theirs, exact), strict=True):
        assert 0 < error < 1.25 * error_of_peft < 0.02


def test_in_fp32_the_adapter_is_pefts_to_the_bit():
    ours = take_step(*adapted(torch.float32))
    transformer, parameters, inputs = adapted(torch.float32)
    as_peft(transformer)
    theirs = take_step(transformer, parameters, inputs)
    assert torch.equal(ours.output, theirs.output) and torch.equal(ours.gradient, theirs.gradient)
    assert ours.kept_bytes == theirs.kept_bytes


def test_q_k_and_v_keep_one_input_between_them():
    transformer, parameters, _ = adapted(torch.bfloat16)
    attention = transformer.blocks[0].attn1
    hidden = torch.randn(2, 8, 32, dtype=torch.bfloat16, requires_grad=True)
    kept = []

    def pack(saved):
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        total = attention.to_q(hidden) + attention.to_k(hidden) + attention.to_v(hidden)
        total.float().sum().backward()
    # each layer keeps its input, and they are one storage
    inputs = [saved for saved in kept if saved.numel() == hidden.numel()]
    assert len(inputs) == 3
    assert {saved.untyped_storage().data_ptr() for saved in inputs} == {hidden.untyped_storage().data_ptr()}
    assert attention.to_q.lora_A["default"].weight.grad.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())


def test_resume_is_bitwise_in_bf16_and_fp8(open_run):
    changes = {
        **SHORT,
        "align__steps": 4,
        "model__dtype": "bfloat16",
        "model__fp8": True,
        "model__gradient_checkpointing": True,
    }
    whole = open_run(**changes)
    expected = train_align(whole, "align")
    shutil.rmtree(whole.folder)
    # after step 3: one step past the checkpoint at 2
    with interrupted(align, "optimizer_step", 4):
        train_align(open_run(**changes), "align")
    assert load_checkpoint(whole.checkpoint("align"))["step"] == 2
    resumed = train_align(open_run(**changes), "align")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


# ---------------------------------------------------------------------------------------------- recomputing, 8 bits


def test_checkpointing_keeps_less_and_changes_nothing():
    plain = take_step(*adapted(torch.float32))
    transformer, parameters, inputs = adapted(torch.float32)
    transformer.enable_gradient_checkpointing()
    recomputed = take_step(transformer, parameters, inputs)
    assert torch.equal(recomputed.output, plain.output) and torch.equal(recomputed.gradient, plain.gradient)
    assert recomputed.kept_bytes < plain.kept_bytes / 4


def test_fp8_stores_the_base_small_and_the_adapter_whole():
    wide = take_step(*adapted(torch.bfloat16))
    transformer, parameters, inputs = adapted(torch.bfloat16)
    adapter_before = lora.snapshot(parameters)
    count = store_in_fp8(transformer, torch.bfloat16)
    small = weights_in_fp8(transformer)
    assert count == len(small) and set(small) == {
        name for name, _ in transformer.named_parameters() if "base_layer" in name
    }
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, adapter_before[name])
    transformer.enable_gradient_checkpointing()
    # as bytes, because torch.equal does not take fp8
    stored = {name: weight.clone().view(torch.uint8) for name, weight in small.items()}
    narrow = take_step(transformer, parameters, inputs)
    for name, weight in weights_in_fp8(transformer).items():
        assert torch.equal(weight.view(torch.uint8), stored.pop(name))
    assert not stored
    assert transformer.dtype == narrow.output.dtype == torch.bfloat16 and narrow.gradient.dtype == torch.float32
    # the weights were rounded
    assert not torch.equal(narrow.output, wide.output)
    assert torch.cosine_similarity(narrow.gradient, wide.gradient, 0) > 0.99


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan", "ltx"])
def test_fp8_trains_in_every_family(family):
    wide = take_step(*adapted(torch.bfloat16, family))
    transformer, parameters, inputs = adapted(torch.bfloat16, family)
    # two blocks' projections at least
    assert store_in_fp8(transformer, torch.bfloat16) >= 12
    for name in weights_in_fp8(transformer):
        assert "blocks." in name and "norm" not in name and "lora" not in name
    transformer.enable_gradient_checkpointing()
    narrow = take_step(transformer, parameters, inputs)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert not torch.equal(narrow.output, wide.output)
    assert torch.cosine_similarity(narrow.gradient, wide.gradient, 0) > 0.98


def test_fp8_without_recomputing_would_keep_the_wide_weights():
    """The reason for the rule that one goes with the other."""
    sizes = []
    for fp8 in (False, True):
        transformer, parameters, inputs = adapted(torch.bfloat16)
        if fp8:
            store_in_fp8(transformer, torch.bfloat16)
        inputs["hidden_states"].requires_grad_()
        sizes.append(take_step(transformer, parameters, inputs).kept_bytes)
    # weights that the gradient goes through on its way to the input; the text's projections are not among them
    passed = [
        weight.numel()
        for name, weight in transformer.named_parameters()
        if name.endswith("base_layer.weight") and "attn2.to_k" not in name and "attn2.to_v" not in name
    ]
    assert sizes[1] - sizes[0] >= 2 * sum(passed) > 0
    with pytest.raises(RecipeError, match=r"model\.fp8 saves nothing"):
        check_rules(Recipe(model=ModelConfig(fp8=True)))
    with pytest.raises(RecipeError, match=r"model\.compile is cut to pieces"):
        check_rules(Recipe(model=ModelConfig(fp8=True, gradient_checkpointing=True, compile=True)))
    check_rules(Recipe(model=ModelConfig(fp8=True, gradient_checkpointing=True)))
