"""What a warm call of the relation loss costs the host, in launches, allocations, dispatches and calls.

``benchmarks/bench_host.py`` measures the same.
"""

import json
import sys

import pytest
import torch

from benchmarks import bench_host
from benchmarks.bench_host import Dispatched
from ldo.kernels import relation_frames

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="launches are made on a GPU, and bench_align.py times them"
)
FORWARD = ["prepare_kernel", "pair_kernel", "loss_kernel"]


@pytest.fixture
def launched():
    with bench_host.recorded() as names:
        yield names


@pytest.fixture
def call(launched):
    run = bench_host.recipe_call()
    return lambda gradient=True: run(gradient)


def test_a_call_makes_five_launches(call, launched):
    call()
    launched.clear()
    call()
    assert launched == ["prepare_kernel", "pair_kernel", "product", "loss_kernel", "project_kernel"]
    launched.clear()
    call(gradient=False)
    assert launched == FORWARD


def test_a_warm_call_dispatches_nothing_but_allocations_and_views(call):
    call(gradient=False)
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
    """Another tensor, or the same one after a write, is sorted again; one that is gone is forgotten."""
    frame = torch.tensor([3, 3, -1, 3, 7])
    first = relation_frames.frame_order(frame, 8)
    assert first.order.tolist() == [2, 0, 1, 3, 4] and first.run_start.tolist() == [0, 1, 1, 1, 4, 5]
    assert first.frame.tolist() == [3, 3, -1, 3, 7, 0, 0, 0]
    assert relation_frames.frame_order(frame, 8) is first
    assert relation_frames.frame_order(frame, 16).frame.shape == (16,)
    assert relation_frames.frame_order(frame.clone(), 16) is not relation_frames.frame_order(frame, 16)
    frame[2] = 3
    assert relation_frames.frame_order(frame, 16).order.tolist() == [0, 1, 2, 3, 4]
    before = len(relation_frames._frame_orders)
    del frame
    assert len(relation_frames._frame_orders) < before
    with torch.inference_mode():
        unversioned = torch.tensor([1, 0])
    assert relation_frames.frame_order(unversioned, 2).order.tolist() == [1, 0]


@pytest.mark.parametrize(("gradient", "limit"), [(False, 130), (True, 270)])
def test_a_warm_call_is_short(call, gradient, limit):
    """102 and 213 functions are called, of Python and of C. Counted and not timed: times depend on the machine.

    ``benchmarks/bench_host.py`` has the times: 20 and 55 microseconds on an idle core of 2024.
    """
    call(gradient)
    called = 0

    def count(frame, event, argument):
        nonlocal called
        called += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call(gradient)
    finally:
        sys.setprofile(None)
    assert 10 < called < limit


def test_the_benchmark_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--repeat", "3", "--out", str(tmp_path / "host.json")])
    assert bench_host.main() == 0
    rows = json.loads((tmp_path / "host.json").read_text())["host"]
    assert [len(row["launches"]) for row in rows] == [3, 5] and "5 launches" in capsys.readouterr().out
