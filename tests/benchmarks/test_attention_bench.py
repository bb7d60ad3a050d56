"""The attention benchmark: real shapes, kernels recognised by name, exact gradients, and the verdict on ``auto``."""

import dataclasses
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

from benchmarks import attention_layers, bench_attention, profiled, show
from benchmarks.attention_layers import Layer
from benchmarks.variant import Unavailable
from ldo.models.attention_backends import BACKENDS
from ldo.models.world_model import WorldModel
from tests.helpers import models, pretend

CPU = torch.device("cpu")
# Names as profilers show them: PyTorch's demangled from its CUDA library, the others from published traces.
NAMES = {
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4>, false>": (
        "PyTorch's FlashAttention-2",
        "fwd",
    ),
    "void pytorch_flash::flash_fwd_splitkv_combine_kernel<pytorch_flash::Flash_fwd_kernel_traits<64>>": (
        "PyTorch's FlashAttention-2",
        "fwd",
    ),
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<pytorch_flash::Flash_bwd_kernel_traits<128>>": (
        "PyTorch's FlashAttention-2",
        "bwd",
    ),
    "void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 128, 4, false>>": ("FlashAttention-2", "fwd"),
    "void flash::flash_bwd_convert_dq_kernel<flash::Flash_bwd_kernel_traits<64>>": ("FlashAttention-2", "bwd"),
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2>>>>": (
        "FlashAttention-3",
        "fwd",
    ),
    "void cutlass::device_kernel<flash::FlashAttnBwdPreprocess<cute::tuple<cute::C<128>>>>": (
        "FlashAttention-3",
        "bwd",
    ),
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0": ("cuDNN", "fwd"),
    # as older versions of cuDNN name it
    "cudnn_generated_fort_native_sdpa_sm90_knob_7_64x128x128_4x1x1_kernel0_0": ("cuDNN", "fwd"),
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1_kernel0_0": ("cuDNN", "bwd"),
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)": ("cuDNN", "bwd"),
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)": (
        "CUTLASS, memory-efficient",
        "fwd",
    ),
    "fmha_cutlassB_bf16_aligned_128x128_k128_sm80"
    "(PyTorchMemEffAttention::AttentionBackwardKernel<cutlass::bfloat16_t>::Params)": (
        "CUTLASS, memory-efficient",
        "bwd",
    ),
    "void (anonymous namespace)::cunn_SoftMaxForward<8, float, float, float, SoftMaxForwardEpilogue>": (
        "written out",
        "fwd",
    ),
    "void (anonymous namespace)::softmax_warp_backward<float, float, float, 9, false>": ("written out", "bwd"),
    # nothing that is known, but it sounds like attention
    "kernel_cutlass_kernel_flash_attncuteSomethingNew": ("unknown", ""),
    # convolutions and products, whose names share words with attention
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn": None,
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": None,
    "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT": None,
}
CUDNN = [name for name, family_and_pass in NAMES.items() if family_and_pass and family_and_pass[0] == "cuDNN"]


def test_the_layers_are_those_of_the_published_models():
    shapes = {(layer.name, layer.n): (layer.b, layer.h, layer.m, layer.d) for layer in attention_layers.layers("cuda")}
    assert shapes == {
        # 9 x 15 x 26 tokens
        ("wan self", 3510): (4, 12, 3510, 128),
        ("wan cross", 3510): (4, 12, 512, 128),
        # 21 x 30 x 52 tokens
        ("wan self", 32760): (1, 12, 32760, 128),
        ("wan cross", 32760): (1, 12, 512, 128),
        # 8 x 16 x 16 tokens
        ("encoder", 2048): (4, 16, 2048, 64),
        ("predictor", 2048): (4, 12, 2048, 32),
        ("encoder", 8192): (1, 16, 8192, 64),
        ("predictor", 8192): (1, 12, 8192, 32),
    }


def test_plans():
    quick = attention_layers.plan("cuda", True, None)
    assert [(layer.name, layer.n) for layer in quick] == [
        ("wan self", 3510),
        ("wan cross", 3510),
        ("encoder", 2048),
        ("predictor", 2048),
    ]
    chosen = attention_layers.plan("cuda", False, [100, 200])
    first_two = [(layer.name, layer.b, layer.n, layer.m) for layer in chosen[:2]]
    assert first_two == [("wan self", 1, 100, 100), ("wan self", 1, 200, 200)]
    assert len(chosen) == 6


def test_operations_are_those_that_pytorch_counts():
    layer = Layer("x", "generator", 2, 3, 40, 24, 16)
    inputs = layer.inputs(torch.Generator().manual_seed(0), CPU, torch.float32)
    query, key, value, _ = (tensor.transpose(1, 2) for tensor in inputs)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        F.scaled_dot_product_attention(query, key, value)
    assert layer.flops("fwd") == counter.get_total_flops()
    backward = sdpa_backward_flop_count(query.shape, query.shape, key.shape, value.shape)
    assert layer.flops("fwd+bwd") - layer.flops("fwd") == backward


# ---------------------------------------------------------------------------------------------- kernels by name


@pytest.mark.parametrize("name", NAMES)
def test_a_kernels_family_and_pass(name):
    assert profiled.family(name) == NAMES[name]


def test_every_backend_promises_families_that_are_told_apart():
    assert set(profiled.PROMISED) == set(BACKENDS)
    assert {family for promised in profiled.PROMISED.values() for family in promised} == set(profiled.FAMILIES)
    named = {family_and_pass[0] for family_and_pass in NAMES.values() if family_and_pass}
    assert named | {"PyTorch's for a CPU"} == {*profiled.FAMILIES, "unknown"}


def test_what_is_not_as_promised_is_reported():
    assert profiled.wrong("sdpa_cudnn", CUDNN) is None
    assert profiled.wrong("native", CUDNN) is None
    assert profiled.wrong("sdpa_flash", CUDNN) == "the fwd ran cuDNN; the bwd ran cuDNN"
    pytorch_flash = [name for name in NAMES if "pytorch_flash" in name]
    assert profiled.wrong("flash2", pytorch_flash).count("PyTorch's FlashAttention-2") == 2
    assert profiled.wrong("sdpa_cudnn", []) == "no attention kernel in the fwd; no attention kernel in the bwd"
    only_forward = [name for name in CUDNN if "prop" not in name or "fprop" in name]
    assert profiled.wrong("sdpa_cudnn", only_forward, ["fwd"]) is None
    assert profiled.wrong("sdpa_cudnn", [*CUDNN, "a_new_flash_kernel"]) == "the fwd ran unknown; the bwd ran unknown"


def test_the_profiler_shows_what_ran_and_how_often():
    tokens = torch.randn(1, 2, 8, 16, requires_grad=True)

    def work(backend):
        with torch.nn.attention.sdpa_kernel(backend):
            once = F.scaled_dot_product_attention(tokens, tokens, tokens)
            F.scaled_dot_product_attention(once, tokens, tokens).sum().backward()

    backends = torch.nn.attention.SDPBackend
    flash_kernels = profiled.ran(lambda: work(backends.FLASH_ATTENTION), CPU)
    plain_kernels = profiled.ran(lambda: work(backends.MATH), CPU)
    counts = {kernel.rsplit("_", 1)[-1]: launches.count for kernel, launches in flash_kernels.items()}
    assert counts == {"cpu": 2, "backward": 2}
    assert profiled.wrong("sdpa_flash", flash_kernels) is None
    assert profiled.wrong("sdpa_math", plain_kernels) is None
    # one operator in the forward and one in the backward, each twice
    assert len(plain_kernels) == 2
    assert all(launches.count == 2 and launches.seconds > 0 for launches in plain_kernels.values())
    other = "PyTorch's for a CPU"
    assert profiled.wrong("sdpa_math", flash_kernels) == f"the fwd ran {other}; the bwd ran {other}"
    # a product is no attention
    assert profiled.ran(lambda: tokens @ tokens.mT, CPU) == {}


# ---------------------------------------------------------------------------------------------- numbers


def test_the_exact_gradients(monkeypatch):
    # several blocks of queries, the last of them smaller
    monkeypatch.setattr(attention_layers, "ROWS", 7)
    layer = Layer("x", "generator", 1, 2, 30, 20, 8)
    inputs = layer.inputs(torch.Generator().manual_seed(0), CPU, torch.float64)
    query, key, value, upstream = (tensor[0].transpose(0, 1) for tensor in inputs)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output = F.scaled_dot_product_attention(*leaves)
    expected = (output, *torch.autograd.grad(output, leaves, upstream))
    for ours, theirs in zip(attention_layers.exact(query, key, value, upstream), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_inputs_lie_in_memory_as_the_models_have_them(monkeypatch, vjepa_folder):
    from diffusers.models.transformers import transformer_wan
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    recorded = []
    original = transformer_wan.dispatch_attention_fn

    def dispatch(q, k, v, **more):
        recorded.append((q, k, v))
        return original(q, k, v, **more)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", dispatch)
    model, arguments = models.transformer("wan")
    model(**arguments)
    assert len(recorded) == 4
    for query, key, value in recorded:
        layer = Layer("x", "generator", query.shape[0], query.shape[2], query.shape[1], key.shape[1], query.shape[3])
        wanted = layer.inputs(torch.Generator(), CPU, torch.float32)
        assert [tensor.stride() for tensor in (query, key, value)] == [tensor.stride() for tensor in wanted[:3]]
    recorded.clear()

    def spy(module, q, k, v, *rest, **more):
        recorded.append((q, k, v))
        return sdpa_attention_forward(module, q, k, v, *rest, **more)

    # as transformers would call any attention
    AttentionInterface.register("spy", spy)
    world_model = WorldModel.load(vjepa_folder)
    world_model.model.set_attn_implementation("spy")
    world_model.forecast(torch.rand(2, 4, 3, 32, 32), 2)
    assert len(recorded) == 4
    for query, key, value in recorded:
        layer = Layer("x", "world model", query.shape[0], query.shape[1], query.shape[2], key.shape[2], query.shape[3])
        wanted = layer.inputs(torch.Generator(), CPU, torch.float32)
        for tensor, expected in zip((query, key, value), wanted[:3], strict=True):
            assert (tensor.shape, tensor.stride()) == (expected.shape, expected.stride())


def test_attention_written_out_is_not_tried_where_it_cannot_fit():
    layer = attention_layers.layers("cuda")[0]
    with pytest.raises(Unavailable, match="its matrices of 3510 x 3510 take some"):
        attention_layers.fits(dataclasses.replace(layer, b=64), "fwd", CPU)
    attention_layers.fits(dataclasses.replace(layer, b=1), "fwd", CPU)


def test_the_verdict_on_auto():
    def row(kind, variant, ms):
        common_fields = {"model": "generator", "case": "wan self", "pass": kind, "shape": {"N": 8}, "variant": variant}
        return {**common_fields, "ms": ms, "tflops": 1.0, "share": 0.5, "spread": 0.05}

    rows = [
        row("fwd", "native", 2.0),
        row("fwd", "sdpa_cudnn", 1.0),
        row("fwd", "sdpa_math", None),
        row("fwd+bwd", "native", 1.0),
    ]
    forward, both = bench_attention.judge_auto(rows, {"generator": "native"})
    assert forward["fastest"] == "sdpa_cudnn" and forward["ms"] == 1.0
    assert forward["slower"] == 2.0 and not forward["was_fastest"]
    assert both["was_fastest"] and both["slower"] == 1.0
    within_the_noise = [rows[1], row("fwd", "native", 1.04)]
    assert bench_attention.judge_auto(within_the_noise, {"generator": "native"})[0]["was_fastest"]
    # a choice that was not timed
    absent = bench_attention.judge_auto(rows, {"generator": "flash3"})[0]
    assert absent["slower"] is None and not absent["was_fastest"]


# ---------------------------------------------------------------------------------------------- all of it, small


@pytest.fixture
def tiny(monkeypatch, tmp_path, wan_folder, vjepa_folder):
    """Run the script on tiny models; its result."""
    for name, value in {
        "GENERATOR": wan_folder,
        "WORLD": vjepa_folder,
        "TEXT": 6,
        "CLIPS": {kind: [(5, 16, 16, 2)] for kind in ("cpu", "cuda")},
        "WINDOWS": {kind: [(8, 1)] for kind in ("cpu", "cuda")},
    }.items():
        monkeypatch.setattr(attention_layers, name, value)
    result_path = tmp_path / "attention.json"

    def go(*flags):
        monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--quick", "--out", str(result_path), *flags])
        assert bench_attention.main() == 0
        return json.loads(result_path.read_text()), result_path

    return go


def test_the_script_runs_small(tiny, capsys):
    result, result_path = tiny("--variants", "native,flash2")
    backends = {"native"}
    assert set(result["left_out"]) == {"flash2"}
    assert {(line["case"], line["pass"], line["variant"]) for line in result["rows"]} == {
        (case, kind, backend)
        for case in ("wan self", "wan cross", "encoder", "predictor")
        for kind in ("fwd", "fwd+bwd")
        for backend in backends
    }
    for row in result["rows"]:
        assert row["op"] == "attention" and row["ms"] > 0
        assert row["share"] == pytest.approx(row["tflops"] / result["matmul_tflops"])
        assert (row["output_error"] if row["pass"] == "fwd" else row["grad_error"]) < 1e-5
    assert {line["shape"].get("M") for line in result["rows"] if line["case"] == "wan cross"} == {6}
    assert {(profile["model"], profile["backend"], profile["pass"]) for profile in result["kernels"]} == {
        (model, backend, kind)
        for model in ("generator", "world model")
        for backend in backends
        for kind in ("fwd", "bwd")
    }
    for row in result["kernels"]:
        assert row["wrong"] is None and row["layers"] == "4 of 4"
        assert all(launches["count"] == (4 if row["model"] == "generator" else 6) for launches in row["names"].values())
    assert len(result["auto"]) == 8 and {verdict["auto"] for verdict in result["auto"]} == {"native"}
    printed = capsys.readouterr().out
    assert "this is a CPU" in printed and "flash2: left out, flash_attn is not installed" in printed
    show.summary(result_path)
    assert "4 profiles of kernels, 0 not as the backend's name promises" in capsys.readouterr().out


def test_a_backend_that_runs_another_kernel_is_reported(tiny, monkeypatch, capsys):
    # a backend that promises one kernel and runs another
    monkeypatch.setitem(BACKENDS, "sdpa_flash", dataclasses.replace(BACKENDS["sdpa_flash"], dense="_native_math"))
    result, _ = tiny("--variants", "sdpa_flash")
    wrong = {(profile["model"], profile["pass"]): profile["wrong"] for profile in result["kernels"]}
    assert wrong == {
        (model, kind): f"the {kind} ran written out"
        for model in ("generator", "world model")
        for kind in ("fwd", "bwd")
    }
    printed = capsys.readouterr().out
    assert "NOT AS PROMISED generator 5x16x16 sdpa_flash: the fwd ran written out" in printed
    assert "auto, native, was not timed" in printed


def test_the_script_keeps_to_one_device_on_a_pretended_gpu(tiny, monkeypatch):
    forward, backward = (
        next(kernel for kernel, known in NAMES.items() if known == ("PyTorch's FlashAttention-2", kind))
        for kind in ("fwd", "bwd")
    )

    # a profiler sees only the kernels of a real GPU
    def ran(work, device):
        work()
        assert device.type == "cuda"
        return {forward: profiled.Ran(4, 1e-3), backward: profiled.Ran(4, 2e-3)}

    monkeypatch.setattr(profiled, "ran", ran)
    with pretend.gpu():
        result, _ = tiny("--device", "cuda", "--variants", "native,sdpa_flash,sdpa_cudnn")
    assert set(result["left_out"]) == {"sdpa_cudnn"}
    assert "it failed on 16-wide heads" in result["left_out"]["sdpa_cudnn"]
    variants = {(row["variant"], row["dtype"]) for row in result["rows"]}
    assert variants == {("native", "bf16"), ("sdpa_flash", "bf16")} and len(result["rows"]) == 16
    assert all((row["output_error"] if row["pass"] == "fwd" else row["grad_error"]) < 0.02 for row in result["rows"])
    assert {verdict["auto"] for verdict in result["auto"]} == {"native"}
    assert all(profile["wrong"] is None for profile in result["kernels"])


def test_model_prints_shapes_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--model", "--device", "cuda"])
    assert bench_attention.main() == 0
    assert "N32760 M32760 D128" in capsys.readouterr().out
