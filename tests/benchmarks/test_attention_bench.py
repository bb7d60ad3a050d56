"""The attention benchmark: real shapes, kernels told by their names, exact gradients, and what is said of ``auto``."""

import dataclasses
import json
import sys

import models
import pretend
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

from benchmarks import bench_attention, common, profiled, show
from benchmarks.bench_attention import Layer
from ldo.attention import BACKENDS
from ldo.world_model import WorldModel

CPU = torch.device("cpu")
# as profilers show them: PyTorch's demangled from its CUDA library, the others from published traces
NAMES = {
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4>, false>": ("PyTorch's FlashAttention-2", "fwd"),
    "void pytorch_flash::flash_fwd_splitkv_combine_kernel<pytorch_flash::Flash_fwd_kernel_traits<64>>": ("PyTorch's FlashAttention-2", "fwd"),
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<pytorch_flash::Flash_bwd_kernel_traits<128>>": (
        "PyTorch's FlashAttention-2",
        "bwd",
    ),
    "void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 128, 4, false>>": ("FlashAttention-2", "fwd"),
    "void flash::flash_bwd_convert_dq_kernel<flash::Flash_bwd_kernel_traits<64>>": ("FlashAttention-2", "bwd"),
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2>>>>": ("FlashAttention-3", "fwd"),
    "void cutlass::device_kernel<flash::FlashAttnBwdPreprocess<cute::tuple<cute::C<128>>>>": ("FlashAttention-3", "bwd"),
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0": ("cuDNN", "fwd"),
    "cudnn_generated_fort_native_sdpa_sm90_knob_7_64x128x128_4x1x1_kernel0_0": ("cuDNN", "fwd"),  # of older ones
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1_kernel0_0": ("cuDNN", "bwd"),
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)": ("cuDNN", "bwd"),
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)": (
        "CUTLASS, memory-efficient",
        "fwd",
    ),
    "fmha_cutlassB_bf16_aligned_128x128_k128_sm80(PyTorchMemEffAttention::AttentionBackwardKernel<cutlass::bfloat16_t>::Params)": (
        "CUTLASS, memory-efficient",
        "bwd",
    ),
    "void (anonymous namespace)::cunn_SoftMaxForward<8, float, float, float, SoftMaxForwardEpilogue>": ("written out", "fwd"),
    "void (anonymous namespace)::softmax_warp_backward<float, float, float, 9, false>": ("written out", "bwd"),
    "kernel_cutlass_kernel_flash_attncuteSomethingNew": ("unknown", ""),
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn": None,
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": None,
    "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT": None,
}
CUDNN = [name for name, told in NAMES.items() if told and told[0] == "cuDNN"]


def test_the_layers_are_those_of_the_published_models():
    found = {(x.name, x.n): (x.b, x.h, x.m, x.d) for x in bench_attention.layers("cuda")}
    assert found == {
        ("wan self", 3510): (4, 12, 3510, 128),  # 9 x 15 x 26
        ("wan cross", 3510): (4, 12, 512, 128),
        ("wan self", 32760): (1, 12, 32760, 128),  # 21 x 30 x 52
        ("wan cross", 32760): (1, 12, 512, 128),
        ("encoder", 2048): (4, 16, 2048, 64),  # 8 x 16 x 16
        ("predictor", 2048): (4, 12, 2048, 32),
        ("encoder", 8192): (1, 16, 8192, 64),
        ("predictor", 8192): (1, 12, 8192, 32),
    }


def test_plans():
    quick = bench_attention.plan("cuda", True, None)
    assert [(x.name, x.n) for x in quick] == [("wan self", 3510), ("wan cross", 3510), ("encoder", 2048), ("predictor", 2048)]
    chosen = bench_attention.plan("cuda", False, [100, 200])
    assert [(x.name, x.b, x.n, x.m) for x in chosen][:2] == [("wan self", 1, 100, 100), ("wan self", 1, 200, 200)] and len(chosen) == 6


def test_operations_are_those_that_pytorch_counts():
    layer = Layer("x", "generator", 2, 3, 40, 24, 16)
    q, k, v, _ = (x.transpose(1, 2) for x in layer.inputs(torch.Generator().manual_seed(0), CPU, torch.float32))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        F.scaled_dot_product_attention(q, k, v)
    assert layer.flops("fwd") == counter.get_total_flops()
    assert layer.flops("fwd+bwd") - layer.flops("fwd") == sdpa_backward_flop_count(q.shape, q.shape, k.shape, v.shape)


# ---------------------------------------------------------------------------------------------- kernels by name


@pytest.mark.parametrize("name", NAMES)
def test_a_kernels_family_and_pass(name):
    assert profiled.family(name) == NAMES[name]


def test_every_backend_promises_families_that_are_told_apart():
    assert set(profiled.PROMISED) == set(BACKENDS)
    assert {f for promised in profiled.PROMISED.values() for f in promised} == set(profiled.FAMILIES)
    assert {told[0] for told in NAMES.values() if told} | {"PyTorch's for a CPU"} == {*profiled.FAMILIES, "unknown"}


def test_what_is_not_as_promised_is_said():
    assert profiled.wrong("sdpa_cudnn", CUDNN) is None
    assert profiled.wrong("native", CUDNN) is None
    assert profiled.wrong("sdpa_flash", CUDNN) == "the fwd ran cuDNN; the bwd ran cuDNN"
    assert profiled.wrong("flash2", [n for n in NAMES if "pytorch_flash" in n]).count("PyTorch's FlashAttention-2") == 2
    assert profiled.wrong("sdpa_cudnn", []) == "no attention kernel in the fwd; no attention kernel in the bwd"
    assert profiled.wrong("sdpa_cudnn", [n for n in CUDNN if "prop" not in n or "fprop" in n], ["fwd"]) is None
    assert profiled.wrong("sdpa_cudnn", [*CUDNN, "a_new_flash_kernel"]) == "the fwd ran unknown; the bwd ran unknown"


def test_the_profiler_tells_what_ran_and_how_often():
    q = torch.randn(1, 2, 8, 16, requires_grad=True)

    def work(backend):
        with torch.nn.attention.sdpa_kernel(backend):
            F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, q, q), q, q).sum().backward()

    kinds = torch.nn.attention.SDPBackend
    flash, written = (profiled.ran(lambda kind=kind: work(kind), CPU) for kind in (kinds.FLASH_ATTENTION, kinds.MATH))
    assert {name.rsplit("_", 1)[-1]: r.count for name, r in flash.items()} == {"cpu": 2, "backward": 2}
    assert profiled.wrong("sdpa_flash", flash) is None and profiled.wrong("sdpa_math", written) is None
    assert profiled.wrong("sdpa_math", flash) == "the fwd ran PyTorch's for a CPU; the bwd ran PyTorch's for a CPU"
    assert all(r.count == 2 and r.seconds > 0 for r in written.values()) and len(written) == 2
    assert profiled.ran(lambda: q @ q.mT, CPU) == {}


# ---------------------------------------------------------------------------------------------- numbers


def test_the_exact_gradients(monkeypatch):
    monkeypatch.setattr(bench_attention, "ROWS", 7)
    q, k, v, g = (x[0].transpose(0, 1) for x in Layer("x", "generator", 1, 2, 30, 20, 8).inputs(torch.Generator().manual_seed(0), CPU, torch.float64))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves)
    for ours, theirs in zip(bench_attention.exact(q, k, v, g), (out, *torch.autograd.grad(out, leaves, g)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_inputs_lie_in_memory_as_the_models_have_them(monkeypatch, vjepa_folder):
    from diffusers.models.transformers import transformer_wan
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []
    stock = transformer_wan.dispatch_attention_fn
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", lambda q, k, v, **more: seen.append((q, k, v)) or stock(q, k, v, **more))
    model, call = models.transformer("wan")
    model(**call)
    assert len(seen) == 4
    for q, k, v in seen:
        layer = Layer("x", "generator", q.shape[0], q.shape[2], q.shape[1], k.shape[1], q.shape[3])
        wanted = layer.inputs(torch.Generator(), CPU, torch.float32)
        assert [x.stride() for x in (q, k, v)] == [x.stride() for x in wanted[:3]]
    seen.clear()

    def spy(module, q, k, v, *rest, **more):
        seen.append((q, k, v))
        return sdpa_attention_forward(module, q, k, v, *rest, **more)

    AttentionInterface.register("spy", spy)
    judge = WorldModel.load(vjepa_folder)
    judge.model.set_attn_implementation("spy")
    judge.forecast(torch.rand(2, 4, 3, 32, 32), 2)
    assert len(seen) == 4
    for q, k, v in seen:
        layer = Layer("x", "world model", q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])
        wanted = layer.inputs(torch.Generator(), CPU, torch.float32)
        assert [(x.shape, x.stride()) for x in (q, k, v)] == [(x.shape, x.stride()) for x in wanted[:3]]


def test_attention_written_out_is_not_tried_where_it_cannot_fit():
    layer = bench_attention.layers("cuda")[0]
    with pytest.raises(common.Unavailable, match="its matrices of 3510 x 3510 take some"):
        bench_attention.fits(dataclasses.replace(layer, b=64), "fwd", CPU)
    bench_attention.fits(dataclasses.replace(layer, b=1), "fwd", CPU)


def test_what_is_said_of_auto():
    def row(kind, variant, ms):
        fixed = {"model": "generator", "case": "wan self", "pass": kind, "shape": {"N": 8}, "variant": variant}
        return {**fixed, "ms": ms, "tflops": 1.0, "share": 0.5, "spread": 0.05}

    rows = [row("fwd", "native", 2.0), row("fwd", "sdpa_cudnn", 1.0), row("fwd", "sdpa_math", None), row("fwd+bwd", "native", 1.0)]
    fwd, both = bench_attention.judge_auto(rows, {"generator": "native"})
    assert (fwd["fastest"], fwd["slower"], fwd["was_fastest"], fwd["ms"]) == ("sdpa_cudnn", 2.0, False, 1.0)
    assert both["was_fastest"] and both["slower"] == 1.0
    assert bench_attention.judge_auto([*rows[1:2], row("fwd", "native", 1.04)], {"generator": "native"})[0]["was_fastest"]  # within the noise
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
        monkeypatch.setattr(bench_attention, name, value)
    out = tmp_path / "attention.json"

    def go(*flags):
        monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--quick", "--out", str(out), *flags])
        assert bench_attention.main() == 0
        return json.loads(out.read_text()), out

    return go


def test_the_script_runs_small(tiny, capsys):
    result, out = tiny("--variants", "native,flash2")
    ran = {"native"}
    assert set(result["left_out"]) == {"flash2"}
    assert {(r["case"], r["pass"], r["variant"]) for r in result["rows"]} == {
        (case, kind, name) for case in ("wan self", "wan cross", "encoder", "predictor") for kind in ("fwd", "fwd+bwd") for name in ran
    }
    for row in result["rows"]:
        assert row["op"] == "attention" and row["ms"] > 0 and row["share"] == pytest.approx(row["tflops"] / result["matmul_tflops"])
        assert (row["output_error"] if row["pass"] == "fwd" else row["grad_error"]) < 1e-5
    assert {r["shape"].get("M") for r in result["rows"] if r["case"] == "wan cross"} == {6}
    assert {(k["model"], k["backend"], k["pass"]) for k in result["kernels"]} == {
        (model, name, kind) for model in ("generator", "world model") for name in ran for kind in ("fwd", "bwd")
    }
    for row in result["kernels"]:
        assert row["wrong"] is None and row["layers"] == "4 of 4"
        assert all(n["count"] == (4 if row["model"] == "generator" else 6) for n in row["names"].values())
    assert len(result["auto"]) == 8 and {v["auto"] for v in result["auto"]} == {"native"}
    printed = capsys.readouterr().out
    assert "this is a CPU" in printed and "flash2: left out, flash_attn is not installed" in printed
    show.summary(out)
    assert "4 profiles of kernels, 0 not as the backend's name promises" in capsys.readouterr().out


def test_a_backend_that_runs_another_kernel_is_reported(tiny, monkeypatch, capsys):
    monkeypatch.setitem(BACKENDS, "sdpa_flash", dataclasses.replace(BACKENDS["sdpa_flash"], dense="_native_math"))
    result, _ = tiny("--variants", "sdpa_flash")
    wrong = {(k["model"], k["pass"]): k["wrong"] for k in result["kernels"]}
    assert wrong == {(model, kind): f"the {kind} ran written out" for model in ("generator", "world model") for kind in ("fwd", "bwd")}
    printed = capsys.readouterr().out
    assert "NOT AS PROMISED generator 5x16x16 sdpa_flash: the fwd ran written out" in printed and "auto, native, was not timed" in printed


def test_the_script_keeps_to_one_device_on_a_pretended_gpu(tiny, monkeypatch):
    fwd, bwd = (next(name for name, told in NAMES.items() if told == ("PyTorch's FlashAttention-2", kind)) for kind in ("fwd", "bwd"))

    def ran(work, device):  # a profiler sees only real ones
        work()
        assert device.type == "cuda"
        return {fwd: profiled.Ran(4, 1e-3), bwd: profiled.Ran(4, 2e-3)}

    monkeypatch.setattr(profiled, "ran", ran)
    with pretend.gpu():
        result, _ = tiny("--device", "cuda", "--variants", "native,sdpa_flash,sdpa_cudnn")
    assert set(result["left_out"]) == {"sdpa_cudnn"} and "it failed on 16-wide heads" in result["left_out"]["sdpa_cudnn"]
    assert {(r["variant"], r["dtype"]) for r in result["rows"]} == {("native", "bf16"), ("sdpa_flash", "bf16")} and len(result["rows"]) == 16
    assert all((r["output_error"] if r["pass"] == "fwd" else r["grad_error"]) < 0.02 for r in result["rows"])
    assert {v["auto"] for v in result["auto"]} == {"native"} and all(k["wrong"] is None for k in result["kernels"])


def test_model_prints_shapes_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--model", "--device", "cuda"])
    assert bench_attention.main() == 0
    assert "N32760 M32760 D128" in capsys.readouterr().out
