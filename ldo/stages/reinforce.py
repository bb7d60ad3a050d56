"""Stage 2: GRPO. For each prompt the generator samples a group of videos, the critic compares them, the policy follows.

The adapter continues from stage 1's values, of which a frozen copy is the reference. What is exported is an exponential
average of the values. ``ldo/stages/collect.py`` samples and scores, ``ldo/stages/policy_losses.py`` and
``ldo/method/objectives.py`` say what is minimised.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldo.core.checkpoint import load_checkpoint, save_checkpoint
from ldo.core.errors import TrainingError
from ldo.core.optimizer import average_keep, make_adamw, optimizer_step
from ldo.core.progress import Bar
from ldo.core.rng import torch_rng
from ldo.core.step_log import StepLog
from ldo.method.alignment import AlignmentLoss
from ldo.method.objectives import Loss
from ldo.models import lora
from ldo.run.state import Run
from ldo.stages.align import backward_in_micro_batches, clips_latent_shape, make_alignment
from ldo.stages.clips import prepare_clips
from ldo.stages.collect import Rollout, collect_rollout, minibatch_groups
from ldo.stages.encoded_clips import clip_batch
from ldo.stages.policy_losses import Policies, losses_of_group, micro_losses

RECENT = 5  # updates whose mean motion decides whether to stop early

Values = dict[str, Tensor]  # an adapter's, by parameter


@dataclass
class PolicyProgress:
    """The state of stage 2: everything besides the adapter and its optimizer that the next update depends on."""

    update: int
    average: Values
    recent_motion: list[float] = field(default_factory=list)
    stopped: str = ""  # why, where the stage stopped early

    def watch_motion(self, ratio: float, least: float) -> None:
        """Stop when the videos have almost stopped moving: that is one way to please a critic."""
        self.recent_motion = [*self.recent_motion, ratio][-RECENT:]
        mean = sum(self.recent_motion) / RECENT
        if len(self.recent_motion) == RECENT and mean < least:
            self.stopped = f"motion fell to {mean:.2f} of the stage-1 model's at update {self.update}"


def train_reinforce(run: Run) -> Values:
    """Run stage 2; returns and exports the averaged adapter values."""
    rl_config, processes, parameters = run.recipe.rl, run.processes, run.parameters
    align_state = finished_align_state(run)
    reference, alignment = start_values(run, align_state), start_alignment(run, align_state)
    # The values may be those of an evaluation or of the gate by now; a resumed run gets its own in _resume.
    lora.restore_values(parameters, reference)
    optimizer = make_adamw(list(parameters.values()), rl_config.lr, rl_config.weight_decay)
    progress = _resume(run, optimizer, reference)
    log = StepLog(run.folder, "reinforce", progress.update, processes.first, run.recipe)
    with Bar("reinforce", rl_config.updates, progress.update, processes.first) as progress_bar:
        while progress.update < rl_config.updates and not progress.stopped:
            rollout, metrics = collect_rollout(run, progress.update, reference)
            metrics |= learn_from_rollout(run, rollout, progress.update, optimizer, reference, alignment)
            progress.update += 1
            if progress.update % rl_config.ema_every == 0:
                progress.average = _averaged(run, progress)
            progress.watch_motion(metrics["motion_ratio"], rl_config.stop_motion)
            log.write(progress.update - 1, **metrics)
            last = progress.update == rl_config.updates or progress.stopped
            if processes.first and (last or progress.update % run.recipe.save_every == 0):
                _save(run, optimizer, progress)
            progress_bar.advance(f"reward {metrics['reward']:.3f}  motion {metrics['motion_ratio']:.2f}")
    log.close()
    if progress.stopped and processes.first:
        print(f"stage 2 stopped early: {progress.stopped}")
    run.export("ldo", progress.average)
    return progress.average


# ---------------------------------------------------------------------------------------------- start and resume


def finished_align_state(run: Run) -> dict[str, Any] | None:
    """The last checkpoint of the finished stage 1; None if this run has no stage 1."""
    if "align" not in run.recipe.stages:
        return None
    state = load_checkpoint(run.checkpoint("align"))
    if state is None or state["step"] < run.recipe.align.steps:
        raise TrainingError("stage 2 needs the checkpoint of a finished stage 1; run the align stage first")
    return state


def start_values(run: Run, align_state: dict[str, Any] | None) -> Values:
    """The adapter that stage 2 continues from: stage 1's, or a fresh one if there was no stage 1."""
    if align_state is None:
        return run.fresh
    return {name: value.to(run.processes.device) for name, value in align_state["lora"].items()}


def start_alignment(run: Run, align_state: dict[str, Any] | None) -> AlignmentLoss | None:
    """The alignment loss next to the reward; None where its weight is 0. Its projector is frozen as stage 1 left it."""
    if not run.recipe.rl.align_weight:
        return None
    alignment = make_alignment(run)
    # the recipe's rules have made sure that a projector comes from a stage 1
    if run.recipe.teacher.projector != "none":
        alignment.load_state_dict(align_state["aligner"])
    return alignment.requires_grad_(False)


def _resume(run: Run, optimizer: torch.optim.Optimizer, reference: Values) -> PolicyProgress:
    """The start of the stage, or where its last checkpoint left it."""
    state = load_checkpoint(run.checkpoint("reinforce"))
    if state is None:
        return PolicyProgress(0, {name: value.clone() for name, value in reference.items()})
    lora.restore_values(run.parameters, state["lora"])
    optimizer.load_state_dict(state["optimizer"])
    average = {name: value.to(run.processes.device) for name, value in state["average"].items()}
    return PolicyProgress(state["step"], average, state["recent"], state["stopped"])


def _save(run: Run, optimizer: torch.optim.Optimizer, progress: PolicyProgress) -> None:
    state = {
        "step": progress.update,
        "lora": lora.snapshot(run.parameters),
        "average": progress.average,
        "optimizer": optimizer.state_dict(),
        "recent": progress.recent_motion,
        "stopped": progress.stopped,
    }
    save_checkpoint(run.checkpoint("reinforce"), state)


def _averaged(run: Run, progress: PolicyProgress) -> Values:
    """The exponential average after one more update; early on it forgets faster, so that the start soon leaves it."""
    rl_config = run.recipe.rl
    count = progress.update // rl_config.ema_every - 1
    keep = average_keep(rl_config.ema, count)
    return {name: torch.lerp(run.parameters[name].detach(), value, keep) for name, value in progress.average.items()}


# ---------------------------------------------------------------------------------------------- one update


def learn_from_rollout(
    run: Run,
    rollout: Rollout,
    update: int,
    optimizer: torch.optim.Optimizer,
    reference: Values,
    alignment: AlignmentLoss | None = None,
) -> dict[str, float]:
    """The optimizer steps on one rollout; returns their mean metrics. ``alignment``: ``start_alignment``'s."""
    rl_config = run.recipe.rl
    assert alignment is not None or not rl_config.align_weight, "rl.align_weight needs start_alignment's loss"
    trained = list(run.parameters.values())
    # grpo has the sampling policy's means and densities in the trajectory; the others ask the policy itself again.
    sampling = lora.snapshot(run.parameters) if rl_config.objective != "grpo" else {}
    sums: dict[str, float] = {}
    norms: list[float] = []
    for epoch in range(rl_config.epochs):
        pass_index = update * rl_config.epochs + epoch
        for minibatch, groups in enumerate(minibatch_groups(run)):
            # Before the first step the present policy is the one that sampled, so its ratio must be exactly 1: the one
            # invariant that catches every disagreement between rollout and update, from dropout to another attention
            # kernel.
            first = epoch == minibatch == 0
            policies = Policies(None if first else sampling, reference)
            losses = len(groups) * losses_of_group(run)
            rows = []
            for loss in micro_losses(run, rollout, groups, pass_index, policies):
                (loss.total / losses).backward()
                rows.append(_loss_metrics(loss))
            all_losses = losses * rl_config.minibatches * rl_config.epochs
            # fetched together: a GPU is waited for once
            for *values, worst in torch.stack(rows).tolist() if rows else []:
                if first and worst != 0:
                    raise TrainingError(
                        f"update {update}: the policy ratio is off 1 by {worst:.1e} before any step; "
                        "rollout and update disagree"
                    )
                for key, value in zip(("policy_loss", "kl", "clipped", "ratio_off"), values, strict=True):
                    sums[key] = sums.get(key, 0.0) + value / all_losses
            if rl_config.align_weight or rl_config.flow_weight:
                clip_gradients(run, alignment, pass_index * rl_config.minibatches + minibatch)
            # every process takes the same steps, whether its own groups have gradients or not
            if any(parameter.grad is not None for parameter in trained) or run.processes.size > 1:
                where = f"update {update}, groups {groups}"
                norms.append(
                    optimizer_step(optimizer, trained, run.processes, rl_config.max_grad_norm, rl_config.lr, where)
                )
    return sums | ({"grad_norm": sum(norms) / len(norms)} if norms else {})


def _loss_metrics(loss: Loss) -> Tensor:
    """What is logged of a loss [5], with the largest distance of a ratio from 1 as its last."""
    off = (loss.ratio.detach() - 1).abs()
    return torch.stack([loss.policy.detach(), loss.divergence.detach(), loss.clipped.detach(), off.mean(), off.max()])


def clip_gradients(run: Run, alignment: AlignmentLoss | None, index: int) -> None:
    """Gradients of the alignment loss and of the flow loss on clips, at stage 2's weights for them."""
    recipe, clips = run.recipe, prepare_clips(run)
    batch = recipe.align.batch
    # All rows, the held-out ones too: stage 2 reports no held-out loss.
    rows = clip_batch(clips.buckets(), run.seed, "reinforce clips", index, batch)
    rng = torch_rng(run.seed, "reinforce clips", index)
    shape = clips_latent_shape(run, clips, rows)
    noise = torch.randn((batch, *shape), generator=rng)
    times_B = run.generator.training_times(torch.rand(batch, generator=rng), shape, recipe.align.time_shift)
    weights = (recipe.rl.flow_weight, recipe.rl.align_weight)
    backward_in_micro_batches(run, alignment, clips, rows, noise, times_B, weights)
