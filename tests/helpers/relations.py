"""What the tests of the relation loss share: inputs, gradients, and the plain form in the inputs' own precision."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldo.ops import relation_loss

# Over all pairs alike, so that the loss has a closed form: no pair need be visited.
SQUARES = {"penalty": "squared", "margin": 0.0}


def inputs(
    clips: int,
    tokens: int,
    *,
    width: int = 10,
    teacher_width: int = 7,
    frames: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
):
    """Student [b, n, d], teacher [b, n, e] and keywords for every option; some of the weights are 0."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(clips, tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    teacher = torch.randn(clips, tokens, teacher_width, generator=generator, dtype=torch.float64).to(dtype)
    frame = torch.randint(frames, (tokens,), generator=generator) * 5 - 4
    weight = (torch.rand(clips, tokens, generator=generator, dtype=torch.float64) * 1.4 - 0.4).clamp_min(0)
    return student, teacher, {"frame_N": frame, "weight_BN": weight}


def loss_and_gradient(student: Tensor, teacher: Tensor, upstream: float = 1.0, **options):
    """The relation loss and its gradient in the student, times ``upstream``."""
    leaf = student.detach().clone().requires_grad_()
    loss = relation_loss(leaf, teacher, **options)
    (upstream * loss).backward()
    return loss.detach(), leaf.grad


def plain(
    student: Tensor, teacher: Tensor, *, frame_N=None, weight_BN=None, margin: float = 0.1, penalty: str = "hinge"
) -> Tensor:
    """The loss by dense arithmetic in the inputs' precision, as one would first write it."""
    unit_x, unit_y = (torch.nn.functional.normalize(features, dim=-1) for features in (student, teacher))
    penalties = ((unit_x @ unit_x.mT - unit_y @ unit_y.mT).abs() - margin).clamp_min(0)
    if penalty == "squared":
        penalties = penalties.square()
    elif penalty == "huber":
        penalties = torch.where(penalties < 0.1, penalties.square() / 0.2, penalties - 0.05)
    tokens = student.shape[1]
    weight = torch.ones(len(student), tokens, device=student.device) if weight_BN is None else weight_BN.float()
    pairs = weight[:, :, None] + weight[:, None] - weight[:, :, None] * weight[:, None]
    if frame_N is None:
        return ((pairs * penalties).sum((1, 2)) / pairs.sum((1, 2))).mean()
    same = frame_N[:, None] == frame_N
    total = 0
    for of_class in (same, ~same):
        weights = pairs * of_class
        per_clip = (weights * penalties).sum((1, 2)) / weights.sum((1, 2)).clamp_min(1e-30)
        total = total + 0.5 * per_clip.mean()
    return total


def distance(found: Tensor, exact: Tensor) -> float:
    """The relative distance |a - b| / |b|."""
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out
