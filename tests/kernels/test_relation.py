"""The fused relation loss: on a GPU as it is, elsewhere through Triton's interpreter."""

from itertools import pairwise

import pytest
import torch

from ldo.kernels import relation, relation_plan, support
from ldo.kernels.support import WORKSPACE
from ldo.ops import relation_loss
from tests.helpers import relations
from tests.helpers.fused import DEVICE, GOAL, POINTERS, fused, inputs, truth

SHAPES = [(1, 1, 8, 8), (2, 97, 40, 24), (1, 130, 33, 7), (3, 133, 64, 65), (1, 315, 16, 48)]  # B, N, D, E


@pytest.fixture(params=["tma", "pointers"])
def loading(request, monkeypatch):
    """Runs a test with either way of loading, tensor descriptors and pointers, on any device."""
    config = {"tma": relation_plan.ON_CPU, "pointers": POINTERS}[request.param]
    choose = lambda *_: config  # noqa: E731
    if DEVICE.type == "cuda":
        major = torch.cuda.get_device_capability()[0]
        if request.param == "tma" and major < 9:
            pytest.skip("no TMA before sm_90")
        arch = {"tma": min(major * 10, 100), "pointers": 80}[request.param]
        choose = lambda _, dtype, __: relation_plan.CONFIGS[arch, dtype != torch.float32]  # noqa: E731
    monkeypatch.setattr(relation_plan, "choose_config", choose)
    relation_plan.plan.cache_clear()
    yield
    relation_plan.plan.cache_clear()


def recorded(monkeypatch):
    """The arguments of every launch from here on, by kernel."""
    launched, launch = {}, support.Launch.__call__

    def record(self, *arguments):
        launched.setdefault(self.kernel.fn.__name__, []).append(arguments)
        launch(self, *arguments)

    monkeypatch.setattr(support.Launch, "__call__", record)
    return launched


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_worse_than_plain_arithmetic_in_the_same_precision(shape, options, dtype):
    student, teacher, named = inputs(*shape, dtype=dtype, options=options)
    # keeps gradients within the range of fp16
    upstream = float(shape[1])
    loss, slope = truth(student, teacher, upstream, **named)
    leaf = student.clone().requires_grad_()
    rough = relations.plain(leaf, teacher, **named)
    (upstream * rough).backward()
    found, gradient = fused(student, teacher, upstream, **named)
    assert found.dtype == torch.float32 and gradient.dtype == dtype and gradient.shape == student.shape
    assert abs(found - loss) <= max(abs(rough - loss).item(), 2e-7 * loss.item())
    if slope.norm() > 1e-6:  # a single token has similarity 1 to itself, whatever it is
        assert relations.distance(gradient, slope) <= min(GOAL[dtype], max(relations.distance(leaf.grad, slope), 1e-6))


@pytest.mark.parametrize("penalty", ["hinge", "squared", "huber"])
@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("loading")
def test_every_penalty(penalty, margin, dtype):
    student, teacher, named = inputs(2, 97, 40, 24, dtype=dtype)
    options = {**named, "penalty": penalty, "margin": margin, "spatial": 0.8, "temporal": 0.3}
    loss, slope = truth(student, teacher, **options)
    found, gradient = fused(student, teacher, **options)
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relations.distance(gradient, slope) <= GOAL[dtype]


@pytest.mark.parametrize("given", [(), ("frame_N",), ("weight_BN",)])
def test_each_option_by_itself(given):
    student, teacher, named = inputs(2, 97, 40, 24)
    named = {name: named[name] for name in given}
    loss, slope = truth(student, teacher, **named)
    found, gradient = fused(student, teacher, **named)
    assert found.item() == pytest.approx(loss.item(), rel=1e-6) and relations.distance(gradient, slope) <= 1e-5


def test_few_active_pairs():
    """If about one pair in a hundred passes the margin, rounding to bf16 unit vectors changes which ones do.

    So the operands must be the inputs as given.
    """
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 384, 128, generator=generator)
    teacher = (student + 0.3 * torch.randn(1, 384, 128, generator=generator)).bfloat16().to(DEVICE)
    student = student.bfloat16().to(DEVICE)
    unit_x, unit_y = (torch.nn.functional.normalize(features.double(), dim=-1) for features in (student, teacher))
    active = ((unit_x @ unit_x.mT - unit_y @ unit_y.mT).abs() > 0.1).double().mean().item()
    assert 0.003 < active < 0.03
    _, slope = truth(student, teacher)
    leaf = student.clone().requires_grad_()
    relations.plain(leaf, teacher).backward()
    _, gradient = fused(student, teacher)
    assert relations.distance(gradient, slope) <= 5e-3 < 2e-2 <= relations.distance(leaf.grad, slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("loading")
def test_panels_and_clips_apart_give_the_same(monkeypatch, dtype):
    """A workspace that holds only one row of squares gives the largest number of panels."""
    student, teacher, named = inputs(2, 200, 40, 24, dtype=dtype)
    loss, slope = truth(student, teacher, **named)
    found, _ = fused(student, teacher, **named)
    for share in (1.5, 0.4, 0.0):  # of one clip's matrix: clips one by one, some panels, as many as can be
        monkeypatch.setattr(relation, "WORKSPACE", int(share * 200 * 256 * student.element_size()))
        again, other = fused(student, teacher, **named)
        assert again.item() == pytest.approx(found.item(), rel=1e-6) and loss.item() == pytest.approx(
            found.item(), rel=1e-6
        )
        assert relations.distance(other, slope) <= GOAL[dtype]


@pytest.mark.parametrize(
    ("clips", "tokens", "elements", "step"),
    [(1, 97, 10**6, 64), (5, 97, 30_000, 64), (2, 700, 100_000, 64), (1, 23_040, 2**27, 256)],
)
def test_plan_keeps_to_the_workspace(clips, tokens, elements, step):
    found, together = relation_plan.panels(clips, tokens, elements, step)
    assert (
        found[0][0] == 0
        and found[-1][1] == tokens
        and all(panel[1] == following[0] for panel, following in pairwise(found))
    )
    for start, end in found:
        # only a panel of a single step may be larger than the workspace
        assert start % step == 0
        assert together * (end - start) * relation_plan.aligned(tokens - start) <= elements or end - start <= step


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200, 511])
@pytest.mark.parametrize(("rows", "cols"), [(32, 64), (64, 64), (64, 32)])
@pytest.mark.parametrize("panel", [64, 128, 4096])
def test_tiles_cover_every_pair_once(tokens, rows, cols, panel):
    """Each row is computed once from its diagonal square on; with the mirror images, a panel's rows are complete."""
    side = max(rows, cols)
    seen = torch.zeros(tokens, tokens, dtype=torch.int)
    for start in range(0, tokens, panel):
        end = min(start + panel, tokens)
        written = torch.zeros(tokens, tokens, dtype=torch.int)
        for row, column in relation_plan.tile_table(tokens, start, end, rows, cols, torch.device("cpu")).tolist():
            seen[row : row + rows, column : column + cols] += 1
            written[row : row + rows, column : column + cols] += 1
            if row // side != column // side and column < end:
                written[column : column + cols, row : row + rows] += 1
        assert (written[start:end, start:] == 1).all()
    square = torch.arange(tokens) // side
    assert torch.equal(seen, (square[:, None] <= square[None, :]).int())


@pytest.mark.usefixtures("loading")
def test_pairs_of_tokens_without_weight_are_left_out_exactly(monkeypatch):
    """Tiles between tokens without weight, and only those, multiply nothing; the result is the same to the bit."""
    student, teacher, named = inputs(2, 252, 40, 24)
    named["weight_BN"][0, :130] = 0
    named["weight_BN"][1, 60:200] = 0
    loss, slope = truth(student, teacher, **named)
    found, gradient = fused(student, teacher, **named)
    assert found.item() == pytest.approx(loss.item(), rel=1e-6) and relations.distance(gradient, slope) <= 1e-5
    with monkeypatch.context() as patch:
        launched = recorded(patch)
        fused(student, teacher, **named)
    observed = launched["prepare_kernel"][0][10]
    if observed is not None:  # where pairs are left out at all
        assert 0 < observed.sum() < observed.numel()
    # the same call again, now without leaving anything out
    make = relation_plan.Plan._scratch
    monkeypatch.setattr(relation_plan.Plan, "_scratch", lambda self: setattr(self, "skips", False) or make(self))
    relation_plan.plan.cache_clear()
    again, same = fused(student, teacher, **named)
    assert torch.equal(found, again) and torch.equal(gradient, same)


def test_without_gradient_no_matrix_is_made(monkeypatch):
    student, teacher, named = inputs(2, 130, 40, 24)
    written = []
    outputs = relation_plan.Plan.outputs
    monkeypatch.setattr(
        relation_plan.Plan, "outputs", lambda self, matrix: written.append(matrix) or outputs(self, matrix)
    )
    with_gradient, _ = fused(student, teacher, **named)
    assert written[-1] is not None
    written.clear()
    without = relation_loss(student, teacher, impl="triton", **named)
    with torch.no_grad():
        neither = relation_loss(student.clone().requires_grad_(), teacher, impl="triton", **named)
    assert written == [None, None] and torch.equal(without, with_gradient) and torch.equal(neither, with_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_to_the_bit(dtype):
    student, teacher, named = inputs(2, 133, 64, 40, dtype=dtype)
    (loss, gradient), (again, same) = (fused(student, teacher, **named) for _ in range(2))
    assert torch.equal(loss, again) and torch.equal(gradient, same)


def test_gradient_is_orthogonal_to_its_token():
    student, teacher, named = inputs(2, 130, 48, 24)
    _, gradient = fused(student, teacher, **named)
    # a cosine does not change along its own vector, so neither does the loss
    along = (gradient.double() * student.double()).sum(-1).abs()
    assert (along <= 1e-6 * gradient.norm(dim=-1) * student.norm(dim=-1)).all() and gradient.norm() > 1e-3


def test_order_of_tokens_does_not_matter():
    student, teacher, named = inputs(2, 97, 40, 24)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    loss, gradient = fused(student, teacher, **named)
    again, moved = fused(
        student[:, order], teacher[:, order], frame_N=named["frame_N"][order], weight_BN=named["weight_BN"][:, order]
    )
    assert (
        again.item() == pytest.approx(loss.item(), rel=1e-6) and relations.distance(moved, gradient[:, order]) <= 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors_have_similarity_and_gradient_zero(dtype):
    student, teacher, named = inputs(1, 40, 32, 24, dtype=dtype)
    # a token without a student's vector, one without a teacher's, and one without either
    student[0, [0, 7]], teacher[0, [3, 7]] = 0, 0
    loss, slope = truth(student, teacher, **named)
    found, gradient = fused(student, teacher, **named)
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    assert (gradient[0, [0, 7]] == 0).all() and relations.distance(gradient, slope) <= GOAL[dtype]


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_of_vectors_do_not_matter(scale, dtype):
    student, teacher, named = inputs(1, 97, 40, 24, dtype=dtype)
    # of some tokens only, so that long and short vectors meet in one tile
    student[0, ::3] *= scale
    teacher[0, ::5] /= scale
    loss, slope = truth(student, teacher, **named)
    found, gradient = fused(student, teacher, **named)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for rows in (slice(0, None, 3), [1, 2]):  # long and short vectors have gradients of different sizes
        assert relations.distance(gradient[0, rows], slope[0, rows]) <= GOAL[dtype]


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(where, value):
    student, teacher, named = inputs(1, 97, 40, 24)
    {"student": student, "teacher": teacher}[where][0, 5, 3] = value
    loss, gradient = fused(student, teacher, **named)
    assert loss.isnan() and gradient.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_unwritten_is_read(monkeypatch, dtype):
    student, teacher, named = inputs(2, 97, 40, 24, dtype=dtype)
    expected = fused(student, teacher, **named)
    empty, empty_like = torch.empty, torch.empty_like
    # new memory is full of NaN: what is read before it is written shows in the results
    monkeypatch.setattr(torch, "empty", lambda *given, **keywords: empty(*given, **keywords).fill_(float("nan")))
    monkeypatch.setattr(
        torch, "empty_like", lambda *given, **keywords: empty_like(*given, **keywords).fill_(float("nan"))
    )
    for space in (WORKSPACE, 0):
        monkeypatch.setattr(relation, "WORKSPACE", space)
        loss, gradient = fused(student, teacher, **named)
        assert torch.equal(loss, expected[0]) and relations.distance(gradient, expected[1]) <= 1e-6


def test_strided_inputs_and_upstream_gradient():
    student, teacher, named = inputs(2, 33, 16, 24)
    _, slope = fused(student, teacher, **named)
    leaf = student.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    strided = {"frame_N": named["frame_N"].repeat_interleave(2)[::2], "weight_BN": named["weight_BN"].T.contiguous().T}
    (-3.5 * relation_loss(leaf, teacher.repeat_interleave(2, -1)[..., ::2], impl="triton", **strided)).backward()
    torch.testing.assert_close(leaf.grad, -3.5 * slope)


def test_loss_scale_rescues_fp16_gradients():
    student, teacher, _ = inputs(1, 507, 64, 32, dtype=torch.float16, options=False)
    _, slope = truth(student, teacher)
    _, gradient = fused(student, teacher, 2.0**16)
    assert relations.distance(gradient.double() / 2**16, slope) < 2e-3


def test_teacher_of_another_precision():
    student, teacher, named = inputs(1, 97, 40, 24, dtype=torch.bfloat16)
    found, gradient = fused(student, teacher.float(), **named)
    expected = fused(student, teacher, **named)
    assert torch.equal(found, expected[0]) and torch.equal(gradient, expected[1])


def test_class_without_weight_contributes_nothing():
    student, teacher, _ = inputs(1, 70, 40, 24, options=False)
    one_frame = torch.zeros(70, dtype=torch.long, device=DEVICE)
    whole, _ = fused(student, teacher)
    assert fused(student, teacher, frame_N=one_frame, temporal=7.0)[0].item() == pytest.approx(0.5 * whole.item())
    nothing = torch.zeros(1, 70, device=DEVICE)
    loss, gradient = fused(student, teacher, frame_N=torch.arange(70, device=DEVICE) // 9, weight_BN=nothing)
    assert loss == 0 and not gradient.any()
