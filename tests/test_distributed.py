"""Processes: shares of work, flat gradient averaging and gathering, on two and three gloo ranks."""

import pretend
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


def test_sending_to_where_it_is_copies_nothing():
    x = torch.randn(3)
    assert distributed.send(x, torch.device("cpu")) is x


@pytest.mark.parametrize(
    "view", [lambda x: x.expand(4, -1), lambda x: x[:, ::2], lambda x: x.T, lambda x: x[0, 3]], ids=["expanded", "strided", "transposed", "scalar"]
)
def test_any_view_can_be_sent(view):
    x = view(torch.arange(6.0)[None])
    with pretend.gpu():
        there = distributed.send(x, torch.device("cuda"))
        assert there.is_cuda and there.shape == x.shape and torch.equal(there.cpu(), x)


@pytest.mark.gpu
def test_sending_to_a_gpu_does_not_wait_for_it():
    x, device = torch.randn(1000), torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = distributed.send(x, device)
        with pytest.raises(RuntimeError):
            x.to(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.cpu(), x)


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


def advantages(rank, size, port, out, spread):
    """Each rank's part of 24 samples in five groups that span ranks, dealt out in blocks or like cards."""
    import os

    from ldo.ops import group_advantage

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = distributed.join("cpu")
    rewards, ids, weights = spanning()
    mine = list(world.share(24)) if spread == "blocks" else list(range(rank, 24, size))
    a, stats = group_advantage(rewards[mine], ids[mine], weights, world=world)
    broken = rewards.clone()
    broken[mine[0] if rank == size - 1 else 0, 1] = float("nan") if rank == size - 1 else 0.0
    message = ""
    try:
        group_advantage(broken[mine], ids[mine], weights, world=world)
    except ValueError as error:
        message = str(error)
    distributed.barrier(world)
    torch.save({"mine": mine, "advantage": a, "stats": vars(stats), "message": message}, f"{out}/{rank}.pt")
    distributed.leave()
    os._exit(0)  # torch's threads can abort a process whose interpreter is already gone


def spanning():
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([7, -2, 7, 40, 7, 7, -2, 3, 40, 40, 3, 3, 9, 7, 40, 3, -2, -2, 7, 40, 3, 7, 40, -2])
    return torch.randn(24, 2, generator=g) * 3, ids, torch.tensor([1.0, 0.5])


@pytest.mark.parametrize("spread", ["blocks", "cards"])
@pytest.mark.parametrize("size", [2, 3])
def test_advantages_do_not_depend_on_how_groups_are_spread(tmp_path, size, spread):
    from ldo.ops import group_advantage

    mp.spawn(advantages, (size, 29520 + size + 10 * (spread == "cards"), str(tmp_path), spread), nprocs=size)
    rewards, ids, weights = spanning()
    alone, stats = group_advantage(rewards, ids, weights, world=World())
    for rank in range(size):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(found["advantage"], alone[found["mine"]])
        assert all(torch.equal(found["stats"][k], v) for k, v in vars(stats).items())
        assert f"reward 1 of sample 0 of rank {size - 1} is nan" in found["message"]  # on every rank alike
    plain, _ = group_advantage(rewards, ids, weights)
    assert torch.allclose(plain, alone, atol=1e-6)
