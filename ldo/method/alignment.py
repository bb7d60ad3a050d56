"""The alignment loss L_PDA: the geometry of the generator's hidden states against that of the teacher's target.

Hidden states are resampled to the target's grid. With s_ij and y_ij the cosine similarities of tokens i and j of
student and target, w the target's weights, and all pairs of a clip in two classes, same frame and different frames:

    d_ij  = s_ij - y_ij,   phi = max(|d| - margin, 0),   W_ij = w_i + w_j - w_i w_j
    L_PDA = spatial  sum_same W phi / sum_same W  +  temporal  sum_diff W phi / sum_diff W

``ldo/ops/relation.py`` computes it from the tokens, with its gradient; ``ldo/method/teacher.py`` makes the target.

Shapes: B clips, N = t h w tokens, D student and E teacher features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from ldo.core.config import TeacherConfig
from ldo.method.teacher import Target
from ldo.models.world_model import Tokens
from ldo.ops import relation_loss
from ldo.ops.dispatch import as_given


class AlignmentLoss(nn.Module):
    """Brings hidden states to the teacher's grid and measures the relation loss. Trainable only with a projector.

    ``width`` and ``dim`` are the features of student and teacher, ``vae_time`` and ``tubelet`` the frames of one latent
    and of one teacher token. ``relation`` has the signature of ``ldo.ops.relation_loss``.
    """

    def __init__(
        self,
        config: TeacherConfig,
        width: int,
        dim: int,
        vae_time: int,
        tubelet: int,
        relation: Callable[..., Tensor] = relation_loss,
    ):
        super().__init__()
        self.config, self.ratio, self.relation = config, vae_time / tubelet, relation
        self.project = (
            nn.Sequential(nn.Linear(width, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(), nn.Linear(2048, dim))
            if config.projector == "mlp"
            else nn.Identity()
        )

    def resample(self, hidden: Tokens, grid: tuple[int, int, int]) -> Tensor:
        """Hidden states on the target's ``grid`` [B, N, D].

        Latent frame 0 is dropped; then linear interpolation in time (half-pixel centres) and area averages in space.
        """
        steps, height, width = hidden.grid
        states = self.project(hidden.x_BND.float()).unflatten(1, hidden.grid)[:, 1:]  # [B, t-1, h, w, D]
        if round((steps - 1) * self.ratio) != grid[0]:
            raise ValueError(
                f"teacher: {steps - 1} latent frames do not correspond to {grid[0]} tubelets at a ratio of {self.ratio}"
            )
        # Two small matrix products: on a GPU the library's interpolation takes longer than the rest of the step, and
        # its gradient is not deterministic. Space first, since there are fewer places afterwards.
        with as_given(states.device):
            states = states.flatten(2, 3)  # [B, t-1, h w, D]
            if (height, width) != grid[1:]:
                states = area_weights(height, width, *grid[1:], states.device) @ states
            states = states.flatten(2)  # [B, t-1, S D]
            if states.shape[1] != grid[0]:
                states = time_weights(states.shape[1], grid[0], states.device) @ states
        return states.unflatten(2, (grid[1] * grid[2], -1)).flatten(1, 2)

    def forward(self, hidden: Tokens, target: Target) -> Tensor:
        """L_PDA: the distance between the geometries of ``hidden`` and ``target``; scalar."""
        config = self.config
        cut = target.skip * target.grid[1] * target.grid[2]
        # back in the model's own precision, which is that of tensor cores
        student = self.resample(hidden, target.grid)[:, cut:].to(hidden.x_BND.dtype)
        frame = frame_of_tokens(*target.grid, target.skip, student.device)
        return self.relation(
            student,
            target.y_BNE[:, cut:],
            frame_N=frame if config.geometry == "split" else None,
            weight_BN=target.weight_BN[:, cut:],
            margin=config.margin,
            penalty=config.penalty,
            spatial=config.spatial,
            temporal=config.temporal,
        )


# ---------------------------------------------------------------------------------------------- what is made once


@lru_cache(maxsize=64)
def time_weights(steps_in: int, steps_out: int, device: torch.device) -> Tensor:
    """[out, in] fp32: linear interpolation between half-pixel centres, clamped at both ends (align_corners=False)."""
    # a tensor made under inference mode could never be used in a backward, and these are kept
    with torch.inference_mode(False):
        position = ((torch.arange(steps_out, dtype=torch.float64) + 0.5) * steps_in / steps_out - 0.5).clamp_min(0)
        low = position.long().clamp_max(steps_in - 1)
        high = (low + 1).clamp_max(steps_in - 1)
        rows = torch.arange(steps_out)
        weights = torch.zeros(steps_out, steps_in, dtype=torch.float64)
        weights[rows, low] += 1 - (position - low)
        weights[rows, high] += position - low
        return weights.float().to(device)


@lru_cache(maxsize=64)
def area_weights(height: int, width: int, height_out: int, width_out: int, device: torch.device) -> Tensor:
    """[out, in] fp32, pixels row by row: the mean over each output pixel's area, as adaptive_avg_pool2d has it."""
    with torch.inference_mode(False):
        return torch.kron(_area(height, height_out), _area(width, width_out)).float().to(device)


def _area(size_in: int, size_out: int) -> Tensor:
    """[out, in] fp64: output i is the mean from floor(i in / out) to ceil((i + 1) in / out)."""
    start = torch.arange(size_out) * size_in // size_out
    end = -(-(torch.arange(size_out) + 1) * size_in // size_out)
    place = torch.arange(size_in)
    covered = ((place >= start[:, None]) & (place < end[:, None])).double()
    return covered / covered.sum(1, keepdim=True)


@lru_cache(maxsize=64)
def frame_of_tokens(steps: int, height: int, width: int, skip: int, device: torch.device) -> Tensor:
    """The frame of each token of a grid without its first ``skip`` steps, int32 [N]; the same tensor every time.

    The relation loss keeps what it derives from this tensor for as long as it is given that very tensor.
    """
    with torch.inference_mode(False):
        return torch.arange(skip, steps, dtype=torch.int32).repeat_interleave(height * width).to(device)
