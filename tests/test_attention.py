"""Attention backends: which is chosen, that every layer it is said to reach calls it, and that numbers stay the same.

What needs a GPU or a package that is not there is stood in for by the same arithmetic in PyTorch, so that layouts, scales
and masks are checked here; the kernels themselves are named by the profiler in the tests marked ``gpu``.
"""

import json
import logging
import shutil
import typing
from types import SimpleNamespace

import models
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from benchmarks import profiled
from ldo import attention, config
from ldo.attention import BACKENDS, RecipeError
from ldo.world_model import WorldModel

FAMILIES = ("wan", "cogvideox", "ltx", "hunyuan")
CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


def run(model, call):
    with torch.no_grad():
        return model(**call)[0]


def sdpa(q, k, v, mask=None, scale=None):  # [B, N, H, D]
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.fixture
def pretend(monkeypatch):
    """Every package is there and every machine will do; flash-attn and xformers are PyTorch arithmetic that is counted."""
    calls = []

    def dense(q, k, v, softmax_scale=None, **_):
        calls.append("flash")
        return sdpa(q, k, v, scale=softmax_scale)

    def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, **_):  # [sum N, H, D]
        calls.append("flash_varlen")
        spans = zip(*(c[:-1].tolist() for c in (cu_seqlens_q, cu_seqlens_k)), *(c[1:].tolist() for c in (cu_seqlens_q, cu_seqlens_k)), strict=True)
        return torch.cat([sdpa(q[None, a:c], k[None, b:d], v[None, b:d], scale=softmax_scale)[0] for a, b, c, d in spans])

    class Ops:
        @staticmethod
        def memory_efficient_attention(q, k, v, bias=None, p=0.0, scale=None):
            calls.append("xformers")
            return sdpa(q, k, v, bias, scale)

    for name, value in {"flash_attn_func": dense, "flash_attn_varlen_func": packed, "xops": Ops}.items():
        monkeypatch.setattr(attention_dispatch, name, value)
    for name in ("_CAN_USE_FLASH_ATTN", "_CAN_USE_XFORMERS_ATTN"):
        monkeypatch.setattr(attention_dispatch, name, True)
    monkeypatch.setattr(attention, "refuse", lambda *_: None)
    return calls


# ---------------------------------------------------------------------------------------------- numbers and reach


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["auto", "native"])
def test_on_a_cpu_nothing_changes(family, name):
    model, call = models.transformer(family)
    before, kinds = run(model, call), [type(m.processor) for _, m in attention.layers(model)]
    effect = attention.set_generator(model, name, F32, CPU)
    assert (effect.backend, effect.reached) == ("native", effect.layers) and effect.layers == len(kinds) >= 2
    assert [type(m.processor) for _, m in attention.layers(model)] == kinds
    assert torch.equal(run(model, call), before)


def test_the_processor_of_cogvideox_is_the_stock_one_in_numbers_and_gradients():
    model, call = models.transformer("cogvideox")
    stock = model(**call)[0]
    wanted = torch.autograd.grad(stock.square().sum(), list(model.parameters()), allow_unused=True)
    for _, layer in attention.layers(model):
        layer.set_processor(attention.JointProcessor())
    ours = model(**call)[0]
    assert torch.equal(ours, stock)
    found = torch.autograd.grad(ours.square().sum(), list(model.parameters()), allow_unused=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, wanted, strict=True) if b is not None)


@pytest.mark.parametrize(
    ("family", "name", "reached", "of", "forms"),
    [
        ("wan", "flash2", 4, 4, {"flash": 4}),
        ("cogvideox", "flash2", 2, 2, {"flash": 2}),
        ("ltx", "flash2", 2, 4, {"flash": 2}),  # cross-attention passes an additive mask
        ("hunyuan", "flash2", 4, 5, {"flash_varlen": 4}),  # the text refiner asks PyTorch itself
        ("wan", "xformers", 4, 4, {"xformers": 4}),
        ("cogvideox", "xformers", 2, 2, {"xformers": 2}),
        ("ltx", "xformers", 4, 4, {"xformers": 4}),
    ],
)
def test_the_layers_counted_are_the_layers_that_call_the_backend(pretend, family, name, reached, of, forms):
    model, call = models.transformer(family)
    before = run(model, call)
    effect = attention.set_generator(model, name, F32, CPU)
    assert str(effect) == f"{name} ({reached} of {of} layers{'' if reached == of else ', the others native'})"
    pretend.clear()
    after = run(model, call)
    assert {f: pretend.count(f) for f in set(pretend)} == forms
    assert torch.allclose(after, before, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_profiler_sees_another_kernel_in_every_layer_counted(family):
    model, call = models.transformer(family)
    call["hidden_states"].requires_grad_()
    effect = attention.set_generator(model, "sdpa_math", F32, CPU)
    with torch.profiler.profile() as profile:
        model(**call)[0].sum().backward()
    ran = {e.key: e.count for e in profile.key_averages()}
    assert ran["aten::_scaled_dot_product_attention_math"] == effect.reached
    others = effect.layers - effect.reached
    assert ran.get("aten::_scaled_dot_product_flash_attention_for_cpu", 0) == others == (family == "hunyuan")


@pytest.mark.parametrize("name", ["flash2", "xformers", "sdpa_flash"])
def test_the_world_model_attends_by_it_too(vjepa_folder, frames, pretend, name):
    plain, judge = WorldModel.load(vjepa_folder), WorldModel.load(vjepa_folder)
    effect = attention.set_world_model(judge.model, name, F32, CPU)
    assert (effect.backend, effect.reached, effect.layers) == (name, 4, 4)
    pretend.clear()
    for ours, theirs in zip(judge.forecast(frames[:, 1:], 8), plain.forecast(frames[:, 1:], 8), strict=True):
        assert torch.allclose(ours.x_BND, theirs.x_BND, atol=1e-5)
    assert len(pretend) == (0 if name == "sdpa_flash" else 4)  # two layers of the encoder, two of the predictor
    x = frames[:, 1:].clone().requires_grad_()
    judge.encode(x).x_BND.square().mean().backward()
    assert x.grad.abs().sum() > 0


def test_the_profiler_sees_another_kernel_in_the_world_model(vjepa_folder, frames):
    judge = WorldModel.load(vjepa_folder)
    attention.set_world_model(judge.model, "sdpa_math", F32, CPU)
    with torch.profiler.profile() as profile:
        judge.forecast(frames[:, 1:], 8)
    ran = {e.key: e.count for e in profile.key_averages()}
    assert ran["aten::_scaled_dot_product_attention_math"] == 4 and "aten::_scaled_dot_product_flash_attention_for_cpu" not in ran


def test_a_choice_for_one_model_leaves_others_alone(vjepa_folder, pretend):
    """diffusers' own ``set_attention_backend`` would switch every model of the process that names none."""
    (chosen, call), (other, _) = models.transformer("wan"), models.transformer("wan")
    judge = WorldModel.load(vjepa_folder)
    attention.set_generator(chosen, "xformers", F32, CPU)
    attention.set_world_model(WorldModel.load(vjepa_folder).model, "xformers", F32, CPU)
    pretend.clear()
    run(other, call)
    judge.encode(torch.rand(1, 4, 3, 32, 32))
    assert not pretend
    run(chosen, call)
    assert len(pretend) == 4


# ---------------------------------------------------------------------------------------------- choosing


def test_recipes_know_the_backends():
    assert set(typing.get_args(config.Attention)) == {"auto", *BACKENDS}
    names = {n.value for n in attention_dispatch.AttentionBackendName}
    assert {f for b in BACKENDS.values() for f in (b.dense, b.masked) if f} <= names


def test_those_without_a_backward_are_not_offered():
    assert attention_dispatch._wrapped_flash_attn_3._backward_fn is None  # the operator behind "_flash_3"
    forms = {f for b in BACKENDS.values() for f in (b.dense, b.masked)}
    assert not {f for f in forms if f == "_flash_3" or "sage" in f}


def test_xformers_is_kept_from_boolean_masks_for_diffusers_misreads_them(monkeypatch):
    seen = []

    class Ops:
        @staticmethod
        def memory_efficient_attention(q, k, v, bias, p, scale):
            seen.append(bias)
            return q

    monkeypatch.setattr(attention_dispatch, "xops", Ops)
    q, mask = torch.randn(1, 4, 2, 8), torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    attention.attend("xformers", q, q, q, mask)
    assert seen[0].unique().tolist() == [0.0, 1.0]  # an excluded key ought to have minus infinity
    assert not BACKENDS["xformers"].form("keys")


@pytest.mark.parametrize(
    ("capability", "missing", "broken", "expected"),
    [
        ((9, 0), (), (), "flash3"),
        ((9, 0), ("flash_attn_interface",), (), "hub_flash3"),
        ((9, 0), ("flash_attn_interface", "kernels"), (), "native"),
        ((9, 0), ("flash_attn_interface", "kernels"), ("native",), "flash2"),
        ((10, 0), (), ("_native_cudnn",), "flash2"),
        ((10, 0), (), (), "sdpa_cudnn"),
        ((8, 0), (), (), "flash2"),
        ((8, 9), ("flash_attn",), (), "hub_flash2"),
        ((8, 0), ("flash_attn", "kernels"), (), "xformers"),
        ((8, 0), ("flash_attn", "kernels", "xformers"), (), "sdpa_flash"),
        ((8, 0), ("flash_attn", "kernels", "xformers"), ("_native_flash",), "native"),
        ((7, 5), ("xformers",), (), "native"),
    ],
)
def test_auto_takes_the_fastest_that_is_there_and_right(monkeypatch, capability, missing, broken, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None if name in missing else SimpleNamespace(origin="there"))
    monkeypatch.setattr(attention, "probe", lambda form, *_: "it is broken" if form in broken else None)
    cuda, calls = torch.device("cuda"), {("none", 64)}
    assert attention.choose("model.attention", "auto", calls, BF16, cuda).name == expected
    assert attention.choose("model.attention", "auto", calls, F32, cuda).name == "native"
    assert attention.choose("model.attention", "auto", calls, BF16, CPU).name == "native"


@pytest.mark.parametrize(("missing", "expected"), [((), "flash2"), (("flash_attn", "kernels"), "native")])
def test_auto_passes_over_backends_without_masks_where_all_layers_mask(monkeypatch, missing, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None if name in missing else SimpleNamespace(origin="there"))
    monkeypatch.setattr(attention, "probe", lambda *_: None)
    assert attention.choose("model.attention", "auto", {("keys", 128)}, BF16, torch.device("cuda")).name == expected


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "words"),
    [
        ("flash2", BF16, (8, 0), "flash_attn is not installed; pip install 'ldo[flash]', or choose auto"),
        ("hub_flash2", BF16, (8, 0), "kernels is not installed; pip install 'ldo[hub]', or choose auto"),
        ("sdpa_cudnn", F32, (8, 0), "16-bit numbers only; set the model's dtype to bfloat16"),
        ("sdpa_cudnn", BF16, (7, 5), "does not run on GPUs of compute capability 7.5; choose auto"),
        ("sdpa_efficient", F32, None, "needs a GPU and this run is on the CPU; choose native"),
    ],
)
def test_why_an_explicit_choice_is_refused(monkeypatch, name, dtype, capability, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"model\.attention is ") as error:
        attention.check("model.attention", name, dtype, torch.device("cuda") if capability else CPU)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["xformers", "sdpa_flash"])
def test_a_choice_that_would_reach_no_layer_is_refused(pretend, name):
    with pytest.raises(RecipeError, match=f"model.attention is '{name}': it takes none of the masks"):
        attention.set_generator(models.transformer("hunyuan")[0], name, F32, CPU)
    with pytest.raises(RecipeError, match="HunyuanVideoTransformer3DModel masks its text in every layer"):
        attention.check("model.attention", name, F32, CPU, "HunyuanVideoTransformer3DModel")
    attention.check("model.attention", name, F32, CPU, "LTXVideoTransformer3DModel")


def test_an_unknown_family_keeps_what_it_has():
    class Strange(type(models.transformer("wan")[0])):
        pass

    model, _ = models.transformer("wan")
    model.__class__ = Strange
    assert attention.set_generator(model, "auto", F32, CPU).backend == "native"
    with pytest.raises(RecipeError, match="which masks Strange passes is not known"):
        attention.set_generator(model, "sdpa_flash", F32, CPU)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda q, k, v, s: sdpa(q, k, v), "output on 16-wide heads is off by"),  # forgets the scale
        (lambda q, k, v, s: sdpa(*(x.transpose(1, 2) for x in (q, k, v)), scale=s).transpose(1, 2), "output on 16-wide heads is off by"),
        (lambda q, k, v, s: sdpa(q, k, v, scale=s).detach(), "it failed on 16-wide heads"),  # no backward
        (lambda q, k, v, s: sdpa(q, k.detach(), v, scale=s) + 0 * k, "gradient on 16-wide heads is off by"),
    ],
)
def test_a_backend_that_is_wrong_is_found_before_it_trains(pretend, monkeypatch, wrong, words):
    class Ops:
        @staticmethod
        def memory_efficient_attention(q, k, v, bias=None, p=0.0, scale=None):
            return wrong(q, k, v, scale)

    assert attention.probe("xformers", "none", 16, F32, CPU) is None
    monkeypatch.setattr(attention_dispatch, "xops", Ops)
    assert words in attention.probe("xformers", "none", 16, F32, CPU)
    with pytest.raises(RecipeError, match=words):
        attention.set_generator(models.transformer("wan")[0], "xformers", F32, CPU)


@pytest.mark.parametrize("name", ["native", "sdpa_math"])
@pytest.mark.parametrize("mask", ["none", "keys", "bias"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sound_backends_pass_the_probe_and_draw_no_number(name, mask, dtype):
    state = torch.get_rng_state()
    assert attention.probe(BACKENDS[name].form(mask), mask, 64, dtype, CPU) is None
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------- in a run


def test_a_run_says_what_it_attends_with(open_run, caplog):
    caplog.set_level(logging.INFO)
    open_run()
    assert "attention: generator native (4 of 4 layers)" in caplog.messages
    assert "attention: world model native (4 of 4 layers)" in caplog.messages
    open_run(model__attention="sdpa_math", world_model__attention="sdpa_flash")
    assert "attention: generator sdpa_math (4 of 4 layers)" in caplog.messages
    assert "attention: world model sdpa_flash (4 of 4 layers)" in caplog.messages


def test_a_recipe_is_refused_before_anything_loads(tmp_path, wan_folder, vjepa_folder, capsys):
    import recipes
    from ldo.check import main

    path = str(recipes.write(tmp_path, wan_folder, vjepa_folder))
    for change, words in {
        "model.attention=sdpa_cudnn": "model.attention is 'sdpa_cudnn': it needs a GPU",
        "world_model.attention=hub_flash3": "world_model.attention is 'hub_flash3': kernels is not installed",
        "model.attention=fastest": "model.attention is 'fastest'; choose one of auto, native",
    }.items():
        assert main([path, "device=cpu", change]) == 2
        assert words in capsys.readouterr().err


def test_the_class_that_decides_over_masks_is_read_from_the_folder(wan_folder, tmp_path, monkeypatch):
    from ldo import check

    folder = shutil.copytree(wan_folder, tmp_path / "wan")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "HunyuanVideoTransformer3DModel"}))
    recipe = config.Recipe(device="cpu", model=config.Model(attention="sdpa_flash"))
    check._attention(recipe, wan_folder)
    with pytest.raises(RecipeError, match="masks its text in every layer"):
        check._attention(recipe, folder)


# ---------------------------------------------------------------------------------------------- kernels by name

KERNELS = [name for name in BACKENDS if name not in ("native", "sdpa_math")]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", *KERNELS])
def test_the_kernels_that_run_on_a_gpu(name, vjepa_folder):
    cuda = torch.device("cuda")
    if name != "auto" and (reason := attention.refuse(BACKENDS[name], BF16, cuda)):
        pytest.skip(reason)
    model, call = models.transformer("wan")
    model, call = model.to(cuda, BF16), {k: v.to(cuda, BF16) if torch.is_tensor(v) else v for k, v in call.items()}
    judge = WorldModel.load(vjepa_folder, BF16).to(cuda)
    call["hidden_states"].requires_grad_()
    frames = torch.rand(1, 16, 3, 32, 32, device=cuda, requires_grad=True)
    steps = {
        attention.set_generator(model, name, BF16, cuda): lambda: model(**call)[0].float().square().sum().backward(),
        attention.set_world_model(judge.model, name, BF16, cuda): lambda: judge.encode(frames).x_BND.square().sum().backward(),
    }
    for effect, step in steps.items():
        assert effect.reached == effect.layers
        if name == "auto":
            assert effect.backend != "native"
        step()  # the first call of a shape may try several kernels
        ran = profiled.ran(step, cuda)
        assert profiled.wrong(effect.backend, ran) is None, (effect.backend, sorted(ran))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", KERNELS)
def test_backends_agree_on_a_gpu(family, name):
    cuda = torch.device("cuda")
    if reason := attention.refuse(BACKENDS[name], BF16, cuda):
        pytest.skip(reason)
    model, call = models.transformer(family)
    model, call = model.to(cuda, BF16), {k: v.to(cuda, BF16) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
    call = {k: v.to(cuda) if torch.is_tensor(v) else tuple(x.to(cuda) for x in v) if isinstance(v, tuple) else v for k, v in call.items()}
    before = run(model, call).float()
    if family == "hunyuan" and not BACKENDS[name].form("keys"):
        with pytest.raises(RecipeError):
            attention.set_generator(model, name, BF16, cuda)
        return
    attention.set_generator(model, name, BF16, cuda)
    assert (run(model, call).float() - before).abs().max() < 0.05 * before.abs().max()
