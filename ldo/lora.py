"""The LoRA: added through peft, swapped in place, exported in the forms that diffusers and ComfyUI load exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "pytorch_lora_weights.safetensors"  # the name diffusers looks for in a folder
COMFY = "comfyui_lora.safetensors"


def add(transformer: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> dict[str, nn.Parameter]:
    """Put a fresh adapter (B = 0) on ``transformer``; returns its fp32 parameters by their exported names.

    The same seed gives the same A, whatever was drawn before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    parameters = {}
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft creates them in the base's dtype
            parameters[name.replace(".default", "")] = parameter
    assert set(parameters) == set(get_peft_model_state_dict(transformer)), "peft names its parameters differently"
    return parameters


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


def export(folder: Path, values: dict[str, Tensor], rank: int, alpha: float, targets: Sequence[str], comfy: dict[str, Tensor]) -> None:
    """Write the LoRA twice: for ``WanPipeline.load_lora_weights`` and for ComfyUI.

    Without its metadata diffusers would take alpha = rank; ComfyUI ignores metadata and reads ``.alpha`` tensors. One
    file cannot hold both: with both, diffusers scales twice. ``comfy``: the values under ComfyUI's names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(targets), "lora_dropout": 0.0, "bias": "none"}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()}, sort_keys=True)}
    tensors = {f"transformer.{k}": v.detach().cpu().contiguous() for k, v in values.items()}
    _write(tensors, folder / WEIGHTS, metadata)
    other = {k: v.detach().cpu().contiguous() for k, v in comfy.items()}
    for key in [k for k in other if k.endswith("lora_down.weight")]:
        other[key.replace("lora_down.weight", "alpha")] = torch.tensor(float(alpha))
    _write(other, folder / COMFY, {"format": "pt"})


def read(folder: Path) -> dict[str, Tensor]:
    """An exported adapter's values by their names in the model."""
    return {k.removeprefix("transformer."): v for k, v in load_file(folder / WEIGHTS).items()}


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata)
    part.replace(path)
