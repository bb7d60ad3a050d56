"""One contract for every family: what the stock pipeline does, the adapter does too, seen as a flow; and both stages run."""

import json
import shutil
from collections.abc import Callable

import diffusers
import models
import pytest
import torch
from diffusers import DiffusionPipeline
from interrupt import interrupted
from safetensors.torch import load_file
from torch import nn

from ldo import align, generator, lora, reinforce
from ldo.generator.folder import read_geometry
from ldo.rollout import Plan, decode, kicks, sample, step
from ldo.train import main

FRAMES, SIDE = 17, 32
PROMPTS = ["a red ball rolls to the left", "a blue ball is thrown"]


@pytest.fixture(scope="session", params=models.FAMILIES)
def folder(request, tmp_path_factory):
    """A pipeline folder of each family, and the family's forms."""
    return models.FAMILIES[request.param](tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture
def model(folder):
    family, _ = read_geometry(folder)
    return generator.load(family, folder, options=generator.Options(text_length=16, guidance=3.0))


def stock(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(model, count=2, seed=0):
    shape = model.geometry.latents(FRAMES, SIDE, SIDE)
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def packed(model, x):
    """Latents as the stock pipeline's call takes them."""
    return {"cogvideox": lambda: x.transpose(1, 2), "ltx": lambda: x.flatten(2).transpose(1, 2)}.get(model.family, lambda: x)()


def velocities(model, t=(0.3, 0.95)):
    with torch.no_grad():
        return model.velocity(latents(model, 2), torch.tensor(t), model.encode_text(PROMPTS))


def generate(pipeline, model, noise, guidance=1.0, steps=8):
    return pipeline(
        PROMPTS,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        num_inference_steps=steps,
        latents=packed(model, noise),
        output_type="pt",
        **model.call_arguments(guidance),
    ).frames


# ---------------------------------------------------------------------------------------------- the stock pipeline


def test_geometry_is_the_json_s(model, folder):
    assert read_geometry(folder)[1] == model.geometry
    z = model.encode_video(torch.rand(1, FRAMES, 3, SIDE, SIDE))
    assert z.shape[1:] == model.geometry.latents(FRAMES, SIDE, SIDE)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_rollout_without_noise_is_the_stock_pipeline(model, folder, guidance):
    """Text, times, velocity, guidance and decoding at once: the same video comes out of the pipeline's own first-order sampler."""
    pipeline = stock(folder)
    if model.family == "wan":
        config = {**pipeline.scheduler.config, "solver_order": 1, "lower_order_final": True, "disable_corrector": list(range(9))}
        pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(config)
        exact = model.velocity  # the pipeline rounds the model's time down to whole thousandths
        model.velocity = lambda x, t, text: exact(x, (t * 1000).floor() / 1000, text)
    noise = latents(model)
    expected = generate(pipeline, model, noise, guidance)
    plan = Plan(tuple(model.times(8, noise.shape[1:])), (), "flow", 0.0, guidance)
    text, null = model.encode_text(PROMPTS), model.encode_text([""])
    own = sample(model, noise, text, null, plan, kicks(noise.shape, 0, torch.Generator()), 2).final_N
    found = decode(model, own, 2)
    assert expected.std() > 0.02 and (found - expected).abs().max() < 2e-4


def test_encoding_is_undone_by_decoding(model):
    frames = torch.rand(2, FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    raw = model.vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mode()
    z = model.encode_video(frames)
    assert torch.allclose(model.restore(z), raw, atol=1e-5) and not torch.allclose(z, raw, atol=1e-2)
    with pytest.raises(ValueError, match=rf"{model.family}: 16 frames; its VAE takes {model.geometry.time}K\+1"):
        model.encode_video(frames[:, :16])


# ---------------------------------------------------------------------------------------------- the tap


def test_tapped_grid_is_where_things_are(model):
    """A latent changed at one place is a token changed at that place of the grid, most of all."""
    x, text, t_B = latents(model, 1), model.encode_text(PROMPTS[:1]), torch.tensor([0.5])
    grid = model.geometry.tokens(x.shape)
    place = (grid[0] - 2, 0, grid[2] - 1)
    _, ph, pw = model.geometry.patch
    seen = []
    for planted in (False, True):
        if planted:
            x = x.clone()
            x[:, :, place[0], place[1] * ph : (place[1] + 1) * ph, place[2] * pw : (place[2] + 1) * pw] += 5
        with model.tap(0) as tap, torch.no_grad():
            model.velocity(x, t_B, text)
        seen.append(tap.take())
    assert seen[0].grid == grid and seen[0].x_BND.shape == (1, grid[0] * grid[1] * grid[2], model.geometry.width)
    change = (seen[1].x_BND - seen[0].x_BND).norm(dim=-1)
    assert int(change.argmax()) == (place[0] * grid[1] + place[1]) * grid[2] + place[2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tap_carries_gradient_and_is_taken_once(model, checkpointing):
    if checkpointing:
        for transformer in model.transformers.values():
            transformer.enable_gradient_checkpointing()
    parameters = models.adapter(model)
    with model.tap(0) as tap:
        v = model.velocity(latents(model), torch.tensor([0.3, 0.95]), model.encode_text(PROMPTS))
        before = tap.take().x_BND.detach().clone()
        v.sum().backward(retain_graph=True)  # checkpointing runs the blocks again here
        tapped = tap.take().x_BND
    assert torch.equal(tapped, before)
    for p in parameters.values():
        p.grad = None
    tapped.square().sum().backward()
    firsts = [p.grad for k, p in parameters.items() if "blocks.0." in k and "single" not in k]
    lasts = [p.grad for k, p in parameters.items() if "blocks.1." in k or "single" in k]
    assert any(g is not None and g.abs().sum() > 0 for g in firsts) and all(g is None for g in lasts)


def test_a_batch_gives_each_sample_what_it_gets_alone(model):
    """Mixed times in one batch, which two experts share among them, and the tap's rows in order."""
    x, t, text = latents(model, 4), torch.tensor([0.95, 0.2, 0.9, 0.6]), model.encode_text(PROMPTS * 2)
    with torch.no_grad(), model.tap(1) as tap:
        together = model.velocity(x, t, text)
    for i in range(4):
        with torch.no_grad(), model.tap(1) as alone:
            assert torch.allclose(model.velocity(x[i : i + 1], t[i : i + 1], text[[i]]), together[i : i + 1], atol=1e-5)
        assert torch.allclose(alone.take().x_BND, tap.take().x_BND[i : i + 1], atol=1e-5)


# ---------------------------------------------------------------------------------------------- the flow


class Oracle(nn.Module):
    """Stands in for a transformer and answers what a perfect one would for Gaussian data x_0 ~ N(0, scale^2), by the family's own rule."""

    def __init__(self, model, answer: Callable):
        super().__init__()
        self.config, self.answer, self.model = model.transformer.config, answer, [model]
        self.register_buffer("dtype_", torch.zeros(()))

    @property
    def dtype(self):
        return torch.float32

    def forward(self, hidden_states, timestep, **arguments):
        return (self.answer(hidden_states, timestep),)


def oracle(model, scale):
    """Replace the transformers by perfect ones."""
    if model.family == "cogvideox":
        alphas = model.pipeline.scheduler.alphas_cumprod.double()

        def answer(z, k):  # E[a e - s x_0 | z] with z = a x_0 + s e
            a, s = (v[k].view(-1, 1, 1, 1, 1) for v in (alphas.sqrt(), (1 - alphas).sqrt()))
            return ((a * s - s * a * scale**2) * z / (a**2 * scale**2 + s**2)).float()
    else:

        def answer(x, time):  # E[e - x_0 | x] with x = (1 - t) x_0 + t e
            t = (time if time.ndim == 1 else time[:, 0]).double().view(-1, *[1] * (x.ndim - 1)) / 1000
            return ((t - (1 - t) * scale**2) * x / ((1 - t) ** 2 * scale**2 + t**2)).float()

    for name in model.transformers:
        model.transformers[name] = Oracle(model, answer)


@pytest.mark.parametrize("sampler", ["ode", "flow", "dance", "cps"])
def test_samplers_end_in_the_data_with_the_densities_that_they_report(model, sampler):
    """With a perfect network every sampler keeps to x_t's true deviation, and log_prob is the normal density of each step.

    cps does so for data that is one video: its noise does not vanish with the step, as an SDE's does.
    """
    scale = 0.5 if sampler != "cps" else 1e-3
    oracle(model, scale)
    text, null = model.encode_text(PROMPTS[:1]), model.encode_text([""])
    shape = latents(model).shape[1:]
    count = 60000 // shape.numel()
    rng = torch.Generator().manual_seed(3)
    noise = torch.randn((count, *shape), generator=rng)
    steps = 500
    window = tuple(range(steps - 1)) if sampler != "ode" else ()
    plan = Plan(tuple(model.times(steps, shape)), window, sampler, 0.3, 1.0)
    found = sample(model, noise, text.expand(count), null, plan, kicks(noise.shape, len(window), rng), count)
    true = lambda t: ((1 - t) ** 2 * scale**2 + t**2) ** 0.5  # noqa: E731
    t = plan.times[-2]  # the last step, always the ODE's, ends in E[x_0 | x_t]
    assert sampler == "cps" or abs(float(found.final_N.std()) / ((1 - t) * scale**2 / true(t)) - 1) < 0.02
    for s in list(range(len(window)))[:: steps // 5]:
        mean, std = step(model, found.x_SN[s], window[s], plan, text.expand(count), null)
        density = torch.distributions.Normal(mean.double(), std).log_prob(found.next_SN[s].double()).flatten(1).mean(1)
        assert torch.allclose(found.logp_SN[s].double(), density, atol=1e-5)
        assert abs(float(found.x_SN[s].std()) / true(plan.times[s]) - 1) < 0.02
        pushed = (found.next_SN[s] - mean) / std
        assert abs(float(pushed.std()) - 1) < 0.02  # the noise has the deviation that the density says


def test_training_times_are_times_of_the_model(model):
    shape = latents(model).shape[1:]
    u = torch.linspace(0, 0.999, 2000)
    t = model.training_times(u, shape)
    assert t.min() >= 0 and t.max() <= 1 and (t.diff() >= 0).all()
    if model.family == "cogvideox":
        table = {float(v) for v in t}
        assert len(table) == 1000 and all(min(abs(v - w) for w in table) < 1e-6 for v in model.times(8, shape)[:-1])
    else:
        shift = model.shift(shape)
        assert torch.allclose(t, shift * u / (1 + (shift - 1) * u)) and shift > 1


# ---------------------------------------------------------------------------------------------- the LoRA


def comfy(model, values):
    return {name: model.comfy_names(lora.of(values, name)) for name in model.transformers}


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (6, 10.0)])
def test_stock_pipeline_reproduces_the_lora_exactly(model, folder, tmp_path, rank, alpha):
    parameters = models.adapter(model, rank, alpha)
    values = lora.snapshot(parameters)
    expected = velocities(model)
    lora.export(tmp_path, values, rank, alpha, model.lora_targets, comfy(model, values))
    assert {k: v.shape for k, v in lora.read(tmp_path).items()} == {k: v.shape for k, v in values.items()}
    pipeline = stock(folder)
    fresh = generator.adapter(model.family)(pipeline, model.options)
    assert not torch.allclose(velocities(fresh), expected, atol=1e-2)
    lora.load_into(pipeline, tmp_path)
    assert (velocities(fresh) - expected).abs().max() == 0.0
    noise = latents(model)
    assert torch.isfinite(generate(pipeline, model, noise, steps=2)).all()


def test_comfy_file_holds_the_same_update(model, folder, tmp_path):
    """Every layer's alpha / rank x up x down, from ComfyUI's file alone, equals the adapter's; diffusers reads the file where it knows the names."""
    rank, alpha = 4, 8.0
    values = lora.snapshot(models.adapter(model, rank, alpha))
    lora.export(tmp_path, values, rank, alpha, model.lora_targets, comfy(model, values))
    for name in model.transformers:
        own = lora.of(values, name)
        layers = sorted({k.rsplit(".lora_", 1)[0] for k in own})
        updates = {k: alpha / rank * own[f"{k}.lora_B.weight"] @ own[f"{k}.lora_A.weight"] for k in layers}
        file = load_file(tmp_path / lora.COMFY[name])
        found = {}
        for key in {k.rsplit(".", 2)[0] if k.endswith("weight") else k.rsplit(".", 1)[0] for k in file}:
            down, up = file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"]
            found[key] = float(file[f"{key}.alpha"]) / len(down) * up @ down
        joined = sum(len(layers_of(key, updates)) for key in found)
        assert joined == len(updates)
        for key, update in found.items():
            assert torch.allclose(update, torch.cat([updates[k] for k in layers_of(key, updates)]), atol=1e-6)
    if model.family in ("wan", "ltx") and len(model.transformers) == 1:
        pipeline = stock(folder)
        file = load_file(tmp_path / lora.COMFY["transformer"])
        if model.family == "ltx":  # its reader knows no alphas: put them into the weights
            sides = {"lora_up": ("lora_B", alpha / rank), "lora_down": ("lora_A", 1.0)}
            file = {k.replace(s, n): v * f for k, v in file.items() for s, (n, f) in sides.items() if s in k}
        pipeline.load_lora_weights(file)
        assert (velocities(generator.adapter(model.family)(pipeline, model.options)) - velocities(model)).abs().max() < 1e-5


def layers_of(key: str, updates: dict) -> list[str]:
    """The layers of diffusers' transformer that one of ComfyUI's holds, in its order; written out apart from the code it checks."""
    key = key.removeprefix("diffusion_model.")
    q, k, v = (f"attn.to_{n}" for n in "qkv")
    head, _, tail = key.partition("_blocks.")
    if head in ("double", "single"):
        block, _, layer = tail.partition(".")
        parts = {
            "img_attn_qkv": [q, k, v],
            "img_attn_proj": ["attn.to_out.0"],
            "img_mlp.fc1": ["ff.net.0.proj"],
            "img_mlp.fc2": ["ff.net.2"],
            "linear1": [q, k, v, "proj_mlp"],
            "linear2": ["proj_out"],
        }[layer]
        prefix = "transformer_blocks" if head == "double" else "single_transformer_blocks"
        return [f"{prefix}.{block}.{p}" for p in parts]
    for comfy, own in (("self_attn", "attn1"), ("cross_attn", "attn2"), ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2")):
        key = key.replace(comfy, own)
    if "attn" in key and key.split(".")[-1] in "qkvo":
        head, last = key.rsplit(".", 1)
        key = f"{head}.to_out.0" if last == "o" else f"{head}.to_{last}"
    assert key in updates
    return [key]


# ---------------------------------------------------------------------------------------------- both stages


@pytest.mark.slow
def test_both_stages_resume_to_the_bit_and_end_in_a_lora_for_the_stock_pipeline(folder, open_run):
    family, _ = read_geometry(folder)
    changes = dict(model__path=str(folder), model__family=family, align__steps=3, align__batch=2, rl__updates=3, rl__group_size=2, rl__prompts=2)
    changes |= dict(rl__guidance=2.0, rl__window_range=2, model__gradient_checkpointing=True)
    whole = open_run(**changes)
    align.train(whole, "align")
    expected = reinforce.train(whole)
    logs = {n: (whole.folder / n).read_text() for n in ("align.jsonl", "reinforce.jsonl")}
    rows = [json.loads(line) for line in logs["reinforce.jsonl"].splitlines()]
    assert rows[0]["ratio_off"] < 1e-3 and all(r["reward_std"] > 0 for r in rows)
    assert any((v != whole.fresh[k]).any() for k, v in expected.items())
    shutil.rmtree(whole.folder)

    for module, name, stage in ((align, "apply", lambda run: align.train(run, "align")), (reinforce, "learn", reinforce.train)):
        with interrupted(module, name, 3):  # past the checkpoint at 2
            stage(open_run(**changes))
        found = stage(open_run(**changes))
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert logs == {n: (whole.folder / n).read_text() for n in logs}

    pipeline = stock(folder)
    lora.load_into(pipeline, whole.lora_folder("ldo"))
    run = open_run(**changes)
    lora.restore(run.parameters, expected)
    assert (velocities(generator.adapter(family)(pipeline, run.generator.options)) - velocities(run.generator)).abs().max() == 0.0


@pytest.mark.slow
def test_evaluate_samples_with_the_family_s_own_arguments(folder, tmp_path, vjepa_folder):
    """From the command line: stage 1, stage 2 and the stock pipeline's videos of every arm."""
    import recipes

    family, _ = read_geometry(folder)
    changes = dict(model__path=str(folder), model__family=family, align__steps=1, align__batch=2, rl__updates=1, rl__group_size=2)
    changes |= dict(stages=["align", "reinforce", "evaluate"], data__clips=4, evaluate__count=2, evaluate__seeds=1, evaluate__batch=2)
    path = recipes.write(tmp_path, folder, vjepa_folder, **changes)
    assert main([str(path)]) == 0
    summary = json.loads((tmp_path / "runs" / "small" / "eval" / "summary.json").read_text())
    assert set(summary["metrics"]) == {"base", "aligned", "ldo"}
