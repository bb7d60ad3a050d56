"""The optimizer step: nothing that is not finite gets through."""

import pytest
import torch

from ldo.distributed import World
from ldo.update import TrainingError, apply, warm


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


def test_warm_up():
    assert [warm(2.0, s, 4) for s in (0, 1, 3, 9)] == [0.5, 1.0, 2.0, 2.0] and warm(2.0, 0, 0) == 2.0
