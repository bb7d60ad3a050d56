"""Processes: shares of work, flat gradient averaging and gathering, on two and three gloo ranks."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from ldo.core import distributed
from ldo.core.distributed import Processes, gather_rows, to_device
from ldo.ops import group_advantage
from tests.helpers import pretend
from tests.helpers.ranks import SPREADS, small_problem, spanning, work


@pytest.mark.parametrize(("count", "size"), [(8, 2), (9, 3), (5, 2), (2, 3)])
def test_shares_cover_all_once(count, size):
    covered = []
    for rank in range(size):
        covered += Processes(rank, size).share(count)
    assert covered == list(range(count))


def test_a_single_process_exchanges_nothing():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    distributed.average_gradients([parameter], Processes())
    assert parameter.grad.tolist() == [1.0, 2.0]
    rows = torch.arange(3)
    assert gather_rows(rows, Processes()) is rows


def test_sending_to_where_it_is_copies_nothing():
    values = torch.randn(3)
    assert to_device(values, torch.device("cpu")) is values


@pytest.mark.parametrize(
    "view",
    [lambda x: x.expand(4, -1), lambda x: x[:, ::2], lambda x: x.T, lambda x: x[0, 3]],
    ids=["expanded", "strided", "transposed", "scalar"],
)
def test_any_view_can_be_sent(view):
    values = view(torch.arange(6.0)[None])
    # As on a real GPU, a tensor goes through pinned memory, which cannot hold a view as it is.
    with pretend.gpu():
        on_device = to_device(values, torch.device("cuda"))
        assert on_device.is_cuda
        assert on_device.shape == values.shape
        assert torch.equal(on_device.cpu(), values)


@pytest.mark.gpu
def test_sending_to_a_gpu_does_not_wait_for_it():
    values, device = torch.randn(1000), torch.device("cuda")
    # In this mode every operation that waits for the GPU raises.
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device = to_device(values, device)
        # The plain way does wait: without this, a mode that had no effect would pass too.
        with pytest.raises(RuntimeError):
            values.to(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(on_device.cpu(), values)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """The number of ranks, and what each rank got: a list by rank under the name of each exchange."""
    size, folder = request.param, tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (size, 29500 + size, str(folder)), nprocs=size)
    results = {}
    for name in ("gradients", *SPREADS):
        results[name] = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(size)]
    return size, results


def test_ranks_get_the_single_process_gradient(ranks):
    size, results = ranks
    of_ranks = results["gradients"]
    model, inputs, targets = small_problem()
    (model[1](model[0](inputs)) - targets).square().mean().backward()
    for index, parameter in enumerate(model.parameters()):
        expected = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for of_rank in of_ranks:
            # Rank 0 drops its gradient of the fourth parameter, which therefore differs from that of one process.
            if index != 3:
                assert torch.allclose(of_rank["grads"][index], expected, atol=1e-6)
            # The same bits everywhere: weights of different ranks would otherwise drift apart.
            assert torch.equal(of_rank["grads"][index], of_ranks[0]["grads"][index])
    assert of_ranks[0]["gathered"].tolist() == [0, 10, 11] + ([20, 21, 22] if size == 3 else [])
    assert all(torch.equal(of_rank["gathered"], of_ranks[0]["gathered"]) for of_rank in of_ranks)


@pytest.mark.parametrize("spread", SPREADS)
def test_advantages_do_not_depend_on_how_groups_are_spread(ranks, spread):
    size, results = ranks
    rewards, ids, weights = spanning()
    single, stats = group_advantage(rewards, ids, weights, world=Processes())
    for of_rank in results[spread]:
        assert torch.equal(of_rank["advantage"], single[of_rank["mine"]])
        assert all(torch.equal(of_rank["stats"][name], value) for name, value in vars(stats).items())
        # On every rank: one that did not raise would wait for the others in the next exchange.
        assert f"reward 1 of sample 0 of rank {size - 1} is nan" in of_rank["message"]
    plain, _ = group_advantage(rewards, ids, weights)
    assert torch.allclose(plain, single, atol=1e-6)
