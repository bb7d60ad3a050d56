"""Train the shipped generator further, fast enough for a GPU: ``python -m ldo.sandbox.build.further``.

    --minutes 7               a slice at a constant rate; the same command again goes on
    --minutes 7 --decay       the last slice: the rate falls to zero in the steps that these minutes will hold
    --write FOLDER            the average as a pipeline in half precision, like the shipped one

Only the transformer learns. The text encoder stays as shipped, so that captions are embedded once and the step is matrices
alone. Latents and embeddings lie on the device. On a GPU the blocks are compiled and the step, optimizer and average
included, is one CUDA graph: at this size launches would cost more than arithmetic.

Draws come from a generator on the device, seeded by (purpose, step): they depend on the kind of device, but on nothing before
them, so a slice goes on with the numbers that the whole would have had.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldo import generator
from ldo.checkpoint import write_text
from ldo.config import RecipeError
from ldo.flow import noisy, training_times
from ldo.generator import Generator, Options
from ldo.rng import torch_rng
from ldo.run import quiet
from ldo.sandbox.build.base import FINE_SHIFT, LENGTH, block_matrices, encode, save_half
from ldo.sandbox.build.pool import pool
from ldo.sandbox.build.stacked import Stacked, set_rates, stacked, update
from ldo.sandbox.dataset import GENERATOR
from ldo.update import TrainingError

EVERY = 50  # steps between looks at the clock and the loss, which wait for the device
SAVE_EVERY = 120.0  # seconds
SAY_EVERY = 20.0
SPARE = 0.9  # of a slice's time, that a decay is planned into
PRECISIONS = ("fp32", "tf32", "bf16")
FORMS = ("compiled", "graph", "eager")  # of a step on a GPU; on a CPU all are eager


@dataclass(frozen=True)
class Settings:
    """What a training depends on; fixed from its first slice to its last."""

    clips: int = 50_000
    batch: int = 256
    lr: float = 1e-3  # AdamW's
    muon_lr: float = 1.5e-3
    weight_decay: float = 0.01
    warmup: int = 500
    keep: float = 0.9995  # of the average, a step
    unnamed: float = 0.1  # share of clips whose caption is dropped
    precision: str = "tf32"  # of products: fp32, tf32 (a GPU's tensor cores) or bf16 (autocast); weights are fp32 in each


@dataclass
class Progress:
    """Where a training stands. ``decay`` is (first step, steps) of the fall to zero, once it is planned."""

    step: int = 0
    decay: tuple[int, int] | None = None
    seconds: float = 0.0  # a step took, in the latest slice

    @property
    def done(self) -> bool:
        return self.decay is not None and self.step >= sum(self.decay)


def rate(step: int, warmup: int, decay: tuple[int, int] | None) -> float:
    """Learning-rate factor: linear warm-up, constant, and from ``decay``'s first step a line that meets zero one step past its last."""
    up = min(1.0, (step + 1) / warmup)
    return up if decay is None else up * min(1.0, max(0.0, (sum(decay) - step) / decay[1]))


# ---------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Clips:
    """Latents [n, 8, 5, 8, 8] in fp16, embeddings of their captions [captions + 1, L, 64] (the last of the empty one), and whose is whose [n]."""

    latents: Tensor
    texts: Tensor
    caption: Tensor


def clips(cache: Path, model: Generator, count: int, device: str, seed: int = 0) -> Clips:
    """``count`` clips of the mix, rendered on all cores and encoded once; latents are kept in ``cache``."""
    frames, captions = pool(cache, "mix", count, seed, workers=os.cpu_count() or 1)
    path = cache / f"latents-{count}-{seed}.npy"
    if not path.exists():
        part = path.with_suffix(".part.npy")
        np.save(part, encode(frames, model.vae, device, 50 if device == "cpu" else 500))
        part.rename(path)
    names = sorted(set(captions))
    row = {name: k for k, name in enumerate(names)}
    texts = torch.cat(
        [model.encode_text(names[i : i + 64]).tensors["embeds"] for i in range(0, len(names), 64)] + [model.encode_text([""]).tensors["embeds"]]
    )
    return Clips(torch.from_numpy(np.load(path)).to(device), texts.float().to(device), torch.tensor([row[c] for c in captions], device=device))


def draw(data: Clips, rng: torch.Generator, step: int, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The clips [B, ...], noise, times [B] and embeddings of a step."""
    device, size = data.latents.device, settings.batch
    rng.manual_seed(torch_rng(3, "base further", step).initial_seed())
    rows = torch.randint(len(data.latents), (size,), generator=rng, device=device)
    x0 = data.latents[rows].float()
    noise = torch.randn(x0.shape, generator=rng, device=device)
    t = training_times(torch.rand(size, generator=rng, device=device), FINE_SHIFT)
    unnamed = torch.rand(size, generator=rng, device=device) < settings.unnamed
    return x0, noise, t, data.texts[torch.where(unnamed, len(data.texts) - 1, data.caption[rows])]


# ---------------------------------------------------------------------------------------------- the step


@dataclass(frozen=True)
class Trained:
    """All that a step changes: the weights with their optimizer, their average, and the sum of losses since the last look."""

    transformer: nn.Module
    optimizer: Stacked
    average: list[Tensor]  # in the order of the transformer's parameters
    loss: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.transformer.parameters(), *self.average, *self.optimizer.state.values(), self.loss]


def trained(transformer: nn.Module) -> Trained:
    """A transformer's training from its present weights."""
    transformer.requires_grad_(True)
    every, matrices = list(transformer.parameters()), block_matrices(transformer)
    rest = [p for p in every if all(p is not m for m in matrices)]
    return Trained(transformer, stacked(matrices, rest), [p.detach().clone() for p in every], torch.zeros((), device=every[0].device))


def step(state: Trained, inputs: tuple[Tensor, ...], settings: Settings) -> None:
    """Forward, backward, optimizer and average, with nothing that a CUDA graph cannot hold."""
    x0, noise, t, text = inputs
    every = list(state.transformer.parameters())
    for p in every:
        p.grad = None
    # no cache of cast weights: under a graph it would outlive the step
    cast = torch.autocast(x0.device.type, torch.bfloat16, cache_enabled=False) if settings.precision == "bf16" else nullcontext()
    with cast:
        v = state.transformer(noisy(x0, noise, t), t * 1000, text, return_dict=False)[0]
    loss = (v.float() - (noise - x0)).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(every, 1.0)
    update(state.optimizer)
    with torch.no_grad():
        torch._foreach_lerp_(state.average, every, 1 - settings.keep)
        state.loss.add_(loss)


@torch.no_grad()
def captured(work: Callable[[], None], held: list[Tensor]) -> Callable[[], None]:
    """``work`` as a CUDA graph. It runs three times before, which capturing needs; the tensors that it changes, ``held``, are put back."""
    kept = [x.clone() for x in held]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.enable_grad():
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch._foreach_copy_(held, kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.enable_grad():
        work()
    return graph.replay


# ---------------------------------------------------------------------------------------------- files


def save(work: Path, state: Trained, progress: Progress, settings: Settings) -> None:
    """Three files of 7 MiB named after the step, then ``further.json``, which names the step that counts."""
    work.mkdir(parents=True, exist_ok=True)
    names = [name for name, _ in state.transformer.named_parameters()]
    files = {
        "weights": dict(state.transformer.named_parameters()),
        "average": dict(zip(names, state.average, strict=True)),
        "optimizer": state.optimizer.state,
    }
    for part, tensors in files.items():
        save_file({k: v.detach() for k, v in tensors.items()}, work / f"{part}-{progress.step}.safetensors")
    write_text(work / "further.json", json.dumps({"progress": asdict(progress), "settings": asdict(settings)}, indent=1))
    for path in work.glob("*.safetensors"):
        if path.stem not in [f"{part}-{progress.step}" for part in files]:
            path.unlink()


def read(work: Path) -> tuple[Progress, Settings] | None:
    """Where the training in ``work`` stands, and its settings; None where there is none."""
    path = work / "further.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    decay = found["progress"]["decay"]
    return Progress(**{**found["progress"], "decay": decay and tuple(decay)}), Settings(**found["settings"])


@torch.no_grad()
def restore(work: Path, state: Trained, progress: Progress) -> None:
    """The tensors that ``save`` wrote, into those of ``state``."""
    saved = {part: load_file(work / f"{part}-{progress.step}.safetensors") for part in ("weights", "average", "optimizer")}
    for (name, p), average in zip(state.transformer.named_parameters(), state.average, strict=True):
        p.copy_(saved["weights"][name])
        average.copy_(saved["average"][name])
    for name, value in state.optimizer.state.items():
        value.copy_(saved["optimizer"][name])


# ---------------------------------------------------------------------------------------------- the slice


def load(path: Path = GENERATOR) -> Generator:
    """A sandbox generator in fp32."""
    return generator.load("wan", path, options=Options(text_length=LENGTH))


def train(
    work: Path,
    cache: Path,
    start: Path,
    device: str,
    deadline: float,
    settings: Settings,
    decay: int | None = None,
    form: str = "compiled",
    every: int = EVERY,
) -> Progress:
    """One slice: until ``deadline`` (of time.monotonic), or to the end of the decay. Goes on from ``work`` where something is saved there.

    ``decay`` begins the fall of the rate to zero, in so many steps, or at 0 in as many as the time left will hold; one
    that has begun goes on. ``form`` is one of FORMS. RecipeError when ``work`` holds a training with other settings, TrainingError
    when the loss is not finite.
    """
    found = read(work)
    progress, before = found or (Progress(), settings)
    changed = [k for k, v in asdict(before).items() if getattr(settings, k) != v]
    if changed:
        raise RecipeError(f"{work} was begun with {changed[0]} = {getattr(before, changed[0])}; give the same, or another --work")
    if device != "cpu":
        torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
    model = load(start)
    data = clips(cache, model, settings.clips, device)
    state = trained(model.transformer.to(device))
    if found:
        restore(work, state, progress)
    inputs = draw(data, rng := torch.Generator(device), progress.step, settings)
    advance = partial(step, state, inputs, settings)
    if device != "cpu" and form == "compiled":
        for block in state.transformer.blocks:
            block.compile(dynamic=False)  # all blocks share one compilation
    if device != "cpu" and form != "eager":
        advance = captured(advance, state.tensors)
    timed = saved = said = time.monotonic()
    first = heard = progress.step
    while not progress.done:
        if decay is not None and progress.decay is None and (decay or progress.seconds):
            left = SPARE * (deadline - time.monotonic())
            progress.decay = (progress.step, decay or max(int(left / progress.seconds), every))
            print(f"the rate falls to zero in {progress.decay[1]} steps from {progress.step}", flush=True)
        for _ in range(min(every, sum(progress.decay) - progress.step) if progress.decay else every):
            now = rate(progress.step, settings.warmup, progress.decay)
            set_rates(state.optimizer, progress.step, now * settings.muon_lr, now * settings.lr, settings.weight_decay)
            for held, new in zip(inputs, draw(data, rng, progress.step, settings), strict=True):
                held.copy_(new)
            advance()
            progress.step += 1
        total = state.loss.item()  # waits for the device
        if not math.isfinite(total):
            raise TrainingError(f"the loss is not finite within {every} steps before step {progress.step}; what was saved is intact. Lower the rates")
        clock = time.monotonic()
        progress.seconds = (clock - timed) / (progress.step - first)
        stop = progress.done or clock > deadline
        if stop or clock - said > SAY_EVERY:
            mean = total / (progress.step - heard)
            print(f"step {progress.step}  loss {mean:.4f} since {heard}  rate {now:.3f}  {1e3 * progress.seconds:.2f} ms a step", flush=True)
            state.loss.zero_()
            heard, said = progress.step, clock
        if stop or clock - saved > SAVE_EVERY:
            save(work, state, progress, settings)
            saved = clock
        if stop:
            break
    return progress


def write(work: Path, start: Path, folder: Path) -> None:
    """The average so far in the place of ``start``'s transformer, in half precision."""
    found = read(work)
    if found is None:
        raise RecipeError(f"{work} holds no training; name the --work of one")
    pipeline = load(start).pipeline
    pipeline.transformer.load_state_dict(load_file(work / f"average-{found[0].step}.safetensors"))
    save_half(pipeline, folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ldo.sandbox.build.further", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/sandbox-further"), help="the training: three files of 7 MiB and further.json")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/sandbox-clips"), help="rendered clips and their latents (57 KB a clip), made on first use"
    )
    parser.add_argument("--start", type=Path, default=GENERATOR, help="the pipeline to begin with")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of this slice, the making of clips included")
    parser.add_argument(
        "--decay", type=int, nargs="?", const=0, metavar="STEPS", help="let the rate fall to zero; without a number, within this slice"
    )
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the average as a pipeline, and train nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--form", choices=FORMS, default=FORMS[0], help="of a step on a GPU: compiled blocks in a CUDA graph, stock kernels in one, neither"
    )
    parser.add_argument("--precision", choices=PRECISIONS)
    for name, kind in (("clips", int), ("batch", int), ("lr", float), ("muon-lr", float), ("warmup", int)):
        parser.add_argument(f"--{name}", type=kind, help=f"default {getattr(Settings, name.replace('-', '_'))}")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    quiet()
    try:
        if args.write:
            write(args.work, args.start, args.write)
            return 0
        found = read(args.work)
        given = {f: value for f in asdict(Settings()) if (value := getattr(args, f, None)) is not None}
        settings = replace(found[1] if found else Settings(), **given)
        progress = train(args.work, args.cache, args.start, args.device, deadline, settings, args.decay, args.form)
    except (RecipeError, TrainingError) as error:
        print(f"ldo: {error}", file=sys.stderr)
        return 2
    print(f"step {progress.step}: " + ("done" if progress.done else "out of time; run the same command again to go on"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
