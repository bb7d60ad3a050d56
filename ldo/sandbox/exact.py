"""The exact metrics of a prompt, if there are any: the one door between the toy world and the stages of training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ldo.sandbox.appearance import appearance_error
from ldo.sandbox.dataset import prompt_of
from ldo.sandbox.measure import measure, severity
from ldo.sandbox.observe import Prompt


@dataclass(frozen=True)
class ExactMetrics:
    """What arithmetic says of a sandbox prompt's videos, frames [T, 3, H, W] in [0, 1]."""

    prompt: Prompt

    @property
    def caption(self) -> str:
        return self.prompt.caption

    def record(self, frames: np.ndarray) -> dict[str, Any]:
        """Every exact metric of a video, with its scene's kind and the motion of the simulator's own clip."""
        found = measure(frames, self.prompt)
        return {
            "kind": self.prompt.kind,
            "path_true": self.prompt.path_length,
            "existence": found.existence,
            "severity": severity(found, self.prompt.kind),
            "appearance_error": appearance_error(frames, self.prompt),
            **asdict(found),
        }

    def violates(self, frames: np.ndarray) -> bool:
        """Does the video break a law so that a person sees it?"""
        return bool(measure(frames, self.prompt).visible)

    def severity(self, frames: np.ndarray) -> float:
        """How broken the video is; 0 is perfect."""
        return severity(measure(frames, self.prompt), self.prompt.kind)


def exact_metrics(text: str, extra: dict) -> ExactMetrics | None:
    """The exact metrics of a prompt line; None where it is not the sandbox's."""
    prompt = prompt_of(text, extra)
    return None if prompt is None else ExactMetrics(prompt)
