"""The frozen world model: V-JEPA 2 as an encoder of videos and a predictor of its own features.

Two properties of ``transformers.VJEPA2Model`` are worked around here, each covered by a test:

* its forward pass encodes the whole clip and only then picks the context tokens, so a "forecast" has seen the future
  through attention; here only the context frames are encoded, and only then does the predictor run;
* its rotary positions assume the square grid of ``crop_size``; here every clip is resized to that square, uncropped,
  so that the world model and the generator look at the same picture.

Shapes: B clips, T frames, N tokens in (t, h, w) order, D features. Frames are RGB in [0, 1].
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Tokens:
    """Features ``x_BND`` on the grid (t, h, w), N = t h w, row-major."""

    x_BND: Tensor
    grid: tuple[int, int, int]


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over features without affine, as V-JEPA 2 trains against (its loss is mean |P - LN(E(x))|)."""
    return F.layer_norm(x.float(), x.shape[-1:])


def window_starts(frames: int, window: int, stride: int) -> list[int]:
    """First frames of the windows; where they do not fit, the last one moves back to the end."""
    if frames < window:
        raise ValueError(f"{frames} frames are fewer than a window of {window}")
    # an overlap with the last but one is better than frames that no window sees
    starts = list(range(0, frames - window + 1, stride))
    if starts[-1] + window < frames:
        starts.append(frames - window)
    return starts


class WorldModel(nn.Module):
    """A frozen ``VJEPA2Model``; gradients flow to the frames, never to the weights.

    ``crop`` is the input side in pixels, ``patch`` the side of a token in pixels, ``tubelet`` the frames of a token,
    ``frames`` the length of the clips it was trained on, ``dim`` the width of its features.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        config = model.config
        self.crop, self.patch, self.tubelet = config.crop_size, config.patch_size, config.tubelet_size
        self.frames, self.dim = config.frames_per_clip, config.hidden_size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        # transformers gathers the mask token with index 1 (modulo their number); an untrained one is all zeros
        tokens = model.predictor.embeddings.mask_tokens
        if tokens[1 % len(tokens)].norm() == 0:
            log.warning("world model: the predictor's mask token 1 is all zeros; its forecasts are likely meaningless")

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype = torch.float32, attention: str | None = None) -> WorldModel:
        """Load a V-JEPA 2 checkpoint folder or Hub name; ``attention`` is a transformers attention implementation."""
        from transformers import VJEPA2Model

        # left out, not None: transformers would take None for a choice
        options = {"attn_implementation": attention} if attention else {}
        return cls(VJEPA2Model.from_pretrained(path, dtype=dtype, **options))

    @property
    def side(self) -> int:
        """Tokens along height and width."""
        return self.crop // self.patch

    def resize(self, frames_BTCHW: Tensor) -> Tensor:
        """Resize to the square input, fp32 [B, T, 3, crop, crop]: antialiased, uncropped, differentiable.

        The right size is left as it is.
        """
        if frames_BTCHW.shape[-2:] == (self.crop, self.crop):
            return frames_BTCHW
        resized = F.interpolate(
            frames_BTCHW.flatten(0, 1).float(),
            (self.crop, self.crop),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        return resized.unflatten(0, frames_BTCHW.shape[:2])

    def prepare(self, frames_BTCHW: Tensor) -> Tensor:
        """Resize to the square input and apply ImageNet normalisation."""
        return (self.resize(frames_BTCHW) - self.mean) / self.std

    def _encode(self, frames_BTCHW: Tensor) -> Tensor:
        if frames_BTCHW.shape[1] % self.tubelet:
            raise ValueError(
                f"world model: {frames_BTCHW.shape[1]} frames are not a multiple of its tubelets of {self.tubelet}"
            )
        dtype = self.model.encoder.embeddings.patch_embeddings.proj.weight.dtype
        return self.model.encoder(self.prepare(frames_BTCHW).to(dtype)).last_hidden_state

    def encode(self, frames_BTCHW: Tensor) -> Tokens:
        """LN(E(x)) of the whole clip, fp32 [B, N, D]. T must be a multiple of ``tubelet``."""
        tubelets = frames_BTCHW.shape[1] // self.tubelet
        return Tokens(layer_norm(self._encode(frames_BTCHW)), (tubelets, self.side, self.side))

    def forecast(self, frames_BTCHW: Tensor, context: int, *, normalize: bool = True) -> tuple[Tokens, Tokens]:
        """Forecast the features of frames ``context``..T from the first ``context`` frames only.

        Returns LN(E(first ``context`` frames)) and the forecast P, layer-normed unless ``normalize`` is False, of the
        tubelets after them. Frames from ``context`` on say only how far to look ahead: their content is never read.
        """
        batch, frames = frames_BTCHW.shape[:2]
        if not 0 < context < frames or context % self.tubelet or frames % self.tubelet:
            raise ValueError(
                f"world model: a context of {context} out of {frames} frames; both must be multiples of "
                f"{self.tubelet}, the context the shorter"
            )
        area = self.side**2
        seen_tubelets, total_tubelets = context // self.tubelet, frames // self.tubelet
        known, total = seen_tubelets * area, total_tubelets * area
        # cut before it is encoded: through attention a token of the context would else know what comes
        seen = self._encode(frames_BTCHW[:, :context])
        index = torch.arange(total, device=seen.device).expand(batch, total)
        forecast = self.model.predictor(seen, [index[:, :known]], [index[:, known:]]).last_hidden_state
        return (
            Tokens(layer_norm(seen), (seen_tubelets, self.side, self.side)),
            Tokens(
                layer_norm(forecast) if normalize else forecast.float(),
                (total_tubelets - seen_tubelets, self.side, self.side),
            ),
        )
