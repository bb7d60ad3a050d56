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
from torch.func import functional_call

from ldo.core.distributed import Processes, average_gradients
from ldo.core.rng import torch_rng
from ldo.models.flow import noisy, training_times
from ldo.sandbox.build.base import SHIFT, block_matrices, other_parameters
from ldo.sandbox.build.further.clips import LatentClips
from ldo.sandbox.build.further.settings import Settings
from ldo.sandbox.build.stacked import StackedOptimizer, stacked_optimizer, update_parameters

ALONE = Processes()


def draw_inputs(
    data: LatentClips, rng: torch.Generator, step: int, settings: Settings, processes: Processes = ALONE
) -> tuple[Tensor, ...]:
    """This process's part of a batch: clips [B, ...], noise, times [B], embeddings, those of no caption, and named [B].

    ``named`` is 1 where a clip has its caption, and 0 where it was dropped. Every process draws the whole batch, so
    that what a step learns from does not depend on their number.
    """
    device, size = data.latents.device, settings.batch
    # Drawn on the device, which would otherwise wait for draws on the CPU and for their copy.
    rng.manual_seed(torch_rng(3, "base further", step).initial_seed())
    clip_rows = torch.randint(len(data.latents), (size,), generator=rng, device=device)
    clean = data.latents[clip_rows].float()
    noise = torch.randn(clean.shape, generator=rng, device=device)
    times = training_times(torch.rand(size, generator=rng, device=device), SHIFT)
    unnamed = torch.rand(size, generator=rng, device=device) < settings.unnamed
    caption_rows = torch.where(unnamed, len(data.texts) - 1, data.caption[clip_rows])
    own = processes.share(size)
    part = slice(own.start, own.stop)
    empty = data.texts[-1:].expand(len(own), -1, -1)
    return clean[part], noise[part], times[part], data.texts[caption_rows[part]], empty, (~unnamed[part]).float()


@dataclass(frozen=True)
class TrainingState:
    """All that a step changes: weights with their optimizer, their average, and the losses since the last report."""

    transformer: nn.Module
    optimizer: StackedOptimizer
    average: list[Tensor]  # in the order of the transformer's parameters
    taken: Tensor  # share of the weights that the next step takes into the average
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
        torch.ones((), device=parameters[0].device),
        torch.zeros((), device=parameters[0].device),
    )


def training_step(
    state: TrainingState, inputs: tuple[Tensor, ...], settings: Settings, processes: Processes = ALONE
) -> None:
    """Forward, backward, optimizer and average, with nothing that a CUDA graph cannot hold.

    Gradients are averaged over ``processes``, whose parts of the batch are of one size.
    """
    clean, noise, times, texts, empty, named = inputs
    parameters = list(state.transformer.parameters())
    # None and not zeros: backward then writes gradients instead of adding to them.
    for parameter in parameters:
        parameter.grad = None
    cast = nullcontext()
    if settings.precision == "bf16":
        # no cache of cast weights: under a graph it would outlive the step
        cast = torch.autocast(clean.device.type, torch.bfloat16, cache_enabled=False)
    latents = noisy(clean, noise, times)
    target = noise - clean
    with cast:
        if settings.guidance:
            target = target + settings.guidance * named.view(-1, 1, 1, 1, 1) * _guidance(
                state, latents, times, texts, empty
            )
        velocity = state.transformer(latents, times * 1000, texts, return_dict=False)[0]
    loss = (velocity.float() - target).square().mean()
    loss.backward()
    average_gradients(parameters, processes)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    update_parameters(state.optimizer)
    with torch.no_grad():
        distance = torch._foreach_sub(parameters, state.average)
        torch._foreach_mul_(distance, state.taken)
        torch._foreach_add_(state.average, distance)
        # Summed on the device: reading a loss at every step would wait for it.
        state.loss.add_(loss)


@torch.no_grad()
def _guidance(state: TrainingState, latents: Tensor, times: Tensor, texts: Tensor, empty: Tensor) -> Tensor:
    """What the caption changes in the average's velocity."""
    names = [name for name, _ in state.transformer.named_parameters()]
    average = dict(zip(names, state.average, strict=True))
    both = torch.cat([latents, latents]), torch.cat([times, times]) * 1000, torch.cat([texts, empty])
    velocity = functional_call(state.transformer, average, both, {"return_dict": False})[0]
    with_caption, without = velocity.float().chunk(2)
    return with_caption - without


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
