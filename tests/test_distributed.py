"""Processes: shares of work, flat gradient averaging and gathering, on two and three gloo ranks."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from ldo import distributed
from ldo.distributed import World


@pytest.mark.parametrize(("count", "size"), [(8, 2), (9, 3), (5, 2), (2, 3)])
def test_shares_cover_all_once(count, size):
    assert [i for r in range(size) for i in World(r, size).share(count)] == list(range(count))


def test_alone_nothing_is_exchanged():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, 2.0])
    distributed.average_gradients([p], World())
    assert p.grad.tolist() == [1.0, 2.0]
    x = torch.arange(3)
    assert distributed.gather(x, World()) is x


def work(rank, size, port, out):
    import os

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = distributed.join("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1), nn.Linear(5, 5))  # the last is never used
    x, y = torch.randn(12, 4), torch.randn(12, 1)
    mine = list(world.share(12))
    (model[1](model[0](x[mine])) - y[mine]).square().mean().backward()
    if rank == 0:
        model[1].bias.grad = None  # a parameter without gradient on one rank counts as zero there
    distributed.average_gradients(list(model.parameters()), world)
    gathered = distributed.gather(torch.arange(rank + 1) + 10 * rank, world)
    distributed.barrier(world)
    torch.save({"grads": [p.grad for p in model.parameters()], "gathered": gathered}, f"{out}/{rank}.pt")
    distributed.leave()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_get_the_single_process_gradient(tmp_path, size):
    mp.spawn(work, (size, 29500 + size, str(tmp_path)), nprocs=size)
    found = [torch.load(tmp_path / f"{r}.pt") for r in range(size)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1), nn.Linear(5, 5))
    x, y = torch.randn(12, 4), torch.randn(12, 1)
    (model[1](model[0](x)) - y).square().mean().backward()
    for k, p in enumerate(model.parameters()):
        expected = p.grad if p.grad is not None else torch.zeros_like(p)
        for f in found:
            if k != 3:
                assert torch.allclose(f["grads"][k], expected, atol=1e-6)
            assert torch.equal(f["grads"][k], found[0]["grads"][k])  # the same bits everywhere
    assert found[0]["gathered"].tolist() == [0, 10, 11] + ([20, 21, 22] if size == 3 else [])
    assert all(torch.equal(f["gathered"], found[0]["gathered"]) for f in found)
