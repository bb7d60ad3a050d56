"""What the tests of the relation loss share: inputs, gradients, and the plain form in the inputs' own precision."""

import torch
from torch import Tensor

from ldo.ops import relation_loss


def inputs(b: int, n: int, *, d: int = 10, e: int = 7, frames: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Student, teacher and the keywords of every option, weights with zeros among them."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(b, n, d, generator=g, dtype=torch.float64).to(dtype)
    teacher = torch.randn(b, n, e, generator=g, dtype=torch.float64).to(dtype)
    frame = torch.randint(frames, (n,), generator=g) * 5 - 4
    weight = (torch.rand(b, n, generator=g, dtype=torch.float64) * 1.4 - 0.4).clamp_min(0)
    return student, teacher, {"frame_N": frame, "weight_BN": weight}


def loss_and_gradient(student: Tensor, teacher: Tensor, upstream: float = 1.0, **options):
    x = student.detach().clone().requires_grad_()
    loss = relation_loss(x, teacher, **options)
    (upstream * loss).backward()
    return loss.detach(), x.grad


def plain(student: Tensor, teacher: Tensor, *, frame_N=None, weight_BN=None, margin: float = 0.1, penalty: str = "hinge") -> Tensor:
    """The loss by dense arithmetic in the inputs' precision, as one would first write it."""
    unit_x, unit_y = (torch.nn.functional.normalize(t, dim=-1) for t in (student, teacher))
    a = ((unit_x @ unit_x.mT - unit_y @ unit_y.mT).abs() - margin).clamp_min(0)
    if penalty == "squared":
        a = a.square()
    elif penalty == "huber":
        a = torch.where(a < 0.1, a.square() / 0.2, a - 0.05)
    n = student.shape[1]
    w = torch.ones(len(student), n, device=student.device) if weight_BN is None else weight_BN.float()
    pairs = w[:, :, None] + w[:, None] - w[:, :, None] * w[:, None]
    if frame_N is None:
        return ((pairs * a).sum((1, 2)) / pairs.sum((1, 2))).mean()
    same = frame_N[:, None] == frame_N
    sums = [(pairs * c).sum((1, 2)) for c in (same, ~same)]
    return sum(0.5 * ((pairs * c * a).sum((1, 2)) / s.clamp_min(1e-30)).mean() for c, s in zip((same, ~same), sums, strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    """Relative: |a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
