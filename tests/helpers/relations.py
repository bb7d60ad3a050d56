"""What the tests of the relation loss share: inputs, gradients, and the plain form in the inputs' own precision."""

import torch
from torch import Tensor

from ldo.ops import relation_loss


def inputs(
    b: int, n: int, *, d: int = 10, e: int = 7, frames: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
):
    """Student [b, n, d], teacher [b, n, e] and keywords for every option; some of the weights are 0."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(b, n, d, generator=generator, dtype=torch.float64).to(dtype)
    teacher = torch.randn(b, n, e, generator=generator, dtype=torch.float64).to(dtype)
    frame = torch.randint(frames, (n,), generator=generator) * 5 - 4
    weight = (torch.rand(b, n, generator=generator, dtype=torch.float64) * 1.4 - 0.4).clamp_min(0)
    return student, teacher, {"frame_N": frame, "weight_BN": weight}


def loss_and_gradient(student: Tensor, teacher: Tensor, upstream: float = 1.0, **options):
    """The relation loss and its gradient in the student, times ``upstream``."""
    x = student.detach().clone().requires_grad_()
    loss = relation_loss(x, teacher, **options)
    (upstream * loss).backward()
    return loss.detach(), x.grad


def plain(
    student: Tensor, teacher: Tensor, *, frame_N=None, weight_BN=None, margin: float = 0.1, penalty: str = "hinge"
) -> Tensor:
    """The loss by dense arithmetic in the inputs' precision, as one would first write it."""
    unit_x, unit_y = (torch.nn.functional.normalize(features, dim=-1) for features in (student, teacher))
    phi = ((unit_x @ unit_x.mT - unit_y @ unit_y.mT).abs() - margin).clamp_min(0)
    if penalty == "squared":
        phi = phi.square()
    elif penalty == "huber":
        phi = torch.where(phi < 0.1, phi.square() / 0.2, phi - 0.05)
    tokens = student.shape[1]
    weight = torch.ones(len(student), tokens, device=student.device) if weight_BN is None else weight_BN.float()
    pairs = weight[:, :, None] + weight[:, None] - weight[:, :, None] * weight[:, None]
    if frame_N is None:
        return ((pairs * phi).sum((1, 2)) / pairs.sum((1, 2))).mean()
    same = frame_N[:, None] == frame_N
    total = 0
    for of_class in (same, ~same):
        weights = pairs * of_class
        per_clip = (weights * phi).sum((1, 2)) / weights.sum((1, 2)).clamp_min(1e-30)
        total = total + 0.5 * per_clip.mean()
    return total


def distance(a: Tensor, b: Tensor) -> float:
    """The relative distance |a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
