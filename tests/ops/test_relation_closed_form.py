"""The closed form of the relation loss, which visits no pair: for squared differences with all pairs alike."""

import pytest
import torch

from ldo.ops import relation, relation_loss
from tests.helpers.relations import SQUARES, Largest, distance, inputs, loss_and_gradient


@pytest.mark.parametrize("clips, tokens, width, teacher_width", [(1, 60, 10, 7), (3, 97, 8, 16), (2, 700, 33, 20)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_closed_form_equals_reference(clips, tokens, width, teacher_width, dtype, tolerance):
    student, teacher, _ = inputs(clips, tokens, width=width, teacher_width=teacher_width, dtype=dtype)
    truth, slope = loss_and_gradient(student.double(), teacher.double(), impl="reference", **SQUARES)
    with Largest() as seen:
        loss, gradient = loss_and_gradient(student, teacher, impl="chunked", **SQUARES)
    # with many tokens, no tensor may be as large as the matrices of pairs
    assert seen.numel < tokens * tokens * clips or tokens < 2 * width
    assert loss.item() == pytest.approx(truth.item(), rel=tolerance)
    assert distance(gradient, slope) <= tolerance


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_closed_form_on_tensor_cores(monkeypatch, kind):
    """Imitates a GPU's rounding: unit vectors and their matrices in half precision, sums in fp32."""
    monkeypatch.setattr(relation, "_operand", lambda student: student.dtype)
    student, teacher, _ = inputs(1, 900, width=64, teacher_width=48, dtype=kind)
    truth, slope = loss_and_gradient(student.double(), teacher.double(), 900.0, impl="reference", **SQUARES)
    loss, gradient = loss_and_gradient(student, teacher, 900.0, impl="chunked", **SQUARES)
    assert (
        gradient.dtype == kind
        and loss.item() == pytest.approx(truth.item(), rel=1e-3)
        and distance(gradient, slope) <= 5e-3
    )


def test_closed_form_gradcheck():
    student, teacher, _ = inputs(2, 12, width=4, teacher_width=3, seed=3)
    # a zero vector gets no gradient; gradcheck would see the jump there, so the token is moved away below
    student[0, 5] = 0
    loss = relation_loss(student.requires_grad_(), teacher, impl="chunked", **SQUARES)
    assert "ClosedForm" in str(loss.grad_fn)
    loss.backward()
    assert not student.grad[0, 5].any()
    with torch.no_grad():
        student[0, 5] = 1
    assert torch.autograd.gradcheck(
        lambda argument: relation_loss(argument, teacher, impl="chunked", **SQUARES), student
    )


@pytest.mark.parametrize(
    "tokens, change, closed",
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
def test_closed_form_is_taken_where_it_applies_and_pays(tokens, change, closed):
    student, teacher, _ = inputs(1, tokens)
    loss = relation_loss(student.requires_grad_(), teacher, **{**SQUARES, **change})
    assert ("ClosedForm" in str(loss.grad_fn)) == closed
