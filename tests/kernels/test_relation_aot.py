"""The relation loss compiled ahead of time for GPUs that are not here: registers, shared memory and instructions."""

import pytest
import torch

from ldo.kernels import relation_plan
from ldo.kernels.support import EPS, HUBER
from tests.helpers import aot

PAIRS = "ldo.kernels.relation_pairs:pair_kernel"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# The tensor cores' instruction.
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

# sm_86, sm_89 and sm_120 take the configuration of sm_80, and have no more than this.
SHARED = {80: 101_376, 90: aot.SHARED_LIMIT, 100: aot.SHARED_LIMIT}

# dtype, penalty, framed, weighted, write, D, E
CASES = {
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


def configs(write: bool) -> dict:
    return relation_plan.WITH_GRADIENT if write else relation_plan.CONFIGS


def pair_spec(case: str, arch: int, config: relation_plan.Config | None = None) -> aot.Spec:
    dtype, penalty, framed, weighted, write, student_width, teacher_width = CASES[case]
    chosen = config or configs(write)[arch, dtype != torch.float32]
    kind, width = TYPES[dtype], chosen.cols // chosen.slices

    def block(rows, columns):
        return f"tensordesc<{kind}[1, {rows}, {columns}]>" if chosen.use_tma else f"*{kind}"

    signature = {
        "x_rows": block(chosen.rows, chosen.depth),
        "t_rows": block(chosen.rows, chosen.depth),
        "x_cols": block(chosen.cols, chosen.depth),
        "t_cols": block(chosen.cols, chosen.depth),
        **dict.fromkeys(("inverse", "ratio", "factor", "partial"), "*fp32"),
        **dict.fromkeys(("partial_stride", "first_partial", "N", "padded", "blocks"), "i32"),
        **dict.fromkeys(("out_rows", "out_cols", "first_clip", "origin", "end"), "i32"),
        "tiles": "*i32",
        "margin": "fp32",
    }
    constants = {
        "D": student_width,
        "E": teacher_width,
        "ROWS": chosen.rows,
        "COLS": chosen.cols,
        "DEPTH": chosen.depth,
        "SLICES": chosen.slices,
        "SQUARE": chosen.square,
        "SKIP": chosen.skip,
        "HUBER": HUBER,
    }
    constants |= {
        "PENALTY": penalty,
        "FRAMED": framed,
        "WEIGHTED": weighted,
        "WRITE": write,
        "UNIT": dtype == torch.float16,
        "USE_TMA": chosen.use_tma,
    }
    constants |= {"PRECISION": "tf32x3", "INTERPRET": False}
    for name, kind_of, there in (
        ("frame", "*i32", framed),
        ("weight", "*fp32", weighted),
        ("observed", "*i32", weighted and chosen.use_tma),
        ("out", block(chosen.rows, width), write),
        ("out_mirror", block(width, chosen.rows), write),
    ):
        (signature if there else constants)[name] = kind_of if there else None
    divisible = ("padded", "out_cols", *(name for name, kind_of in signature.items() if kind_of.startswith("*")))
    options = {"maxnreg": chosen.registers} if chosen.registers else {}
    return aot.Spec(
        f"{case} sm_{arch}", PAIRS, signature, constants, divisible, chosen.warps, chosen.stages, options, (arch,)
    )


def row_specs() -> list[aot.Spec]:
    """The kernels around the pairs, with the constants of their launches."""
    bf16, fp32, int32 = "*bf16", "*fp32", "*i32"
    prepare = {"student": bf16, "teacher": bf16, "inverse": fp32, "ratio": fp32, "factor": fp32, "scale": fp32}
    prepare |= {"N": "i32", "padded": "i32", "clips": "i32", "blocks": "i32"}
    prepare |= dict.fromkeys(("spatial", "temporal", "inverse_gain", "ratio_gain"), "fp32")
    weighted = {"weight": fp32, "padded_weight": fp32, "observed": int32}
    framed = {"order": int32, "run_start": int32, "cumulative": "*fp64"}
    half = {"student": "*fp16", "teacher": "*fp16", "unit": "*fp16"}
    loss = {"partial": fp32, "scale": fp32, "loss": fp32, "tiles": "i32", "clips": "i32"}
    project = {
        "upstream": fp32,
        "product": fp32,
        "scale": fp32,
        "student": bf16,
        "gradient": bf16,
        "rows": "i32",
        "N": "i32",
    }
    optional = dict.fromkeys((*weighted, *framed, "unit"))

    def spec(name, kernel, signature, warps=4, options=None, **constants):
        pointers = tuple(argument for argument, kind in signature.items() if kind.startswith("*"))
        kernel = "ldo.kernels.relation_" + kernel
        return aot.Spec(name, kernel, signature, constants, pointers, warps, options=options or {})

    def prepared(name, signature):
        left = {argument: None for argument in optional if argument not in signature}
        sizes = {"D": 1920, "E": 1024, "TOKENS": 16, "BLOCK": 512, "SCAN": relation_plan.SCAN, "SKIP": 128, "EPS": EPS}
        return spec(
            name,
            "prepare:prepare_kernel",
            prepare | signature,
            8,
            {"maxnreg": relation_plan.PREPARE_REGISTERS},
            **sizes,
            **left,
        )

    return [
        prepared("prepare", {}),
        prepared("prepare, frames and weights", weighted | framed),
        prepared("prepare fp16", half | weighted | framed),
        spec("loss", "finish:loss_kernel", loss, BLOCK=1024),
        spec("project", "finish:project_kernel", project, 2, D=1920, TOKENS=1, COLUMNS=2048, UNIT=False, EPS=EPS),
    ]


@pytest.fixture(scope="module")
def usage():
    return aot.compile_all([pair_spec(*compiled) for compiled in COMPILED] + row_specs())


@pytest.mark.slow
@pytest.mark.parametrize(("case", "arch"), COMPILED)
def test_pairs_fit_and_reach_the_tensor_cores(usage, case, arch):
    found = usage[f"{case} sm_{arch}", arch]
    assert found.stack == 0 and found.spills == 0
    assert found.shared <= SHARED[arch]
    assert found.count(MATRIX[arch]) >= 2  # both similarities
    # only the epilogue multiplies in fp32
    assert found.count("FFMA") < 4000
    writes = CASES[case][4]
    if arch == 90 and CASES[case][0] != torch.float32:
        # nothing hides the epilogue: the tensor cores wait for as long as it takes
        assert sum(found.opcodes.values()) < 3750
        # the mirror image costs no shuffles
        assert found.count("STSM.16.MT88.4") == found.count("STSM.16.M88.4") > 0 or not writes
    if relation_plan.CONFIGS[arch, True].use_tma:
        assert found.count("UTMALDG") and bool(found.count("UTMASTG")) == writes


@pytest.mark.slow
@pytest.mark.parametrize("arch", MATRIX)
@pytest.mark.parametrize("kernel", ["prepare", "prepare, frames and weights", "prepare fp16", "loss", "project"])
def test_kernels_around_the_pairs(usage, kernel, arch):
    found = usage[kernel, arch]
    assert found.stack == 0 and found.spills == 0 and found.shared <= 48 * 1024
    if kernel != "loss":
        assert found.count("LDG.E.128")  # 16 bytes a thread: bound by memory
