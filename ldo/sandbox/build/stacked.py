"""Muon for matrices and AdamW for the rest, as one step that a CUDA graph can hold.

``torch.optim.Muon`` takes its rate as a Python number and goes matrix by matrix, a thousand small launches for the sandbox's
generator. Here matrices of one shape are one stack, all other weights one vector, and what changes from step to step is
read from a small tensor on the device. Newton-Schulz runs in fp32: on stacks this small bf16 gains nothing on a GPU and
costs ten times as much on a CPU without bf16 arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
BETAS, EPS = (0.9, 0.98), 1e-8
QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's Newton-Schulz coefficients
RATES = ("muon", "keep_muon", "adamw", "keep_adamw", "second")


@dataclass(frozen=True)
class Stacked:
    """Parameters and what the optimizer remembers of them: momenta [n, a, b] per shape, and two moments [m] of the rest."""

    matrices: tuple[tuple[nn.Parameter, ...], ...]  # one group a shape
    rest: tuple[nn.Parameter, ...]
    state: dict[str, Tensor]
    rates: Tensor  # [5], in the order of RATES

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in (*self.matrices, self.rest) for p in group]


def stacked(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> Stacked:
    """An optimizer with empty memory, on the parameters' device."""
    ordered = sorted(matrices, key=lambda p: tuple(p.shape))  # stable: within a shape, the model's order
    groups = tuple(tuple(group) for _, group in groupby(ordered, key=lambda p: tuple(p.shape)))
    device = rest[0].device
    state = {f"momentum {k}": torch.zeros(len(group), *group[0].shape, device=device) for k, group in enumerate(groups)}
    state |= {name: torch.zeros(sum(p.numel() for p in rest), device=device) for name in ("first", "second")}
    return Stacked(groups, tuple(rest), state, torch.zeros(len(RATES), device=device))


def set_rates(optimizer: Stacked, step: int, muon: float, adamw: float, weight_decay: float) -> None:
    """The rates of the step with number ``step`` (from 0), which also sets AdamW's bias corrections."""
    first, second = (1 - beta ** (step + 1) for beta in BETAS)
    values = [muon, 1 - muon * weight_decay, adamw / first, 1 - adamw * weight_decay, second**-0.5]
    optimizer.rates.copy_(torch.tensor(values), non_blocking=True)


def orthogonal(x_NAB: Tensor) -> Tensor:
    """Each matrix's nearest (half-)orthogonal one, roughly: five Newton-Schulz steps leave singular values in 0.7 to 1.2."""
    a, b, c = QUINTIC
    y = x_NAB.mT if x_NAB.shape[1] > x_NAB.shape[2] else x_NAB
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if x_NAB.shape[1] > x_NAB.shape[2] else y


@torch.no_grad()
def update(optimizer: Stacked) -> None:
    """One step on the parameters' gradients: Muon with Nesterov momentum, its steps as long as AdamW's (0.2 sqrt(max(a, b))), and AdamW."""
    muon, keep_muon, adamw, keep_adamw, second = optimizer.rates.unbind()
    for k, group in enumerate(optimizer.matrices):
        gradient = torch.stack([p.grad for p in group])
        momentum = optimizer.state[f"momentum {k}"].lerp_(gradient, 1 - MOMENTUM)
        move = orthogonal(gradient.lerp(momentum, MOMENTUM)) * (muon * (-0.2 * max(group[0].shape) ** 0.5))
        torch._foreach_mul_(group, keep_muon)
        torch._foreach_add_(group, move.unbind())
    gradient = torch.cat([p.grad.flatten() for p in optimizer.rest])
    mean = optimizer.state["first"].lerp_(gradient, 1 - BETAS[0])
    square = optimizer.state["second"].lerp_(gradient.square(), 1 - BETAS[1])
    move = mean / (square.sqrt() * second + EPS) * -adamw
    torch._foreach_mul_(optimizer.rest, keep_adamw)
    torch._foreach_add_(optimizer.rest, [m.view_as(p) for m, p in zip(move.split([p.numel() for p in optimizer.rest]), optimizer.rest, strict=True)])
