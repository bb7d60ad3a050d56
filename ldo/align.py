"""Stage 1: flow matching on clips, with the teacher's relation loss on one block's hidden state.

    L = |v - (e - x_0)|^2 + weight * L_PDA

The ``sft`` stage is the control: the same clips, noise, times and steps without the teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldo import checkpoint, flow, lora
from ldo.distributed import send
from ldo.encode import Clips, batch, prepare
from ldo.metrics import Log
from ldo.progress import Bar
from ldo.rng import torch_rng
from ldo.run import Run
from ldo.teacher import Aligner
from ldo.update import adamw, apply, warm

HELD_OUT = (0.2, 0.5, 0.8)  # noise levels of the held-out loss


def latent_shape(run: Run, clips: Clips, rows: Tensor) -> tuple[int, ...]:
    """Shape (C, T, H, W) of the latents of some rows of one size."""
    return run.generator.geometry.latents(*clips.sizes[int(rows[0])])


def block_index(run: Run) -> int:
    """The aligned block: ``teacher.block`` as a share of depth."""
    blocks = run.generator.geometry.blocks
    return min(int(run.recipe.teacher.block * blocks), blocks - 1)


def losses(run: Run, aligner: Aligner | None, clips: Clips, rows: Tensor, noise: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Flow loss and L_PDA (0 without an aligner) of some clips of one size at given noise and times."""
    device = run.world.device
    latents, target = clips.take(rows)
    x0, noise, t_B = (send(v, device) for v in (latents, noise, t_B))
    text = run.texts([clips.prompts[i] for i in rows.tolist()])
    x = flow.noisy(x0, noise, t_B)
    if aligner is None:
        v = run.generator.velocity(x, t_B, text)
        pda = v.new_zeros(())
    else:
        with run.generator.tap(block_index(run)) as tap:
            v = run.generator.velocity(x, t_B, text)
        pda = aligner(tap.take(), target.to(device))
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
    optimizer = adamw(trained, config.lr, config.weight_decay)
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
        kept, left = clips.split()
        log = Log(run.folder, stage, step, world.first, run.recipe)
        with Bar(stage, config.steps, step, world.first) as bar:
            while step < config.steps:
                rows = batch(kept, recipe.seed, "align", step, config.batch)
                rng = torch_rng(recipe.seed, "align", step)
                shape = latent_shape(run, clips, rows)
                noise = torch.randn((config.batch, *shape), generator=rng)
                t_B = run.generator.training_times(torch.rand(config.batch, generator=rng), shape, config.time_shift)
                mine = list(world.share(config.batch))
                flow_loss, pda = torch.zeros(2, device=world.device)
                for part in micro_batches(mine, config.micro_batch):
                    found = losses(run, aligner, clips, rows[part], noise[part], t_B[part])
                    share = len(part) / len(mine)
                    ((found[0] + recipe.teacher.weight * found[1]) * share).backward()
                    flow_loss, pda = (a + b.detach() * share for a, b in zip((flow_loss, pda), found, strict=True))
                where = f"{stage} step {step}, clips {rows[mine][:4].tolist()}..."
                norm = apply(optimizer, trained, world, config.max_grad_norm, warm(config.lr, step, config.warmup), where)
                step += 1
                figures = {"flow_loss": flow_loss.item(), "pda_loss": pda.item(), "grad_norm": norm}
                if step % recipe.save_every == 0 or step == config.steps:
                    figures |= held_out(run, aligner, clips, left)
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
def held_out(run: Run, aligner: Aligner | None, clips: Clips, left: list[list[int]]) -> dict[str, float]:
    """Losses on held-out clips at fixed noise levels and fixed noise: comparable from step to step."""
    if not any(left):  # too few clips to hold any out
        left = [rows[:32] for rows in clips.buckets()]
    rng = torch_rng(run.seed, "held out")
    parts = []
    for rows in filter(None, left):
        noise = torch.randn((len(rows), *latent_shape(run, clips, torch.tensor(rows))), generator=rng)
        parts += [(torch.tensor(rows)[at], noise[at]) for at in micro_batches(list(range(len(rows))), run.recipe.align.micro_batch)]
    count = sum(len(rows) for rows, _ in parts)
    figures = {}
    total = 0.0
    for t in HELD_OUT:
        found = [(len(rows) / count, losses(run, aligner, clips, rows, noise, torch.full((len(rows),), t))) for rows, noise in parts]
        figures[f"held_out_flow_{t}"] = sum(share * loss.item() for share, (loss, _) in found)
        total += sum(share * pda.item() for share, (_, pda) in found) / len(HELD_OUT)
    return figures | ({"held_out_pda": total} if aligner else {})
