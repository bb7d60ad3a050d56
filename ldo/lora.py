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
    """One of the adapter's two products, in its input's precision; the weight stays fp32, and so does what the optimizer adds up.

    peft widens the input instead: q, k and v then each keep an fp32 copy of one 16-bit x for the backward, and the products, fp32 too,
    leave copies of the output. The stock pipeline keeps the adapter in the base's precision, so this is also how it computes.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def _thrifty(transformer: nn.Module) -> None:
    """Make every product of the adapter a ``Product``; layers hand them their input as it is."""
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
                linear.__class__ = Product


def add(transformers: dict[str, nn.Module], rank: int, alpha: float, targets: Sequence[str] | str, seed: int) -> dict[str, nn.Parameter]:
    """Put a fresh adapter (B = 0) on each transformer; returns the fp32 parameters by their exported names.

    The same seed gives the same A, whatever was drawn before.
    """
    parameters = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prefix, transformer in transformers.items():
            transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=_targets(targets)))
            _thrifty(transformer)
            own = {}
            for name, parameter in transformer.named_parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()  # peft creates them in the base's dtype
                    own[name.replace(".default", "")] = parameter
            assert set(own) == set(get_peft_model_state_dict(transformer)), "peft names its parameters differently"
            parameters |= {f"{prefix}.{name}": p for name, p in own.items()}
    return parameters


def _targets(targets: Sequence[str] | str) -> list[str] | str:
    return targets if isinstance(targets, str) else list(targets)


def snapshot(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of the adapter's values."""
    return {k: p.detach().clone() for k, p in parameters.items()}


@torch.no_grad()
def restore(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Write ``values`` into the adapter in place."""
    for k, p in parameters.items():
        p.copy_(values[k])


@contextmanager
def swapped(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Run with other adapter values (a reference, an average, zeros for the base), bit-exactly restored afterwards."""
    own = snapshot(parameters)
    restore(parameters, values)
    try:
        yield
    finally:
        restore(parameters, own)


def zeros(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Values under which the adapter does nothing: the base model."""
    return {k: torch.zeros_like(p) for k, p in parameters.items()}


# ---------------------------------------------------------------------------------------------- files


def of(values: dict[str, Tensor], transformer: str) -> dict[str, Tensor]:
    """The part of an adapter's values that belongs to one transformer, by the names of its layers."""
    return {k.removeprefix(f"{transformer}."): v for k, v in values.items() if k.startswith(f"{transformer}.")}


def export(
    folder: Path, values: dict[str, Tensor], rank: int, alpha: float, targets: Sequence[str] | str, comfy: dict[str, dict[str, Tensor]]
) -> None:
    """Write the LoRA twice: for the stock pipeline's ``load_lora_weights`` and for ComfyUI, one file a transformer.

    Without its metadata diffusers would take alpha = rank; ComfyUI ignores metadata and reads ``.alpha`` tensors. One
    file cannot hold both: with both, diffusers scales twice. ``comfy``: each transformer's values under ComfyUI's names; a
    layer that joins several has a rank, and so an alpha, several times as large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target_modules = targets if isinstance(targets, str) else sorted(targets)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": target_modules, "lora_dropout": 0.0, "bias": "none"}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()}, sort_keys=True)}
    for name, other in comfy.items():
        # the second transformer's file is loaded into it by a flag; its keys say "transformer" too
        tensors = {f"transformer.{k}": v.detach().cpu().contiguous() for k, v in of(values, name).items()}
        _write(tensors, folder / WEIGHTS[name], metadata)
        other = {k: v.detach().cpu().contiguous() for k, v in other.items()}
        for key in [k for k in other if k.endswith("lora_down.weight")]:
            other[key.replace("lora_down.weight", "alpha")] = torch.tensor(float(alpha) * len(other[key]) / rank)
        _write(other, folder / COMFY[name], {"format": "pt"})


def read(folder: Path) -> dict[str, Tensor]:
    """An exported adapter's values by their names in the run."""
    found = {}
    for name, file in WEIGHTS.items():
        if (folder / file).exists():
            found |= {f"{name}.{k.removeprefix('transformer.')}": v for k, v in load_file(folder / file).items()}
    return found


def load_into(pipeline: Any, folder: Path) -> None:
    """Load an exported LoRA into a stock pipeline, as its documentation says."""
    pipeline.load_lora_weights(folder, weight_name=WEIGHTS["transformer"])
    if (folder / WEIGHTS["transformer_2"]).exists():
        pipeline.load_lora_weights(folder, weight_name=WEIGHTS["transformer_2"], load_into_transformer_2=True)


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata)
    part.replace(path)
