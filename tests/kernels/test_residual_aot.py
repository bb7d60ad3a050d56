"""The residual's kernels compiled ahead of time for GPUs that are not here: registers, memory and instructions."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from ldo.kernels import residual, residual_launch, residual_rows
from tests.helpers import aot

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def row_specs(features, dtype, metric):
    """The row kernels on contiguous inputs, as ``launch_rows`` with and without statistics and ``launch_gradients``."""
    constants = {
        "predicted_stride": features,
        "target_stride": features,
        "D": features,
        "METRIC": metric,
        "NORM_Z": True,
    }
    constants |= {"K": residual_rows.K[metric]}
    forward = constants | {"NORM_H": True, "FUSE_SUMS": True}
    rows = {"predicted": TYPES[dtype], "target": TYPES[dtype], "residual": "*fp32", "M": "i32"}
    keep = rows | {"statistics": "*fp32"}
    fp32 = dict.fromkeys(("upstream", "weight", "statistics", "total"), "*fp32")
    gradients = {"predicted": TYPES[dtype], "target": TYPES[dtype], "gradient": TYPES[dtype], "offsets": "*i64"}
    gradients |= fp32 | dict.fromkeys(("M", "S", "steps"), "i32")
    for name, kernel, signature, fixed in (
        ("forward", "row_residuals", rows, forward | {"statistics": None}),
        ("forward for backward", "row_residuals", keep, forward),
        ("backward", "row_gradients", gradients, constants | {"gradient_stride": features, "EACH": False}),
    ):
        pointers = tuple(name_of for name_of, kind in signature.items() if kind[0] == "*")
        title = f"{name} {metric} {features} {TYPES[dtype][1:]}"
        block_m, block_d, warps = residual_launch.tile(features, name == "forward", interpreted=False)
        fixed |= {"BLOCK_M": block_m, "BLOCK_D": block_d}
        yield aot.Spec(
            title,
            f"ldo.kernels.residual_rows:{kernel}",
            signature,
            fixed,
            pointers,
            warps,
            options=residual_rows.OPTIONS,
        )


def segment_specs():
    """``segment_means`` of one long segment, of a few and of very many."""
    for segments, count, weight, table in (
        (1, 10**6, None, None),
        (16, 16 * 2000, "*fp32", "*i64"),
        (10**6, 3 * 10**6, "*fp32", "*i64"),
    ):
        signature = {"value": "*fp32", "weight": weight, "offsets": table, "out": "*fp32", "total": "*fp32"}
        none = {name: None for name, kind in signature.items() if kind is None}
        signature = {name: kind for name, kind in signature.items() if kind}
        block_s, block_r = residual.segment_tile(segments, count)
        constants = {"ROWS": True, "MEAN": True, "BLOCK_S": block_s, "BLOCK_R": block_r, **none}
        integers = dict.fromkeys(("S", "width", "count"), "i32")
        name, kernel = f"segment_means of {segments}", "ldo.kernels.residual:segment_means"
        yield aot.Spec(name, kernel, signature | integers, constants, tuple(signature), options=residual_rows.OPTIONS)


@pytest.fixture(scope="module")
def compiled():
    *other_segments, segments = segment_specs()
    others = [
        *row_specs(97, torch.bfloat16, "cosine"),
        *row_specs(1024, torch.bfloat16, "cosine"),
        *row_specs(8192, torch.float16, "l1"),
        *other_segments,
    ]
    return aot.compile_all(
        [*row_specs(1408, torch.bfloat16, "cosine"), segments, *(replace(spec, archs=(90,)) for spec in others)]
    )


def test_every_kernel_fits_every_architecture(compiled):
    assert {arch for _, arch in compiled} == {80, 90, 100} and len(compiled) == 3 * 4 + 11
    for name, usage in compiled.items():
        assert usage.stack == 0 and usage.spills == 0 and usage.shared <= aot.SHARED_LIMIT and usage.registers <= 128, (
            f"{name}: {usage}"
        )


def test_rows_move_in_16_bytes(compiled):
    wide = {name: usage for name, usage in compiled.items() if "1408" in name[0]}
    assert len(wide) == 9
    for name, usage in wide.items():
        assert usage.registers <= 64, f"{name}: {usage.registers} registers leave too few warps to hide memory"
        # 24 elements a thread of two inputs, 2 bytes each; none past the row's end
        assert usage.count("LDG.E.128") == 6, name
        assert usage.count("STG.E.128") == 3 * name[0].startswith("backward"), name


def test_sums_of_usual_rows_stay_within_a_warp(compiled):
    """No barrier: warps that share a row wait for each other, which takes a third of the time on an H200."""
    for name, usage in compiled.items():
        if "1024" in name[0] and "segment" not in name[0]:
            assert usage.count("BAR") == 0 and usage.registers <= 96, name
