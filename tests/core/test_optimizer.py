"""The optimizer step: nothing that is not finite gets through."""

import pytest
import torch

from ldo.core.distributed import Processes
from ldo.core.errors import TrainingError
from ldo.core.optimizer import average_keep, make_adamw, optimizer_step, warmup_rate


def make_parameter(gradient):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor(gradient)
    return parameter


def test_steps_clips_and_clears():
    parameter = make_parameter([3.0, 0.0, 4.0])
    # Plain SGD, so that the step shows the clipped gradient itself. Its own rate of 1 must give way to the step's 0.5.
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    assert optimizer_step(optimizer, [parameter], Processes(), 1.0, 0.5, "step 0") == pytest.approx(5)
    assert torch.allclose(parameter, torch.tensor([0.7, 1.0, 0.6]), atol=1e-5)
    assert parameter.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_touches_nothing(bad):
    parameter = make_parameter([bad, 0.0, 0.0])
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    with pytest.raises(TrainingError, match="not finite at step 7, clips 1 and 2"):
        optimizer_step(optimizer, [parameter], Processes(), 1.0, 0.5, "step 7, clips 1 and 2")
    assert (parameter == 1).all()


def test_the_optimizer_is_pytorchs_and_fused_only_on_a_gpu():
    found, expected = make_parameter([3.0, -1.0, 0.0]), make_parameter([3.0, -1.0, 0.0])
    for optimizer in (make_adamw([found], 0.1, 0.01), torch.optim.AdamW([expected], lr=0.1, weight_decay=0.01)):
        optimizer.step()
        assert not optimizer.defaults["fused"]
    assert torch.equal(found, expected)
    # Two optimizers that did nothing would agree as well.
    assert (found != 1).any()


@pytest.mark.gpu
def test_the_fused_optimizer_does_the_same():
    found = torch.nn.Parameter(make_parameter([0.0] * 3).detach().cuda())
    expected = torch.nn.Parameter(make_parameter([0.0] * 3).detach().cuda())
    ours, theirs = make_adamw([found], 0.1, 0.01), torch.optim.AdamW([expected], lr=0.1, weight_decay=0.01)
    assert ours.defaults["fused"]
    # AdamW's first step hardly depends on more than the gradient's sign; the second one shows its moments too.
    for gradient in ([3.0, -1.0, 0.0], [1.0, 2.0, 3.0]):
        for parameter, optimizer in ((found, ours), (expected, theirs)):
            parameter.grad = torch.tensor(gradient, device="cuda")
            optimizer.step()
    assert torch.allclose(found, expected, atol=1e-6)


def test_warm_up():
    assert [warmup_rate(2.0, step, 4) for step in (0, 1, 3, 9)] == [0.5, 1.0, 2.0, 2.0]
    # A warm-up of no steps must not divide by zero.
    assert warmup_rate(2.0, 0, 0) == 2.0


def test_an_average_forgets_where_it_began():
    average = 1.0
    for step in range(600):
        average += (1 - average_keep(0.9995, step)) * (0.0 - average)
    assert average < 1e-9
    assert 1 - average_keep(0.9995, 100_000) == pytest.approx(0.0005)
