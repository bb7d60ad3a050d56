"""The relation loss compiled for GPUs that are not here: what each configuration takes of registers and shared memory."""

import aot
import pytest
import torch

from ldo.kernels import relation

PAIRS = "ldo.kernels.relation_pairs:pair_kernel"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # what tensor cores are fed with
SHARED = {80: 101_376, 90: aot.SHARED_LIMIT, 100: aot.SHARED_LIMIT}  # sm_80's cut serves sm_86, 89 and 120 too, which have this much

CASES = {  # dtype, penalty, framed, weighted, write, D, E
    "hinge": (torch.bfloat16, "hinge", True, True, True, 1920, 1024),
    "hinge, all pairs alike": (torch.bfloat16, "hinge", False, False, True, 1536, 1024),
    "hinge, odd widths": (torch.bfloat16, "hinge", True, True, True, 1000, 1408),
    "squared": (torch.bfloat16, "squared", True, True, True, 3072, 1408),
    "huber": (torch.bfloat16, "huber", True, True, True, 5120, 1024),
    "no gradient": (torch.bfloat16, "hinge", True, True, False, 1920, 1024),
    "fp16": (torch.float16, "hinge", True, True, True, 1920, 1024),
    "fp32": (torch.float32, "hinge", True, True, True, 1920, 1024),
}
ELSEWHERE = ("hinge", "huber", "no gradient", "fp16", "fp32")  # on sm_80 and sm_100; on sm_90 every case
COMPILED = [(case, arch) for arch in MATRIX for case in (CASES if arch == 90 else ELSEWHERE)]


def pair_spec(case: str, arch: int, config: relation.Config | None = None) -> aot.Spec:
    dtype, penalty, framed, weighted, write, d, e = CASES[case]
    c = config or relation.CONFIGS[arch, dtype != torch.float32]
    kind, width = TYPES[dtype], c.cols // c.slices

    def block(rows, columns):
        return f"tensordesc<{kind}[1, {rows}, {columns}]>" if c.bulk else f"*{kind}"

    signature = {
        **{f"{v}_rows": block(c.rows, c.depth) for v in "xt"},
        **{f"{v}_cols": block(c.cols, c.depth) for v in "xt"},
        **dict.fromkeys(("inverse", "ratio", "factor", "partial"), "*fp32"),
        **dict.fromkeys(("N", "padded", "out_rows", "out_cols", "clip0", "origin", "end"), "i32"),
        "tiles": "*i32",
        "margin": "fp32",
    }
    constants = {"D": d, "E": e, "ROWS": c.rows, "COLS": c.cols, "DEPTH": c.depth, "SLICES": c.slices, "SUPER": c.super, "HUBER": relation.HUBER}
    constants |= {"PENALTY": penalty, "FRAMED": framed, "WEIGHTED": weighted, "WRITE": write, "UNIT": dtype == torch.float16, "BULK": c.bulk}
    constants |= {"PRECISION": "tf32x3", "INTERPRET": False}
    for name, kind_of, there in (
        ("frame", "*i32", framed),
        ("weight", "*fp32", weighted),
        ("out", block(c.rows, width), write),
        ("out_mirror", block(width, c.rows), write),
    ):
        (signature if there else constants)[name] = kind_of if there else None
    divisible = ("padded", "out_cols", *(name for name, kind_of in signature.items() if kind_of.startswith("*")))
    options = {"maxnreg": c.registers} if c.registers else {}
    return aot.Spec(f"{case} sm_{arch}", PAIRS, signature, constants, divisible, c.warps, c.stages, options, (arch,))


def row_specs() -> list[aot.Spec]:
    """The kernels around the pairs, at the launches' own constants."""
    code, rows = "ldo.kernels.relation_pairs:", {"TOKENS": 4, "BLOCK": 512, "EPS": relation.EPS}
    x, fp32 = "*bf16", "*fp32"
    prepare = {"x": x, "t": x, "inverse": fp32, "ratio": fp32, "N": "i32", "padded": "i32"}
    half = {**prepare, "x": "*fp16", "t": "*fp16", "unit": "*fp16"}
    sums = {"frame": "*i32", "weight": fp32, "sums": fp32, "N": "i32"}
    factor = {"sums": fp32, "factor": fp32, "top": fp32, "blocks": "i32", "clips": "i32", "spatial": "fp32", "temporal": "fp32"}
    loss = {"partial": fp32, "top": fp32, "loss": fp32, "tiles": "i32", "clips": "i32"}
    project = {"upstream": fp32, "pull": fp32, "top": fp32, "x": x, "grad": x, "count": "i32", "N": "i32"}

    def spec(name, kernel, signature, **constants):
        return aot.Spec(name, code + kernel, signature, constants, tuple(k for k, v in signature.items() if v.startswith("*")))

    return [
        spec("prepare", "prepare_kernel", prepare, unit=None, D=1920, E=1024, UNIT=False, **rows),
        spec("prepare fp16", "prepare_kernel", half, D=1920, E=1024, UNIT=True, **rows),
        spec("class sums", "class_sums_kernel", sums, FRAMED=True, WEIGHTED=True, ROWS=16, COLS=128),
        spec("factor", "factor_kernel", factor, BLOCK=256),
        spec("loss", "loss_kernel", loss, BLOCK=1024),
        spec("project", "project_kernel", project, D=1920, UNIT=False, **rows),
    ]


@pytest.fixture(scope="module")
def usage():
    return aot.compile_all([pair_spec(*at) for at in COMPILED] + row_specs())


@pytest.mark.slow
@pytest.mark.parametrize(("case", "arch"), COMPILED)
def test_pairs_fit_and_reach_the_tensor_cores(usage, case, arch):
    found = usage[f"{case} sm_{arch}", arch]
    assert found.stack == 0 and found.spills == 0
    assert found.shared <= SHARED[arch]
    assert found.count(MATRIX[arch]) >= 2  # both similarities
    assert found.count("FFMA") < 4000  # fp32 multiplication is the epilogue's alone
    if arch == 90 and CASES[case][0] != torch.float32:
        assert sum(found.opcodes.values()) < 3700  # the epilogue is not hidden behind anything: what it takes, the tensor cores wait
        assert found.count("STSM.16.MT88.4") == found.count("STSM.16.M88.4") > 0 or not CASES[case][4]  # the mirror image costs no shuffles
    if relation.CONFIGS[arch, True].bulk:
        assert found.count("UTMALDG") and bool(found.count("UTMASTG")) == CASES[case][4]


@pytest.mark.slow
@pytest.mark.parametrize("arch", MATRIX)
@pytest.mark.parametrize("kernel", ["prepare", "prepare fp16", "class sums", "factor", "loss", "project"])
def test_kernels_around_the_pairs(usage, kernel, arch):
    found = usage[kernel, arch]
    assert found.stack == 0 and found.spills == 0 and found.shared <= 48 * 1024
    if kernel in ("prepare", "project"):
        assert found.count("LDG.E.128")  # 16 bytes a thread: bound by memory
