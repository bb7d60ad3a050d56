"""Guards: what they punish, and what they do not."""

import torch
import torch.nn.functional as F

from ldo.core.config import CriticConfig
from ldo.method.guards import guard_penalties


def test_guards_punish_only_below_the_floor(frames):
    config = CriticConfig(
        motion_floor=0.5, motion_weight=0.7, sharpness_floor=0.8, sharpness_weight=0.2, start_weight=0.1
    )
    still = frames[:, :1].expand(-1, 17, -1, -1, -1)
    soft = F.avg_pool2d(frames.flatten(0, 1), 5, 1, 2).view_as(frames)
    # Rows of two clips each: unchanged, still, soft. Columns: motion, sharpness, start.
    videos = torch.cat([frames, still, soft])
    penalties = guard_penalties(videos, frames.repeat(3, 1, 1, 1, 1), config)
    assert penalties.names == ("motion", "sharpness", "start")
    assert torch.allclose(penalties.weights, torch.tensor([0.7, 0.2, 0.1]))
    assert (penalties.values[:2] == 0).all()
    # No motion at all is the worst there is.
    assert (penalties.values[2:4, 0] == -1).all()
    assert (penalties.values[4:, 1] < -0.1).all()
    assert (penalties.values[4:, 2] < 0).all()
    # A still clip has the right first frame.
    assert (penalties.values[2:4, 2] == 0).all()


def test_motion_guard_punishes_restless_clips_too(frames):
    config = CriticConfig(motion_floor=0.5, motion_ceiling=1.5, sharpness_weight=0)
    # Changes between frames scale with the distance from the first one, so the motion is 0.3 and 3 times as much.
    slow = frames[:, :1] + 0.3 * (frames - frames[:, :1])
    fast = frames[:, :1] + 3 * (frames - frames[:, :1])
    penalties = guard_penalties(torch.cat([slow, frames, fast]), frames.repeat(3, 1, 1, 1, 1), config)
    assert penalties.names == ("motion",)
    assert torch.allclose(penalties.values[:2], torch.tensor(0.3 / 0.5 - 1), atol=1e-5)
    assert (penalties.values[2:4] == 0).all()
    assert torch.allclose(penalties.values[4:], torch.tensor(1 - 3 / 1.5), atol=1e-5)


def test_no_guards(frames):
    config = CriticConfig(motion_weight=0, sharpness_weight=0, start_weight=0)
    penalties = guard_penalties(frames, frames, config)
    assert penalties.values.shape == (2, 0)
    assert penalties.weights.shape == (0,)
    assert penalties.names == ()
