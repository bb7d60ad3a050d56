"""Recipes: frozen dataclasses, filled from YAML and ``a.b=c`` overrides, and validated before anything loads.

Every user error is a ``RecipeError``: one line that says what, where and the mend.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

STAGES = ("gate", "sft", "align", "reinforce", "evaluate", "report")
# auto: the fastest that trains here; the others are the keys of attention.BACKENDS
Attention = Literal[
    "auto", "native", "flash3", "flash2", "hub_flash3", "hub_flash2", "xformers", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math"
]


class RecipeError(ValueError):
    """A mistake in a recipe, a path or a dataset that its user can mend."""


@dataclass(frozen=True)
class Model:
    """The video generator."""

    path: str = "sandbox"  # diffusers folder, Hub name, or "sandbox" for the shipped tiny model
    family: str = "wan"
    dtype: Literal["float32", "bfloat16"] = "float32"
    text_length: int = 0  # tokens of the prompt, as the pipeline's max_sequence_length; 0 takes the family's own
    guidance: float = 6.0  # the scale that a guidance-distilled transformer is told (hunyuan); not classifier-free guidance
    gradient_checkpointing: bool = False
    attention: Attention = "auto"  # kernel of its attention
    fp8: bool = False  # store the base's weights in 8 bits
    offload: tuple[Literal["text", "vae", "world_model"], ...] = ()  # parts that wait on the CPU until they are called
    vae_tiling: bool = False
    vae_slicing: bool = False
    compile: bool = False  # the transformer's blocks


@dataclass(frozen=True)
class WorldModel:
    """The frozen V-JEPA 2."""

    path: str = "sandbox"  # V-JEPA 2 folder, Hub name, or "sandbox"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Attention = "auto"


@dataclass(frozen=True)
class Data:
    """Clips for stage 1, prompts for stage 2."""

    source: Literal["videos", "self"] = "videos"  # "self": stage 1 learns on the base model's own samples
    videos: str = "sandbox"  # folder of clips with captions, Hugging Face dataset (hf:owner/name, parquet, saved folder), or "sandbox"
    prompts: str = "sandbox"  # text file, one prompt a line, or JSON lines with "text", or "sandbox"
    clips: int = 768  # how many clips to write ("sandbox") or to sample ("self")
    prompt_count: int = 256  # how many prompts to write ("sandbox")
    frames: int = 17
    height: int = 32
    width: int = 32
    fps: float = 8.0
    buckets: tuple[tuple[int, ...], ...] = ()  # sizes [frames, height, width] that clips are sorted into; empty: frames x height x width alone
    windows: Literal["first", "all"] = "first"  # of a clip longer than its size: its beginning, or all of it, piece after piece
    caption: str = ""  # column of the captions; empty: "text", or "caption" where there is no "text"
    bad_clips: Literal["error", "skip"] = "error"  # clips that cannot be used: stop, or go on without them; either way they are listed
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    cache: str = ""  # folder of encoded clips and prompts; empty: <out>/cache


@dataclass(frozen=True)
class Lora:
    """One adapter serves all stages."""

    rank: int = 32
    alpha: float = 32.0


@dataclass(frozen=True)
class Teacher:
    """Predictive Dynamics Alignment."""

    mode: Literal["forecast", "encode", "delta"] = "forecast"
    block: float = 0.5  # which transformer block is aligned, as a share of depth
    window: int = 16  # frames the world model sees at once
    context: int = 8  # frames it forecasts from
    stride: int = 8
    geometry: Literal["split", "full"] = "split"  # same-frame and other pairs apart, or one plain mean over all pairs
    weights: Literal["motion", "uniform"] = "motion"  # token weights by the teacher's own change over time, or 1
    margin: float = 0.1
    penalty: Literal["hinge", "squared", "huber"] = "hinge"
    spatial: float = 0.5
    temporal: float = 0.5
    projector: Literal["none", "mlp"] = "none"  # of hidden states, before their geometry is compared: trained in stage 1, frozen in stage 2
    weight: float = 0.5  # of L_PDA beside the flow loss


@dataclass(frozen=True)
class Critic:
    """The causal reward."""

    reward: Literal["skill", "plain"] = "skill"
    direction: Literal["both", "forward"] = "both"
    window: int = 16
    stride: int = 8
    contexts: tuple[int, ...] = (4, 8)
    horizon: int = 0  # tubelets looked ahead; 0 looks to the end of the window
    plain_weight: float = 0.0  # of the plain reward, added to skill: skill alone favours motion, plain alone stillness
    plain_horizon: int = 0  # tubelets the plain reward looks ahead; 0 takes ``horizon``
    metric: Literal["cosine", "l1", "l2"] = "cosine"
    aggregation: Literal["mean", "top"] = "mean"  # over a window's tokens: all, or the ``top`` most surprising share
    top: float = 0.1
    windows: Literal["mean", "worst"] = "mean"  # over a clip's windows and contexts
    kappa: float = 0.02  # floor of the persistence error, for scenes at rest
    fps: float = 0.0  # resample clips to this rate before scoring; 0 keeps their own
    motion_floor: float = 0.5  # guard: least share of the stage-1 model's motion on the same prompt
    motion_ceiling: float = 2.0  # guard: greatest share of it; restless videos are as easy a way to a reward as still ones
    motion_weight: float = 0.5
    sharpness_floor: float = 0.8  # guard: least share of the stage-1 model's sharpness
    sharpness_weight: float = 0.5
    start_weight: float = 0.0  # guard: fidelity of the first frame to the stage-1 model's


@dataclass(frozen=True)
class Gate:
    """Stage 0: the critic must earn its place."""

    pairs: int = 200  # matched pairs a kind of violation
    all_kinds: float = 0.90  # least share of pairs ranked rightly, over all kinds
    each_kind: float = 0.75
    spearman: float = 0.3  # least rank correlation of reward and exact metrics within a prompt
    prompts: int = 12  # prompts of that test, ``samples`` videos each
    samples: int = 12
    override: bool = False  # go on with a critic that failed


@dataclass(frozen=True)
class Align:
    """Stage 1, and the SFT control of the same length."""

    steps: int = 200
    batch: int = 32
    micro_batch: int = 0  # clips in one forward pass; 0 takes a process's whole share of the batch
    lr: float = 1e-4
    warmup: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    time_shift: float = 0.0  # shift of the training times; 0 takes the sampler's


@dataclass(frozen=True)
class Reinforce:
    """Stage 2."""

    updates: int = 100  # rollouts; each is followed by ``epochs`` x ``minibatches`` optimizer steps
    prompts: int = 4  # groups a rollout
    group_size: int = 12
    micro_batch: int = 0  # videos of a group in one forward pass; 0 takes the whole group
    objective: Literal["grpo", "nft", "awm"] = "grpo"
    sampler: Literal["flow", "dance", "cps"] = "flow"
    eta: float = 0.7
    steps: int = 16
    window: int = 3  # stochastic, trained steps
    window_start: int = 0  # first step that may be stochastic
    window_range: int = 1  # how many steps the window's start may move over, drawn for each rollout
    guidance: float = 1.0
    shared_noise: bool = True  # a group starts from one noise
    epochs: int = 1
    minibatches: int = 2  # optimizer steps an epoch: at 1 the clip never acts
    lr: float = 1e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip: float = 1e-3
    guard: bool = True  # GRPO-Guard: ratios of equal spread at every step, gradients of equal weight
    guard_clip: float = 1e-4
    advantage_clip: float = 5.0
    kl: float = 2e-4
    nft_beta: float = 1.0
    train_times: int = 3  # noise levels a sample is trained at (nft, awm)
    align_weight: float = 0.0  # of L_PDA during stage 2
    flow_weight: float = 0.0  # of the flow loss on the clips during stage 2
    ema: float = 0.9
    ema_every: int = 8
    stop_motion: float = 0.5  # stop when the videos' motion falls below this share of the stage-1 model's


@dataclass(frozen=True)
class Evaluate:
    """Sampling by the stock pipeline from the exported LoRA."""

    prompts: str = "sandbox"
    count: int = 128  # prompts taken
    seeds: int = 2
    steps: int = 20
    guidance: float = 1.0
    batch: int = 32


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on."""

    name: str = "sandbox"
    seed: int = 0
    out: str = "runs"
    device: str = "auto"
    threads: int = 0  # CPU threads; 0 leaves PyTorch's choice
    save_every: int = 20  # steps between checkpoints
    log: tuple[str, ...] = ("tensorboard",)  # beside the JSON lines: tensorboard, wandb, trackio
    log_project: str = "ldo"  # project in W&B and trackio
    stages: tuple[str, ...] = STAGES
    model: Model = field(default_factory=Model)
    world_model: WorldModel = field(default_factory=WorldModel)
    data: Data = field(default_factory=Data)
    lora: Lora = field(default_factory=Lora)
    teacher: Teacher = field(default_factory=Teacher)
    critic: Critic = field(default_factory=Critic)
    gate: Gate = field(default_factory=Gate)
    align: Align = field(default_factory=Align)
    rl: Reinforce = field(default_factory=Reinforce)
    evaluate: Evaluate = field(default_factory=Evaluate)

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


# ---------------------------------------------------------------------------------------------- reading


def read(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply ``a.b=c`` overrides. RecipeError on anything misspelt, misplaced or of a wrong type."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [], 1)
        raise RecipeError(
            f"recipe {path} does not exist" + (f"; did you mean {path.parent / near[0]}?" if near else "; give the path of a YAML file")
        )
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path} must be a mapping of keys to values, not a {type(tree).__name__}")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {text!r} is not of the form key=value, e.g. align.steps=100")
        node = tree
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise RecipeError(f"override {text!r}: {part} is a value, not a section")
        try:
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"override {text!r}: the value is not valid YAML") from None
    return _beside(build(Recipe, tree, str(path)), path.parent)


def _beside(recipe: Recipe, folder: Path) -> Recipe:
    """Files that are not found from the current folder but lie beside the recipe are meant: recipes bring their prompts along."""
    parts = {}
    for section, key in (("data", "videos"), ("data", "prompts"), ("evaluate", "prompts")):
        part = parts.get(section, getattr(recipe, section))
        value = getattr(part, key)
        if not Path(value).exists() and (folder / value).exists():
            part = dataclasses.replace(part, **{key: str(folder / value)})
        parts[section] = part
    return dataclasses.replace(recipe, **parts)


def build(cls: type, tree: dict, where: str, prefix: str = "") -> Any:
    """A dataclass from a mapping, checked key by key."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in fields:
            raise RecipeError(f"{where}: unknown key {prefix}{key}{_nearest(str(key), cls, prefix)}")
        kind = fields[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise RecipeError(
                    f"{where}: {prefix}{key} is a section; write its keys below it, e.g. {prefix}{key}.{dataclasses.fields(kind)[0].name}"
                )
            values[key] = build(kind, value, where, f"{prefix}{key}.")
        else:
            values[key] = _convert(value, kind, f"{where}: {prefix}{key}")
    return cls(**values)


def _nearest(key: str, cls: type, prefix: str) -> str:
    here = [f.name for f in dataclasses.fields(cls)]
    everywhere = dict(_leaves(Recipe))
    homes = [full for full in everywhere if full.rsplit(".", 1)[-1] == key]
    if homes:
        return f"; it belongs elsewhere: {' or '.join(homes)}"
    near = difflib.get_close_matches(key, here, 1, 0.6)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    near = difflib.get_close_matches(prefix + key, everywhere, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(here)}"


def _leaves(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _leaves(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hints[f.name]


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise RecipeError(f"{where} is {value!r}; choose one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{where} is {value!r}; a list is expected, e.g. [4, 8]")
        return tuple(_convert(v, typing.get_args(kind)[0], where) for v in value)
    if origin in (typing.Union, types.UnionType):
        raise AssertionError(f"{where}: unions are not used in recipes")
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise RecipeError(f"{where} is {value!r}; {words[kind]} is expected")
    return value


def to_dict(recipe: Any) -> Any:
    """Plain nested dict, as YAML and JSON take it."""
    if dataclasses.is_dataclass(recipe):
        return {f.name: to_dict(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}
    return list(recipe) if isinstance(recipe, tuple) else recipe


def flat(tree: dict, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
