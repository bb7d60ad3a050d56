"""The counter of live bytes against PyTorch's CPU allocator, and what stands in for kernels."""

import pytest
import torch

from benchmarks.memory import peak_extra
from ldo.kernels.support import WORKSPACE
from ldo.memory.live_bytes import FusedKernels, LiveBytes, relation_stand_in


def test_it_counts_what_the_allocator_does():
    given = torch.randn(64, 1000)

    def work():
        product = given @ given.T
        short_lived = torch.randn(300, 1000)
        large = short_lived.exp()
        # It dies in the middle, which the counter must notice.
        del short_lived
        view = (large[:64] + given).view(-1)[10:]
        return product, view * 2

    with LiveBytes() as live:
        kept = work()
    assert live.now == sum(tensor.numel() * 4 for tensor in kept)
    assert live.peak == peak_extra(work, torch.device("cpu"), 0) * 2**20


def test_views_of_what_was_there_before_cost_nothing():
    weight = torch.empty(1000, 1000, device="meta")
    with LiveBytes() as live:
        weight.t()[3:].unsqueeze(0).detach()
        # An operator in place returns what it was given.
        weight.add_(1)
    assert live.peak == 0


def test_attention_keeps_no_matrix_of_all_pairs():
    query = torch.empty(1, 4, 4096, 64, device="meta", requires_grad=True)
    with FusedKernels(), LiveBytes() as live:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert live.peak < 12 * query.numel() * 4 < 4 * 4096**2 * 4


def test_the_relation_loss_stands_in_for_the_kernel():
    relation_kernel = pytest.importorskip("ldo.kernels.relation")
    assert relation_kernel.WORKSPACE == WORKSPACE
    student = torch.empty(2, 1000, 64, device="meta", requires_grad=True)
    with LiveBytes() as live:
        relation_stand_in(student, torch.empty(2, 1000, 32, device="meta")).backward()
    pairs, rows = 2 * 1000 * 1000 * 4, 2 * 1000 * 64 * 4
    assert pairs + rows <= live.peak <= pairs + 4 * rows
