"""The relation loss against a double loop, its forms against each other, and what must hold for any input."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldo.ops import relation, relation_loss
from tests.helpers import pretend, regions
from tests.helpers.relations import distance, inputs, loss_and_gradient, plain

SHAPES = [(1, 1), (3, 2), (2, 97), (1, 130), (1, 513), (2, 700)]  # B, N


def by_double_loop(student, teacher, frame, weight, margin, penalty, spatial, temporal):
    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    def phi(d):
        a = max(abs(d) - margin, 0.0)
        if penalty == "huber":
            return a * a / 0.2 if a < 0.1 else a - 0.05
        return a if penalty == "hinge" else a * a

    per_clip = []
    for b, (x, y) in enumerate(zip(student.numpy(), teacher.numpy(), strict=True)):
        top, bottom = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
        for i in range(len(x)):
            for j in range(len(x)):
                same = frame is None or bool(frame[i] == frame[j])
                w_i, w_j = (1.0, 1.0) if weight is None else (float(weight[b, i]), float(weight[b, j]))
                w = w_i + w_j - w_i * w_j
                top[same] += w * phi(cosine(x[i], x[j]) - cosine(y[i], y[j]))
                bottom[same] += w
        share = {True: 1.0 if frame is None else spatial, False: temporal}
        per_clip.append(sum(share[c] * top[c] / bottom[c] for c in (True, False) if bottom[c]))
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
@pytest.mark.parametrize("b, n", SHAPES)
def test_chunked_equals_reference(b, n, penalty, dtype, tolerance):
    student, teacher, options = inputs(b, n, dtype=dtype)
    truth, slope = loss_and_gradient(student.double(), teacher.double(), penalty=penalty, impl="reference", **options)
    loss, gradient = loss_and_gradient(student, teacher, penalty=penalty, impl="chunked", **options)
    assert loss.dtype == dtype and gradient.dtype == dtype
    assert loss.item() == pytest.approx(truth.item(), rel=tolerance)
    torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=tolerance * max(float(slope.abs().max()), 1e-9))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("penalty", relation.PENALTIES)
def test_gradcheck(impl, penalty):
    student, teacher, options = inputs(2, 6, d=4, e=3, seed=3)
    unit_x, unit_y = (torch.nn.functional.normalize(t, dim=-1) for t in (student, teacher))
    d = (unit_x @ unit_x.mT - unit_y @ unit_y.mT).abs()
    assert (d - 0.1).abs().min() > 1e-4, "a pair sits on the kink: choose another seed"
    assert torch.autograd.gradcheck(
        lambda x: relation_loss(x, teacher, penalty=penalty, impl=impl, **options), student.requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_dense_arithmetic_in_it(dtype):
    student, teacher, options = inputs(2, 600, d=48, e=32, dtype=dtype)
    truth, slope = loss_and_gradient(student.double(), teacher.double(), impl="reference", **options)
    x = student.clone().requires_grad_()
    naive = plain(x, teacher, **options)
    naive.backward()
    loss, gradient = loss_and_gradient(student, teacher, impl="chunked", **options)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert abs(loss.item() - truth.item()) <= abs(naive.item() - truth.item()) + 1e-7
    assert distance(gradient, slope) <= distance(x.grad, slope)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_loss_scaling_rescues_fp16_gradients(impl):
    student, teacher, _ = inputs(1, 1500, d=128, e=32, dtype=torch.float16)
    _, slope = loss_and_gradient(student.double(), teacher.double(), impl="reference")
    x = student.clone().requires_grad_()
    (relation_loss(x, teacher, impl=impl) * 2**16).backward()
    assert distance(x.grad.double() / 2**16, slope) < 2e-3


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gradient_is_orthogonal_to_its_token(impl):
    student, teacher, options = inputs(2, 130, d=16)
    _, gradient = loss_and_gradient(student, teacher, impl=impl, **options)
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
    x = student.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    y = teacher.repeat_interleave(2, -1)[..., ::2]
    strided = {
        "frame_N": options["frame_N"].repeat_interleave(2)[::2],
        "weight_BN": options["weight_BN"].T.contiguous().T,
    }
    loss = relation_loss(x, y, impl=impl, **strided)
    loss.backward()
    assert not x.is_contiguous() and not y.is_contiguous() and loss.item() == pytest.approx(truth.item(), rel=1e-12)
    torch.testing.assert_close(x.grad, slope)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_upstream_gradient_and_detached_teacher(impl):
    student, teacher, options = inputs(2, 15)
    _, slope = loss_and_gradient(student, teacher, impl=impl, **options)
    x, y = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    (-3.5 * relation_loss(x, y, impl=impl, **options)).backward()
    torch.testing.assert_close(x.grad, -3.5 * slope)
    assert y.grad is None


def test_repeats_to_the_bit():
    student, teacher, options = inputs(2, 700, d=32, dtype=torch.float32)
    first, second = (loss_and_gradient(student, teacher, impl="chunked", **options) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_chunked_never_holds_all_pairs(monkeypatch):
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
    student, teacher, options = inputs(2, 330, d=64, e=48, dtype=kind)
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
    student, teacher, options = inputs(2, 130, d=64, e=48, dtype=torch.float32)
    student = student.bfloat16()
    found, expected = (loss_and_gradient(student, t, impl="chunked", **options) for t in (teacher, teacher.bfloat16()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is tested itself")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("squares", [False, True])
def test_half_precision_takes_a_gpus_products_on_a_pretended_one(kind, squares):
    student, teacher, options = inputs(2, 330, d=64, e=48, dtype=kind)
    options = {"penalty": "squared", "margin": 0.0} if squares else options
    truth, slope = loss_and_gradient(student.double(), teacher.double(), 900.0, impl="reference", **options)
    with pretend.gpu():
        given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        loss, gradient = loss_and_gradient(student.cuda(), teacher.cuda(), 900.0, impl="chunked", **given)
        loss, gradient = loss.cpu(), gradient.cpu()
    assert (
        gradient.dtype == kind
        and loss.item() == pytest.approx(truth.item(), rel=1e-3)
        and distance(gradient, slope) <= 5e-3
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [330, 5000])
def test_chunked_on_a_gpu(kind, n):
    student, teacher, options = inputs(2, n, d=64, e=48, dtype=kind)
    truth, slope = loss_and_gradient(student.double(), teacher.double(), 900.0, impl="reference", **options)
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    loss, gradient = loss_and_gradient(student.cuda(), teacher.cuda(), 900.0, impl="chunked", **given)
    assert (
        gradient.dtype == kind
        and loss.item() == pytest.approx(truth.item(), rel=1e-5)
        and distance(gradient.cpu(), slope) <= 4e-3
    )


SQUARES = {"penalty": "squared", "margin": 0.0}  # over all pairs alike: no pair need be visited


@pytest.mark.parametrize("b, n, d, e", [(1, 60, 10, 7), (3, 97, 8, 16), (2, 700, 33, 20)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_closed_form_equals_reference(b, n, d, e, dtype, tolerance):
    student, teacher, _ = inputs(b, n, d=d, e=e, dtype=dtype)
    truth, slope = loss_and_gradient(student.double(), teacher.double(), impl="reference", **SQUARES)
    with Largest() as seen:
        loss, gradient = loss_and_gradient(student, teacher, impl="chunked", **SQUARES)
    assert seen.numel < n * n * b or n < 2 * d
    assert loss.item() == pytest.approx(truth.item(), rel=tolerance)
    assert distance(gradient, slope) <= tolerance


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_closed_form_on_tensor_cores(monkeypatch, kind):
    """Imitates a GPU's rounding: unit vectors and their matrices in half precision, sums in fp32."""
    monkeypatch.setattr(relation, "_operand", lambda student: student.dtype)
    student, teacher, _ = inputs(1, 900, d=64, e=48, dtype=kind)
    truth, slope = loss_and_gradient(student.double(), teacher.double(), 900.0, impl="reference", **SQUARES)
    loss, gradient = loss_and_gradient(student, teacher, 900.0, impl="chunked", **SQUARES)
    assert (
        gradient.dtype == kind
        and loss.item() == pytest.approx(truth.item(), rel=1e-3)
        and distance(gradient, slope) <= 5e-3
    )


def test_closed_form_gradcheck():
    student, teacher, _ = inputs(2, 12, d=4, e=3, seed=3)
    student[0, 5] = 0
    loss = relation_loss(student.requires_grad_(), teacher, impl="chunked", **SQUARES)
    assert "ClosedForm" in str(loss.grad_fn)
    loss.backward()
    assert not student.grad[0, 5].any()
    with torch.no_grad():
        student[0, 5] = 1
    assert torch.autograd.gradcheck(lambda x: relation_loss(x, teacher, impl="chunked", **SQUARES), student)


@pytest.mark.parametrize(
    "n, change, closed",
    [
        (60, {}, True),
        (12, {}, False),  # fewer pairs than the matrices have entries
        (60, {"margin": 0.1}, False),
        (60, {"penalty": "hinge"}, False),
        (60, {"frame_N": torch.zeros(60, dtype=torch.long)}, False),
        (60, {"weight_BN": torch.ones(1, 60)}, False),
        (60, {"impl": "reference"}, False),
    ],
)
def test_closed_form_is_taken_where_it_applies_and_pays(n, change, closed):
    student, teacher, _ = inputs(1, n)
    loss = relation_loss(student.requires_grad_(), teacher, **{**SQUARES, **change})
    assert ("ClosedForm" in str(loss.grad_fn)) == closed


FORMS = {"reference": {"impl": "reference"}, "chunked": {"impl": "chunked"}, "closed": {"impl": "chunked", **SQUARES}}


def of_form(form, teacher, options):
    """``relation_loss`` of a form, as a function of the student. The closed form takes no options."""
    return lambda x: relation_loss(x, teacher, **FORMS[form], **({} if form == "closed" else options))


@pytest.mark.parametrize("inside", regions.AUTOCAST, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_no_bit(form, dtype, inside):
    student, teacher, options = inputs(2, 60, dtype=dtype)
    regions.assert_same(of_form(form, teacher, options), student, inside)


def test_autocast_is_felt_by_plain_arithmetic():
    """The region of these tests has an effect: outside of the operation it does round."""
    student, teacher, options = inputs(2, 60, dtype=torch.float32)
    with pytest.raises(AssertionError, match="value: largest difference"):
        regions.assert_same(lambda x: plain(x, teacher, **options), student, ("forward",))
    with pytest.raises(AssertionError, match="gradient: largest difference"):
        regions.assert_same(lambda x: plain(x, teacher, **options), student, ("backward",))


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_no_bit_when_compiled(form):
    student, teacher, options = inputs(2, 60, dtype=torch.float32)
    function = of_form(form, teacher, options)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: function(x), backend="aot_eager", fullgraph=True)
    expected = regions.value_and_gradient(compiled, student)
    for a, b in zip(expected, regions.value_and_gradient(function, student), strict=True):
        # the compiler may split a fused product and sum
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-8)
    for inside in (("forward",), ("forward", "backward")):
        found = regions.value_and_gradient(compiled, student, inside)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), inside


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
