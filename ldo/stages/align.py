"""Stage 1: flow matching on clips, with the teacher's alignment loss on one block's hidden states.

    L = |v - (e - x_0)|^2 + weight * L_PDA

The ``sft`` stage is the control: the same clips, noise, times and steps without the teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldo.core.checkpoint import load_checkpoint, save_checkpoint
from ldo.core.distributed import to_device
from ldo.core.optimizer import make_adamw, optimizer_step, warmup_rate
from ldo.core.progress import Bar
from ldo.core.rng import torch_rng
from ldo.core.step_log import StepLog
from ldo.method.alignment import AlignmentLoss
from ldo.models import flow, lora
from ldo.run.state import Run
from ldo.stages.clips import prepare_clips
from ldo.stages.encoded_clips import EncodedClips, clip_batch

HELD_OUT_LEVELS = (0.2, 0.5, 0.8)  # noise levels of the held-out loss
HELD_OUT_CLIPS = 32  # at most, of each size, where there are too few clips to hold any out


def train_align(run: Run, stage: str) -> dict[str, Tensor]:
    """Run the ``align`` stage or its ``sft`` control from a fresh adapter; returns and exports the adapter's values."""
    recipe, processes, config = run.recipe, run.processes, run.recipe.align
    # The control differs from the stage in this one line: whatever else moves the metrics, both arms share it.
    alignment = make_alignment(run) if stage == "align" else None
    trained = [*run.parameters.values(), *(alignment.parameters() if alignment else [])]
    optimizer = make_adamw(trained, config.lr, config.weight_decay)
    # A stage that is done already still exports its adapter below, so that an export that was killed is repeated.
    step = _resume(run, stage, optimizer, alignment)
    if step < config.steps:
        clips = prepare_clips(run)
        training_rows, held_out_rows = clips.split()
        log = StepLog(run.folder, stage, step, processes.first, recipe)
        with Bar(stage, config.steps, step, processes.first) as progress_bar:
            while step < config.steps:
                rows = clip_batch(training_rows, recipe.seed, "align", step, config.batch)
                # the sft control draws the same noise and times: both are functions of the step
                noise, times_B = _draw(run, clips, rows, step)
                weights = (1.0, recipe.teacher.weight)
                losses = backward_in_micro_batches(run, alignment, clips, rows, noise, times_B, weights)
                # Noise was drawn for the whole batch and cut, so that a sample does not depend on how many processes
                # there are.
                own = list(processes.share(config.batch))
                where = f"{stage} step {step}, clips {rows[own][:4].tolist()}..."
                rate = warmup_rate(config.lr, step, config.warmup)
                gradient_norm = optimizer_step(optimizer, trained, processes, config.max_grad_norm, rate, where)
                step += 1
                flow_loss, alignment_loss = (loss.item() for loss in losses)
                metrics = {"flow_loss": flow_loss, "pda_loss": alignment_loss, "grad_norm": gradient_norm}
                # The held-out losses go with the checkpoints: each costs three forward passes over all held-out clips.
                saves = step % recipe.save_every == 0 or step == config.steps
                if saves:
                    metrics |= held_out_losses(run, alignment, clips, held_out_rows)
                log.write(step - 1, **metrics)
                if saves:
                    save_align_state(run, stage, step, optimizer, alignment)
                progress_bar.advance(f"flow {flow_loss:.3f}  pda {alignment_loss:.3f}")
        log.close()
    values = lora.snapshot(run.parameters)
    run.export("aligned" if stage == "align" else stage, values)
    return values


def _draw(run: Run, clips: EncodedClips, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Noise and training times of a step's clips, a function of (seed, step)."""
    config = run.recipe.align
    rng = torch_rng(run.seed, "align", step)
    shape = clips_latent_shape(run, clips, rows)
    noise = torch.randn((config.batch, *shape), generator=rng)
    uniform = torch.rand(config.batch, generator=rng)
    return noise, run.generator.training_times(uniform, shape, config.time_shift)


def _resume(run: Run, stage: str, optimizer: torch.optim.Optimizer, alignment: AlignmentLoss | None) -> int:
    """Bring the adapter to the start of the stage, or to its last checkpoint; returns the steps done."""
    state = load_checkpoint(run.checkpoint(stage))
    if state is None:
        lora.restore_values(run.parameters, run.fresh)
        return 0
    lora.restore_values(run.parameters, state["lora"])
    optimizer.load_state_dict(state["optimizer"])
    if alignment:
        alignment.load_state_dict(state["aligner"])
    return state["step"]


def save_align_state(
    run: Run, stage: str, step: int, optimizer: torch.optim.Optimizer, alignment: AlignmentLoss | None
) -> None:
    """Checkpoint everything that the next step depends on."""
    if not run.processes.first:
        return
    state = {"step": step, "lora": lora.snapshot(run.parameters), "optimizer": optimizer.state_dict()}
    if alignment:
        state["aligner"] = alignment.state_dict()
    save_checkpoint(run.checkpoint(stage), state)


# ---------------------------------------------------------------------------------------------- losses


def make_alignment(run: Run) -> AlignmentLoss:
    """The alignment loss for this run's models; its projector, if any, starts from the run's seed."""
    geometry = run.generator.geometry
    # nn.Linear draws from the global generator, which a resumed run has left elsewhere: seed it, then give it back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        alignment = AlignmentLoss(
            run.recipe.teacher, geometry.width, run.world_model.dim, geometry.time, run.world_model.tubelet
        )
    return alignment.to(run.processes.device)


def block_index(run: Run) -> int:
    """The aligned block: ``teacher.block`` as a share of depth."""
    blocks = run.generator.geometry.blocks
    return min(int(run.recipe.teacher.block * blocks), blocks - 1)


def clips_latent_shape(run: Run, clips: EncodedClips, rows: Tensor) -> tuple[int, ...]:
    """Shape (C, T, H, W) of the latents of some rows of one size."""
    return run.generator.geometry.latents(*clips.sizes[int(rows[0])])


def clip_losses(
    run: Run, alignment: AlignmentLoss | None, clips: EncodedClips, rows: Tensor, noise: Tensor, times_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Flow loss and alignment loss (0 without one) of some clips of one size at given noise and times."""
    device = run.processes.device
    latents, target = clips.take(rows)
    clean_latents, noise, times_B = (to_device(tensor, device) for tensor in (latents, noise, times_B))
    text = run.texts([clips.prompts[row] for row in rows.tolist()])
    noisy_latents = flow.noisy(clean_latents, noise, times_B)
    if alignment is None:
        velocity = run.generator.velocity(noisy_latents, times_B, text)
        distance = velocity.new_zeros(())
    else:
        # The hidden state is caught on the way: a second forward pass to the block would cost half a step.
        with run.generator.tap(block_index(run)) as tap:
            velocity = run.generator.velocity(noisy_latents, times_B, text)
        distance = alignment(tap.take(), target.to(device))
    # Each family weights times as it was pretrained, so the flow loss is the family's and not simply a mean square.
    return run.generator.flow_loss(velocity, noise - clean_latents, times_B), distance


def backward_in_micro_batches(
    run: Run,
    alignment: AlignmentLoss | None,
    clips: EncodedClips,
    rows: Tensor,
    noise: Tensor,
    times_B: Tensor,
    weights: tuple[float, float],
) -> Tensor:
    """Gradients of this rank's share of a batch, one micro-batch after another; returns flow and alignment loss [2].

    ``weights`` are those of the flow loss and of the alignment loss; what is returned is not weighted.
    """
    config = run.recipe.align
    flow_weight, alignment_weight = weights
    own = list(run.processes.share(config.batch))
    sums = torch.zeros(2, device=run.processes.device)
    for part in micro_batches(own, config.micro_batch):
        flow_loss, distance = clip_losses(run, alignment, clips, rows[part], noise[part], times_B[part])
        share = len(part) / len(own)
        ((flow_weight * flow_loss + alignment_weight * distance) * share).backward()
        # Kept on the device: fetching a number here would make the host wait in the midst of the step.
        sums = sums + torch.stack([flow_loss.detach(), distance.detach()]) * share
    return sums


def micro_batches(rows: list[int], size: int) -> list[list[int]]:
    """The rows of a step in forward passes of at most ``size``; 0 takes them all at once."""
    size = size or len(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def held_out_losses(
    run: Run, alignment: AlignmentLoss | None, clips: EncodedClips, held_out: list[list[int]]
) -> dict[str, float]:
    """Losses on held-out clips at fixed noise levels and fixed noise: comparable from step to step."""
    if not any(held_out):
        held_out = [rows[:HELD_OUT_CLIPS] for rows in clips.buckets()]
    # The same noise at every step and in both arms: what changes between two points of the curve is the model.
    rng = torch_rng(run.seed, "held out")
    parts = []
    for rows in filter(None, held_out):
        index = torch.tensor(rows)
        noise = torch.randn((len(rows), *clips_latent_shape(run, clips, index)), generator=rng)
        for part in micro_batches(list(range(len(rows))), run.recipe.align.micro_batch):
            parts.append((index[part], noise[part]))
    count = sum(len(rows) for rows, _ in parts)
    metrics = {}
    alignment_loss = 0.0
    for level in HELD_OUT_LEVELS:
        flow_loss = distance = 0
        for rows, noise in parts:
            times = torch.full((len(rows),), level)
            losses = clip_losses(run, alignment, clips, rows, noise, times)
            flow_loss += len(rows) / count * losses[0].item()
            distance += len(rows) / count * losses[1].item()
        metrics[f"held_out_flow_{level}"] = flow_loss
        alignment_loss += distance / len(HELD_OUT_LEVELS)
    return metrics | ({"held_out_pda": alignment_loss} if alignment else {})
