"""Models from only their configurations, on the meta device: true shapes and types, no weights, no memory.

Each transformer class has one entry in ``TRANSFORMERS``: which configuration keys count its blocks, and how it is
called on latents of a given shape. Its adapter in ldo/models/generator knows where the blocks are, which layers carry a
LoRA and how long texts are.

Shapes: B videos, latents (C, T, H, W) of one, L text tokens.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldo.core.errors import RecipeError
from ldo.models import lora
from ldo.models.generator.families import family_adapter
from ldo.models.generator.folder import Geometry, geometry_from_configs


@dataclass(frozen=True)
class Family:
    """How to handle one transformer class."""

    # of its adapter in ldo/models/generator
    name: str
    # configuration keys that count blocks, in the order in which the blocks run
    counts: tuple[str, ...]
    # (config, batch, latent, text, dtype) -> arguments of forward
    call: Callable[..., dict[str, Any]]
    # whether the stock pipeline joins both branches of guidance in one batch
    joined_guidance: bool = False

    @property
    def targets(self) -> tuple[str, ...] | str:
        """The linear layers that carry a LoRA: the last parts of their names, or a pattern."""
        targets = family_adapter(self.name).lora_targets
        return targets if isinstance(targets, str) else tuple(targets)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _wan(config: dict, batch: int, latent: tuple[int, ...], text: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _empty(batch, *latent, dtype=dtype),
        "timestep": _empty(batch),
        "encoder_hidden_states": _empty(batch, text, config["text_dim"], dtype=dtype),
    }


def _cogvideox(config: dict, batch: int, latent: tuple[int, ...], text: int, dtype: torch.dtype) -> dict[str, Any]:
    channels, frames, height, width = latent
    tokens = frames * (height // config["patch_size"]) * (width // config["patch_size"])
    rotary = None
    if config.get("use_rotary_positional_embeddings"):
        rotary = (_empty(tokens, config["attention_head_dim"]), _empty(tokens, config["attention_head_dim"]))
    return {
        # this family puts time before the channels
        "hidden_states": _empty(batch, frames, channels, height, width, dtype=dtype),
        "timestep": _empty(batch),
        "encoder_hidden_states": _empty(batch, text, config["text_embed_dim"], dtype=dtype),
        "image_rotary_emb": rotary,
    }


def _hunyuan(config: dict, batch: int, latent: tuple[int, ...], text: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _empty(batch, *latent, dtype=dtype),
        "timestep": _empty(batch),
        "encoder_hidden_states": _empty(batch, text, config["text_embed_dim"], dtype=dtype),
        "encoder_attention_mask": _empty(batch, text, dtype=dtype),
        "pooled_projections": _empty(batch, config["pooled_projection_dim"], dtype=dtype),
        "guidance": _empty(batch, dtype=dtype) if config.get("guidance_embeds") else None,
    }


def _ltx(config: dict, batch: int, latent: tuple[int, ...], text: int, dtype: torch.dtype) -> dict[str, Any]:
    channels, frames, height, width = latent
    return {
        # this family takes one token per position of the latents
        "hidden_states": _empty(batch, frames * height * width, channels, dtype=dtype),
        "timestep": _empty(batch),
        "encoder_hidden_states": _empty(batch, text, config["caption_channels"], dtype=dtype),
        "encoder_attention_mask": _empty(batch, text, dtype=dtype),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (1.0, 1.0, 1.0),
    }


TRANSFORMERS: dict[str, Family] = {
    "WanTransformer3DModel": Family("wan", ("num_layers",), _wan),
    "CogVideoXTransformer3DModel": Family("cogvideox", ("num_layers",), _cogvideox, True),
    "HunyuanVideoTransformer3DModel": Family("hunyuan", ("num_layers", "num_single_layers"), _hunyuan),
    "LTXVideoTransformer3DModel": Family("ltx", ("num_layers",), _ltx, True),
}


def transformer_family(config: dict) -> Family:
    """The entry for a transformer's configuration; RecipeError for an unknown class."""
    name = config.get("_class_name")
    if name not in TRANSFORMERS:
        raise RecipeError(f"model.path: it holds a {name}; supported: {', '.join(TRANSFORMERS)}")
    return TRANSFORMERS[name]


def construct_model(config: dict, cls: str | None = None) -> nn.Module:
    """A model as its class initialises it, in fp32 on the default device.

    ``cls`` names the class if the configuration does not (a text encoder's is in model_index.json).
    """
    import diffusers
    import transformers

    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))
    model_class = getattr(transformers, cls or config["architectures"][0])
    return model_class(model_class.config_class.from_dict(dict(config)))


def build_meta(config: dict, dtype: torch.dtype, cls: str | None = None) -> nn.Module:
    """A frozen model, as ``construct_model`` makes it, on the meta device in ``dtype``.

    What its class keeps in fp32 stays fp32, as from_pretrained leaves it.
    """
    import diffusers

    # diffusers would warn about every cast, though from_pretrained makes the same ones.
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = construct_model(config, cls)
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)
    fp32_modules = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if "_class_name" in config else set()
    for name, tensor in model.named_parameters():
        if not fp32_modules & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def add_meta_lora(transformer: nn.Module, rank: int, alpha: float, targets: tuple[str, ...] | str) -> int:
    """Put the adapter on a meta transformer; returns its number of parameters.

    RecipeError for a target that no linear layer is called.
    """
    linear_names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(targets, str):
        found = targets in _name_ends(linear_names) or any(re.fullmatch(targets, name) for name in linear_names)
        missing = [] if found else [targets]
    else:
        name_ends = _name_ends(linear_names)
        missing = [target for target in targets if target not in name_ends]
    if missing:
        nearest = difflib.get_close_matches(missing[0], _name_ends(linear_names), 1)
        suggestion = f"; did you mean {nearest[0]}?" if nearest else ""
        raise RecipeError(
            f"lora.targets: no linear layer of {type(transformer).__name__} is called {missing[0]}{suggestion}"
        )
    with torch.device("meta"):
        added = lora.add({"transformer": transformer}, rank, alpha, targets, 0)
    return sum(parameter.numel() for parameter in added.values())


def _name_ends(names: list[str]) -> set[str]:
    """Every name from each of its parts on: of "a.b.c" these are "a.b.c", "b.c" and "c"."""
    name_ends = set()
    for name in names:
        parts = name.split(".")
        name_ends.update(".".join(parts[first:]) for first in range(len(parts)))
    return name_ends


def transformer_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's blocks in the order in which they run."""
    return family_adapter(TRANSFORMERS[type(transformer).__name__].name).blocks(transformer)


def pipeline_geometry(configs: dict[str, dict]) -> Geometry:
    """The geometry of a pipeline with these configurations; RecipeError for one that is not supported."""
    try:
        return geometry_from_configs(
            transformer_family(configs["transformer"]).name, configs["vae"], configs["transformer"]
        )
    except ValueError as error:
        raise RecipeError(f"model.path: {error}") from None


def text_width(config: dict) -> int:
    """Features of a text token, as the transformer takes them."""
    return next(config[key] for key in ("text_dim", "text_embed_dim", "caption_channels") if key in config)


def prompt_length(config: dict, asked: int) -> int:
    """Tokens of a prompt: as asked, else the family's own."""
    # A learnt table of positions allows only one length.
    if config.get("max_text_seq_length") and not config.get("use_rotary_positional_embeddings"):
        return config["max_text_seq_length"]
    return asked or family_adapter(transformer_family(config).name).text_length
