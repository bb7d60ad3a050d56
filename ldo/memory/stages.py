"""The phases of each stage: which weights are on the GPU, what data is held there, and what the work adds on top.

Data and the adapter are in fp32, weights in their model's type. A phase's work is the peak of its passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ldo.core.batch_sizes import GATE_CLIPS, SELF_CLIPS
from ldo.memory import passes
from ldo.memory.counts import MemoryCounts
from ldo.sandbox.simulate import FRAMES


@dataclass(frozen=True)
class Phase:
    """One phase of a stage, in bytes of one GPU.

    ``weights`` of the models, the ``adapter`` and all that belongs to it, data ``held`` throughout, ``work`` on top.
    """

    name: str
    weights: int
    adapter: int
    held: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.held + self.work


@dataclass(frozen=True)
class Stage:
    """A stage's phases on one GPU, and the most that a process keeps in the host's memory.

    ``once``: only the first process does.
    """

    name: str
    phases: tuple[Phase, ...]
    host: int
    once: bool = False

    @property
    def worst(self) -> Phase:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: phase.total)


def loading_stage(counts: MemoryCounts) -> Stage:
    """The models as they are loaded, and the adapter with a fresh copy."""
    phase = Phase("models and adapter", counts.resident(), 2 * counts.lora, 0, 0)
    # Weights pass through the host as they are on disk, before any is stored in 8 bits.
    return Stage("load", (phase,), counts.wide)


def gate_stage(counts: MemoryCounts) -> Stage:
    """Stage 0: the critic scores sandbox clips at the world model's own size."""
    side = counts.world_model["crop_size"]
    held = GATE_CLIPS * FRAMES * 3 * side * side * 4
    work = counts.scoring_bytes(GATE_CLIPS, (FRAMES, side, side))
    phase = Phase(f"score {GATE_CLIPS} clips", counts.resident("world_model"), 2 * counts.lora, held, work)
    # A rough bound for the rendered clips of all kinds of pairs, which wait on the host.
    return Stage("gate", (phase,), 10 * held, once=True)


def tuning_stage(counts: MemoryCounts, name: str) -> Stage:
    """Stage 1, with the teacher as "align" or without as "sft": clips and prompts are prepared, then trained on."""
    # Before training: parameters and a fresh copy. While it trains: gradients and two moments as well.
    loaded, trained = 2 * counts.lora, 5 * counts.lora
    clips = counts.prepared
    frames = clips * counts.video
    phases = []
    if counts.recipe.data.source == "self":
        phases += _self_phases(counts, loaded)
    phases.append(
        Phase(f"encode {_plural(clips, 'clip')}", counts.resident("vae"), loaded, frames, counts.encoding_bytes(clips))
    )
    phases.append(
        Phase(
            f"targets of {_plural(clips, 'clip')}",
            counts.resident("world_model"),
            loaded,
            frames,
            counts.teaching_bytes(clips),
        )
    )
    phases.append(_embedding(counts, clips, trained, 0))
    phases.append(_clip_training(counts, name, trained))
    phases.append(_optimizer_step(counts, trained, 0))
    kept = 0
    if not counts.recipe.on_disk:
        kept = counts.clips * (counts.latents + _feature_bytes(counts, name))
    # Twice what is kept, while the batches that were prepared are joined.
    return Stage(name, tuple(phases), 2 * kept + frames + counts.kept_texts)


def _self_phases(counts: MemoryCounts, adapter: int) -> list[Phase]:
    """The base model samples the clips that it will be trained on."""
    recipe = counts.recipe
    clips = recipe.rl.micro_batch or SELF_CLIPS
    sampling = passes.sampling_bytes(counts.step(clips, False, recipe.evaluate.guidance))
    latents = clips * counts.latents
    phases = [
        Phase(f"sample {_plural(clips, 'clip')}", counts.resident(), adapter, 2 * latents, sampling),
        Phase(
            f"decode {_plural(clips, 'clip')}", counts.resident("vae"), adapter, latents, counts.decoding_bytes(clips)
        ),
    ]
    if recipe.data.best_of > 1:
        videos, work = clips * counts.video, counts.scoring_bytes(clips)
        phases.append(Phase(f"score {_plural(clips, 'clip')}", counts.resident("world_model"), adapter, videos, work))
    return phases


def _feature_bytes(counts: MemoryCounts, name: str) -> int:
    """Bytes of the teacher's features of one clip, each token with its weight; none for "sft"."""
    if name != "align":
        return 0
    alignment = counts.alignment
    return 4 * (alignment.dim + 1) * math.prod(alignment.grid)


def _clip_training(counts: MemoryCounts, name: str, adapter: int) -> Phase:
    """A forward and backward pass on a batch of clips, with the losses of "sft" or "align"."""
    # Latents, noise, noisy latents, embeddings and the teacher's features of the batch.
    held = counts.batch * (3 * counts.latents + counts.text + _feature_bytes(counts, name))
    alignment = counts.alignment if name == "align" else None
    work = passes.training_bytes(counts.step(counts.batch, True), alignment)
    return Phase(f"train on {counts.batch}", counts.resident(), adapter, held, work)


def _embedding(counts: MemoryCounts, prompts: int, adapter: int, held: int) -> Phase:
    work = counts.embedding_bytes(prompts)
    return Phase(f"embed {_plural(prompts, 'prompt')}", counts.resident("text"), adapter, held, work)


def _optimizer_step(counts: MemoryCounts, adapter: int, held: int) -> Phase:
    # Several processes average their gradients in one flat buffer.
    work = counts.lora if counts.gpus > 1 else 0
    return Phase("optimizer step", counts.resident(), adapter, held, work)


def reinforce_stage(counts: MemoryCounts) -> Stage:
    """Stage 2: a rollout is sampled, decoded and scored, then trained on."""
    settings = counts.recipe.rl
    groups = max(settings.prompts // counts.gpus, 1)
    videos = groups * settings.group_size
    micro_batch = settings.micro_batch or settings.group_size
    is_grpo = settings.objective == "grpo"
    # Parameters, fresh copy, gradients, two moments, reference, average, and what is swapped out for another of these;
    # nft and awm keep the sampling policy besides.
    adapter = (8 if is_grpo else 9) * counts.lora
    # Noise of the start and of the stochastic steps, and embeddings.
    drawn_inputs = videos * ((1 + settings.window) * counts.latents + counts.text)
    # State, next state and mean of each stochastic step, and the end.
    trajectory = videos * (3 * settings.window + 1) * counts.latents
    # The reference's means, which only GRPO's divergence needs.
    reference = videos * settings.window * counts.latents if settings.kl and is_grpo else 0
    sampling = passes.sampling_bytes(counts.step(micro_batch, False, settings.guidance))
    phases = [
        _embedding(counts, min(counts.prepared, settings.prompts), adapter, drawn_inputs),
        Phase(
            f"sample {videos} videos, {micro_batch} at a time",
            counts.resident(),
            adapter,
            drawn_inputs + trajectory,
            max(sampling + 2 * micro_batch * counts.latents, trajectory),
        ),
    ]
    # With the end of each group's reference video, before it is decoded.
    kept = drawn_inputs + trajectory + reference + groups * counts.latents
    phases += _scoring_phases(counts, groups, micro_batch, adapter, kept)
    held = trajectory + reference + videos * counts.text
    training = passes.training_bytes(counts.step(micro_batch, True, settings.guidance))
    phases.append(
        Phase(f"train on {micro_batch}", counts.resident(), adapter, held + 2 * micro_batch * counts.latents, training)
    )
    if settings.align_weight or settings.flow_weight:
        clip_phase = _clip_training(counts, "align" if settings.align_weight else "sft", adapter)
        phases.append(Phase("losses on clips", clip_phase.weights, adapter, held + clip_phase.held, clip_phase.work))
    phases.append(_optimizer_step(counts, adapter, held))
    return Stage("reinforce", tuple(phases), 2 * counts.lora + counts.kept_texts)


def _scoring_phases(counts: MemoryCounts, groups: int, micro_batch: int, adapter: int, kept: int) -> list[Phase]:
    """Videos of a rollout become rewards, one group at a time; ``kept`` is held throughout."""
    settings = counts.recipe.rl
    # Groups whose reference videos, one per group, are decoded together.
    joined = math.gcd(groups, micro_batch) if settings.micro_batch else groups
    decoded = max(micro_batch, joined)
    # Of all that is decoded, only these videos are alive at a time.
    alive_videos = kept + (joined + settings.group_size) * counts.video
    # The guards compare each video of a group with its own copy of the reference.
    guarded = alive_videos + settings.group_size * counts.video
    guards = settings.group_size * passes.guard_bytes(counts.recipe.critic, counts.size)
    return [
        Phase(
            f"decode {decoded} at a time",
            counts.resident("vae"),
            adapter,
            alive_videos - micro_batch * counts.video,
            counts.decoding_bytes(decoded),
        ),
        Phase(
            f"score {_plural(micro_batch, 'video')}",
            counts.resident("world_model"),
            adapter,
            alive_videos,
            counts.scoring_bytes(micro_batch),
        ),
        Phase(f"guards on {settings.group_size} videos", counts.resident(), adapter, guarded, guards),
    ]


def evaluate_stage(counts: MemoryCounts) -> Stage:
    """The evaluation: the stock pipeline samples, the critic scores."""
    settings = counts.recipe.evaluate
    videos = _plural(settings.batch, "video")
    # The training run's models are gone by then, and the stock pipeline loads its own as they are.
    stock_weights = counts.wide
    held = settings.batch * (2 * counts.latents + 2 * counts.text)
    frames = settings.batch * counts.video
    sampling = passes.sampling_bytes(counts.step(settings.batch, False, settings.guidance, stock=True))
    phases = (
        Phase(f"sample {videos}", stock_weights, counts.lora, held, sampling),
        Phase(f"decode {videos}", stock_weights, counts.lora, held, counts.decoding_bytes(settings.batch)),
        Phase(f"score {videos}", stock_weights, counts.lora, frames, counts.scoring_bytes(settings.batch)),
    )
    return Stage("evaluate", phases, 3 * frames)


def _plural(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count > 1 else ''}"
