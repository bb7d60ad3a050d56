"""Stage 1: flow matching on clips, with the teacher's relation loss on one block's hidden state.

    L = |v - (e - x_0)|^2 + weight * L_PDA

The ``sft`` stage is the control: the same clips, noise, times and steps without the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldo import checkpoint, data, flow, lora
from ldo.metrics import Log
from ldo.progress import Bar
from ldo.rng import torch_rng
from ldo.run import Run, in_batches, sandbox_clips
from ldo.selfmode import own_clips
from ldo.teacher import Aligner, Target, make_target
from ldo.update import apply, warm

HELD_OUT = (0.2, 0.5, 0.8)  # noise levels of the held-out loss


@dataclass(frozen=True)
class Clips:
    """Latents, text embeddings' prompts and teacher targets of all clips, made once a run and kept in memory."""

    latents: Tensor
    prompts: list[str]
    target: Target

    def __len__(self) -> int:
        return len(self.latents)


def prepare(run: Run) -> Clips:
    """Encode every clip once with the VAE and the world model."""
    if run.prepared is not None:
        return run.prepared
    recipe = run.recipe
    clips = run.clips
    if recipe.data.source == "self":
        clips = own_clips(run)
    elif clips is None:
        clips = sandbox_clips(run)
    latents, targets = [], []
    for rows in in_batches(run, "encode", len(clips)):
        frames = run.frames_of(clips[rows]).to(run.world.device)
        latents.append(run.generator.encode_video(frames).cpu())
        targets.append(make_target(run.judge, frames, recipe.teacher).to(torch.device("cpu")))
    first = targets[0]
    target = Target(torch.cat([t.y_BNE for t in targets]), torch.cat([t.weight_BN for t in targets]), first.grid, first.skip)
    run.prepared = Clips(torch.cat(latents), [c.text for c in clips], target)
    return run.prepared


def block_index(run: Run) -> int:
    """The aligned block: ``teacher.block`` as a share of depth."""
    blocks = run.generator.geometry.blocks
    return min(int(run.recipe.teacher.block * blocks), blocks - 1)


def losses(run: Run, aligner: Aligner | None, clips: Clips, rows: Tensor, noise: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Flow loss and L_PDA (0 without an aligner) of some clips at given noise and times."""
    device = run.world.device
    x0, noise, t_B = clips.latents[rows].to(device), noise.to(device), t_B.to(device)
    text = run.texts([clips.prompts[i] for i in rows.tolist()])
    x = flow.noisy(x0, noise, t_B)
    if aligner is None:
        v = run.generator.velocity(x, t_B, text)
        pda = v.new_zeros(())
    else:
        with run.generator.tap(block_index(run)) as tap:
            v = run.generator.velocity(x, t_B, text)
        pda = aligner(tap.take(), clips.target.take(rows).to(device))
    return run.generator.flow_loss(v, noise - x0, t_B), pda


def micro_batches(rows: list[int], size: int) -> list[list[int]]:
    """The rows of a step in forward passes of at most ``size``; 0 takes them all at once."""
    return [rows[i : i + (size or len(rows))] for i in range(0, len(rows), size or len(rows))]


def make_aligner(run: Run) -> Aligner:
    """The relation loss for this run's models; its projector, if any, starts from the run's seed."""
    geometry = run.generator.geometry
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        aligner = Aligner(run.recipe.teacher, geometry.width, run.judge.dim, geometry.time, run.judge.tubelet)
    return aligner.to(run.world.device)


def train(run: Run, stage: str) -> dict[str, Tensor]:
    """Run the ``align`` stage or its ``sft`` control from a fresh adapter; returns and exports the adapter's values."""
    recipe, world, config = run.recipe, run.world, run.recipe.align
    parameters = run.parameters
    aligner = make_aligner(run) if stage == "align" else None
    trained = [*parameters.values(), *(aligner.parameters() if aligner else [])]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    lora.restore(parameters, run.fresh)
    step = 0
    state = checkpoint.load(run.checkpoint(stage))
    if state:
        step = state["step"]
        lora.restore(parameters, state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        if aligner:
            aligner.load_state_dict(state["aligner"])
    if step < config.steps:
        clips = prepare(run)
        kept = max(len(clips) - min(32, len(clips) // 8), 1)  # the last ones are held out
        log = Log(run.folder, stage, step, world.first)
        shape = tuple(clips.latents.shape[1:])
        with Bar(stage, config.steps, step, world.first) as bar:
            while step < config.steps:
                rows = torch.from_numpy(data.batch_indices(recipe.seed, "align", step, config.batch, kept))
                rng = torch_rng(recipe.seed, "align", step)
                noise = torch.randn((config.batch, *clips.latents.shape[1:]), generator=rng)
                t_B = run.generator.training_times(torch.rand(config.batch, generator=rng), shape, config.time_shift)
                mine = list(world.share(config.batch))
                flow_loss, pda = torch.zeros(()), torch.zeros(())
                for part in micro_batches(mine, config.micro_batch):
                    found = losses(run, aligner, clips, rows[part], noise[part], t_B[part])
                    share = len(part) / len(mine)
                    ((found[0] + recipe.teacher.weight * found[1]) * share).backward()
                    flow_loss, pda = (a + b.detach().cpu() * share for a, b in zip((flow_loss, pda), found, strict=True))
                where = f"{stage} step {step}, clips {rows[mine][:4].tolist()}..."
                norm = apply(optimizer, trained, world, config.max_grad_norm, warm(config.lr, step, config.warmup), where)
                step += 1
                figures = {"flow_loss": flow_loss.item(), "pda_loss": pda.item(), "grad_norm": norm}
                if step % recipe.save_every == 0 or step == config.steps:
                    figures |= held_out(run, aligner, clips, kept)
                log.write(step - 1, **figures)
                if step % recipe.save_every == 0 or step == config.steps:
                    save(run, stage, step, optimizer, aligner)
                bar.advance(f"flow {flow_loss.item():.3f}  pda {pda.item():.3f}")
        log.close()
    values = lora.snapshot(parameters)
    run.export("aligned" if stage == "align" else stage, values)
    return values


def save(run: Run, stage: str, step: int, optimizer: torch.optim.Optimizer, aligner: Aligner | None) -> None:
    """Checkpoint everything the next step depends on."""
    if run.world.first:
        state = {"step": step, "lora": lora.snapshot(run.parameters), "optimizer": optimizer.state_dict()}
        checkpoint.save(run.checkpoint(stage), state | ({"aligner": aligner.state_dict()} if aligner else {}))


@torch.no_grad()
def held_out(run: Run, aligner: Aligner | None, clips: Clips, kept: int) -> dict[str, float]:
    """Losses on held-out clips at fixed noise levels and fixed noise: comparable from step to step."""
    rows = torch.arange(kept, len(clips)) if kept < len(clips) else torch.arange(min(32, len(clips)))
    noise = torch.randn((len(rows), *clips.latents.shape[1:]), generator=torch_rng(run.seed, "held out"))
    figures = {}
    total = 0.0
    for t in HELD_OUT:
        flow_loss, pda = losses(run, aligner, clips, rows, noise, torch.full((len(rows),), t))
        figures[f"held_out_flow_{t}"] = flow_loss.item()
        total += pda.item() / len(HELD_OUT)
    return figures | ({"held_out_pda": total} if aligner else {})
