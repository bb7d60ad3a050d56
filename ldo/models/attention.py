"""Attention of both models: which kernel runs it, and whether that took effect.

Which backends there are, and which can run here, is in ``ldo/models/attention_backends.py``. diffusers'
``dispatch_attention_fn`` runs them for both models:

    generator    each layer's processor carries its backend. CogVideoX's stock processor asks PyTorch itself, so it
                 is replaced by ``JointProcessor``, the same arithmetic through the dispatch
    world model  a function of ours, registered with transformers' ``AttentionInterface``, hands over to the dispatch

``transformer.set_attention_backend`` is not used: it silently skips layers, and it changes the backend of every other
diffusers model in the process too. A backend is tried on a few tokens before it is set: output and gradients must agree
with plain attention. A layer whose mask the backend does not take stays with PyTorch, and the log says so.

Shapes: B samples, N tokens, H heads, D features a head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldo.core.errors import RecipeError
from ldo.models.attention_backends import BACKENDS, MASKS_OF, Backend, backend_order, check_attention, refusal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Effect:
    """What came of a choice: ``reached`` of ``layers`` attention layers run ``backend``; ``note`` says why not all."""

    backend: str
    reached: int
    layers: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.backend} ({self.reached} of {self.layers} layers{self.note and ', '}{self.note})"


# ---------------------------------------------------------------------------------------------- choosing


def attend(
    form: str, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention [B, N, H, D] by diffusers' backend ``form``."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    return dispatch_attention_fn(
        q_BNHD, k_BNHD, v_BNHD, attn_mask=mask, scale=scale, backend=AttentionBackendName(form)
    )


def probe_backend(form: str, mask: str, dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Attend 192 tokens of 2 heads of width ``dim``, forward and backward; what is wrong with the result, or None.

    Also fetches a kernel that comes from the Hub. The bound is a few times bfloat16's rounding of values of order 1.
    """
    from diffusers.models.attention_dispatch import attention_backend

    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 192, 2, dim, generator=rng).to(device, dtype).requires_grad_() for _ in range(3)]
    keep = torch.arange(192, device=device) < 150
    # as models pass them: a few of them mask by a large negative number and not by a boolean
    masks = {
        "none": None,
        "keys": keep.view(1, 1, 1, -1),
        "bias": torch.where(keep, 0.0, -10000.0).to(dtype).expand(1, 2, 1, -1),
    }
    plain_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    plain_mask = None if mask == "none" else keep.view(1, 1, 1, -1)
    heads_first = [tensor.transpose(1, 2) for tensor in plain_inputs]
    # a scale of its own, because a kernel that forgets the scale would pass with the usual one
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=plain_mask, scale=0.3).transpose(1, 2)
    try:
        # within diffusers' own context, which looks at packages and versions
        with attention_backend(form):
            output = attend(form, *inputs, mask=masks[mask], scale=0.3)
        gradients = torch.autograd.grad(_any_loss(output), inputs)
    # whatever an external kernel raises means that it cannot be used here
    except Exception as error:
        return f"it failed on {dim}-wide heads ({' '.join(str(error).split())[:160]})"
    expected_gradients = torch.autograd.grad(_any_loss(expected), plain_inputs)
    compared = [("output", output, expected)]
    compared += [("gradient", *pair) for pair in zip(gradients, expected_gradients, strict=True)]
    for what, found, wanted in compared:
        found, wanted = found.detach().float(), wanted.detach()
        error = float((found - wanted).abs().max() / wanted.abs().max())
        # not "error >= 0.04", which a NaN would pass
        if not error < 0.04:
            return f"its {what} on {dim}-wide heads is off by {error:.0%}"
    return None


def _any_loss(output: Tensor) -> Tensor:
    return output.sum() + output.square().sum()


def choose_backend(
    key: str, name: str, calls: set[tuple[str, int]], dtype: torch.dtype, device: torch.device
) -> Backend:
    """The backend for layers that pass ``calls``, pairs of mask and head width; "native" is left untried.

    ``auto``: on the CPU and in 32 bits PyTorch's own choice; else the first in ``backend_order`` that serves some layer
    and whose result is right. RecipeError where an explicit choice serves none or fails.
    """
    if name == "native" or (name == "auto" and (device.type != "cuda" or dtype == torch.float32)):
        return BACKENDS["native"]
    if name != "auto":
        check_attention(key, name, dtype, device)
        reason = _wrong(BACKENDS[name], calls, dtype, device)
        if reason:
            raise RecipeError(f"{key} is {name!r}: {reason}")
        return BACKENDS[name]
    # installed is not enough: a kernel can lack this head width, or be built for another PyTorch
    for candidate in backend_order(device):
        backend = BACKENDS[candidate]
        reason = refusal(backend, dtype, device) or _wrong(backend, calls, dtype, device)
        if reason is None:
            return backend
        log.debug("attention: not %s: %s", candidate, reason)
    return BACKENDS["native"]


def _wrong(backend: Backend, calls: set[tuple[str, int]], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a backend cannot serve any of these calls, or what it gets wrong in one; None if all is well."""
    served = sorted((mask, width) for mask, width in calls if backend.form(mask))
    if not served:
        return "it takes none of the masks that this model's layers pass; choose auto"
    for mask, width in served:
        reason = probe_backend(backend.form(mask), mask, width, dtype, device)
        if reason:
            return reason
    return None


# ---------------------------------------------------------------------------------------------- the generator


class JointProcessor:
    """CogVideoX's joint attention over text and video tokens, through diffusers' dispatch.

    Text comes first; only the video's tokens are rotated. Returns (video, text).
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask=None,
        image_rotary_emb=None,
    ):
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.embeddings import apply_rotary_emb

        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], 1)
        query, key, value = (
            projection(tokens).unflatten(2, (attn.heads, -1)) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:

            def rotate(states: Tensor) -> Tensor:
                video = apply_rotary_emb(states[:, text:], image_rotary_emb, sequence_dim=1)
                return torch.cat([states[:, :text], video], 1)

            query, key = rotate(query), rotate(key)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        # to_out is a projection and a dropout
        output = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3)))
        return output[:, text:], output[:, :text]


def attention_layers(transformer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The attention layers of a diffusers transformer, with their names."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    kinds = Attention | AttentionModuleMixin
    return [(name, module) for name, module in transformer.named_modules() if isinstance(module, kinds)]


def _joint(layer: nn.Module) -> bool:
    return type(layer.processor).__name__ == "CogVideoXAttnProcessor2_0"


def set_generator_attention(
    transformer: nn.Module, name: str, dtype: torch.dtype, device: torch.device, key: str = "model.attention"
) -> Effect:
    """Let the generator's layers attend by backend ``name`` ("auto" or one of ``BACKENDS``) on ``device``.

    With "auto" on a CPU nothing is touched. RecipeError where an explicit choice cannot work or reaches no layer.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    family = type(transformer).__name__
    every = attention_layers(transformer)
    if family not in MASKS_OF and name not in ("auto", "native"):
        raise RecipeError(f"{key} is {name!r}: which masks {family} passes is not known; choose native")
    settable = _settable_layers(every, family)
    backend = BACKENDS["native"]
    if family in MASKS_OF:
        calls = {(mask, layer.to_q.out_features // layer.heads) for mask, layer in settable}
        backend = choose_backend(key, name, calls, dtype, device)
    if backend.name == "native":
        # "auto" leaves layers as they are; a joint layer's stock processor asks PyTorch in any case
        if name == "native":
            for _, layer in settable:
                if not _joint(layer):
                    layer.processor._attention_backend = AttentionBackendName.NATIVE
        return Effect("native", len(every), len(every))
    for mask, layer in settable:
        if _joint(layer):
            layer.set_processor(JointProcessor())
        layer.processor._attention_backend = AttentionBackendName(backend.form(mask) or "native")
    # counted from the layers themselves, not from what was just done to them
    forms = {backend.form(mask) for mask, _ in settable} - {""}
    reached = sum(getattr(layer.processor, "_attention_backend", None) in forms for _, layer in every)
    return Effect(backend.name, reached, len(every), "" if reached == len(every) else "the others native")


def _settable_layers(layers: list[tuple[str, nn.Module]], family: str) -> list[tuple[str, nn.Module]]:
    """The layers whose backend can be set, each with the kind of mask that it passes."""
    if family not in MASKS_OF:
        return []

    def mask(path: str) -> str:
        return next((kind for part, kind in MASKS_OF[family].items() if part in path.split(".")), "none")

    return [
        (mask(path), layer) for path, layer in layers if _joint(layer) or hasattr(layer.processor, "_attention_backend")
    ]


# ---------------------------------------------------------------------------------------------- the world model


def _handover(form: str) -> Callable[..., tuple[Tensor, None]]:
    """An attention function as transformers calls it, [B, H, N, D] in and [B, N, H, D] out, that calls ``attend``."""

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **_):
        # ``attend`` takes neither: they would be ignored silently
        assert not dropout and not is_causal, "a frozen encoder neither drops nor is causal"
        tokens_first = [states.transpose(1, 2) for states in (query, key, value)]
        return attend(form, *tokens_first, mask=attention_mask, scale=scaling), None

    return attention


def set_world_model_attention(
    model: nn.Module, name: str, dtype: torch.dtype, device: torch.device, key: str = "world_model.attention"
) -> Effect:
    """Let a ``VJEPA2Model``, encoder and predictor, attend by backend ``name`` on ``device``.

    Errors as those of ``set_generator_attention``.
    """
    from transformers import AttentionInterface

    layers = [module for module in model.modules() if hasattr(module, "attention_head_size")]
    calls = {("none", layer.attention_head_size) for layer in layers}
    backend = choose_backend(key, name, calls, dtype, device)
    registered = "sdpa"
    if backend.name != "native":
        # at the word "flash" in a name transformers imports kernels of its own
        registered = "ldo_" + backend.name.replace("flash", "fa")
        AttentionInterface.register(registered, _handover(backend.dense))
    if backend.name != "native" or name == "native":
        model.set_attn_implementation(registered)
    reached = sum(layer.config._attn_implementation == registered for layer in layers)
    return Effect(backend.name, reached, len(layers))
