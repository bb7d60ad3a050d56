"""Prompt embeddings of a run, each made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from ldo.core.batch_sizes import PREPARED_CLIPS
from ldo.core.config import Recipe
from ldo.data.cache import KEPT_PROMPTS, entry_path, has_entry, read_entry, write_entry
from ldo.models.generator.protocol import Generator, Text

TEXT_VERSION = 1  # version of the code that embeds prompts


class Texts:
    """Prompt embeddings, made once each.

    The sandbox's are kept on the CPU; those of real models on disk, and the most recent on the CPU too. ``source``
    gives what an embedding depends on besides the recipe: the identity of the text encoder, and versions.
    """

    def __init__(
        self, generator: Generator, recipe: Recipe, device: torch.device, source: Callable[[], dict[str, str]]
    ):
        self._generator, self._recipe, self._device, self._source = generator, recipe, device, source
        self._known: dict[str, Text] = {}
        # Per instance: a cache on the class would keep the run, and with it the models, alive.
        self._read = lru_cache(KEPT_PROMPTS)(self._stored)

    def _entry(self, prompt: str) -> Path:
        model = self._recipe.model
        key = {"prompt": prompt, "family": model.family, "dtype": model.dtype, "length": model.text_length}
        return entry_path(self._recipe.cache, "text", {**key, "code": TEXT_VERSION, **self._source()})

    def store(self, prompts: list[str]) -> None:
        """Make sure that prompts are on disk.

        Each is embedded on its own, so that it does not depend on its neighbours.
        """
        for prompt in prompts:
            if not has_entry(self._entry(prompt)):
                write_entry(self._entry(prompt), self._generator.encode_text([prompt]).tensors)

    def _stored(self, prompt: str) -> Text:
        found = read_entry(self._entry(prompt))
        if found is None:
            self._entry(prompt).unlink(missing_ok=True)
            self.store([prompt])
            found = read_entry(self._entry(prompt))
        return Text(found)

    def __call__(self, prompts: list[str]) -> Text:
        """Embeddings on the run's device."""
        if self._recipe.on_disk:
            return Text.cat([self._read(prompt) for prompt in prompts]).to(self._device)
        new = sorted(set(prompts) - set(self._known))
        for start in range(0, len(new), PREPARED_CLIPS):
            part = new[start : start + PREPARED_CLIPS]
            # In batches, since the sandbox's encoder gives the same bits for any batch; real encoders do not, see
            # store.
            embedded = self._generator.encode_text(part).to("cpu")
            self._known |= dict(zip(part, embedded.split(1), strict=True))
        return Text.cat([self._known[prompt] for prompt in prompts]).to(self._device)
