"""The LoRA: added through peft, swapped in place, exported in the forms that diffusers and ComfyUI load exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# one file for each transformer of the pipeline; the first has the name that diffusers looks for in a folder
WEIGHTS = {"transformer": "pytorch_lora_weights.safetensors", "transformer_2": "pytorch_lora_weights_2.safetensors"}
COMFY = {"transformer": "comfyui_lora.safetensors", "transformer_2": "comfyui_lora_low_noise.safetensors"}


class Product(nn.Linear):
    """One of the adapter's two products, in its input's precision; the weight stays fp32, as does the optimizer's sum.

    peft widens the input instead: q, k and v then each keep an fp32 copy of one 16-bit x for the backward, and the
    products, fp32 too, leave copies of the output. The stock pipeline keeps the adapter in the base's precision, so
    this is also how it computes.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def _use_products(transformer: nn.Module) -> None:
    """Make every product of the adapter a ``Product``; layers hand them their input as it is."""
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
                # the class and not the object: peft's names and references to the module stay as they are
                linear.__class__ = Product


def add(
    transformers: dict[str, nn.Module], rank: int, alpha: float, targets: Sequence[str] | str, seed: int
) -> dict[str, nn.Parameter]:
    """Put a fresh adapter (B = 0) on each transformer; returns the fp32 parameters by their exported names.

    The same seed gives the same A, whatever was drawn before.
    """
    parameters = {}
    target_modules = targets if isinstance(targets, str) else list(targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prefix, transformer in transformers.items():
            transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules))
            _use_products(transformer)
            trained = {}
            for name, parameter in transformer.named_parameters():
                if parameter.requires_grad:
                    # peft creates them in the base's dtype; in bf16 a small step would round to none
                    parameter.data = parameter.data.float()
                    trained[name.replace(".default", "")] = parameter
            expected = set(get_peft_model_state_dict(transformer))
            assert set(trained) == expected, "peft names its parameters differently"
            parameters |= {f"{prefix}.{name}": parameter for name, parameter in trained.items()}
    return parameters


def snapshot(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of the adapter's values."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def restore_values(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Write ``values`` into the adapter in place."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@contextmanager
def swapped(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Run with other adapter values (a reference, an average, zeros for the base), bit-exactly restored afterwards."""
    kept = snapshot(parameters)
    restore_values(parameters, values)
    try:
        yield
    finally:
        restore_values(parameters, kept)


def zeros(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Values under which the adapter does nothing: the base model."""
    return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}


# ---------------------------------------------------------------------------------------------- files


def of(values: dict[str, Tensor], transformer: str) -> dict[str, Tensor]:
    """The part of an adapter's values that belongs to one transformer, by the names of its layers."""
    return {
        name.removeprefix(f"{transformer}."): value
        for name, value in values.items()
        if name.startswith(f"{transformer}.")
    }


def export(
    folder: Path,
    values: dict[str, Tensor],
    rank: int,
    alpha: float,
    targets: Sequence[str] | str,
    comfy: dict[str, dict[str, Tensor]],
) -> None:
    """Write the LoRA twice: for the stock pipeline's ``load_lora_weights`` and for ComfyUI, one file a transformer.

    Without its metadata diffusers would take alpha = rank; ComfyUI ignores metadata and reads ``.alpha`` tensors. One
    file cannot hold both: with both, diffusers scales twice. ``comfy``: each transformer's values under ComfyUI's
    names; a layer that joins several has a rank, and so an alpha, several times as large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target_modules = targets if isinstance(targets, str) else sorted(targets)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": target_modules, "lora_dropout": 0.0, "bias": "none"}
    prefixed = {f"transformer.{key}": value for key, value in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(prefixed, sort_keys=True)}
    for name, comfy_values in comfy.items():
        # the second transformer's file is loaded into it by a flag; its keys say "transformer" too
        tensors = {f"transformer.{layer}": value for layer, value in of(values, name).items()}
        _write(tensors, folder / WEIGHTS[name], metadata)
        alphas = {}
        for layer, value in comfy_values.items():
            if layer.endswith("lora_down.weight"):
                # a down projection has as many rows as the layer's rank
                alphas[layer.replace("lora_down.weight", "alpha")] = torch.tensor(float(alpha) * len(value) / rank)
        _write(comfy_values | alphas, folder / COMFY[name], {"format": "pt"})


def read_lora(folder: Path) -> dict[str, Tensor]:
    """An exported adapter's values by their names in the run."""
    values = {}
    for transformer, file in WEIGHTS.items():
        if (folder / file).exists():
            for name, value in load_file(folder / file).items():
                values[f"{transformer}.{name.removeprefix('transformer.')}"] = value
    return values


def load_into(pipeline: Any, folder: Path) -> None:
    """Load an exported LoRA into a stock pipeline, as its documentation says."""
    pipeline.load_lora_weights(folder, weight_name=WEIGHTS["transformer"])
    if (folder / WEIGHTS["transformer_2"]).exists():
        pipeline.load_lora_weights(folder, weight_name=WEIGHTS["transformer_2"], load_into_transformer_2=True)


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    # under another name first: a killed process must not leave half a file behind
    part = path.with_suffix(".part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, metadata)
    part.replace(path)
