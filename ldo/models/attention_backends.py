"""The ways to run attention that a recipe may name, and which of them can run on a machine.

A backend is one of ``BACKENDS``: the names of a recipe. Every one of them trains; those of diffusers that do not (its
dense FlashAttention-3 is an operator without a backward, SageAttention is for sampling) are not offered.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from ldo.core.errors import RecipeError


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
    fix: str = ""  # how to install the package
    least: tuple[int, int] = (0, 0)
    most: tuple[int, int] = (99, 9)
    half: bool = False
    cpu: bool = False

    def form(self, mask: str) -> str:
        """diffusers' name for layers with this kind of mask; empty where it takes no such mask."""
        if mask == "none":
            return self.dense
        return self.masked if mask in self.masks else ""


# How the compute capabilities read: FlashAttention-2 from Ampere on, FlashAttention-3 only on Hopper.
_ANY = ("keys", "bias")
_FLASH2 = dict(masks=("keys",), least=(8, 0), half=True)
_FLASH3 = dict(masks=("keys",), least=(9, 0), most=(9, 9), half=True)
_HUB = dict(package="kernels", fix="pip install 'ldo[hub]'")
_ALL = (
    Backend("native", "native", "native", _ANY, cpu=True),
    # the form for packed sequences: diffusers' other one has no backward
    Backend(
        "flash3",
        "_flash_varlen_3",
        "_flash_varlen_3",
        package="flash_attn_interface",
        fix="build FlashAttention-3 from source",
        **_FLASH3,
    ),
    Backend("flash2", "flash", "flash_varlen", package="flash_attn", fix="pip install 'ldo[flash]'", **_FLASH2),
    Backend("hub_flash3", "_flash_3_hub", "_flash_3_varlen_hub", **_HUB, **_FLASH3),
    Backend("hub_flash2", "flash_hub", "flash_varlen_hub", **_HUB, **_FLASH2),
    # no "keys": diffusers hands xformers such a mask as an additive one of zeros and ones
    Backend("xformers", "xformers", "xformers", ("bias",), "xformers", "pip install 'ldo[xformers]'"),
    Backend("sdpa_cudnn", "_native_cudnn", "_native_cudnn", _ANY, least=(8, 0), half=True),
    Backend("sdpa_flash", "_native_flash", least=(8, 0), half=True, cpu=True),
    Backend("sdpa_efficient", "_native_efficient", "_native_efficient", _ANY),
    Backend("sdpa_math", "_native_math", "_native_math", _ANY, cpu=True),
)
BACKENDS = {backend.name: backend for backend in _ALL}

# What a family's layers pass as a mask, by a part of their name; layers not named pass none.
MASKS_OF = {
    "WanTransformer3DModel": {},
    "CogVideoXTransformer3DModel": {},
    "LTXVideoTransformer3DModel": {"attn2": "bias"},
    "HunyuanVideoTransformer3DModel": {"transformer_blocks": "keys", "single_transformer_blocks": "keys"},
}


def backend_order(device: torch.device) -> tuple[str, ...]:
    """What ``auto`` tries on a GPU, the fastest first.

    Expected from published numbers: FlashAttention-2 reaches about a third of an H100's rate and version 3 up to three
    quarters (Shah et al., FlashAttention-3, 2024), with cuDNN's kernels not far behind version 3; before Hopper version
    2 leads. Measured on an H200 (docs/attention.md): PyTorch's own choice there is cuDNN's kernel, in up to 0.75 of the
    time that it takes through diffusers' ``sdpa_cudnn``, which copies q, k and v first.
    """
    major = torch.cuda.get_device_capability(device)[0]
    library: tuple[str, ...] = ()
    if major == 9:
        library = ("native",)
    elif major > 9:
        library = ("sdpa_cudnn",)
    return ("flash3", "hub_flash3", *library, "flash2", "hub_flash2", "xformers", "sdpa_flash")


def refusal(backend: Backend, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on this machine in this precision, with the fix; None if it may. Loads nothing."""
    if backend.package and not _installed(backend.package):
        return f"{backend.package} is not installed; {backend.fix}, or choose auto"
    # before the capability is asked for, which needs a GPU
    if device.type != "cuda":
        return None if backend.cpu else "it needs a GPU and this run is on the CPU; choose native"
    if backend.half and dtype not in (torch.bfloat16, torch.float16):
        return "it takes 16-bit numbers only; set the model's dtype to bfloat16, or choose native"
    capability = torch.cuda.get_device_capability(device)
    if not backend.least <= capability <= backend.most:
        return f"it does not run on GPUs of compute capability {capability[0]}.{capability[1]}; choose auto"
    return None


def _installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    # a mere folder of that name, such as our kernels/, has no origin
    return found is not None and found.origin is not None


def check_attention(key: str, name: str, dtype: torch.dtype, device: torch.device, transformer: str = "") -> None:
    """RecipeError where the choice ``key: name`` cannot work. ``transformer``: the generator's class, if known."""
    if name == "auto":
        return
    reason = refusal(BACKENDS[name], dtype, device)
    # refused only where no layer would be left: of several kinds of mask some layers may still be served
    masks = set(MASKS_OF.get(transformer, {}).values())
    if reason is None and masks == {"keys"} and not BACKENDS[name].form("keys"):
        reason = (
            f"{transformer} masks its text in every layer, and it takes no such mask; choose auto, flash2 or native"
        )
    if reason:
        raise RecipeError(f"{key} is {name!r}: {reason}")
