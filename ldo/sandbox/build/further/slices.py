"""Slices of the further training, each of which continues where the one before stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldo.core.distributed import Processes, barrier, gather_objects
from ldo.core.errors import RecipeError, TrainingError
from ldo.core.optimizer import average_keep, warmup_rate
from ldo.models.generator.families import load_generator
from ldo.models.generator.protocol import Generator, Options
from ldo.sandbox.build.base import LENGTH, save_half
from ldo.sandbox.build.further.checkpoint import (
    TrainingProgress,
    read_training,
    restore_training,
    save_training,
    tensor_file,
)
from ldo.sandbox.build.further.clips import load_latent_clips
from ldo.sandbox.build.further.settings import Settings
from ldo.sandbox.build.further.step import (
    ALONE,
    TrainingState,
    capture_graph,
    draw_inputs,
    start_training,
    training_step,
)
from ldo.sandbox.build.stacked import set_rates
from ldo.sandbox.shipped import GENERATOR

# Steps between looks at the clock and the loss. Each look waits for the device, which then idles for a moment.
EVERY = 50
SAVE_EVERY = 120.0  # seconds
SAY_EVERY = 20.0  # seconds
SPARE = 0.9  # share of a slice's time that a decay is planned into


def rate_factor(step: int, warmup: int, decay: tuple[int, int] | None) -> float:
    """Learning-rate factor: linear warm-up, constant, and a linear decay once it is planned.

    The decay starts at its first step, and meets zero one step past its last.
    """
    rising = warmup_rate(1.0, step, warmup)
    if decay is None:
        return rising
    first, steps = decay
    falling = (first + steps - step) / steps
    return rising * min(1.0, max(0.0, falling))


def load_generator_folder(path: Path = GENERATOR) -> Generator:
    """A sandbox generator in fp32."""
    return load_generator("wan", path, options=Options(text_length=LENGTH))


def train_slice(
    work: Path,
    cache: Path,
    start: Path,
    device: str,
    deadline: float,
    settings: Settings,
    decay: int | None = None,
    form: str | None = None,
    every: int = EVERY,
    processes: Processes = ALONE,
) -> TrainingProgress:
    """One slice: until ``deadline`` (of time.monotonic), or to the end of the decay.

    Resumes from ``work`` where something is saved there, and begins with the pipeline ``start`` elsewhere. ``decay``
    starts the fall of the rate to zero, over that many steps; 0 takes as many as the time left will hold. A decay that
    has started continues. ``form`` is one of FORMS, by default compiled on a GPU and eager on a CPU. ``processes``
    share each batch. RecipeError when ``work`` holds a training with other settings, or the batch cannot be shared
    evenly; TrainingError when the loss is not finite.
    """
    if settings.batch % processes.size:
        raise RecipeError(f"--batch {settings.batch} does not divide by {processes.size} processes; give a multiple")
    training = read_training(work)
    if training:
        progress, earlier = training
        _check_settings(work, earlier, settings)
    else:
        progress = TrainingProgress()
    if device != "cpu":
        torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
    model = load_generator_folder(start)
    if processes.first:
        # makes the clips, which the others then read
        load_latent_clips(cache, model, settings.clips, device)
    barrier(processes)
    data = load_latent_clips(cache, model, settings.clips, device)
    state = start_training(model.transformer.to(device))
    if training:
        restore_training(work, state, progress)
    rng = torch.Generator(device)
    # A graph reads its inputs at fixed addresses: each step's draws are copied into these tensors.
    inputs = draw_inputs(data, rng, progress.step, settings, processes)
    advance = _in_form(state, inputs, settings, device, form, processes)

    started = time.monotonic()
    last_saved = last_report = started
    first_step = last_reported_step = progress.step
    while not progress.done:
        # Without a number, a decay is planned from the measured time of a step: not before there is one.
        if decay is not None and progress.decay is None and (decay or progress.seconds):
            _plan_decay(progress, decay, deadline, every, processes)
        step_count = every if progress.last_step is None else min(every, progress.last_step - progress.step)
        for _ in range(step_count):
            factor = rate_factor(progress.step, settings.warmup, progress.decay)
            muon_rate, adamw_rate = factor * settings.muon_lr, factor * settings.lr
            set_rates(state.optimizer, progress.step, muon_rate, adamw_rate, settings.weight_decay)
            state.taken.fill_(1 - average_keep(settings.keep, progress.step))
            drawn = draw_inputs(data, rng, progress.step, settings, processes)
            for held_input, drawn_input in zip(inputs, drawn, strict=True):
                held_input.copy_(drawn_input)
            advance()
            progress.step += 1
        # Reading the loss waits for the device, so the clock below measures finished steps.
        loss_sum = state.loss.item()
        if not math.isfinite(loss_sum):
            raise TrainingError(
                f"the loss is not finite within {every} steps before step {progress.step}; what was saved is intact. "
                "Lower the rates"
            )
        current_time = time.monotonic()
        seconds = (current_time - started) / (progress.step - first_step)
        # The first process's clock counts for all: a decay is planned from it, and all must stop at the same step.
        progress.seconds, overdue = gather_objects((seconds, current_time > deadline), processes)[0]
        stop = progress.done or overdue
        if stop or current_time - last_report > SAY_EVERY:
            mean_loss = loss_sum / (progress.step - last_reported_step)
            _say(
                f"step {progress.step}  loss {mean_loss:.4f} since {last_reported_step}  rate {factor:.3f}  "
                f"{1e3 * progress.seconds:.2f} ms a step",
                processes,
            )
            state.loss.zero_()
            last_reported_step = progress.step
            last_report = current_time
        if processes.first and (stop or current_time - last_saved > SAVE_EVERY):
            save_training(work, state, progress, settings)
            last_saved = current_time
        if stop:
            break
    return progress


def _check_settings(work: Path, earlier: Settings, settings: Settings) -> None:
    for name, value in asdict(earlier).items():
        if getattr(settings, name) != value:
            raise RecipeError(f"{work} was begun with {name} = {value}; give the same, or another --work")


def _in_form(
    state: TrainingState,
    inputs: tuple[Tensor, ...],
    settings: Settings,
    device: str,
    form: str | None,
    processes: Processes,
) -> Callable[[], None]:
    """The step as a call without arguments, in one of FORMS; a CPU has no graphs."""
    advance = partial(training_step, state, inputs, settings, processes)
    form = form or ("eager" if device == "cpu" else "compiled")
    if form == "compiled":
        # Block by block and not as a whole: the blocks are alike and share one compilation.
        for block in state.transformer.blocks:
            block.compile(dynamic=False)
    return advance if device == "cpu" or form == "eager" else capture_graph(advance, state.tensors)


def _plan_decay(
    progress: TrainingProgress, steps: int, deadline: float, every: int, processes: Processes = ALONE
) -> None:
    """Start the decay with the next step, over ``steps`` or, for 0, as many as the time left will hold."""
    if not steps:
        seconds_left = SPARE * (deadline - time.monotonic())
        steps = max(int(seconds_left / progress.seconds), every)
        steps = gather_objects(steps, processes)[0]
    progress.decay = (progress.step, steps)
    _say(f"the rate falls to zero in {steps} steps from {progress.step}", processes)


def _say(line: str, processes: Processes) -> None:
    if processes.first:
        print(line, flush=True)


def write_average(work: Path, start: Path, folder: Path) -> None:
    """Write the pipeline ``start`` with the average so far as its transformer, in half precision."""
    training = read_training(work)
    if training is None:
        raise RecipeError(f"{work} holds no training; name the --work of one")
    progress, _ = training
    pipeline = load_generator_folder(start).pipeline
    pipeline.transformer.load_state_dict(load_file(tensor_file(work, "average", progress.step)))
    save_half(pipeline, folder)
