"""What a warm call of the relation loss costs the host: launches, allocations, dispatches, microseconds.

Launches are recorded instead of made, so that only Python and PyTorch are left; large allocations are handed out again.
"""

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldo.kernels import relation, relation_plan, support
from ldo.ops import relation_loss

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="launches are made on a GPU, and bench_align.py times them")
RECIPE = (4, 4096, 1536, 1024)
FORWARD = ["prepare_kernel", "pair_kernel", "loss_kernel"]


class Dispatched(TorchDispatchMode):
    """Names of the operations that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def launched(monkeypatch):
    names, empty, kept = [], torch.empty, {}

    def again(*size, dtype=None, device=None):
        key = (size, dtype)
        if key not in kept:
            kept[key] = empty(*size, dtype=dtype, device=device)
        return kept[key]

    monkeypatch.setattr(support.Launch, "__call__", lambda self, *_: names.append(self.name))
    monkeypatch.setattr(relation, "_add_product", lambda *_, **__: names.append("product"))
    monkeypatch.setattr(relation_plan, "choose_config", lambda *_: relation_plan.CONFIGS[90, True])
    monkeypatch.setattr(torch, "empty", again)
    relation_plan.plan.cache_clear()
    yield names
    relation_plan.plan.cache_clear()


@pytest.fixture
def call(launched):
    b, n, d, e = RECIPE
    student = torch.zeros(b, n, d, dtype=torch.bfloat16)
    teacher = torch.zeros(b, n, e, dtype=torch.bfloat16)
    frame, weight = torch.arange(n) // 256, torch.ones(b, n)

    def run(gradient=True):
        loss = relation_loss(student.requires_grad_(gradient), teacher, frame_N=frame, weight_BN=weight, impl="triton")
        return torch.autograd.grad(loss, student) if gradient else loss

    return run


def test_a_call_makes_five_launches(call, launched):
    call()
    launched.clear()
    call()
    assert launched == ["prepare_kernel", "pair_kernel", "product", "loss_kernel", "project_kernel"]
    launched.clear()
    call(gradient=False)
    assert launched == FORWARD


def test_a_warm_call_dispatches_nothing_but_allocations_and_views(call):
    call()
    with Dispatched() as seen:
        call(gradient=False)
    views = ("aten.split_with_sizes", "aten.view", "aten.detach", "aten.alias", "aten.empty")
    assert all(name.startswith(views) for name in seen.names), seen.names
    assert len(seen.names) <= 6, seen.names


def test_a_frame_tensor_is_sorted_once(call):
    call()
    with Dispatched() as seen:
        call()
    assert not any("sort" in name for name in seen.names)


def test_frame_order_follows_its_tensor():
    """Another tensor, or the same one written to, is looked at anew; a dead one is forgotten."""
    frame = torch.tensor([3, 3, -1, 3, 7])
    first = relation_plan.frame_order(frame, 8)
    assert first.order.tolist() == [2, 0, 1, 3, 4] and first.run_start.tolist() == [0, 1, 1, 1, 4, 5]
    assert first.frame.tolist() == [3, 3, -1, 3, 7, 0, 0, 0]
    assert relation_plan.frame_order(frame, 8) is first
    assert relation_plan.frame_order(frame, 16).frame.shape == (16,)
    assert relation_plan.frame_order(frame.clone(), 16) is not relation_plan.frame_order(frame, 16)
    frame[2] = 3
    assert relation_plan.frame_order(frame, 16).order.tolist() == [0, 1, 2, 3, 4]
    before = len(relation_plan._frame_orders)
    del frame
    assert len(relation_plan._frame_orders) < before
    with torch.inference_mode():
        unversioned = torch.tensor([1, 0])
    assert relation_plan.frame_order(unversioned, 2).order.tolist() == [1, 0]


def test_a_warm_call_is_short(call):
    """60 microseconds for the forward on an idle core; the limit leaves room for a busy one."""
    call(gradient=False)
    times = []
    for _ in range(300):
        began = time.perf_counter()
        call(gradient=False)
        times.append(time.perf_counter() - began)
    assert min(times) < 60e-6, f"{min(times) * 1e6:.0f} us"
