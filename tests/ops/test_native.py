"""The extension under torch: groups of every size against the reference, the same bits everywhere, and gradients."""

import pytest
import torch

from ldo.ops import group_advantage
from tests.helpers import forms
from tests.helpers.advantages import close, draw
from tests.helpers.forms import needs_extension

FORMS = pytest.mark.parametrize("form", forms.NATIVE)
CHUNK = 1024  # csrc/arithmetic.h: where a group counts as large

SIZES = {
    "ones": [1] * 50,
    "odd": [1, 31, 32, 33, 1, 63, 64, 65, 2],
    "around a chunk": [CHUNK - 1, 3, CHUNK, 1, CHUNK + 1],
    "one large": [5 * CHUNK + 17],
    "large among small": [2, 2 * CHUNK, 5, 1, 3 * CHUNK + 1, 16, 16],
    "many": [16] * 3000,
}


@FORMS
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("scale", ["group", "global", "none"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_group_is_the_reference(form, sizes, scale, shuffle, dtype):
    rewards, ids = draw(sizes, dtype=dtype, device=forms.device_of(form), shuffle=shuffle)
    weights = torch.tensor([1.0, -0.3], device=rewards.device)
    found, expected = (
        group_advantage(rewards, ids, weights, scale=scale, clip=2.0, impl=impl) for impl in (form, "reference")
    )
    close(found, expected, 1e-12 if dtype == torch.float64 else 1e-6)


@FORMS
def test_millions_in_one_group_and_in_many(form):
    for size in (2_000_000, 16):
        rewards, ids = draw([size] * (2_000_000 // size), kinds=1, device=forms.device_of(form))
        rewards += 1e4  # where sums in fp32 would lose the spread
        close(group_advantage(rewards, ids, impl=form), group_advantage(rewards, ids, impl="reference"), 1e-6)


@FORMS
def test_results_are_bitwise_repeatable(form):
    # large groups are summed in several chunks, whose order must not depend on timing
    rewards, ids = draw(SIZES["large among small"], device=forms.device_of(form))
    first = group_advantage(rewards, ids, impl=form)[0]
    assert all(torch.equal(first, group_advantage(rewards, ids, impl=form)[0]) for _ in range(10))


@pytest.mark.gpu
@needs_extension
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("scale", ["group", "global", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gpu_and_cpu_give_the_same_bits(sizes, scale, dtype):
    rewards, ids = draw(sizes, dtype=dtype)
    found, stats = group_advantage(rewards, ids, scale=scale, impl="cpp")
    expected, other = group_advantage(rewards.cuda(), ids.cuda(), scale=scale, impl="cuda")
    assert torch.equal(found, expected.cpu())
    for ours, theirs in zip(vars(stats).values(), vars(other).values(), strict=True):
        assert torch.equal(ours, theirs.cpu())


@pytest.mark.gpu
@needs_extension
def test_ordered_ids_take_one_launch():
    rewards, ids = draw([16] * 64, device="cuda")
    group_advantage(rewards, ids, impl="cuda")
    with torch.profiler.profile() as seen:
        group_advantage(rewards, ids, impl="cuda")
        torch.cuda.synchronize()
    on_gpu = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_gpu if "Mem" not in name]  # copies and fills are no kernels
    assert len(kernels) == 1 and "advantage_kernel" in kernels[0]


@FORMS
def test_strides_integers_and_id_types_do_not_matter(form):
    rewards, ids = draw([3, 4, 5], device=forms.device_of(form))
    expected = group_advantage(rewards, ids, impl=form)
    wide = torch.stack([rewards, -rewards], -1)[..., 0]
    pairs = torch.stack([ids, -ids], 1)[:, 0]
    assert not wide.is_contiguous() and not pairs.is_contiguous()
    close(group_advantage(wide, pairs, impl=form), expected, 0)
    close(group_advantage(rewards, ids.to(torch.int16), impl=form), expected, 0)
    whole = (rewards * 10).round()
    close(group_advantage(whole.int(), ids, impl=form), group_advantage(whole, ids, impl=form), 0)


@FORMS
@pytest.mark.parametrize("scale", ["group", "global", "none"])
def test_gradient_is_that_of_the_reference(form, scale):
    """Also for clipped and for equal rewards. Groups of one have no gradient, except through the overall spread."""
    rewards, ids = draw([4, 1, 3, 6], dtype=torch.float64, device=forms.device_of(form), shuffle=True)
    rewards[ids == ids[0]] = 1.5
    weights = torch.tensor([0.7, -1.0], dtype=torch.float64, device=rewards.device)
    upstream = torch.linspace(-1, 2, len(ids), dtype=torch.float64, device=rewards.device)
    live = rewards.double()
    grads = []
    for impl in (form, "reference"):
        leaf = live.clone().requires_grad_()
        (group_advantage(leaf, ids, weights, scale=scale, clip=1.2, impl=impl)[0] * upstream).sum().backward()
        grads.append(leaf.grad)
    # the reference's square root has no derivative at 0: NaN in a group that is all equal
    usable = torch.isfinite(grads[1])
    assert usable.any() and torch.isfinite(grads[0]).all()
    assert torch.allclose(grads[0][usable], grads[1][usable], atol=1e-12)
