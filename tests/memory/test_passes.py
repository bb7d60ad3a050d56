"""The peaks of passes against what PyTorch's CPU allocator measures on the same programs.

On a CPU the profiler sees every allocation, also those that kernels make for themselves, which the memory model does
not count; in fp32 those are small.
"""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks.memory import peak_extra
from ldo.core.config import CriticConfig, TeacherConfig
from ldo.memory import passes
from ldo.memory.meta_models import TRANSFORMERS, pipeline_geometry, transformer_family
from ldo.memory.passes import TransformerPass
from ldo.memory.plan import plan_memory
from ldo.method import teacher
from ldo.method.critic import score_clips
from ldo.method.guards import guard_penalties
from ldo.models import lora
from ldo.models.generator.published import model_configs, published_names
from ldo.stages.collect import judge_videos, video_latent_shape

CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 5,
    "rope_max_seq_len": 64,
}
# 320 tokens, so that activations outweigh what kernels allocate for themselves.
LATENT, TEXT = (8, 5, 16, 16), 32
TARGETS = TRANSFORMERS["WanTransformer3DModel"].targets


def measured(work) -> float:
    """The allocator's own peak of a program, in bytes."""
    return peak_extra(work, torch.device("cpu"), 0) * 2**20


def a_step(dtype=torch.float32, batch=2, checkpointing=False, config=CONFIG, **more):
    return TransformerPass(
        json.dumps(config), dtype, batch, LATENT, TEXT, 8, TARGETS, checkpointing, device="cpu", **more
    )


def real_transformer(step: TransformerPass):
    """The same transformer with weights, its adapter, and gradients already there."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_config(json.loads(step.config)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not set(model._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.to(step.dtype)
    # The model counts gradients with the adapter, so they are there before the pass is measured.
    for parameter in lora.add({"transformer": model}, step.rank, step.rank, step.targets, 0).values():
        parameter.grad = torch.zeros_like(parameter)
    if step.checkpointing:
        model.enable_gradient_checkpointing()

    def velocity(latents):
        text = torch.randn(len(latents), step.text, 64).to(step.dtype)
        return model(
            hidden_states=latents.to(step.dtype),
            timestep=torch.rand(len(latents)),
            encoder_hidden_states=text,
            return_dict=False,
        )[0].float()

    return velocity


def measured_training(step: TransformerPass) -> float:
    velocity = real_transformer(step)

    def work():
        noise, clean = torch.randn(step.batch, *step.latent), torch.randn(step.batch, *step.latent)
        (velocity(noise) - (noise - clean)).square().mean().backward()

    return measured(work)


# ---------------------------------------------------------------------------------------------- against the allocator


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_training_step_in_fp32(checkpointing, batch):
    step = a_step(batch=batch, checkpointing=checkpointing)
    assert passes.training_bytes(step) == pytest.approx(measured_training(step), rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_in_bf16(checkpointing):
    """Here the CPU's attention keeps fp32 buffers of its own for the backward, which the model does not see."""
    step = a_step(torch.bfloat16, 1, checkpointing, CONFIG | {"num_layers": 3})
    assert 0.85 < passes.training_bytes(step) / measured_training(step) < 1.0


def test_a_step_of_sampling():
    step = a_step()
    velocity = real_transformer(step)
    latents = torch.randn(step.batch, *step.latent)
    with torch.no_grad():
        measured_bytes = measured(lambda: velocity(latents))
    assert passes.sampling_bytes(step) == pytest.approx(measured_bytes, rel=0.03)


@pytest.mark.parametrize("encode", [False, True])
def test_the_vae(wan, wan_folder, encode):
    config = json.dumps(model_configs(wan_folder)["vae"])
    size, latent, batch = (17, 64, 64), (4, 5, 16, 16), 2
    frames, latents = torch.rand(batch, size[0], 3, *size[1:]), torch.randn(batch, *latent)
    measured_bytes = measured((lambda: wan.encode_video(frames)) if encode else (lambda: wan.decode_video(latents)))
    predicted_bytes = batch * passes.vae_bytes(config, torch.float32, size, latent, encode)
    assert predicted_bytes == pytest.approx(measured_bytes, rel=0.15)


def test_the_critic(judge, vjepa_folder):
    config = json.dumps(model_configs(vjepa_folder)["config"])
    frames = torch.rand(4, 33, 3, 64, 64)
    measured_bytes = measured(lambda: score_clips(judge, frames, CriticConfig()))
    predicted_bytes = 4 * passes.critic_bytes(config, torch.float32, CriticConfig(), (33, 64, 64))
    assert predicted_bytes == pytest.approx(measured_bytes, rel=0.15)


def test_the_teachers_targets(judge, vjepa_folder):
    config = json.dumps(model_configs(vjepa_folder)["config"])
    frames = torch.rand(4, 33, 3, 64, 64)
    measured_bytes = measured(lambda: teacher.make_target(judge, frames, TeacherConfig()))
    predicted_bytes = 4 * passes.target_bytes(config, torch.float32, TeacherConfig(), (33, 64, 64))
    assert predicted_bytes == pytest.approx(measured_bytes, rel=0.15)


def test_the_guards():
    frames, reference = torch.rand(3, 17, 3, 32, 32), torch.rand(3, 17, 3, 32, 32)
    measured_bytes = measured(lambda: guard_penalties(frames, reference, CriticConfig()))
    assert 3 * passes.guard_bytes(CriticConfig(), (17, 32, 32)) == pytest.approx(measured_bytes, rel=0.02)


@pytest.mark.parametrize(("groups", "size", "micro", "within"), [(2, 4, 0, 0.15), (2, 4, 2, 0.01), (4, 4, 2, 0.01)])
def test_judging_a_rollout(open_run, groups, size, micro, within):
    """Videos of one group at a time are judged.

    With micro-batches the guards on a group take the most; whole groups are decoded in one pass, for which see the VAE.
    """
    changes = {
        "rl__prompts": groups,
        "rl__group_size": size,
        "rl__micro_batch": micro,
        "rl__minibatches": 1,
        "rl__kl": 0.0,
    }
    run = open_run(stages=["reinforce"], **changes)
    videos, shape = groups * size, video_latent_shape(run)
    joined = math.gcd(groups, micro) if micro else groups
    ends, references = torch.randn(videos, *shape), torch.randn(groups, *shape)
    measured_bytes = measured(lambda: judge_videos(run, ends, references, joined, []))
    plan = plan_memory(run.recipe, run.recipe.model.path, run.recipe.world_model.path)
    reinforce = next(stage for stage in plan.stages() if stage.name == "reinforce")
    phases = [phase for phase in reinforce.phases if phase.name.split()[0] in ("decode", "score", "guards")]
    # Noise, trajectory and embeddings are there before.
    steps = run.recipe.rl.window
    held = videos * ((2 + 4 * steps) * plan.latents + plan.text) + groups * plan.latents
    most = max(phase.held + phase.work for phase in phases)
    assert len(phases) == 3 and most - held == pytest.approx(measured_bytes, rel=within)


# ------------------------------------------------------------------------------------------ extrapolation and families


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_block_adds_the_same(checkpointing, monkeypatch):
    step = a_step(checkpointing=checkpointing, config=CONFIG | {"num_layers": 6})
    # Past the cache, which would return the first result again.
    extrapolated = passes.training_bytes.__wrapped__(step)
    monkeypatch.setattr(passes, "_extrapolated", lambda _text, measure: measure({}))
    assert extrapolated == pytest.approx(passes.training_bytes.__wrapped__(step), rel=1e-3)


def test_two_kinds_of_blocks_are_extrapolated_apart(monkeypatch):
    config = model_configs("hunyuanvideo-community/HunyuanVideo")["transformer"]
    # More of each kind than the two that are measured, and few heads, so that the test is quick.
    config |= {"num_layers": 3, "num_single_layers": 4, "num_attention_heads": 2}
    targets = transformer_family(config).targets
    step = TransformerPass(json.dumps(config), torch.bfloat16, 1, (16, 3, 8, 8), 16, 4, targets)
    extrapolated = passes.training_bytes.__wrapped__(step)
    monkeypatch.setattr(passes, "_extrapolated", lambda _text, measure: measure({}))
    assert extrapolated == pytest.approx(passes.training_bytes.__wrapped__(step), rel=1e-2)


GENERATORS = [
    name
    for name in published_names()
    if name.startswith(("THUDM", "hunyuan")) or name in ("Lightricks/LTX-Video", "Wan-AI/Wan2.2-TI2V-5B-Diffusers")
]


@pytest.mark.parametrize("name", GENERATORS)
def test_every_family_runs_on_meta(name):
    """At this size tokens dominate: a step's memory grows with the batch, and checkpointing and depth matter."""
    parts = model_configs(name)
    geometry = pipeline_geometry(parts)
    config = parts["transformer"] | {key: 2 for key in transformer_family(parts["transformer"]).counts}
    alignment = passes.Alignment(TeacherConfig(), 32, (2, 4, 4), 4, 2) if geometry.time == 4 else None
    latent, targets = (geometry.channels, 2, 32, 32), transformer_family(config).targets
    plain = TransformerPass(json.dumps(config), torch.bfloat16, 1, latent, 226, 4, targets)
    thrifty = dataclasses.replace(plain, checkpointing=True)
    assert passes.training_bytes(thrifty, alignment) < passes.training_bytes(plain, alignment)
    assert passes.sampling_bytes(plain) < passes.training_bytes(thrifty)


def test_weights_in_8_bits_are_widened_one_layer_at_a_time():
    config = CONFIG | {"num_attention_heads": 8, "ffn_dim": 2048}
    step = a_step(torch.bfloat16, 1, True, config)
    wide, narrow = (passes.sizes(json.dumps(config), torch.bfloat16, None, fp8)[1] for fp8 in (False, True))
    extra = passes.training_bytes(dataclasses.replace(step, fp8=True)) - passes.training_bytes(step)
    assert narrow < 0.6 * wide and 0 <= extra < (wide - narrow) * 0.6
