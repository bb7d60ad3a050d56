"""The settings of the further training."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("fp32", "tf32", "bf16")
FORMS = ("compiled", "graph", "eager")  # of a step on a GPU; on a CPU all are eager


@dataclass(frozen=True)
class Settings:
    """What a training depends on; fixed from its first slice to its last.

    ``precision`` is that of products: fp32, tf32 (a GPU's tensor cores) or bf16 (autocast). Weights are fp32 in each.
    With ``guidance`` g the model learns to sample as if guided, without the second forward pass that guidance costs:
    what the caption changes in the average's velocity is added g times to the target of named clips, which converges to
    a guidance scale of 1 / (1 - g) (model guidance: Tang et al., Diffusion Models without Classifier-free Guidance,
    2025).
    """

    clips: int = 50_000
    batch: int = 256
    lr: float = 1e-3  # AdamW's
    muon_lr: float = 1.5e-3
    weight_decay: float = 0.01
    warmup: int = 500
    keep: float = 0.9995  # share of the average that a step keeps
    guidance: float = 0.0  # below 1
    unnamed: float = 0.1  # share of clips whose caption is dropped
    precision: str = "tf32"
