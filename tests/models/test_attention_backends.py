"""Which attention backend is chosen, which are refused and why, and that a wrong one is found before it trains."""

import typing
from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_dispatch

from ldo.core.config import AttentionName
from ldo.core.errors import RecipeError
from ldo.models import attention, attention_backends
from ldo.models.attention import choose_backend, probe_backend, set_generator_attention
from ldo.models.attention_backends import BACKENDS, check_attention
from tests.helpers import models
from tests.helpers.plain_attention import attend_plainly

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, BF16 = torch.float32, torch.bfloat16


def forms_of_diffusers():
    """diffusers' names that the table uses."""
    return {form for backend in BACKENDS.values() for form in (backend.dense, backend.masked) if form}


def without_packages(monkeypatch, missing):
    """Every optional package but those in ``missing`` seems to be installed."""
    installed = SimpleNamespace(origin="there")
    monkeypatch.setattr(
        attention_backends.importlib.util, "find_spec", lambda name: None if name in missing else installed
    )


def test_recipes_know_the_backends():
    assert set(typing.get_args(AttentionName)) == {"auto", *BACKENDS}
    assert forms_of_diffusers() <= {name.value for name in attention_dispatch.AttentionBackendName}


def test_those_without_a_backward_are_not_offered():
    # the operator behind "_flash_3"
    assert attention_dispatch._wrapped_flash_attn_3._backward_fn is None
    assert not {form for form in forms_of_diffusers() if form == "_flash_3" or "sage" in form}


def test_xformers_is_kept_from_boolean_masks_for_diffusers_misreads_them(monkeypatch):
    biases = []

    class Ops:
        @staticmethod
        def memory_efficient_attention(query, key, value, bias, p, scale):
            biases.append(bias)
            return query

    monkeypatch.setattr(attention_dispatch, "xops", Ops)
    states = torch.randn(1, 4, 2, 8)
    mask = torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    attention.attend("xformers", states, states, states, mask)
    # an excluded key ought to have minus infinity
    assert biases[0].unique().tolist() == [0.0, 1.0]
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
def test_auto_takes_the_fastest_that_is_installed_and_right(monkeypatch, capability, missing, broken, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    without_packages(monkeypatch, missing)
    monkeypatch.setattr(attention, "probe_backend", lambda form, *_: "it is broken" if form in broken else None)
    calls = {("none", 64)}
    assert choose_backend("model.attention", "auto", calls, BF16, CUDA).name == expected
    assert choose_backend("model.attention", "auto", calls, F32, CUDA).name == "native"
    assert choose_backend("model.attention", "auto", calls, BF16, CPU).name == "native"


@pytest.mark.parametrize(("missing", "expected"), [((), "flash2"), (("flash_attn", "kernels"), "native")])
def test_auto_passes_over_backends_without_masks_where_all_layers_mask(monkeypatch, missing, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    without_packages(monkeypatch, missing)
    monkeypatch.setattr(attention, "probe_backend", lambda *_: None)
    assert choose_backend("model.attention", "auto", {("keys", 128)}, BF16, CUDA).name == expected


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
    monkeypatch.setattr(attention_backends.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"model\.attention is ") as error:
        check_attention("model.attention", name, dtype, CUDA if capability else CPU)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["xformers", "sdpa_flash"])
def test_a_choice_that_would_reach_no_layer_is_refused(pretend, name):
    with pytest.raises(RecipeError, match=f"model.attention is '{name}': it takes none of the masks"):
        set_generator_attention(models.transformer("hunyuan")[0], name, F32, CPU)
    with pytest.raises(RecipeError, match="HunyuanVideoTransformer3DModel masks its text in every layer"):
        check_attention("model.attention", name, F32, CPU, "HunyuanVideoTransformer3DModel")
    check_attention("model.attention", name, F32, CPU, "LTXVideoTransformer3DModel")


def test_an_unknown_family_keeps_what_it_has():
    class Strange(type(models.transformer("wan")[0])):
        pass

    transformer, _ = models.transformer("wan")
    transformer.__class__ = Strange
    assert set_generator_attention(transformer, "auto", F32, CPU).backend == "native"
    with pytest.raises(RecipeError, match="which masks Strange passes is not known"):
        set_generator_attention(transformer, "sdpa_flash", F32, CPU)


def forgets_the_scale(query, key, value, scale):
    return attend_plainly(query, key, value)


def mixes_up_heads_and_tokens(query, key, value, scale):
    turned = [states.transpose(1, 2) for states in (query, key, value)]
    return attend_plainly(*turned, scale=scale).transpose(1, 2)


def has_no_backward(query, key, value, scale):
    return attend_plainly(query, key, value, scale=scale).detach()


def forgets_a_gradient(query, key, value, scale):
    # the key takes part, so that it has a gradient, which is zero
    return attend_plainly(query, key.detach(), value, scale=scale) + 0 * key


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (forgets_the_scale, "output on 16-wide heads is off by"),
        (mixes_up_heads_and_tokens, "output on 16-wide heads is off by"),
        (has_no_backward, "it failed on 16-wide heads"),
        (forgets_a_gradient, "gradient on 16-wide heads is off by"),
    ],
)
def test_a_backend_that_is_wrong_is_found_before_it_trains(pretend, monkeypatch, wrong, words):
    class Ops:
        @staticmethod
        def memory_efficient_attention(query, key, value, bias=None, p=0.0, scale=None):
            return wrong(query, key, value, scale)

    assert probe_backend("xformers", "none", 16, F32, CPU) is None
    monkeypatch.setattr(attention_dispatch, "xops", Ops)
    assert words in probe_backend("xformers", "none", 16, F32, CPU)
    with pytest.raises(RecipeError, match=words):
        set_generator_attention(models.transformer("wan")[0], "xformers", F32, CPU)


@pytest.mark.parametrize("name", ["native", "sdpa_math"])
@pytest.mark.parametrize("mask", ["none", "keys", "bias"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sound_backends_pass_the_probe_and_draw_no_number(name, mask, dtype):
    state = torch.get_rng_state()
    assert probe_backend(BACKENDS[name].form(mask), mask, 64, dtype, CPU) is None
    # a run with a probe draws what one without it draws
    assert torch.equal(torch.get_rng_state(), state)
