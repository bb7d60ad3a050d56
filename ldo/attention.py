"""Attention of both models: which kernel runs it, and whether that took effect.

A backend is one of ``BACKENDS``: the names of a recipe. Every one of them trains; those of diffusers that do not (its
dense FlashAttention-3 is an operator without a backward, SageAttention is for sampling) are not offered. diffusers'
``dispatch_attention_fn`` runs them for both models:

    generator    each layer's processor carries its backend. CogVideoX's stock processor asks PyTorch itself, so it
                 is replaced by ``JointProcessor``, the same arithmetic through the dispatch
    world model  a function of ours, registered with transformers' ``AttentionInterface``, hands over to the dispatch

``transformer.set_attention_backend`` is not used: it passes over layers without a word, and it changes the backend of
every other diffusers model of the process too. Before a backend is set it must attend a few tokens, forward and
backward, like plain attention does; a layer whose mask it cannot take is left to PyTorch, and the log says so.

Shapes: B samples, N tokens, H heads, D features a head.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldo.config import RecipeError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A way to run attention. ``dense`` and ``masked`` are diffusers' names of it, without and with a mask.

    ``masks``: the kinds of mask it takes besides none at all: "keys" (boolean, [B, 1, 1, N]) and "bias" (additive,
    [B, H, 1, N]). ``package``: what must be importable; ``least`` and ``most``: bounds of the GPU's compute
    capability; ``half``: takes 16-bit numbers only; ``cpu``: runs without a GPU.
    """

    name: str
    dense: str
    masked: str = ""
    masks: tuple[str, ...] = ()
    package: str = ""
    mend: str = ""
    least: tuple[int, int] = (0, 0)
    most: tuple[int, int] = (99, 9)
    half: bool = False
    cpu: bool = False

    def form(self, mask: str) -> str:
        """diffusers' name for layers with this kind of mask; empty where it takes no such mask."""
        return self.dense if mask == "none" else self.masked if mask in self.masks else ""


_ANY = ("keys", "bias")
_FLASH2 = dict(masks=("keys",), least=(8, 0), half=True)
_FLASH3 = dict(masks=("keys",), least=(9, 0), most=(9, 9), half=True)
_HUB = dict(package="kernels", mend="pip install 'ldo[hub]'")
BACKENDS = {
    b.name: b
    for b in (
        Backend("native", "native", "native", _ANY, cpu=True),
        # the form for packed sequences: diffusers' other one has no backward
        Backend("flash3", "_flash_varlen_3", "_flash_varlen_3", package="flash_attn_interface", mend="build FlashAttention-3 from source", **_FLASH3),
        Backend("flash2", "flash", "flash_varlen", package="flash_attn", mend="pip install 'ldo[flash]'", **_FLASH2),
        Backend("hub_flash3", "_flash_3_hub", "_flash_3_varlen_hub", **_HUB, **_FLASH3),
        Backend("hub_flash2", "flash_hub", "flash_varlen_hub", **_HUB, **_FLASH2),
        # no "keys": diffusers hands xformers such a mask as an additive one of zeros and ones
        Backend("xformers", "xformers", "xformers", ("bias",), "xformers", "pip install 'ldo[xformers]'"),
        Backend("sdpa_cudnn", "_native_cudnn", "_native_cudnn", _ANY, least=(8, 0), half=True),
        Backend("sdpa_flash", "_native_flash", least=(8, 0), half=True, cpu=True),
        Backend("sdpa_efficient", "_native_efficient", "_native_efficient", _ANY),
        Backend("sdpa_math", "_native_math", "_native_math", _ANY, cpu=True),
    )
}

# What a family's layers pass as a mask, by a part of their name; layers not named pass none.
_MASKS = {
    "WanTransformer3DModel": {},
    "CogVideoXTransformer3DModel": {},
    "LTXVideoTransformer3DModel": {"attn2": "bias"},
    "HunyuanVideoTransformer3DModel": {"transformer_blocks": "keys", "single_transformer_blocks": "keys"},
}


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


def order(device: torch.device) -> tuple[str, ...]:
    """What ``auto`` tries on a GPU, the fastest first.

    Expected from published figures: FlashAttention-2 reaches about a third of an H100's rate and version 3 up to three
    quarters (Shah et al., FlashAttention-3, 2024), with cuDNN's kernels not far from version 3; before Hopper version 2 leads.
    Measured on an H200 (docs/attention.md): PyTorch's own choice there is cuDNN's kernel, in up to 0.75 of the time that it takes
    through diffusers' ``sdpa_cudnn``, which copies q, k and v first.
    """
    major = torch.cuda.get_device_capability(device)[0]
    own = ("native",) if major == 9 else ("sdpa_cudnn",) if major > 9 else ()
    return ("flash3", "hub_flash3", *own, "flash2", "hub_flash2", "xformers", "sdpa_flash")


def refuse(backend: Backend, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on this machine in this precision, with the mend; None if it may. Loads nothing."""
    found = importlib.util.find_spec(backend.package) if backend.package else None
    if backend.package and (found is None or found.origin is None):  # a mere folder of that name, such as our kernels/, has no origin
        return f"{backend.package} is not installed; {backend.mend}, or choose auto"
    if device.type != "cuda":
        return None if backend.cpu else "it needs a GPU and this run is on the CPU; choose native"
    if backend.half and dtype not in (torch.bfloat16, torch.float16):
        return "it takes 16-bit numbers only; set the model's dtype to bfloat16, or choose native"
    capability = torch.cuda.get_device_capability(device)
    if not backend.least <= capability <= backend.most:
        return f"it does not run on GPUs of compute capability {capability[0]}.{capability[1]}; choose auto"
    return None


def check(key: str, name: str, dtype: torch.dtype, device: torch.device, transformer: str = "") -> None:
    """RecipeError where the recipe's choice ``key: name`` cannot work. ``transformer``: the generator's class, if known."""
    if name == "auto":
        return
    reason = refuse(BACKENDS[name], dtype, device)
    masks = set(_MASKS.get(transformer, {}).values())
    if reason is None and masks == {"keys"} and not BACKENDS[name].form("keys"):
        reason = f"{transformer} masks its text in every layer, and it takes no such mask; choose auto, flash2 or native"
    if reason:
        raise RecipeError(f"{key} is {name!r}: {reason}")


def attend(form: str, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention [B, N, H, D] by diffusers' backend ``form``."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    return dispatch_attention_fn(q_BNHD, k_BNHD, v_BNHD, attn_mask=mask, scale=scale, backend=AttentionBackendName(form))


def probe(form: str, mask: str, dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Attend 192 tokens of 2 heads of width ``dim``, forward and backward; what is wrong with the result, or None.

    Also fetches a kernel that comes from the Hub. The bound is a few times bfloat16's rounding of values of order 1.
    """
    from diffusers.models.attention_dispatch import attention_backend

    rng = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 192, 2, dim, generator=rng).to(device, dtype).requires_grad_() for _ in range(3)]
    keep = torch.arange(192, device=device) < 150
    given = {"none": None, "keys": keep.view(1, 1, 1, -1), "bias": torch.where(keep, 0.0, -10000.0).to(dtype).expand(1, 2, 1, -1)}[mask]
    plain = [x.detach().float().requires_grad_() for x in qkv]
    limit = None if given is None else keep.view(1, 1, 1, -1)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in plain), attn_mask=limit, scale=0.3).transpose(1, 2)
    try:
        with attention_backend(form):  # diffusers' own look at packages and versions
            out = attend(form, *qkv, mask=given, scale=0.3)
        gradients = torch.autograd.grad(out.sum() + out.square().sum(), qkv)
    except Exception as error:  # whatever a foreign kernel raises: it is not to be used
        return f"it failed on {dim}-wide heads ({' '.join(str(error).split())[:160]})"
    wanted = torch.autograd.grad(expected.sum() + expected.square().sum(), plain)
    for what, ours, theirs in (("output", out, expected), *(("gradient", g, w) for g, w in zip(gradients, wanted, strict=True))):
        ours, theirs = ours.detach().float(), theirs.detach()
        off = float((ours - theirs).abs().max() / theirs.abs().max())
        if not off < 0.04:
            return f"its {what} on {dim}-wide heads is off by {off:.0%}"
    return None


def choose(key: str, name: str, calls: set[tuple[str, int]], dtype: torch.dtype, device: torch.device) -> Backend:
    """The backend for layers that pass ``calls``, pairs of mask and head width; "native" is left untried.

    ``auto``: on the CPU and in 32 bits PyTorch's own choice; else the first in ``order`` that serves some layer and
    whose result is right. RecipeError where an explicit choice serves none or fails.
    """
    if name == "native" or (name == "auto" and (device.type != "cuda" or dtype == torch.float32)):
        return BACKENDS["native"]

    def wrong(backend: Backend) -> str | None:
        served = sorted((mask, dim) for mask, dim in calls if backend.form(mask))
        if not served:
            return "it takes none of the masks that this model's layers pass; choose auto"
        return next((r for mask, dim in served if (r := probe(backend.form(mask), mask, dim, dtype, device))), None)

    if name != "auto":
        check(key, name, dtype, device)
        if reason := wrong(BACKENDS[name]):
            raise RecipeError(f"{key} is {name!r}: {reason}")
        return BACKENDS[name]
    for candidate in order(device):
        reason = refuse(BACKENDS[candidate], dtype, device) or wrong(BACKENDS[candidate])
        if reason is None:
            return BACKENDS[candidate]
        log.debug("attention: not %s: %s", candidate, reason)
    return BACKENDS["native"]


# ---------------------------------------------------------------------------------------------- the generator


class JointProcessor:
    """CogVideoX's joint attention over text and video tokens, through diffusers' dispatch.

    Text comes first; only the video's tokens are rotated. Returns (video, text).
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask=None, image_rotary_emb=None):
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.embeddings import apply_rotary_emb

        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], 1)
        q, k, v = (layer(tokens).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (torch.cat([x[:, :text], apply_rotary_emb(x[:, text:], image_rotary_emb, sequence_dim=1)], 1) for x in (q, k))
        out = dispatch_attention_fn(q, k, v, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))
        return out[:, text:], out[:, :text]


def layers(transformer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The attention layers of a diffusers transformer, with their names."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    return [(n, m) for n, m in transformer.named_modules() if isinstance(m, Attention | AttentionModuleMixin)]


def _joint(layer: nn.Module) -> bool:
    return type(layer.processor).__name__ == "CogVideoXAttnProcessor2_0"


def set_generator(transformer: nn.Module, name: str, dtype: torch.dtype, device: torch.device, key: str = "model.attention") -> Effect:
    """Let the generator's layers attend by backend ``name`` ("auto" or one of ``BACKENDS``) on ``device``.

    With "auto" on a CPU nothing is touched. RecipeError where an explicit choice cannot work or reaches no layer.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    every = layers(transformer)
    table = _MASKS.get(type(transformer).__name__)
    if table is None and name not in ("auto", "native"):
        raise RecipeError(f"{key} is {name!r}: which masks {type(transformer).__name__} passes is not known; choose native")

    def mask(path: str) -> str:
        return next((kind for part, kind in table.items() if part in path.split(".")), "none")

    open_ = [(mask(n), m) for n, m in every if table is not None and (_joint(m) or hasattr(m.processor, "_attention_backend"))]
    calls = {(kind, m.to_q.out_features // m.heads) for kind, m in open_}
    backend = choose(key, name, calls, dtype, device) if table is not None else BACKENDS["native"]
    if backend.name == "native":  # what every layer does already, the unnamed ones too
        for _, layer in open_ if name == "native" else ():
            if not _joint(layer):
                layer.processor._attention_backend = AttentionBackendName.NATIVE
        return Effect("native", len(every), len(every))
    for kind, layer in open_:
        if _joint(layer):
            layer.set_processor(JointProcessor())
        layer.processor._attention_backend = AttentionBackendName(backend.form(kind) or "native")
    forms = {backend.form(kind) for kind, _ in open_} - {""}
    reached = sum(getattr(m.processor, "_attention_backend", None) in forms for _, m in every)
    return Effect(backend.name, reached, len(every), "" if reached == len(every) else "the others native")


# ---------------------------------------------------------------------------------------------- the world model


def _handover(form: str) -> Callable[..., tuple[Tensor, None]]:
    """An attention function as transformers calls it, [B, H, N, D] in and [B, N, H, D] out, that hands over to ``attend``."""

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **_):
        assert not dropout and not is_causal, "a frozen encoder neither drops nor is causal"
        return attend(form, *(x.transpose(1, 2) for x in (query, key, value)), mask=attention_mask, scale=scaling), None

    return attention


def set_world_model(model: nn.Module, name: str, dtype: torch.dtype, device: torch.device, key: str = "world_model.attention") -> Effect:
    """Let a ``VJEPA2Model``, encoder and predictor, attend by backend ``name`` on ``device``; as ``set_generator``."""
    from transformers import AttentionInterface

    every = [m for m in model.modules() if hasattr(m, "attention_head_size")]
    backend = choose(key, name, {("none", m.attention_head_size) for m in every}, dtype, device)
    registered = "sdpa"
    if backend.name != "native":
        registered = "ldo_" + backend.name.replace("flash", "fa")  # at the word "flash" transformers imports kernels of its own
        AttentionInterface.register(registered, _handover(backend.dense))
    if backend.name != "native" or name == "native":
        model.set_attn_implementation(registered)
    reached = sum(m.config._attn_implementation == registered for m in every)
    return Effect(backend.name, reached, len(every))
