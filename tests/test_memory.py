"""The memory model against what PyTorch's CPU allocator measures on the same programs, and the table and verdict made of it.

On a CPU the profiler sees every allocation, also those that kernels make for themselves, which the model does not count;
in fp32 those are small.
"""

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch

import recipes
from benchmarks.memory import peak_extra
from ldo import budget, critic, lora, memory, meta, passes, reinforce, teacher
from ldo.check import main as check_main
from ldo.config import Critic, RecipeError, Teacher, read
from ldo.generator import published
from ldo.live import WORKSPACE, Live, kernels, relation
from ldo.passes import Step
from ldo.sandbox import dataset

CPU = torch.device("cpu")
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
LATENT, TEXT = (8, 5, 16, 16), 32  # 320 tokens
TARGETS = meta.FAMILIES["WanTransformer3DModel"].targets


def a_step(dtype=torch.float32, batch=2, checkpointing=False, config=CONFIG, **more):
    return Step(json.dumps(config), dtype, batch, LATENT, TEXT, 8, TARGETS, checkpointing, device="cpu", **more)


def real_transformer(step: Step):
    """The same transformer with weights, its adapter, and gradients already there."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_config(json.loads(step.config)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not set(model._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.to(step.dtype)
    for parameter in lora.add({"transformer": model}, step.rank, step.rank, step.targets, 0).values():
        parameter.grad = torch.zeros_like(parameter)
    if step.checkpointing:
        model.enable_gradient_checkpointing()

    def velocity(x):
        text = torch.randn(len(x), step.text, 64).to(step.dtype)
        return model(hidden_states=x.to(step.dtype), timestep=torch.rand(len(x)), encoder_hidden_states=text, return_dict=False)[0].float()

    return velocity


def measured_training(step: Step) -> float:
    velocity = real_transformer(step)

    def work():
        noise, x0 = (torch.randn(step.batch, *step.latent) for _ in range(2))
        (velocity(noise) - (noise - x0)).square().mean().backward()

    return peak_extra(work, CPU, 0) * 2**20


# ---------------------------------------------------------------------------------------------- the counter


def test_live_counts_what_the_allocator_does():
    a = torch.randn(64, 1000)

    def work():
        b = a @ a.T
        c = torch.randn(300, 1000)
        d = c.exp()
        del c
        e = (d[:64] + a).view(-1)[10:]
        return b, e * 2

    with Live() as live:
        kept = work()
    assert live.now == sum(t.numel() * 4 for t in kept)
    assert live.peak == peak_extra(work, CPU, 0) * 2**20


def test_views_of_what_was_there_before_cost_nothing():
    weight = torch.empty(1000, 1000, device="meta")
    with Live() as live:
        weight.t()[3:].unsqueeze(0).detach()
        weight.add_(1)
    assert live.peak == 0


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
    velocity, x = real_transformer(step), torch.randn(step.batch, *step.latent)
    with torch.no_grad():
        found = peak_extra(lambda: velocity(x), CPU, 0) * 2**20
    assert passes.sampling_bytes(step) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("encode", [False, True])
def test_the_vae(wan, wan_folder, encode):
    config = published.configs(wan_folder)["vae"]
    size, latent, batch = (17, 64, 64), (4, 5, 16, 16), 2
    frames, z = torch.rand(batch, size[0], 3, *size[1:]), torch.randn(batch, *latent)
    found = peak_extra((lambda: wan.encode_video(frames)) if encode else (lambda: wan.decode_video(z)), CPU, 0) * 2**20
    assert batch * passes.vae_bytes(json.dumps(config), torch.float32, size, latent, encode) == pytest.approx(found, rel=0.15)


def test_the_critic(judge, vjepa_folder):
    config, options, frames = json.dumps(published.configs(vjepa_folder)["config"]), Critic(), torch.rand(4, 33, 3, 64, 64)
    found = peak_extra(lambda: critic.score(judge, frames, options), CPU, 0) * 2**20
    assert 4 * passes.critic_bytes(config, torch.float32, options, (33, 64, 64)) == pytest.approx(found, rel=0.15)


def test_the_teachers_targets(judge, vjepa_folder):
    config, options, frames = json.dumps(published.configs(vjepa_folder)["config"]), Teacher(), torch.rand(4, 33, 3, 64, 64)
    found = peak_extra(lambda: teacher.make_target(judge, frames, options), CPU, 0) * 2**20
    assert 4 * passes.target_bytes(config, torch.float32, options, (33, 64, 64)) == pytest.approx(found, rel=0.15)


def test_the_guards():
    x, reference = torch.rand(3, 17, 3, 32, 32), torch.rand(3, 17, 3, 32, 32)
    found = peak_extra(lambda: critic.guards(x, reference, Critic()), CPU, 0) * 2**20
    assert 3 * passes.guard_bytes(Critic(), (17, 32, 32)) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize(("groups", "size", "micro", "within"), [(2, 4, 0, 0.15), (2, 4, 2, 0.01), (4, 4, 2, 0.01)])
def test_judging_a_rollout(open_run, groups, size, micro, within):
    """Videos of one group at a time: with micro-batches the guards on a group are the most, whole groups are decoded in one pass, see the VAE."""
    changes = {"rl__prompts": groups, "rl__group_size": size, "rl__micro_batch": micro, "rl__minibatches": 1, "rl__kl": 0.0}
    run = open_run(stages=["reinforce"], **changes)
    n, shape, few = groups * size, reinforce.latent_shape(run), math.gcd(groups, micro) if micro else groups
    final, quiet = torch.randn(n, *shape), torch.randn(groups, *shape)
    found = peak_extra(lambda: reinforce.judge(run, final, quiet, few, []), CPU, 0) * 2**20
    p = memory.plan(run.recipe, run.recipe.model.path, run.recipe.world_model.path)
    phases = [x for s in p.stages() for x in s.phases if s.name == "reinforce" and x.name.split()[0] in ("decode", "score", "guards")]
    steps = run.recipe.rl.window
    held = n * ((2 + 4 * steps) * p.latents + p.text) + groups * p.latents  # noise, trajectory, embeddings: there before
    assert len(phases) == 3 and max(x.held + x.work for x in phases) - held == pytest.approx(found, rel=within)


# ---------------------------------------------------------------------------------------------- extrapolation and families


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_block_adds_the_same(checkpointing, monkeypatch):
    step = a_step(checkpointing=checkpointing, config=CONFIG | {"num_layers": 6})
    guess = passes.training_bytes.__wrapped__(step)
    monkeypatch.setattr(passes, "_extrapolated", lambda _text, measure: measure({}))
    assert guess == pytest.approx(passes.training_bytes.__wrapped__(step), rel=1e-3)


def test_two_kinds_of_blocks_are_extrapolated_apart(monkeypatch):
    config = published.configs("hunyuanvideo-community/HunyuanVideo")["transformer"]
    config |= {"num_layers": 3, "num_single_layers": 4, "num_attention_heads": 2}
    targets = meta.family(config).targets
    step = Step(json.dumps(config), torch.bfloat16, 1, (16, 3, 8, 8), 16, 4, targets)
    guess = passes.training_bytes.__wrapped__(step)
    monkeypatch.setattr(passes, "_extrapolated", lambda _text, measure: measure({}))
    assert guess == pytest.approx(passes.training_bytes.__wrapped__(step), rel=1e-2)


GENERATORS = [n for n in published.names() if n.startswith(("THUDM", "hunyuan")) or n in ("Lightricks/LTX-Video", "Wan-AI/Wan2.2-TI2V-5B-Diffusers")]


@pytest.mark.parametrize("name", GENERATORS)
def test_every_family_runs_on_meta(name):
    """Tokens dominate at this size, so that a step's memory grows with the batch, and checkpointing and depth matter."""
    parts = published.configs(name)
    geometry = meta.geometry(parts)
    config = parts["transformer"] | {key: 2 for key in meta.family(parts["transformer"]).counts}
    text = json.dumps(config)
    alignment = passes.Alignment(Teacher(), 32, (2, 4, 4), 4, 2) if geometry.time == 4 else None
    whole = Step(text, torch.bfloat16, 1, (geometry.channels, 2, 32, 32), 226, 4, meta.family(config).targets)
    thrifty = dataclasses.replace(whole, checkpointing=True)
    assert passes.training_bytes(thrifty, alignment) < passes.training_bytes(whole, alignment)
    assert passes.sampling_bytes(whole) < passes.training_bytes(thrifty)


def test_weights_in_8_bits_are_widened_one_layer_at_a_time():
    config = CONFIG | {"num_attention_heads": 8, "ffn_dim": 2048}
    step = a_step(torch.bfloat16, 1, True, config)
    wide, narrow = (passes.sizes(json.dumps(config), torch.bfloat16, None, fp8)[1] for fp8 in (False, True))
    extra = passes.training_bytes(dataclasses.replace(step, fp8=True)) - passes.training_bytes(step)
    assert narrow < 0.6 * wide and 0 <= extra < (wide - narrow) * 0.6


def test_what_waits_on_the_cpu_is_not_resident(plan):
    p = plan()
    p.offload = ("text", "vae", "world_model")
    assert p._resident() == p.weights["transformer"] and p._resident("vae") == p.weights["transformer"] + p.weights["vae"]


def test_attention_keeps_no_matrix_of_all_pairs():
    q = torch.empty(1, 4, 4096, 64, device="meta", requires_grad=True)
    with kernels(), Live() as live:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert live.peak < 12 * q.numel() * 4 < 4 * 4096**2 * 4


def test_the_relation_loss_stands_in_for_the_kernel():
    relation_kernel = pytest.importorskip("ldo.kernels.relation")
    assert relation_kernel.WORKSPACE == WORKSPACE
    student = torch.empty(2, 1000, 64, device="meta", requires_grad=True)
    with Live() as live:
        relation(student, torch.empty(2, 1000, 32, device="meta")).backward()
    pairs, rows = 2 * 1000 * 1000 * 4, 2 * 1000 * 64 * 4
    assert pairs + rows <= live.peak <= pairs + 4 * rows


# ---------------------------------------------------------------------------------------------- the table


@pytest.fixture
def recipe(tmp_path, wan_folder, vjepa_folder):
    stages = ["gate", "sft", "align", "reinforce", "evaluate"]
    return lambda **changes: recipes.write(tmp_path, wan_folder, vjepa_folder, **({"stages": stages} | changes))


@pytest.fixture
def plan(recipe, wan_folder, vjepa_folder):
    def make(gpus=1, **changes):
        r = read(recipe(**changes))
        return memory.plan(r, r.model.path, r.world_model.path, gpus)

    return make


def test_stages_and_weights(plan, wan, judge):
    p = plan()
    stages = {s.name: s for s in p.stages()}
    assert list(stages) == ["load", "gate", "align", "reinforce", "evaluate"]
    assert p.weights["world_model"] == meta.size(judge.model)
    assert p.weights["transformer"] + p.weights["vae"] == meta.size(wan.transformer) + meta.size(wan.vae)
    assert stages["load"].worst.total == sum(p.weights.values()) + 2 * p.lora
    assert all(phase.total <= stage.worst.total for stage in stages.values() for phase in stage.phases)


def test_gpus_share_the_batch_and_the_groups(plan):
    phases = [{p.name.split()[0]: p for s in plan(gpus).stages() for p in s.phases if s.name == "align"} for gpus in (1, 2)]
    assert phases[1]["train"].name == "train on 2" and phases[1]["train"].work < 0.6 * phases[0]["train"].work
    rollouts = [next(p for s in plan(gpus).stages() if s.name == "reinforce" for p in s.phases if p.name.startswith("sample")) for gpus in (1, 2)]
    assert rollouts[0].held > 1.8 * rollouts[1].held


def test_the_largest_bucket_tells(plan):
    def work(**changes):
        return next(p.work for s in plan(stages=["align"], **changes).stages() for p in s.phases if p.name.startswith("train"))

    assert work(data__buckets=[[17, 32, 32], [17, 64, 64]]) == work(data__height=64, data__width=64) > 2 * work()


def test_guidance_trains_through_two_passes(plan):
    def work(**changes):
        return next(p.work for s in plan(**changes).stages() if s.name == "reinforce" for p in s.phases if p.name.startswith("train"))

    assert 1.9 < work(rl__guidance=3.0) / work() < 2.1


def test_clips_beside_the_rollout_take_what_their_losses_do_in_stage_one(plan):
    def phase(stage, begins, **changes):
        return next(p for s in plan(stages=[stage], **changes).stages() if s.name == stage for p in s.phases if p.name.startswith(begins))

    flow, both = (phase("reinforce", "clips beside", **{f"rl__{key}_weight": 0.1}) for key in ("flow", "align"))
    assert flow.work == phase("sft", "train on").work < both.work == phase("align", "train on").work


def test_both_experts_carry_an_adapter(plan):
    p = plan()
    two = memory.Plan(p.recipe, p.parts | {"transformer_2": p.parts["transformer"]}, p.judge)
    assert two.lora == 2 * p.lora and sum(two.weights.values()) == sum(p.weights.values()) + p.weights["transformer"]


@pytest.mark.parametrize(("text", "size"), [("80G", 80 * 2**30), ("79.5GiB", int(79.5 * 2**30)), ("512 mb", 2**29), ("24GB", 24 * 2**30)])
def test_memory_sizes(text, size):
    assert budget.parse_memory(text) == size


@pytest.mark.parametrize("text", ["80", "eighty", "0G", "-1G", "80T"])
def test_memory_sizes_that_are_none(text):
    with pytest.raises(RecipeError, match=r"give the memory of one GPU, e\.g\. 80G"):
        budget.parse_memory(text)


def large(tmp_path, **changes) -> Path:
    """A recipe of published models at a real size, which a Hub name stands for."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ball rolls\na ball falls\n")
    tree = {"model.path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "model.dtype": "bfloat16", "world_model.path": "facebook/vjepa2-vitl-fpc64-256"}
    size = {"data.frames": 33, "data.height": 240, "data.width": 416, "data.prompts": str(prompts), "evaluate.prompts": str(prompts)}
    path = recipes.write(tmp_path, Path("-"), Path("-"), **tree, **size, **changes)
    return path


def test_what_to_change_is_recomputed(plan):
    p = plan(stages=["align"], data__height=64, data__width=64)
    limit = p.stages()[0].worst.total + budget.RESERVED  # the models fit, and nothing that works on them
    fits, words = budget.verdict(p, limit)
    found = budget.mends(p, limit)
    assert not fits and words.startswith("does not fit: ")
    assert [m.saves for m in found] == sorted((m.saves for m in found), reverse=True)
    thrifty = next(m for m in found if m.key == "model.gradient_checkpointing")
    after = budget.with_all(p, [thrifty])
    name = thrifty.where.split(": ")[1]
    now, then = (next(x for s in q.stages() for x in s.phases if x.name == name) for q in (p, after))
    assert thrifty.text == "model.gradient_checkpointing=true" and thrifty.saves == now.total - then.total > 0
    assert budget.verdict(p, budget.peak(p.stages()))[0] and not budget.verdict(p, budget.peak(p.stages()) - 1)[0]


def test_check_prints_a_table_for_hub_models_within_a_minute(tmp_path, capsys):
    began = time.process_time()
    assert check_main([str(large(tmp_path)), "--memory", "10000G"]) == 0
    assert time.process_time() - began < 60
    out = capsys.readouterr().out
    assert "transformer 1.42 B" in out and "fits: " in out and "host memory" in out and "The recipe is sound." in out
    assert all(f"\n  {stage} " in out for stage in ("load", "align", "reinforce"))


def test_too_large_is_exit_code_1(recipe, capsys):
    assert check_main([str(recipe()), "stages=[align]", "--memory", "1G"]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "The recipe is sound, but too large." in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.frames=32", "32 frames; the VAE takes 4K+1: use 33"),
        ("data.height=250", "height 250; it must be a multiple of 16"),
        ("model.family=ltx", "model.family is 'ltx', but Wan-AI/Wan2.1-T2V-1.3B-Diffusers holds a wan model; set model.family=wan"),
    ],
)
def test_sizes_that_a_hub_model_cannot_take(tmp_path, capsys, change, words):
    assert check_main([str(large(tmp_path)), change]) == 2
    assert words in capsys.readouterr().err


def test_mistakes_of_the_command_line(recipe, capsys):
    assert check_main([str(recipe()), "--memory", "much"]) == 2
    assert check_main([str(recipe()), "--gpus", "3"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "--memory is 'much'" in lines[0] and "with 3 processes" in lines[1]


def test_models_that_nothing_is_known_of(tmp_path, capsys):
    assert check_main([str(large(tmp_path)), "model.path=someone/else", "--memory", "1G"]) == 0
    assert "memory       unknown" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipes_models_are_known(path):
    r = read(path)
    names = {"sandbox": str(dataset.GENERATOR)}, {"sandbox": str(dataset.WORLD_MODEL)}
    p = memory.plan(r, names[0].get(r.model.path, r.model.path), names[1].get(r.world_model.path, r.world_model.path))
    assert p is not None and p.lora > 0 and all(p.weights.values())


def test_the_sandboxs_table(capsys):
    assert check_main([str(Path(__file__).parent.parent / "recipes" / "sandbox.yaml")]) == 0
    assert "host memory" in capsys.readouterr().out
