"""Models from their configurations alone, on the meta device: true shapes and types, no weights, no memory.

Each transformer class has one entry of ``FAMILIES``: which configuration keys count its blocks, and how it is called on latents of a
given shape. Where the blocks are, what carries a LoRA, and how long texts are, its adapter in ldo/generator says.

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

from ldo import generator, lora
from ldo.config import RecipeError
from ldo.generator import folder
from ldo.generator.folder import Geometry


@dataclass(frozen=True)
class Family:
    """How to handle one transformer class."""

    name: str  # of its adapter in ldo/generator
    counts: tuple[str, ...]  # configuration keys that count blocks, in the order in which the blocks run
    call: Callable[..., dict[str, Any]]  # (config, batch, latent, text, dtype) -> arguments of forward
    joined_guidance: bool = False  # the stock pipeline joins both branches of guidance in one batch

    @property
    def targets(self) -> tuple[str, ...] | str:
        """The linear layers that carry a LoRA: ends of their names, or a pattern."""
        found = generator.adapter(self.name).lora_targets
        return found if isinstance(found, str) else tuple(found)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _wan(config: dict, batch: int, latent: tuple[int, ...], text: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _empty(batch, *latent, dtype=dtype),
        "timestep": _empty(batch),
        "encoder_hidden_states": _empty(batch, text, config["text_dim"], dtype=dtype),
    }


def _cogvideox(config: dict, batch: int, latent: tuple[int, ...], text: int, dtype: torch.dtype) -> dict[str, Any]:
    c, t, h, w = latent
    n = t * (h // config["patch_size"]) * (w // config["patch_size"])
    rotary = (_empty(n, config["attention_head_dim"]), _empty(n, config["attention_head_dim"]))
    return {
        "hidden_states": _empty(batch, t, c, h, w, dtype=dtype),
        "timestep": _empty(batch),
        "encoder_hidden_states": _empty(batch, text, config["text_embed_dim"], dtype=dtype),
        "image_rotary_emb": rotary if config.get("use_rotary_positional_embeddings") else None,
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
    c, t, h, w = latent
    return {
        "hidden_states": _empty(batch, t * h * w, c, dtype=dtype),
        "timestep": _empty(batch),
        "encoder_hidden_states": _empty(batch, text, config["caption_channels"], dtype=dtype),
        "encoder_attention_mask": _empty(batch, text, dtype=dtype),
        "num_frames": t,
        "height": h,
        "width": w,
        "rope_interpolation_scale": (1.0, 1.0, 1.0),
    }


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": Family("wan", ("num_layers",), _wan),
    "CogVideoXTransformer3DModel": Family("cogvideox", ("num_layers",), _cogvideox, True),
    "HunyuanVideoTransformer3DModel": Family("hunyuan", ("num_layers", "num_single_layers"), _hunyuan),
    "LTXVideoTransformer3DModel": Family("ltx", ("num_layers",), _ltx, True),
}


def family(config: dict) -> Family:
    """The entry for a transformer's configuration; RecipeError for a class that nothing is known of."""
    name = config.get("_class_name")
    if name not in FAMILIES:
        raise RecipeError(f"model.path: it holds a {name}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def construct(config: dict, cls: str | None = None) -> nn.Module:
    """A model as its class initialises it, on the default device in fp32.

    ``cls`` names the class where the configuration does not (a text encoder's comes from model_index).
    """
    import diffusers
    import transformers

    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))
    kind = getattr(transformers, cls or config["architectures"][0])
    return kind(kind.config_class.from_dict(dict(config)))


def build(config: dict, dtype: torch.dtype, cls: str | None = None) -> nn.Module:
    """A frozen model (``construct``) on the meta device in ``dtype``; what its class keeps in fp32 stays fp32, as from_pretrained leaves it."""
    import diffusers

    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # it warns of every cast that from_pretrained makes too
    try:
        with torch.device("meta"):
            model = construct(config, cls)
    finally:
        diffusers.utils.logging.set_verbosity(level)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if "_class_name" in config else set()
    for name, tensor in model.named_parameters():
        if not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def size(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def add_lora(transformer: nn.Module, rank: int, alpha: float, targets: tuple[str, ...] | str) -> int:
    """Put the adapter on a meta transformer; returns its number of parameters. RecipeError for a target that no linear layer bears."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    ends = {name.split(".", i)[-1] for name in linear for i in range(name.count(".") + 1)}
    for target in (targets,) if isinstance(targets, str) else targets:
        if target not in ends and not any(re.fullmatch(target, name) for name in linear if isinstance(targets, str)):
            near = difflib.get_close_matches(target, ends, 1)
            raise RecipeError(
                f"lora.targets: no linear layer of {type(transformer).__name__} is called {target}" + (f"; did you mean {near[0]}?" if near else "")
            )
    with torch.device("meta"):
        return sum(p.numel() for p in lora.add({"transformer": transformer}, rank, alpha, targets, 0).values())


def blocks(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's blocks in the order in which they run."""
    return generator.adapter(FAMILIES[type(transformer).__name__].name).blocks(transformer)


def geometry(configs: dict[str, dict]) -> Geometry:
    """The geometry of a pipeline with these configurations; RecipeError for one that is not supported."""
    try:
        return folder.geometry(family(configs["transformer"]).name, configs["vae"], configs["transformer"])
    except ValueError as error:
        raise RecipeError(f"model.path: {error}") from None


def text_width(config: dict) -> int:
    """Features of a text token, as the transformer takes them."""
    return next(config[key] for key in ("text_dim", "text_embed_dim", "caption_channels") if key in config)


def text_length(config: dict, asked: int) -> int:
    """Tokens of a prompt: as asked, else the family's own; a learnt table of positions allows one length alone."""
    if config.get("max_text_seq_length") and not config.get("use_rotary_positional_embeddings"):
        return config["max_text_seq_length"]
    return asked or generator.adapter(family(config).name).text_length
