"""What a recipe needs of a GPU's memory and of the host's, stage by stage and phase by phase, before anything is loaded.

Resident bytes (weights, the adapter with its gradients, optimizer and copies, data kept on the device) are counted; what a
phase needs on top is the peak of the real modules' passes on meta tensors (``ldo.passes``). docs/memory.md says what is
left out. Processes share work by data parallelism: each holds every model.

Shapes: N videos of a rollout on one GPU, G groups of g, S stochastic steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ldo import cache, meta, passes
from ldo.config import Recipe
from ldo.generator.published import configs
from ldo.passes import Alignment, Step
from ldo.sandbox.simulate import FRAMES

PREPARED = 32  # clips encoded and prompts embedded at a time where they are kept in memory
JUDGED = 50  # clips scored at a time at the gate
OWN = 16  # clips sampled at a time in self mode, without rl.micro_batch


@dataclass(frozen=True)
class Phase:
    """One phase of a stage: bytes of weights, of the adapter with all that belongs to it, of data held, and of work on top."""

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
    """A stage's phases on one GPU, and the most a process keeps in the host's memory; ``once``: only the first process does."""

    name: str
    phases: tuple[Phase, ...]
    host: int
    once: bool = False

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda p: p.total)


class Plan:
    """A recipe that ``ldo.check`` found sound, on ``gpus`` GPUs, with the configurations of its models.

    RecipeError where a LoRA target fits no layer.
    """

    def __init__(self, recipe: Recipe, parts: dict[str, dict], judge: dict, gpus: int = 1, clips: int | None = None):
        self.recipe, self.parts, self.gpus = recipe, parts, gpus
        self.clips = recipe.data.clips if clips is None else clips
        self.geometry = meta.geometry(parts)
        self.time = self.geometry.time
        self.dtype, self.judge_dtype = (getattr(torch, part.dtype) for part in (recipe.model, recipe.world_model))
        self.judge, self.judge_text = judge, json.dumps(judge)
        self.config, self.vae = json.dumps(parts["transformer"]), json.dumps(parts["vae"])
        self.family = meta.family(parts["transformer"])
        self.targets = self.family.targets
        d, m = recipe.data, recipe.model
        self.on_disk = recipe.on_disk  # clips and prompts are then encoded one at a time, else PREPARED at a time and kept in memory
        self.length = meta.text_length(parts["transformer"], recipe.model.text_length)
        self.size = (d.frames, d.height, d.width)
        self.latent = self.geometry.latents(*self.size)
        self.fp8, self.tiling, self.slicing, self.offload = m.fp8, m.vae_tiling, m.vae_slicing, m.offload

    # ------------------------------------------------------------------------------------------ what is counted

    @property
    def wide(self) -> int:
        """Bytes of all weights as from_pretrained leaves them, before any is stored in 8 bits."""
        parts = [p for p in self._sizes if p != "world_model"]
        return sum(passes.sizes(json.dumps(self.parts[p]), self.dtype, self._class(p))[1] for p in parts) + self.weights["world_model"]

    @cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Parameters and bytes of each model."""
        parts = [p for p in ("transformer", "transformer_2", "text_encoder", "text_encoder_2", "vae") if p in self.parts]
        fp8 = {p: self.fp8 and p.startswith("transformer") for p in parts}
        out = {p: passes.sizes(json.dumps(self.parts[p]), self.dtype, self._class(p), fp8[p]) for p in parts}
        return out | {"world_model": passes.sizes(self.judge_text, self.judge_dtype)}

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of each model's weights as loaded."""
        return {part: size for part, (_, size) in self._sizes.items()}

    @cached_property
    def counts(self) -> dict[str, int]:
        """Parameters of each model, and of the adapter: one for each expert."""
        adapter = passes.adapter_count(self.config, self.recipe.lora.rank, self.targets)
        return {part: n for part, (n, _) in self._sizes.items()} | {"lora": adapter * (2 if "transformer_2" in self.parts else 1)}

    def _class(self, part: str) -> str | None:
        named = self.parts["model_index"].get(part)
        return named[1] if named and named[0] == "transformers" else None

    def _resident(self, *used: str) -> int:
        """Bytes of weights on the device while the parts ``used`` work: of those that wait on the CPU, only these are there."""
        away = [p for p in self.offload if p not in used]
        return sum(size for part, size in self.weights.items() if not any(part.startswith(p) for p in away))

    @property
    def lora(self) -> int:
        """Bytes of the adapter's values in fp32, all experts together."""
        return 4 * self.counts["lora"]

    @property
    def batch(self) -> int:
        """Clips of one forward pass of stage 1."""
        share = max(self.recipe.align.batch // self.gpus, 1)
        return min(self.recipe.align.micro_batch or share, share)

    @property
    def video(self) -> int:
        """Bytes of one video's frames in fp32."""
        t, h, w = self.size
        return 4 * 3 * t * h * w

    @property
    def latents(self) -> int:
        """Bytes of one video's latents in fp32."""
        c, t, h, w = self.latent
        return 4 * c * t * h * w

    @property
    def text(self) -> int:
        """Bytes of one prompt's embeddings."""
        return self.length * meta.text_width(self.parts["transformer"]) * self.dtype.itemsize

    @property
    def _texts(self) -> int:
        """Bytes of embeddings that a process keeps in the host's memory; where they are not on disk, of all prompts."""
        return (cache.KEPT if self.on_disk else self.recipe.data.prompt_count) * self.text

    @cached_property
    def alignment(self) -> Alignment:
        c, tubelet = self.judge, self.judge.get("tubelet_size", 2)
        side = c["crop_size"] // c["patch_size"]
        return Alignment(self.recipe.teacher, c["hidden_size"], ((self.size[0] - 1) // tubelet, side, side), self.time, tubelet)

    # ------------------------------------------------------------------------------------------ passes of this recipe

    def step(self, batch: int, training: bool, guidance: float = 1.0, stock: bool = False) -> Step:
        """A pass over ``batch`` videos; ``stock``: as the stock pipeline makes it."""
        guided = guidance != 1.0
        joined = guided and stock and self.family.joined_guidance
        return Step(
            self.config,
            self.dtype,
            batch,
            self.latent,
            self.length,
            self.recipe.lora.rank,
            self.targets,
            checkpointing=training and self.recipe.model.gradient_checkpointing,
            branches=2 if guided and not joined else 1,
            joined=joined,
            per_token=bool(self.parts["model_index"].get("expand_timesteps")),
            fp8=self.fp8 and not stock,
        )

    def vae_bytes(self, batch: int, encode: bool = False) -> int:
        one = passes.vae_bytes(self.vae, self.dtype, self.size, self.latent, encode, self.tiling)
        return one + (batch - 1) * (self.latents if encode else 2 * self.video) if self.slicing else batch * one

    def critic_bytes(self, batch: int) -> int:
        return batch * passes.critic_bytes(self.judge_text, self.judge_dtype, self.recipe.critic, self.size)

    def text_phase(self, adapter: int, held: int = 0) -> Phase:
        count = 1 if self.on_disk else min(PREPARED, self.recipe.rl.prompts) if held else PREPARED
        work = 0
        for part in ("text_encoder", "text_encoder_2"):
            if part in self.parts:
                cls = self._class(part)
                length = 77 if cls == "CLIPTextModel" else self.length
                work = max(work, count * passes.text_bytes(json.dumps(self.parts[part]), cls, self.dtype, length))
        return Phase(f"embed {_many(count, 'prompt')}", self._resident("text"), adapter, held, work)

    # ------------------------------------------------------------------------------------------ stages

    def stages(self) -> list[Stage]:
        """The recipe's stages in order; sft is left out beside align, which is the same and more."""
        make = {"gate": self.gate, "sft": self.align, "align": self.align, "reinforce": self.reinforce, "evaluate": self.evaluate}
        out = [self._loading()]
        for name in self.recipe.stages:
            if name in make and not (name == "sft" and "align" in self.recipe.stages):
                # stage 1 takes every bucket in turn: the largest tells
                found = [p.align(name) for p in self._buckets()] if name in ("sft", "align") else [make[name](name)]
                phases, host = max(found, key=lambda f: max(p.total for p in f[0]))
                out.append(Stage(name, tuple(phases), host, once=name == "gate"))
        return out

    def _buckets(self) -> list[Plan]:
        """A plan for each size of stage 1's clips."""
        data = self.recipe.data
        plans = []
        for frames, height, width in data.buckets:
            own = dataclasses.replace(data, buckets=(), frames=frames, height=height, width=width)
            plans.append(Plan(dataclasses.replace(self.recipe, data=own), self.parts, self.judge, self.gpus, self.clips))
        return plans or [self]

    def _loading(self) -> Stage:
        return Stage("load", (Phase("models and adapter", self._resident(), 2 * self.lora, 0, 0),), self.wide)

    def gate(self, _name: str) -> tuple[list[Phase], int]:
        crop = self.judge["crop_size"]
        work = JUDGED * passes.critic_bytes(self.judge_text, self.judge_dtype, self.recipe.critic, (FRAMES, crop, crop))
        held = JUDGED * FRAMES * 3 * crop * crop * 4
        return [Phase(f"score {JUDGED} clips", self._resident("world_model"), 2 * self.lora, held, work)], 10 * held

    def align(self, name: str) -> tuple[list[Phase], int]:
        r, d = self.recipe, self.recipe.data
        batch = self.batch
        loaded, trained = 2 * self.lora, 5 * self.lora  # parameters, fresh copy; gradients, two moments
        encoded = 1 if self.on_disk else PREPARED
        frames = encoded * self.video
        phases = []
        if d.source == "self":
            own = r.rl.micro_batch or OWN
            sampling = passes.sampling_bytes(self.step(own, False, r.evaluate.guidance))
            phases.append(Phase(f"sample {_many(own, 'clip')}", self._resident(), loaded, 2 * own * self.latents, sampling))
            phases.append(Phase(f"decode {_many(own, 'clip')}", self._resident("vae"), loaded, own * self.latents, self.vae_bytes(own)))
        phases.append(Phase(f"encode {_many(encoded, 'clip')}", self._resident("vae"), loaded, frames, self.vae_bytes(encoded, encode=True)))
        targets = encoded * passes.target_bytes(self.judge_text, self.judge_dtype, r.teacher, self.size)
        phases.append(Phase(f"targets of {_many(encoded, 'clip')}", self._resident("world_model"), loaded, frames, targets))
        phases.append(self.text_phase(trained))
        # latents, noise, noisy latents and the teacher's features of the batch
        alignment = self.alignment if name == "align" else None
        feature = 4 * (alignment.dim + 1) * alignment.grid[0] * alignment.grid[1] * alignment.grid[2] if alignment else 0
        held = batch * (3 * self.latents + self.text + feature)
        work = passes.training_bytes(self.step(batch, True), alignment)
        phases.append(Phase(f"train on {batch}", self._resident(), trained, held, work))
        phases.append(Phase("optimizer step", self._resident(), trained, 0, self.lora if self.gpus > 1 else 0))
        kept = 0 if self.on_disk else self.clips * (self.latents + feature)
        return phases, 2 * kept + encoded * self.video + self._texts  # twice while parts are joined

    def reinforce(self, _name: str) -> tuple[list[Phase], int]:
        r, rl = self.recipe, self.recipe.rl
        groups = max(rl.prompts // self.gpus, 1)
        n, g, s = groups * rl.group_size, rl.group_size, rl.window
        micro = rl.micro_batch or g
        # parameters, fresh, gradients, two moments, reference, average; what is swapped out; nft and awm keep the sampling policy
        adapter = (8 + (rl.objective != "grpo")) * self.lora
        drawn = n * ((1 + s) * self.latents + self.text)  # noise of the start and of the steps, embeddings
        path = n * (3 * s + 1) * self.latents  # the trajectory: state, next state and mean of each stochastic step, and the end
        reference = n * s * self.latents if rl.kl and rl.objective == "grpo" else 0
        sampling = passes.sampling_bytes(self.step(micro, False, rl.guidance))
        few = math.gcd(groups, micro) if rl.micro_batch else groups  # groups whose references, one a group, are decoded together
        once = max(micro, few)
        guards = g * passes.guard_bytes(r.critic, self.size)
        kept = drawn + path + reference + groups * self.latents
        videos = (few + g) * self.video  # of all that is decoded, only these live; the guards hold a reference beside each
        phases = [
            self.text_phase(adapter, drawn),
            Phase(f"sample {n} videos, {micro} at a time", self._resident(), adapter, drawn + path, max(sampling + 2 * micro * self.latents, path)),
            Phase(f"decode {once} at a time", self._resident("vae"), adapter, kept + videos - micro * self.video, self.vae_bytes(once)),
            Phase(f"score {_many(micro, 'video')}", self._resident("world_model"), adapter, kept + videos, self.critic_bytes(micro)),
            Phase(f"guards on {g} videos", self._resident(), adapter, kept + videos + g * self.video, guards),
        ]
        held = path + reference + n * self.text
        step = self.step(micro, True, rl.guidance)
        phases.append(Phase(f"train on {micro}", self._resident(), adapter, held + 2 * micro * self.latents, passes.training_bytes(step)))
        if rl.align_weight or rl.flow_weight:
            extra = self.align("align" if rl.align_weight else "sft")[0][-2]
            phases.append(dataclasses.replace(extra, name="clips beside", adapter=adapter, held=extra.held + held))
        phases.append(Phase("optimizer step", self._resident(), adapter, held, self.lora if self.gpus > 1 else 0))
        return phases, 2 * self.lora + self._texts

    def evaluate(self, _name: str) -> tuple[list[Phase], int]:
        e = self.recipe.evaluate
        stock = self.wide  # the training run's models are gone by then
        held = e.batch * (2 * self.latents + 2 * self.text)
        work = passes.sampling_bytes(self.step(e.batch, False, e.guidance, stock=True))
        phases = [
            Phase(f"sample {_many(e.batch, 'video')}", stock, self.lora, held, work),
            Phase(f"decode {_many(e.batch, 'video')}", stock, self.lora, held, self.vae_bytes(e.batch)),
            Phase(f"score {_many(e.batch, 'video')}", stock, self.lora, e.batch * self.video, self.critic_bytes(e.batch)),
        ]
        return phases, 3 * e.batch * self.video


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count > 1 else ''}"


def plan(recipe: Recipe, model: str, world_model: str, gpus: int = 1, clips: int | None = None) -> Plan | None:
    """The plan of a checked recipe, ``clips`` being how many it has; None where a Hub model's configuration is neither cached nor shipped."""
    parts, judge = configs(model), configs(world_model)
    if parts is None or judge is None or "transformer" not in parts:
        return None
    return Plan(recipe, parts, judge["config"], gpus, clips)


def here() -> int | None:
    """Memory of this machine's first GPU in bytes; None where there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
