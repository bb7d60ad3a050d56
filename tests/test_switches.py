"""Memory and speed switches: each is seen to act, both stages run under it, and what must not change does not."""

import logging
import shutil
from itertools import chain
from types import SimpleNamespace

import models
import pytest
import torch
from interrupt import interrupted
from peft.tuners.lora import LoraLayer
from torch import nn

import recipes
from ldo import align, check, checkpoint, generator, lora, meta, reinforce, switches
from ldo.config import Model, Recipe, RecipeError
from ldo.generator.folder import read_geometry
from ldo.metrics import read
from ldo.run import configure
from ldo.world_model import WorldModel

SHORT = {"stages": ["align", "reinforce"], "align__steps": 2, "align__batch": 2, "rl__updates": 1, "rl__group_size": 2, "rl__steps": 4}


def stages(run):
    """Both stages; what they export."""
    values = align.train(run, "align") | {f"rl {k}": v for k, v in reinforce.train(run).items()}
    rows = read(run.folder / "align.jsonl") + read(run.folder / "reinforce.jsonl")
    assert len(rows) == 3 and all(r["grad_norm"] > 0 for r in rows)
    return values


def adapted(dtype, family="wan"):
    """A tiny transformer in ``dtype`` with a filled fp32 adapter, and inputs."""
    model, call = models.transformer(family)
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules or ()):
            p.data = p.data.to(dtype)
    parameters = lora.add({"transformer": model}, 4, 8.0, meta.FAMILIES[type(model).__name__].targets, seed=0)
    rng = torch.Generator().manual_seed(1)
    for p in parameters.values():
        p.data.normal_(0, 0.1, generator=rng)
    return model, parameters, {k: v.to(dtype) if "states" in k or "projections" in k else v for k, v in call.items()}


def step(model, parameters, call):
    """Output, gradient, and the bytes that autograd keeps for the backward beside the parameters."""
    own = {p.untyped_storage().data_ptr(): p.data for p in model.parameters()}
    kept = {}  # storages by their address; the tensors are held, or an address might be taken again

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(**call)[0]
    size = sum(x.untyped_storage().nbytes() for x in kept.values())
    (out if out.dtype == torch.float64 else out.float()).square().sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in parameters.values()]), size


# ---------------------------------------------------------------------------------------------- precision


def test_bf16_base_fp32_adapter(open_run):
    run = open_run(model__dtype="bfloat16", world_model__dtype="bfloat16", **SHORT)
    transformer, vae = run.generator.transformer, run.generator.vae
    assert transformer.dtype == vae.dtype == torch.bfloat16 and next(run.judge.model.parameters()).dtype == torch.bfloat16
    assert all(m.base_layer.weight.dtype == torch.bfloat16 for m in transformer.modules() if hasattr(m, "base_layer"))
    values = stages(run)
    assert {v.dtype for v in chain(run.parameters.values(), values.values())} == {torch.float32}
    for stage in ("align", "reinforce"):
        state = checkpoint.load(run.checkpoint(stage))
        assert {v.dtype for s in state["optimizer"]["state"].values() for v in s.values()} == {torch.float32}
    for folder in ("aligned", "ldo"):
        assert {v.dtype for v in lora.read(run.lora_folder(folder)).values()} == {torch.float32}


def as_peft(model):
    """The adapter as peft runs it: inputs and products in the precision of the adapter's weights."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = True
            for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
                linear.__class__ = nn.Linear


def doubled(model, call):
    """The same values in fp64, those of the adapter too."""
    to = lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v  # noqa: E731
    model.double()
    return {k: tuple(map(to, v)) if isinstance(v, tuple) else to(v) for k, v in call.items()}


@pytest.mark.parametrize("family", ["wan", "cogvideox", "hunyuan", "ltx"])
def test_the_adapters_products_in_bf16_keep_less_and_are_as_exact(family):
    """Against fp64: what rounding adds to the base's own is small beside it."""
    model, parameters, call = adapted(torch.bfloat16, family)
    exact, truth, _ = step(model, parameters, doubled(model, call))
    ours = step(*adapted(torch.bfloat16, family))
    model, parameters, call = adapted(torch.bfloat16, family)
    as_peft(model)
    theirs = step(model, parameters, call)
    assert ours[1].dtype == torch.float32 and truth.dtype == torch.float64
    assert ours[2] < 0.8 * theirs[2]

    def far(found):
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, (exact, truth), strict=True)]

    for now, before in zip(far(ours[:2]), far(theirs[:2]), strict=True):
        assert 0 < now < 1.25 * before < 0.02


def test_in_fp32_the_adapter_is_pefts_to_the_bit():
    ours = step(*adapted(torch.float32))
    model, parameters, call = adapted(torch.float32)
    as_peft(model)
    theirs = step(model, parameters, call)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and ours[2] == theirs[2]


def test_q_k_and_v_keep_one_input_between_them():
    model, parameters, _ = adapted(torch.bfloat16)
    attention, kept = model.blocks[0].attn1, []
    x = torch.randn(2, 8, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sum(layer(x) for layer in (attention.to_q, attention.to_k, attention.to_v)).float().sum().backward()
    inputs = [t for t in kept if t.numel() == x.numel()]
    assert len(inputs) == 3 and {t.untyped_storage().data_ptr() for t in inputs} == {x.untyped_storage().data_ptr()}
    assert attention.to_q.lora_A["default"].weight.grad.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in parameters.values())


def test_resume_is_bitwise_in_bf16_and_fp8(open_run):
    changes = {**SHORT, "align__steps": 4, "model__dtype": "bfloat16", "model__fp8": True, "model__gradient_checkpointing": True}
    whole = open_run(**changes)
    expected = align.train(whole, "align")
    shutil.rmtree(whole.folder)
    with interrupted(align, "apply", 4):  # after step 3: one step past the checkpoint at 2
        align.train(open_run(**changes), "align")
    assert checkpoint.load(whole.checkpoint("align"))["step"] == 2
    found = align.train(open_run(**changes), "align")
    assert all(torch.equal(found[k], v) for k, v in expected.items())


# ---------------------------------------------------------------------------------------------- recomputing, 8 bits


def test_checkpointing_keeps_less_and_changes_nothing():
    plain = step(*adapted(torch.float32))
    model, parameters, call = adapted(torch.float32)
    model.enable_gradient_checkpointing()
    out, gradient, size = step(model, parameters, call)
    assert torch.equal(out, plain[0]) and torch.equal(gradient, plain[1])
    assert size < plain[2] / 4


def test_fp8_stores_the_base_small_and_the_adapter_whole():
    wide = step(*adapted(torch.bfloat16))
    model, parameters, call = adapted(torch.bfloat16)
    before = {k: v.clone() for k, v in parameters.items()}
    count = switches.store_in_fp8(model, torch.bfloat16)
    small = [n for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn]
    linear = [n for n, p in model.named_parameters() if "base_layer" in n]
    assert count == len(small) and set(linear) == set(small)
    assert all(p.dtype == torch.float32 and torch.equal(p, before[k]) for k, p in parameters.items())
    model.enable_gradient_checkpointing()
    stored = {n: p.clone() for n, p in model.named_parameters() if n in small}
    out, gradient, _ = step(model, parameters, call)
    assert all(torch.equal(p.view(torch.uint8), stored[n].view(torch.uint8)) for n, p in model.named_parameters() if n in small)
    assert model.dtype == torch.bfloat16 and out.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    assert not torch.equal(out, wide[0])  # the weights were rounded
    assert torch.cosine_similarity(gradient, wide[1], 0) > 0.99


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan", "ltx"])
def test_fp8_trains_in_every_family(family):
    wide = step(*adapted(torch.bfloat16, family))
    model, parameters, call = adapted(torch.bfloat16, family)
    assert switches.store_in_fp8(model, torch.bfloat16) >= 12  # two blocks' projections at least
    small = [n for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn]
    assert all("blocks." in n and "norm" not in n and "lora" not in n for n in small)
    model.enable_gradient_checkpointing()
    out, gradient, _ = step(model, parameters, call)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert not torch.equal(out, wide[0]) and torch.cosine_similarity(gradient, wide[1], 0) > 0.98


def test_fp8_without_recomputing_would_keep_the_wide_weights():
    """The reason for the rule that one goes with the other."""
    sizes = []
    for fp8 in (False, True):
        model, parameters, call = adapted(torch.bfloat16)
        if fp8:
            switches.store_in_fp8(model, torch.bfloat16)
        call["hidden_states"].requires_grad_()
        sizes.append(step(model, parameters, call)[2])
    # weights that the gradient goes through on its way to the input; the text's projections are not among them
    through = [p.numel() for n, p in model.named_parameters() if n.endswith("base_layer.weight") and "attn2.to_k" not in n and "attn2.to_v" not in n]
    assert sizes[1] - sizes[0] >= 2 * sum(through) > 0
    with pytest.raises(RecipeError, match=r"model\.fp8 saves nothing"):
        switches.check(Model(fp8=True))
    with pytest.raises(RecipeError, match=r"model\.compile is cut to pieces"):
        switches.check(Model(fp8=True, gradient_checkpointing=True, compile=True))
    switches.check(Model(fp8=True, gradient_checkpointing=True))


def test_recipes_that_make_no_sense_are_refused_before_anything_loads(tmp_path, wan_folder, vjepa_folder, capsys):
    path = str(recipes.write(tmp_path, wan_folder, vjepa_folder))
    for change, words in {
        "model.offload=[cpu]": "model.offload is 'cpu'; choose one of text, vae, world_model",
        "model.fp8=true": "set model.gradient_checkpointing=true, or model.fp8=false",
        "model.fp8=8": "model.fp8 is 8; true or false is expected",
    }.items():
        assert check.main([path, change]) == 2
        assert words in capsys.readouterr().err
    assert check.main([path, "model.offload=[text,vae]", "model.fp8=true", "model.gradient_checkpointing=true"]) == 0


def test_both_stages_run_with_everything_that_saves_memory(open_run, caplog):
    caplog.set_level(logging.INFO)
    on = ("fp8", "gradient_checkpointing", "vae_tiling", "vae_slicing")
    run = open_run(**SHORT, **{f"model__{k}": True for k in on}, model__dtype="bfloat16", model__offload=["text", "vae", "world_model"])
    assert {v.dtype for v in stages(run).values()} == {torch.float32}
    small = sum(p.dtype == torch.float8_e4m3fn for p in run.generator.transformer.parameters())
    assert small > 0 and f"fp8: {small} weights of the generator are stored in 8 bits" in caplog.messages


@pytest.mark.parametrize("form", models.FAMILIES)
def test_everything_at_once_in_every_family(form, tmp_path, vjepa_folder, frames, caplog):
    caplog.set_level(logging.INFO)
    folder = models.FAMILIES[form](tmp_path / form)
    model = generator.load(read_geometry(folder)[0], folder, torch.bfloat16, generator.Options(text_length=16))
    parameters = lora.add(model.transformers, 4, 8.0, model.lora_targets, seed=0)
    on = dict(fp8=True, gradient_checkpointing=True, vae_tiling=True, vae_slicing=True, offload=("text", "vae", "world_model"))
    recipe = Recipe(model=Model(dtype="bfloat16", attention="sdpa_math", **on))
    configure(recipe, model, WorldModel.load(vjepa_folder), torch.device("cpu"))
    assert sum("attention: generator sdpa_math" in m for m in caplog.messages) == len(model.transformers)
    x = model.encode_video(frames)
    # times on both sides of the boundary, where there are two experts
    v = model.velocity(x, torch.tensor([0.1, 0.99]), model.encode_text(["a red ball rolls", "a blue ball"]))
    v.square().mean().backward()
    assert v.shape == x.shape and model.decode_video(v.detach()).shape == frames.shape
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters.values())
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    for name in model.transformers:
        assert sum(float(p.grad.abs().sum()) for k, p in parameters.items() if k.startswith(f"{name}.")) > 0


# ---------------------------------------------------------------------------------------------- offload


AWAY = torch.float64  # stands in for an accelerator: like a device, it is what ``to`` takes


class Pipeline:
    """Five modules; every call answers which of them are on the accelerator."""

    def __init__(self):
        make = lambda: nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))  # noqa: E731
        self.components = {"text_encoder": make(), "text_encoder_2": make(), "tokenizer": None, "vae": make(), "transformer": make()}
        self.pipeline, self.vae, self.transformers = self, self.components["vae"], {"transformer": self.components["transformer"]}
        self.judge = nn.Module()
        self.judge.model = make()
        for owner in (self.judge, self.judge.model):
            owner.register_buffer("mean", torch.zeros(1))
        for name in ("encode_text", "encode_video", "decode_video", "velocity"):
            setattr(self, name, self.where)
        self.judge.encode = self.judge.forecast = self.where

    def where(self):
        """Which parts are on the accelerator."""
        names = {"text": ("text_encoder", "text_encoder_2"), "vae": ("vae",), "transformer": ("transformer",)}
        modules = {n: [self.components[c] for c in cs] for n, cs in names.items()} | {"world_model": [self.judge.model]}
        found = set()
        for name, parts in modules.items():
            (place,) = {t.dtype for m in parts for t in (*m.parameters(), *m.buffers())}  # a part is whole here or there
            found |= {name} if place == AWAY else set()
        return found


def test_guests_visit_one_at_a_time_and_go_home_before_the_transformer_runs():
    p = Pipeline()
    before = {n: v.clone() for n, v in p.vae.state_dict().items()}
    switches.place(p, p.judge, ("text", "vae", "world_model"), AWAY)
    assert p.where() == {"transformer"} and p.judge.mean.dtype == AWAY
    assert p.encode_text() == {"transformer", "text"}
    assert p.velocity() == {"transformer"}
    assert p.decode_video() == p.encode_video() == {"transformer", "vae"}
    assert p.judge.encode() == p.judge.forecast() == {"transformer", "world_model"}
    assert p.velocity() == {"transformer"}
    assert all(torch.equal(v, before[n]) for n, v in p.vae.state_dict().items())


def test_what_is_not_offloaded_stays():
    p = Pipeline()
    switches.place(p, p.judge, ("vae",), AWAY)
    others = {"transformer", "text", "world_model"}
    assert p.where() == p.judge.encode() == others
    assert p.decode_video() == p.where() == {*others, "vae"}
    assert p.encode_text() == others
    p = Pipeline()
    assert switches.place(p, p.judge, (), AWAY) is None
    assert p.where() == p.velocity() == {*others, "vae"}


def test_offload_changes_no_number(open_run):
    plain = open_run(**SHORT)
    expected = stages(plain)
    shutil.rmtree(plain.folder)
    found = stages(open_run(**SHORT, model__offload=["text", "vae", "world_model"]))
    assert all(torch.equal(found[k], v) for k, v in expected.items())


# ---------------------------------------------------------------------------------------------- the VAE


def test_tiling_and_slicing_of_the_vae(open_run, frames, caplog):
    plain = open_run().generator
    run = open_run(**SHORT, model__vae_tiling=True, model__vae_slicing=True)
    assert any("tiles leave faint seams" in m for m in caplog.messages)
    vae = run.generator.vae
    vae.enable_tiling(16, 16, 12, 12)  # the real ones are 256 pixels and more, larger than the sandbox's clips
    sizes = []
    hook = vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    latents = run.generator.encode_video(frames)
    video = run.generator.decode_video(latents)
    hook.remove()
    assert {s[0] for s in sizes} == {1} and max(s[-1] for s in sizes) == 4  # one clip at a time, 16 of 32 pixels
    assert 0 < (video - plain.decode_video(latents)).abs().max() < 0.5  # seams
    vae.disable_tiling()
    assert torch.allclose(run.generator.decode_video(latents), plain.decode_video(latents), atol=1e-5)


# ---------------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize(("family", "blocks"), [("wan", 2), ("cogvideox", 2), ("hunyuan", 4), ("ltx", 2)])
def test_all_blocks_are_compiled_in_every_family_and_expert(family, blocks):
    experts = {n: models.transformer(family)[0] for n in ("high", "low")}
    assert switches.compile_blocks(SimpleNamespace(transformers={"transformer": experts["high"]}, velocity=lambda: None)) == blocks
    assert switches.compile_blocks(SimpleNamespace(transformers=experts, velocity=lambda: None)) == 2 * blocks


def test_compiled_blocks_are_tapped_and_sampling_shares_the_graph_of_training(wan, monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(switches, "COMPILER", backend)
    lora.add(wan.transformers, 4, 8.0, wan.lora_targets, seed=0)
    x, t, text = torch.randn(2, 4, 5, 8, 8), torch.tensor([0.3, 0.7]), wan.encode_text(["a red ball", "a blue ball"])
    with wan.tap(0) as tap:
        plain = wan.velocity(x, t, text)
    hidden = tap.take().x_BND
    torch._dynamo.reset()
    assert switches.compile_blocks(wan) == 2
    with torch.no_grad():
        sampled = wan.velocity(x, t, text)
    assert not sampled.requires_grad and torch.equal(sampled, plain)
    made = len(graphs)
    assert made >= 1
    for _ in range(2):
        with wan.tap(0) as tap:
            v = wan.velocity(x, t, text)
        assert v.requires_grad and torch.equal(v, plain) and torch.equal(tap.take().x_BND, hidden)
    assert len(graphs) == made
    torch._dynamo.reset()


def test_a_compiled_policy_has_ratio_one(open_run, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(switches, "COMPILER", "eager")
    torch._dynamo.reset()
    run = open_run(**SHORT, model__compile=True, model__gradient_checkpointing=True)
    assert "compile: 2 blocks, when they first run" in caplog.messages
    stages(run)  # it raises where a ratio is not exactly 1 before the first step
    torch._dynamo.reset()
