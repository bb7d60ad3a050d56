"""Bytes of what a recipe keeps in memory, and the peaks of the passes that it makes.

Resident bytes (weights, the adapter, videos, latents, embeddings) are counted; a pass's peak is that of the real
modules on meta tensors (``ldo.memory.passes``).
"""

from __future__ import annotations

import json
from functools import cached_property

import torch

from ldo.core.batch_sizes import PREPARED_CLIPS
from ldo.core.config import Recipe
from ldo.data.cache import KEPT_PROMPTS
from ldo.memory import passes
from ldo.memory.meta_models import pipeline_geometry, prompt_length, text_width, transformer_family
from ldo.memory.passes import Alignment, TransformerPass

PIPELINE_PARTS = ("transformer", "transformer_2", "text_encoder", "text_encoder_2", "vae")
# tokens of a prompt for CLIP's text encoder, whatever the recipe asks
CLIP_TEXT_LENGTH = 77


class MemoryCounts:
    """A checked recipe on ``gpus`` GPUs, with the configurations of its models.

    ``parts`` are those of the generator by name, ``world_model`` is the world model's; ``clips`` is how many there are,
    None for as many as the recipe asks. RecipeError where a LoRA target fits no layer.
    """

    def __init__(
        self, recipe: Recipe, parts: dict[str, dict], world_model: dict, gpus: int = 1, clips: int | None = None
    ):
        self.recipe, self.parts, self.world_model, self.gpus = recipe, parts, world_model, gpus
        self.clips = recipe.data.clips if clips is None else clips
        self.geometry = pipeline_geometry(parts)
        self.time = self.geometry.time
        self.dtype = getattr(torch, recipe.model.dtype)
        self.world_model_dtype = getattr(torch, recipe.world_model.dtype)
        # As text, because passes are cached by their arguments and a dict cannot be a key.
        self.transformer_text = json.dumps(parts["transformer"])
        self.vae_text = json.dumps(parts["vae"])
        self.world_model_text = json.dumps(world_model)
        self.family = transformer_family(parts["transformer"])
        self.targets = self.family.targets
        self.length = prompt_length(parts["transformer"], recipe.model.text_length)
        self.size = (recipe.data.frames, recipe.data.height, recipe.data.width)
        self.latent = self.geometry.latents(*self.size)
        self.offload = recipe.model.offload

    # ------------------------------------------------------------------------------------------ models

    @cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Parameters and bytes of each model as loaded."""
        by_part = {}
        for part in PIPELINE_PARTS:
            if part in self.parts:
                # Text encoders and the VAE keep their type.
                fp8 = self.recipe.model.fp8 and part.startswith("transformer")
                by_part[part] = self._part_size(part, fp8)
        by_part["world_model"] = passes.sizes(self.world_model_text, self.world_model_dtype)
        return by_part

    def _part_size(self, part: str, fp8: bool) -> tuple[int, int]:
        return passes.sizes(json.dumps(self.parts[part]), self.dtype, self.text_class(part), fp8)

    def text_class(self, part: str) -> str | None:
        """The transformers class of a text encoder, which only the pipeline's index names; None for other parts."""
        index_entry = self.parts["model_index"].get(part)
        return index_entry[1] if index_entry and index_entry[0] == "transformers" else None

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of each model's weights as loaded."""
        return {part: size for part, (_, size) in self._sizes.items()}

    @property
    def wide(self) -> int:
        """Bytes of all weights as from_pretrained leaves them, before any is stored in 8 bits."""
        total_bytes = self.weights["world_model"]
        for part in self._sizes:
            if part != "world_model":
                total_bytes += self._part_size(part, fp8=False)[1]
        return total_bytes

    @cached_property
    def counts(self) -> dict[str, int]:
        """Parameters of each model, and of the adapter ("lora")."""
        parameters_of = {part: parameters for part, (parameters, _) in self._sizes.items()}
        adapter = passes.adapter_count(self.transformer_text, self.recipe.lora.rank, self.targets)
        # A mixture of two experts carries an adapter on each.
        parameters_of["lora"] = 2 * adapter if "transformer_2" in self.parts else adapter
        return parameters_of

    def resident(self, *used: str) -> int:
        """Bytes of weights on the device while the parts ``used`` work.

        Of the parts that wait on the CPU, only these are on the device.
        """
        offloaded = tuple(part for part in self.offload if part not in used)
        # By prefix: "text" stands for all text encoders.
        return sum(size for part, size in self.weights.items() if not part.startswith(offloaded))

    @property
    def lora(self) -> int:
        """Bytes of the adapter's values in fp32, all experts together."""
        return 4 * self.counts["lora"]

    # ------------------------------------------------------------------------------------------ data

    @property
    def batch(self) -> int:
        """Clips of one forward pass of stage 1."""
        # Each process trains on its share of the batch, in micro-batches if the recipe asks for them.
        share = max(self.recipe.align.batch // self.gpus, 1)
        return min(self.recipe.align.micro_batch or share, share)

    @property
    def prepared(self) -> int:
        """Clips encoded, or prompts embedded, at a time: one where they go to disk, else many, which stay in memory."""
        return 1 if self.recipe.on_disk else PREPARED_CLIPS

    @property
    def video(self) -> int:
        """Bytes of one video's frames in fp32."""
        frames, height, width = self.size
        return 4 * 3 * frames * height * width

    @property
    def latents(self) -> int:
        """Bytes of one video's latents in fp32."""
        channels, frames, height, width = self.latent
        return 4 * channels * frames * height * width

    @property
    def text(self) -> int:
        """Bytes of one prompt's embeddings."""
        return self.length * text_width(self.parts["transformer"]) * self.dtype.itemsize

    @property
    def kept_texts(self) -> int:
        """Bytes of embeddings that a process keeps in the host's memory: of all prompts unless they are on disk."""
        return (KEPT_PROMPTS if self.recipe.on_disk else self.recipe.data.prompt_count) * self.text

    # ------------------------------------------------------------------------------------------ passes

    @cached_property
    def alignment(self) -> Alignment:
        """What the relation loss of this recipe is made on."""
        tubelet = self.world_model.get("tubelet_size", 2)
        side = self.world_model["crop_size"] // self.world_model["patch_size"]
        # Without the first frame, which has a latent of its own in a causal VAE.
        grid = ((self.size[0] - 1) // tubelet, side, side)
        return Alignment(self.recipe.teacher, self.world_model["hidden_size"], grid, self.time, tubelet)

    def step(self, batch: int, training: bool, guidance: float = 1.0, stock: bool = False) -> TransformerPass:
        """A pass over ``batch`` videos; ``stock``: as the stock pipeline makes it."""
        # Some families' stock pipelines join both branches of guidance in one batch; training never does.
        guided = guidance != 1.0
        joined = guided and stock and self.family.joined_guidance
        return TransformerPass(
            self.transformer_text,
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
            fp8=self.recipe.model.fp8 and not stock,
        )

    def encoding_bytes(self, batch: int) -> int:
        """Peak of encoding a batch of videos."""
        return self._vae_bytes(batch, self.latents, encode=True)

    def decoding_bytes(self, batch: int) -> int:
        """Peak of decoding a batch of latents."""
        return self._vae_bytes(batch, 2 * self.video, encode=False)

    def _vae_bytes(self, batch: int, output: int, encode: bool) -> int:
        options = self.recipe.model
        single = passes.vae_bytes(self.vae_text, self.dtype, self.size, self.latent, encode, options.vae_tiling)
        # Slices go through the VAE one after the other, and what came out of the others waits.
        return single + (batch - 1) * output if options.vae_slicing else batch * single

    def scoring_bytes(self, batch: int, size: tuple[int, int, int] | None = None) -> int:
        """Peak of the critic on a batch of videos of ``size`` (T, H, W), by default the recipe's."""
        single = passes.critic_bytes(
            self.world_model_text, self.world_model_dtype, self.recipe.critic, size or self.size
        )
        return batch * single

    def teaching_bytes(self, batch: int) -> int:
        """Peak of making the teacher's targets of a batch of clips."""
        teacher = self.recipe.teacher
        return batch * passes.target_bytes(self.world_model_text, self.world_model_dtype, teacher, self.size)

    def embedding_bytes(self, prompts: int) -> int:
        """Peak of embedding prompts with the text encoders, one after the other."""
        peak = 0
        for part in ("text_encoder", "text_encoder_2"):
            if part in self.parts:
                encoder_class = self.text_class(part)
                length = CLIP_TEXT_LENGTH if encoder_class == "CLIPTextModel" else self.length
                peak = max(peak, passes.text_bytes(json.dumps(self.parts[part]), encoder_class, self.dtype, length))
        return prompts * peak
