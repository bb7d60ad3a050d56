"""Muon for matrices and AdamW for the rest, as one step that a CUDA graph can hold.

``torch.optim.Muon`` takes its rate as a Python number and goes matrix by matrix, which is a thousand small launches
for the sandbox's generator. Here matrices of one shape are one stack, all other weights are one vector, and what
changes from step to step is read from a small tensor on the device. Newton-Schulz runs in fp32: on stacks this small,
bf16 gains nothing on a GPU and costs ten times as much on a CPU without bf16 arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
BETAS = (0.9, 0.98)
ADAMW_EPS = 1e-8
QUINTIC = (3.4445, -4.7750, 2.0315)  # Keller Jordan's Newton-Schulz coefficients
RATES = ("muon", "keep_muon", "adamw", "keep_adamw", "second")


@dataclass(frozen=True)
class StackedOptimizer:
    """Parameters and what the optimizer remembers of them.

    Momenta [n, a, b] per shape, and two moments [m] of the rest.
    """

    matrices: tuple[tuple[nn.Parameter, ...], ...]  # one group for each shape
    rest: tuple[nn.Parameter, ...]
    state: dict[str, Tensor]
    rates: Tensor  # [5], in the order of RATES


def stacked_optimizer(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> StackedOptimizer:
    """An optimizer with empty memory, on the parameters' device."""

    def shape(parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape)

    # The sort is stable: within a shape, matrices stay in the model's order.
    groups = tuple(tuple(group) for _, group in groupby(sorted(matrices, key=shape), key=shape))
    device = rest[0].device
    state = {}
    for index, group in enumerate(groups):
        state[f"momentum {index}"] = torch.zeros(len(group), *group[0].shape, device=device)
    rest_size = sum(parameter.numel() for parameter in rest)
    state["first"] = torch.zeros(rest_size, device=device)
    state["second"] = torch.zeros(rest_size, device=device)
    return StackedOptimizer(groups, tuple(rest), state, torch.zeros(len(RATES), device=device))


def set_rates(optimizer: StackedOptimizer, step: int, muon: float, adamw: float, weight_decay: float) -> None:
    """Set the rates for ``step`` (counted from 0), AdamW's bias corrections included."""
    first_correction = 1 - BETAS[0] ** (step + 1)
    second_correction = 1 - BETAS[1] ** (step + 1)
    values = [
        muon,
        1 - muon * weight_decay,
        adamw / first_correction,
        1 - adamw * weight_decay,
        second_correction**-0.5,
    ]
    # Outside the graph, which reads the new values from the same address when it is replayed.
    optimizer.rates.copy_(torch.tensor(values), non_blocking=True)


def orthogonal(x_NAB: Tensor) -> Tensor:
    """Each matrix's nearest (half-)orthogonal one, roughly.

    Five Newton-Schulz steps, each y' = a y + (b G + c G G) y with G = y y^T and the coefficients of QUINTIC, leave
    singular values in 0.7 to 1.2.
    """
    a, b, c = QUINTIC
    # G is smaller for a wide matrix than for a tall one.
    tall = x_NAB.shape[1] > x_NAB.shape[2]
    y = x_NAB.mT if tall else x_NAB
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        G = y @ y.mT
        polynomial = torch.baddbmm(G, G, G, beta=b, alpha=c)
        y = torch.baddbmm(y, polynomial, y, beta=a)
    return y.mT if tall else y


@torch.no_grad()
def update_parameters(optimizer: StackedOptimizer) -> None:
    """One step on the parameters' gradients: Muon with Nesterov momentum for the matrices, AdamW for the rest.

    Muon's steps are scaled by 0.2 sqrt(max(a, b)), which makes them as long as AdamW's.
    """
    muon, keep_muon, adamw, keep_adamw, second_correction = optimizer.rates.unbind()
    for index, group in enumerate(optimizer.matrices):
        gradient = torch.stack([parameter.grad for parameter in group])
        momentum = optimizer.state[f"momentum {index}"].lerp_(gradient, 1 - MOMENTUM)
        direction = orthogonal(gradient.lerp(momentum, MOMENTUM))
        # The factor is negative, so that the update is added.
        update = direction * (muon * (-0.2 * max(group[0].shape) ** 0.5))
        torch._foreach_mul_(group, keep_muon)
        torch._foreach_add_(group, update.unbind())

    # The correction of the second moment multiplies its root, and the rate holds that of the first.
    gradient = torch.cat([parameter.grad.flatten() for parameter in optimizer.rest])
    first_moment = optimizer.state["first"].lerp_(gradient, 1 - BETAS[0])
    second_moment = optimizer.state["second"].lerp_(gradient.square(), 1 - BETAS[1])
    update = first_moment / (second_moment.sqrt() * second_correction + ADAMW_EPS) * -adamw
    flat_updates = update.split([parameter.numel() for parameter in optimizer.rest])
    shaped_updates = [part.view_as(parameter) for part, parameter in zip(flat_updates, optimizer.rest, strict=True)]
    torch._foreach_mul_(optimizer.rest, keep_adamw)
    torch._foreach_add_(optimizer.rest, shaped_updates)
