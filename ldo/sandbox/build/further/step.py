"""One step of the further training: draws, forward, backward, optimizer and average, as a CUDA graph can hold them.

Draws come from a generator on the device, seeded by (purpose, step). They depend on the kind of device, but on nothing
drawn before them, so a slice continues with the numbers that an uninterrupted training would have had.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldo.core.rng import torch_rng
from ldo.models.flow import noisy, training_times
from ldo.sandbox.build.base import FINE_SHIFT, block_matrices, other_parameters
from ldo.sandbox.build.further.clips import LatentClips
from ldo.sandbox.build.further.settings import Settings
from ldo.sandbox.build.stacked import StackedOptimizer, stacked_optimizer, update_parameters


def draw_inputs(
    data: LatentClips, rng: torch.Generator, step: int, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The clips [B, ...], noise, times [B] and embeddings of a step."""
    device, size = data.latents.device, settings.batch
    # Drawn on the device, which would otherwise wait for draws on the CPU and for their copy.
    rng.manual_seed(torch_rng(3, "base further", step).initial_seed())
    clip_rows = torch.randint(len(data.latents), (size,), generator=rng, device=device)
    clean = data.latents[clip_rows].float()
    noise = torch.randn(clean.shape, generator=rng, device=device)
    times = training_times(torch.rand(size, generator=rng, device=device), FINE_SHIFT)
    unnamed = torch.rand(size, generator=rng, device=device) < settings.unnamed
    caption_rows = torch.where(unnamed, len(data.texts) - 1, data.caption[clip_rows])
    return clean, noise, times, data.texts[caption_rows]


@dataclass(frozen=True)
class TrainingState:
    """All that a step changes: weights with their optimizer, their average, and the losses since the last report."""

    transformer: nn.Module
    optimizer: StackedOptimizer
    average: list[Tensor]  # in the order of the transformer's parameters
    loss: Tensor  # a sum

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.transformer.parameters(), *self.average, *self.optimizer.state.values(), self.loss]


def start_training(transformer: nn.Module) -> TrainingState:
    """The state before the first step, from the transformer's present weights."""
    transformer.requires_grad_(True)
    parameters = list(transformer.parameters())
    matrices = block_matrices(transformer)
    return TrainingState(
        transformer,
        stacked_optimizer(matrices, other_parameters(parameters, matrices)),
        [parameter.detach().clone() for parameter in parameters],
        torch.zeros((), device=parameters[0].device),
    )


def training_step(state: TrainingState, inputs: tuple[Tensor, ...], settings: Settings) -> None:
    """Forward, backward, optimizer and average, with nothing that a CUDA graph cannot hold."""
    clean, noise, times, texts = inputs
    parameters = list(state.transformer.parameters())
    # None and not zeros: backward then writes gradients instead of adding to them.
    for parameter in parameters:
        parameter.grad = None
    cast = nullcontext()
    if settings.precision == "bf16":
        # no cache of cast weights: under a graph it would outlive the step
        cast = torch.autocast(clean.device.type, torch.bfloat16, cache_enabled=False)
    with cast:
        velocity = state.transformer(noisy(clean, noise, times), times * 1000, texts, return_dict=False)[0]
    loss = (velocity.float() - (noise - clean)).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    update_parameters(state.optimizer)
    with torch.no_grad():
        torch._foreach_lerp_(state.average, parameters, 1 - settings.keep)
        # Summed on the device: reading a loss at every step would wait for it.
        state.loss.add_(loss)


@torch.no_grad()
def capture_graph(work: Callable[[], None], changed: list[Tensor]) -> Callable[[], None]:
    """``work`` as a CUDA graph.

    Capturing needs three runs before it; the tensors that they change, ``changed``, are put back.
    """
    before = [tensor.clone() for tensor in changed]
    # PyTorch wants the runs before a capture on a stream of their own.
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream), torch.enable_grad():
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side_stream)
    torch._foreach_copy_(changed, before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.enable_grad():
        work()
    return graph.replay
