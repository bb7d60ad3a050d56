"""The relation loss against a double loop, its forms against each other, and what must hold for any input."""

import numpy as np
import pytest
import torch

from ldo.ops import relation, relation_loss
from tests.helpers import pretend, regions
from tests.helpers.relations import SQUARES, Largest, distance, inputs, loss_and_gradient, plain

SHAPES = [(1, 1), (3, 2), (2, 97), (1, 130), (1, 513), (2, 700)]  # B, N


def by_double_loop(student, teacher, frame, weight, margin, penalty, spatial, temporal):
    """The loss pair by pair, in Python floats: a mean over the pairs of each class, times the class's share."""

    def cosine(one, other):
        return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    def phi(difference):
        excess = max(abs(difference) - margin, 0.0)
        if penalty == "huber":
            return excess * excess / 0.2 if excess < 0.1 else excess - 0.05
        return excess if penalty == "hinge" else excess * excess

    per_clip = []
    # sums over pairs, by whether both tokens lie in the same frame
    for clip, (student_ND, teacher_NE) in enumerate(zip(student.numpy(), teacher.numpy(), strict=True)):
        top, bottom = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
        for one in range(len(student_ND)):
            for other in range(len(student_ND)):
                same = frame is None or bool(frame[one] == frame[other])
                of_one = 1.0 if weight is None else float(weight[clip, one])
                of_other = 1.0 if weight is None else float(weight[clip, other])
                # a pair counts as soon as one of its tokens does
                pair = of_one + of_other - of_one * of_other
                difference = cosine(student_ND[one], student_ND[other]) - cosine(teacher_NE[one], teacher_NE[other])
                top[same] += pair * phi(difference)
                bottom[same] += pair
        share = {True: 1.0 if frame is None else spatial, False: temporal}
        per_clip.append(sum(share[same] * top[same] / bottom[same] for same in (True, False) if bottom[same]))
    return sum(per_clip) / len(per_clip)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("penalty", relation.PENALTIES)
@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_is_the_formula(impl, penalty, framed, weighted):
    student, teacher, options = inputs(2, 9)
    frame = options["frame_N"] if framed else None
    weight = options["weight_BN"] if weighted else None
    expected = by_double_loop(student, teacher, frame, weight, 0.15, penalty, 0.8, 0.3)
    loss = relation_loss(
        student,
        teacher,
        frame_N=frame,
        weight_BN=weight,
        margin=0.15,
        penalty=penalty,
        spatial=0.8,
        temporal=0.3,
        impl=impl,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("spatial, temporal", [(1.0, 0.0), (0.0, 1.0)])
def test_shares_choose_the_class_of_pairs(spatial, temporal):
    student, teacher, options = inputs(1, 8)
    frame = options["frame_N"]
    expected = by_double_loop(student, teacher, frame, None, 0.1, "hinge", spatial, temporal)
    assert relation_loss(student, teacher, frame_N=frame, spatial=spatial, temporal=temporal).item() == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("penalty", relation.PENALTIES)
@pytest.mark.parametrize("clips, tokens", SHAPES)
def test_chunked_equals_reference(clips, tokens, penalty, dtype, tolerance):
    student, teacher, options = inputs(clips, tokens, dtype=dtype)
    truth, slope = loss_and_gradient(student.double(), teacher.double(), penalty=penalty, impl="reference", **options)
    loss, gradient = loss_and_gradient(student, teacher, penalty=penalty, impl="chunked", **options)
    assert loss.dtype == dtype and gradient.dtype == dtype
    assert loss.item() == pytest.approx(truth.item(), rel=tolerance)
    torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=tolerance * max(float(slope.abs().max()), 1e-9))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("penalty", relation.PENALTIES)
def test_gradcheck(impl, penalty):
    student, teacher, options = inputs(2, 6, width=4, teacher_width=3, seed=3)
    unit_x, unit_y = (torch.nn.functional.normalize(features, dim=-1) for features in (student, teacher))
    differences = (unit_x @ unit_x.mT - unit_y @ unit_y.mT).abs()
    assert (differences - 0.1).abs().min() > 1e-4, "a pair sits on the kink: choose another seed"
    assert torch.autograd.gradcheck(
        lambda argument: relation_loss(argument, teacher, penalty=penalty, impl=impl, **options),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_dense_arithmetic_in_it(dtype):
    student, teacher, options = inputs(2, 600, width=48, teacher_width=32, dtype=dtype)
    truth, slope = loss_and_gradient(student.double(), teacher.double(), impl="reference", **options)
    leaf = student.clone().requires_grad_()
    naive = plain(leaf, teacher, **options)
    naive.backward()
    loss, gradient = loss_and_gradient(student, teacher, impl="chunked", **options)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert abs(loss.item() - truth.item()) <= abs(naive.item() - truth.item()) + 1e-7
    assert distance(gradient, slope) <= distance(leaf.grad, slope)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_loss_scaling_rescues_fp16_gradients(impl):
    student, teacher, _ = inputs(1, 1500, width=128, teacher_width=32, dtype=torch.float16)
    _, slope = loss_and_gradient(student.double(), teacher.double(), impl="reference")
    leaf = student.clone().requires_grad_()
    # without this factor, gradients of so many tokens fall below the smallest fp16 number
    (relation_loss(leaf, teacher, impl=impl) * 2**16).backward()
    assert distance(leaf.grad.double() / 2**16, slope) < 2e-3


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gradient_is_orthogonal_to_its_token(impl):
    student, teacher, options = inputs(2, 130, width=16)
    _, gradient = loss_and_gradient(student, teacher, impl=impl, **options)
    # a cosine does not change along its own vector, so neither does the loss
    along = (gradient * student).sum(-1).abs()
    assert (along <= 1e-12 * gradient.norm(dim=-1) * student.norm(dim=-1) + 1e-18).all() and gradient.norm() > 1e-3


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_order_of_tokens_does_not_matter(impl):
    student, teacher, options = inputs(2, 97)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(1))
    loss, gradient = loss_and_gradient(student, teacher, impl=impl, **options)
    shuffled = {"frame_N": options["frame_N"][order], "weight_BN": options["weight_BN"][:, order]}
    again, moved = loss_and_gradient(student[:, order], teacher[:, order], impl=impl, **shuffled)
    assert again.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(moved, gradient[:, order], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_vectors_have_similarity_and_gradient_zero(impl, dtype):
    student, teacher, options = inputs(1, 20, dtype=dtype)
    student[0, [0, 7]], teacher[0, [3, 7]] = 0, 0
    loss, gradient = loss_and_gradient(student, teacher, impl=impl, **options)
    assert torch.isfinite(gradient).all() and (gradient[0, [0, 7]] == 0).all() and gradient[0, 3].abs().sum() > 0
    one = relation_loss(torch.zeros(1, 1, 4), torch.ones(1, 1, 4), impl=impl)
    assert one.item() == pytest.approx(0.9) and torch.isfinite(loss)  # d = 0 - 1


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_class_without_weight_contributes_nothing(impl):
    student, teacher, _ = inputs(1, 12)
    one_frame = torch.zeros(12, dtype=torch.long)
    whole = relation_loss(student, teacher, impl=impl)
    assert relation_loss(
        student, teacher, frame_N=one_frame, spatial=0.5, temporal=7.0, impl=impl
    ).item() == pytest.approx(0.5 * whole.item())
    loss, gradient = loss_and_gradient(
        student, teacher, frame_N=torch.arange(12) // 4, weight_BN=torch.zeros(1, 12), impl=impl
    )
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_strided_inputs(impl):
    student, teacher, options = inputs(2, 33)
    truth, slope = loss_and_gradient(student, teacher, impl=impl, **options)
    leaf = student.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    wide_teacher = teacher.repeat_interleave(2, -1)[..., ::2]
    strided = {
        "frame_N": options["frame_N"].repeat_interleave(2)[::2],
        "weight_BN": options["weight_BN"].T.contiguous().T,
    }
    loss = relation_loss(leaf, wide_teacher, impl=impl, **strided)
    loss.backward()
    assert not leaf.is_contiguous() and not wide_teacher.is_contiguous()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-12)
    torch.testing.assert_close(leaf.grad, slope)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_upstream_gradient_and_detached_teacher(impl):
    student, teacher, options = inputs(2, 15)
    _, slope = loss_and_gradient(student, teacher, impl=impl, **options)
    leaf, teacher_leaf = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    (-3.5 * relation_loss(leaf, teacher_leaf, impl=impl, **options)).backward()
    torch.testing.assert_close(leaf.grad, -3.5 * slope)
    assert teacher_leaf.grad is None


def test_repeats_to_the_bit():
    student, teacher, options = inputs(2, 700, width=32, dtype=torch.float32)
    first, second = (loss_and_gradient(student, teacher, impl="chunked", **options) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_chunked_never_holds_all_pairs(monkeypatch):
    # panels much smaller than the number of tokens
    monkeypatch.setattr(relation, "PANEL", 32)
    student, teacher, options = inputs(1, 400)
    largest = {}
    for impl in ("reference", "chunked"):
        with Largest() as seen:
            loss_and_gradient(student, teacher, impl=impl, **options)
        largest[impl] = seen.numel
    assert largest["reference"] >= 400 * 400 and largest["chunked"] <= 32 * 400


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", relation.PENALTIES)
def test_chunked_on_tensor_cores(monkeypatch, kind, penalty):
    """Imitates a GPU's rounding: rows as given and slopes in half precision, sums in fp32."""
    monkeypatch.setattr(relation, "_operand", lambda student: student.dtype)
    monkeypatch.setattr(relation, "PANEL", 100)
    student, teacher, options = inputs(2, 330, width=64, teacher_width=48, dtype=kind)
    truth, slope = loss_and_gradient(
        student.double(), teacher.double(), 900.0, impl="reference", penalty=penalty, **options
    )
    loss, gradient = loss_and_gradient(student, teacher, 900.0, impl="chunked", penalty=penalty, **options)
    assert (
        gradient.dtype == kind
        and loss.item() == pytest.approx(truth.item(), rel=1e-5)
        and distance(gradient, slope) <= 4e-3
    )


def test_on_tensor_cores_a_teacher_is_rounded_once_to_the_students_precision(monkeypatch):
    monkeypatch.setattr(relation, "_operand", lambda student: student.dtype)
    student, teacher, options = inputs(2, 130, width=64, teacher_width=48, dtype=torch.float32)
    student = student.bfloat16()
    found, expected = (
        loss_and_gradient(student, given, impl="chunked", **options) for given in (teacher, teacher.bfloat16())
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is tested itself")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("squares", [False, True])
def test_half_precision_takes_a_gpus_products_on_a_pretended_one(kind, squares):
    student, teacher, options = inputs(2, 330, width=64, teacher_width=48, dtype=kind)
    options = {"penalty": "squared", "margin": 0.0} if squares else options
    truth, slope = loss_and_gradient(student.double(), teacher.double(), 900.0, impl="reference", **options)
    with pretend.gpu():
        given = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        loss, gradient = loss_and_gradient(student.cuda(), teacher.cuda(), 900.0, impl="chunked", **given)
        loss, gradient = loss.cpu(), gradient.cpu()
    assert (
        gradient.dtype == kind
        and loss.item() == pytest.approx(truth.item(), rel=1e-3)
        and distance(gradient, slope) <= 5e-3
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [330, 5000])
def test_chunked_on_a_gpu(kind, tokens):
    student, teacher, options = inputs(2, tokens, width=64, teacher_width=48, dtype=kind)
    truth, slope = loss_and_gradient(student.double(), teacher.double(), 900.0, impl="reference", **options)
    given = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    loss, gradient = loss_and_gradient(student.cuda(), teacher.cuda(), 900.0, impl="chunked", **given)
    assert (
        gradient.dtype == kind
        and loss.item() == pytest.approx(truth.item(), rel=1e-5)
        and distance(gradient.cpu(), slope) <= 4e-3
    )


FORMS = {"reference": {"impl": "reference"}, "chunked": {"impl": "chunked"}, "closed": {"impl": "chunked", **SQUARES}}


def of_form(form, teacher, options):
    """``relation_loss`` of a form, as a function of the student. The closed form takes no options."""
    return lambda student: relation_loss(student, teacher, **FORMS[form], **({} if form == "closed" else options))


@pytest.mark.parametrize("inside", regions.AUTOCAST, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_no_bit(form, dtype, inside):
    student, teacher, options = inputs(2, 60, dtype=dtype)
    regions.assert_same(of_form(form, teacher, options), student, inside)


def test_autocast_is_felt_by_plain_arithmetic():
    """The region of these tests has an effect: arithmetic outside the operation is rounded."""
    student, teacher, options = inputs(2, 60, dtype=torch.float32)
    with pytest.raises(AssertionError, match="value: largest difference"):
        regions.assert_same(lambda argument: plain(argument, teacher, **options), student, ("forward",))
    with pytest.raises(AssertionError, match="gradient: largest difference"):
        regions.assert_same(lambda argument: plain(argument, teacher, **options), student, ("backward",))


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_no_bit_when_compiled(form):
    student, teacher, options = inputs(2, 60, dtype=torch.float32)
    function = of_form(form, teacher, options)
    torch._dynamo.reset()
    compiled = torch.compile(lambda argument: function(argument), backend="aot_eager", fullgraph=True)
    expected = regions.value_and_gradient(compiled, student)
    for ours, theirs in zip(expected, regions.value_and_gradient(function, student), strict=True):
        # the compiler may split a fused product and sum
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-8)
    for inside in (("forward",), ("forward", "backward")):
        found = regions.value_and_gradient(compiled, student, inside)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)), inside


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student_BND": torch.ones(5, 4)}, r"student \[B, N, D\].*\(5, 4\)"),
        ({"teacher_BNE": torch.ones(2, 4, 4)}, r"\(2, 5, 4\) and \(2, 4, 4\)"),
        ({"student_BND": torch.ones(2, 0, 4), "teacher_BNE": torch.ones(2, 0, 4)}, "holds no tokens"),
        ({"frame_N": torch.zeros(4, dtype=torch.long)}, "frame_N must be 5 integers"),
        ({"frame_N": torch.zeros(5)}, "frame_N must be 5 integers, got torch.float32"),
        ({"weight_BN": torch.ones(5)}, r"weight_BN must be \(2, 5\), got \(5,\)"),
        ({"margin": -0.1}, "margin must be at least 0, got -0.1"),
        ({"margin": float("nan")}, "margin must be at least 0, got nan"),
        ({"penalty": "l2"}, "unknown penalty 'l2'; one of hinge, squared, huber"),
        ({"impl": "cuda"}, "impl='cuda' is not available; choose auto or"),
        ({"teacher_BNE": torch.ones(2, 5, 4, device="meta")}, "on one device"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        relation_loss(**{"student_BND": torch.ones(2, 5, 4), "teacher_BNE": torch.ones(2, 5, 4), **change})
