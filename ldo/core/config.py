"""Recipes: everything that a run depends on, as frozen sections with a type and bounds for each key.

``ldo/core/recipe_file.py`` reads them from YAML; rules between keys are in ``ldo/run/rules.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from typing_extensions import Self

STAGES = ("gate", "sft", "align", "reinforce", "evaluate", "report")

_PACKAGE = Path(__file__).resolve().parents[1]
# inside the package in a wheel, next to it in a checkout
_RECIPES = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
DEFAULT_RECIPE = _RECIPES / "sandbox.yaml"
FAIR_PREFERENCE = 0.1  # the gate: how far from one half the preference for a restitution may be


def _from_text(value: Any) -> Any:
    # YAML 1.1 reads 1e-4, which has no dot, as text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _from_list(value: Any) -> Any:
    return tuple(_from_list(item) for item in value) if isinstance(value, list | tuple) else value


Number = Annotated[float, BeforeValidator(_from_text)]
Numbers = Annotated[tuple[int, ...], BeforeValidator(_from_list)]
Sizes = Annotated[tuple[tuple[int, ...], ...], BeforeValidator(_from_list)]
Words = Annotated[tuple[str, ...], BeforeValidator(_from_list)]
Offloaded = Annotated[tuple[Literal["text", "vae", "world_model"], ...], BeforeValidator(_from_list)]
Precision = Literal["float32", "bfloat16"]
# auto: the fastest that trains here; the others are the keys of attention_backends.BACKENDS
AttentionName = Literal[
    "auto",
    "native",
    "flash3",
    "flash2",
    "hub_flash3",
    "hub_flash2",
    "xformers",
    "sdpa_cudnn",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_math",
]


class Section(BaseModel):
    """A part of a recipe: frozen, hashable, without unknown keys or silent conversions (1.5 is no whole number)."""

    # Frozen and hashable, because memory estimates are cached by section. Strict, because a silently rounded step count
    # is a wrong experiment.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def changed(self, **values: Any) -> Self:
        """A copy with some values replaced, validated like the original."""
        return type(self).model_validate({**dict(self), **values})


class ModelConfig(Section):
    """The video generator."""

    path: str = "sandbox"  # diffusers folder, Hub name, or "sandbox" for the shipped tiny model
    family: str = "wan"
    dtype: Precision = "float32"
    # tokens of the prompt, as the pipeline's max_sequence_length; 0 takes the family's own
    text_length: int = Field(0, ge=0)
    # the scale that a guidance-distilled transformer is given (hunyuan); not classifier-free guidance
    guidance: Number = Field(6.0, ge=0)
    gradient_checkpointing: bool = False
    attention: AttentionName = "auto"
    fp8: bool = False  # store the base's weights in 8 bits
    offload: Offloaded = ()  # parts that wait on the CPU until they are called
    vae_tiling: bool = False
    vae_slicing: bool = False
    compile: bool = False  # the transformer's blocks


class WorldModelConfig(Section):
    """The frozen V-JEPA 2."""

    path: str = "sandbox"  # V-JEPA 2 folder, Hub name, or "sandbox"
    dtype: Precision = "float32"
    attention: AttentionName = "auto"


class DataConfig(Section):
    """Clips for stage 1, prompts for stage 2."""

    source: Literal["videos", "self"] = "videos"  # "self": stage 1 learns on the base model's own samples
    # folder of clips with captions, Hugging Face dataset (hf:owner/name, parquet, saved folder), or "sandbox"
    videos: str = "sandbox"
    prompts: str = "sandbox"  # text file with one prompt a line, JSON lines with "text", or "sandbox"
    clips: int = Field(768, gt=0)  # how many clips to write ("sandbox") or to sample ("self")
    # "self": samples that the critic chooses each clip from; with 1 it chooses nothing
    best_of: int = Field(1, gt=0)
    prompt_count: int = Field(256, gt=0)  # how many prompts to write ("sandbox")
    frames: int = Field(17, gt=0)
    height: int = Field(32, gt=0)
    width: int = Field(32, gt=0)
    fps: Number = Field(8.0, gt=0)
    # sizes [frames, height, width] that clips are sorted into; empty: only frames x height x width
    buckets: Sizes = ()
    # of a clip longer than its size: its beginning, or all of it, piece after piece
    windows: Literal["first", "all"] = "first"
    caption: str = ""  # column of the captions; empty: "text", or "caption" where there is no "text"
    # clips that cannot be used: stop, or continue without them; either way they are listed
    bad_clips: Literal["error", "skip"] = "error"
    decoder: Literal["pyav"] = "pyav"  # there is no other; older recipes name it
    cache: str = ""  # folder of encoded clips and prompts; empty: <out>/cache


class LoraConfig(Section):
    """One adapter serves all stages."""

    rank: int = Field(32, gt=0)
    alpha: Number = Field(32.0, gt=0)


class TeacherConfig(Section):
    """Predictive Dynamics Alignment."""

    mode: Literal["forecast", "encode", "delta"] = "forecast"
    block: Number = Field(0.5, ge=0, lt=1)  # which transformer block is aligned, as a share of depth
    window: int = Field(16, gt=0)  # frames the world model sees at once
    context: int = Field(8, gt=0)  # frames it forecasts from
    stride: int = Field(8, gt=0)
    # same-frame and other pairs apart, or one plain mean over all pairs
    geometry: Literal["split", "full"] = "split"
    weights: Literal["motion", "uniform"] = "motion"  # token weights: the target's own change over time, or 1
    margin: Number = Field(0.1, ge=0)
    penalty: Literal["hinge", "squared", "huber"] = "hinge"
    spatial: Number = Field(0.5, ge=0)
    temporal: Number = Field(0.5, ge=0)
    # of hidden states, before their geometry is compared: trained in stage 1, frozen in stage 2
    projector: Literal["none", "mlp"] = "none"
    weight: Number = Field(0.5, ge=0)  # of the alignment loss, next to the flow loss


class CriticConfig(Section):
    """The causal reward."""

    reward: Literal["skill", "plain"] = "skill"
    direction: Literal["both", "forward"] = "both"
    window: int = Field(16, gt=0)
    stride: int = Field(8, gt=0)
    contexts: Numbers = (4, 8)
    horizon: int = Field(0, ge=0)  # tubelets looked ahead; 0 looks to the end of the window
    # of the plain reward, added to skill: skill favours motion, plain favours stillness
    plain_weight: Number = Field(0.0, ge=0)
    plain_horizon: int = Field(0, ge=0)  # tubelets the plain reward looks ahead; 0 takes ``horizon``
    metric: Literal["cosine", "l1", "l2"] = "cosine"
    # over a window's tokens: all, or the ``top`` most surprising share
    aggregation: Literal["mean", "top"] = "mean"
    top: Number = Field(0.1, ge=0, le=1)
    windows: Literal["mean", "worst"] = "mean"  # over a clip's windows and contexts
    kappa: Number = Field(0.02, gt=0)  # floor of the persistence error, for scenes at rest
    fps: Number = Field(0.0, ge=0)  # resample clips to this rate before scoring; 0 keeps their own
    motion_floor: Number = Field(0.5, ge=0)  # guard: least share of the stage-1 model's motion on the same prompt
    # guard: greatest share of it; restless videos are as easy a way to a reward as still ones
    motion_ceiling: Number = Field(2.0, gt=0)
    motion_weight: Number = Field(0.5, ge=0)
    sharpness_floor: Number = Field(0.8, ge=0)  # guard: least share of the stage-1 model's sharpness
    sharpness_weight: Number = Field(0.5, ge=0)
    start_weight: Number = Field(0.0, ge=0)  # guard: fidelity of the first frame to the stage-1 model's


class GateConfig(Section):
    """Stage 0: the critic must earn its place."""

    pairs: int = Field(200, gt=0)  # matched pairs for each kind of violation
    all_kinds: Number = Field(0.90, ge=0, le=1)  # least share of pairs ranked correctly, over all kinds
    each_kind: Number = Field(0.75, ge=0, le=1)
    spearman: Number = Field(0.3, ge=-1, le=1)  # least rank correlation of reward and exact metrics within a prompt
    prompts: int = Field(12, gt=0)  # prompts of that test, ``samples`` videos each
    samples: int = Field(12, gt=0)
    override: bool = False  # continue with a critic that failed


class AlignConfig(Section):
    """Stage 1, and the SFT control of the same length."""

    steps: int = Field(200, gt=0)
    batch: int = Field(32, gt=0)
    micro_batch: int = Field(0, ge=0)  # clips in one forward pass; 0 takes a process's whole share of the batch
    lr: Number = Field(1e-4, gt=0)
    warmup: int = Field(20, ge=0)
    weight_decay: Number = Field(0.01, ge=0)
    max_grad_norm: Number = Field(1.0, gt=0)
    time_shift: Number = Field(0.0, ge=0)  # shift of the training times; 0 takes the sampler's


class ReinforceConfig(Section):
    """Stage 2."""

    updates: int = Field(100, gt=0)  # rollouts; each is followed by ``epochs`` x ``minibatches`` optimizer steps
    prompts: int = Field(4, gt=0)  # groups in a rollout
    group_size: int = Field(12, ge=2)  # videos of one prompt that are compared; 8 or more learn well
    micro_batch: int = Field(0, ge=0)  # videos of a group in one forward pass; 0 takes the whole group
    objective: Literal["grpo", "nft", "awm"] = "grpo"
    sampler: Literal["flow", "dance", "cps"] = "flow"
    eta: Number = 0.7
    steps: int = Field(16, gt=0)
    window: int = 3  # stochastic, trained steps
    window_start: int = Field(0, ge=0)  # first step that may be stochastic
    window_range: int = Field(1, gt=0)  # how many steps the window's start may move over, drawn for each rollout
    guidance: Number = Field(1.0, ge=0)
    shared_noise: bool = True  # a group starts from one noise
    epochs: int = Field(1, gt=0)
    minibatches: int = Field(2, gt=0)  # optimizer steps in an epoch: at 1 the clip never acts
    lr: Number = Field(1e-4, gt=0)
    weight_decay: Number = Field(0.0, ge=0)
    max_grad_norm: Number = Field(1.0, gt=0)
    clip: Number = Field(1e-3, gt=0)
    guard: bool = True  # GRPO-Guard: ratios of equal spread at every step, gradients of equal weight
    guard_clip: Number = Field(1e-4, gt=0)
    advantage_clip: Number = Field(5.0, gt=0)
    kl: Number = Field(2e-4, ge=0)
    nft_beta: Number = Field(1.0, gt=0)
    train_times: int = Field(3, gt=0)  # noise levels a sample is trained at (nft, awm)
    align_weight: Number = Field(0.0, ge=0)  # of the alignment loss during stage 2
    flow_weight: Number = Field(0.0, ge=0)  # of the flow loss on the clips during stage 2
    ema: Number = Field(0.9, ge=0, lt=1)
    ema_every: int = Field(8, gt=0)
    stop_motion: Number = Field(0.5, ge=0)  # stop when the videos' motion falls below this share of the stage-1 model's


class EvaluateConfig(Section):
    """Sampling by the stock pipeline from the exported LoRA."""

    prompts: str = "sandbox"
    count: int = Field(128, gt=0)  # prompts taken
    seeds: int = Field(2, gt=0)
    steps: int = Field(20, gt=0)
    guidance: Number = Field(1.0, ge=0)
    batch: int = Field(32, gt=0)


class Recipe(Section):
    """Everything a run depends on."""

    name: str = "sandbox"
    seed: int = 0
    out: str = "runs"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0)  # CPU threads; 0 leaves PyTorch's choice
    save_every: int = Field(20, gt=0)  # steps between checkpoints
    log: Words = ("tensorboard",)  # besides the JSON lines: tensorboard, wandb, trackio
    log_project: str = "ldo"  # project in W&B and trackio
    stages: Words = STAGES
    model: ModelConfig = ModelConfig()
    world_model: WorldModelConfig = WorldModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    teacher: TeacherConfig = TeacherConfig()
    critic: CriticConfig = CriticConfig()
    gate: GateConfig = GateConfig()
    align: AlignConfig = AlignConfig()
    rl: ReinforceConfig = ReinforceConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return Path(self.out) / self.name

    @property
    def on_disk(self) -> bool:
        """Are encoded clips and prompts kept on disk? The shipped models' are small and quick to make."""
        return self.model.path != "sandbox"

    @property
    def cache(self) -> Path:
        """Folder of encoded clips and prompts, shared by all runs."""
        return Path(self.data.cache) if self.data.cache else Path(self.out) / "cache"


def to_plain(section: Any) -> Any:
    """A section as a nested dict of plain values, as YAML and JSON take it."""
    return section.model_dump(mode="json")


def flat_items(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
