"""The optimizer step: nothing that is not finite gets through."""

import pytest
import torch

from ldo.distributed import World
from ldo.update import TrainingError, adamw, apply, warm


def parameter(gradient):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor(gradient)
    return p


def test_steps_clips_and_clears():
    p = parameter([3.0, 0.0, 4.0])
    optimizer = torch.optim.SGD([p], lr=1.0)
    assert apply(optimizer, [p], World(), 1.0, 0.5, "step 0") == pytest.approx(5)
    assert torch.allclose(p, torch.tensor([0.7, 1.0, 0.6]), atol=1e-5) and p.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_touches_nothing(bad):
    p = parameter([bad, 0.0, 0.0])
    with pytest.raises(TrainingError, match="not finite at step 7, clips 1 and 2"):
        apply(torch.optim.AdamW([p], lr=1.0), [p], World(), 1.0, 0.5, "step 7, clips 1 and 2")
    assert (p == 1).all()


def test_the_optimizer_is_pytorchs_and_fused_on_a_gpu_alone():
    found, expected = parameter([3.0, -1.0, 0.0]), parameter([3.0, -1.0, 0.0])
    for optimizer in (adamw([found], 0.1, 0.01), torch.optim.AdamW([expected], lr=0.1, weight_decay=0.01)):
        optimizer.step()
        assert not optimizer.defaults["fused"]
    assert torch.equal(found, expected) and (found != 1).any()


@pytest.mark.gpu
def test_the_fused_optimizer_does_the_same():
    found, expected = (torch.nn.Parameter(p.detach().cuda()) for p in (parameter([0.0] * 3), parameter([0.0] * 3)))
    ours, theirs = adamw([found], 0.1, 0.01), torch.optim.AdamW([expected], lr=0.1, weight_decay=0.01)
    assert ours.defaults["fused"]
    for gradient in ([3.0, -1.0, 0.0], [1.0, 2.0, 3.0]):
        for p, optimizer in ((found, ours), (expected, theirs)):
            p.grad = torch.tensor(gradient, device="cuda")
            optimizer.step()
    assert torch.allclose(found, expected, atol=1e-6)


def test_warm_up():
    assert [warm(2.0, s, 4) for s in (0, 1, 3, 9)] == [0.5, 1.0, 2.0, 2.0] and warm(2.0, 0, 0) == 2.0
