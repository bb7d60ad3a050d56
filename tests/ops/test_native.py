"""The extension under torch: large and odd groups against the reference, opcheck, torch.compile, gradients, and that bad tensors are refused."""

import logging
import sys
import types

import forms
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ldo.ops import dispatch, extension, group_advantage, native

CHUNK = 1024  # csrc/arithmetic.h: where a group counts as large
needs_extension = pytest.mark.skipif(extension.load()[0] is None, reason=extension.load()[1])
FORMS = pytest.mark.parametrize("form", forms.NATIVE)


def draw(sizes, r=2, dtype=torch.float32, device="cpu", shuffle=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.arange(len(sizes)) * 7 - 3, torch.tensor(sizes))
    rewards = (torch.randn(len(ids), r, generator=g, dtype=torch.float64) * 3 + 2).to(dtype)
    if shuffle:
        order = torch.randperm(len(ids), generator=g)
        ids, rewards = ids[order], rewards[order]
    return rewards.to(device), ids.to(device)


def close(found, expected, tolerance):
    """Advantages and statistics of two calls; equal rewards leave a rounding rest of 1e-16 in the spread."""
    for a, b in zip((found[0], *vars(found[1]).values()), (expected[0], *vars(expected[1]).values()), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


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
    found, expected = (group_advantage(rewards, ids, weights, scale=scale, clip=2.0, impl=impl) for impl in (form, "reference"))
    close(found, expected, 1e-12 if dtype == torch.float64 else 1e-6)


@FORMS
def test_millions_in_one_group_and_in_many(form):
    for size in (2_000_000, 16):
        rewards, ids = draw([size] * (2_000_000 // size), r=1, device=forms.device_of(form))
        rewards += 1e4  # where sums in fp32 would lose the spread
        close(group_advantage(rewards, ids, impl=form), group_advantage(rewards, ids, impl="reference"), 1e-6)


@FORMS
def test_results_are_bitwise_repeatable(form):
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
    a, stats = group_advantage(rewards, ids, scale=scale, impl="cpp")
    b, other = group_advantage(rewards.cuda(), ids.cuda(), scale=scale, impl="cuda")
    assert torch.equal(a, b.cpu()) and all(torch.equal(x, y.cpu()) for x, y in zip(vars(stats).values(), vars(other).values(), strict=True))


@pytest.mark.gpu
@needs_extension
def test_ordered_ids_take_one_launch():
    rewards, ids = draw([16] * 64, device="cuda")
    group_advantage(rewards, ids, impl="cuda")
    with torch.profiler.profile() as seen:
        group_advantage(rewards, ids, impl="cuda")
        torch.cuda.synchronize()
    kernels = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name]
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
    """Where clipped and where all are equal too; groups of one get none, unless through the spread of all."""
    rewards, ids = draw([4, 1, 3, 6], dtype=torch.float64, device=forms.device_of(form), shuffle=True)
    rewards[ids == ids[0]] = 1.5
    weights = torch.tensor([0.7, -1.0], dtype=torch.float64, device=rewards.device)
    up = torch.linspace(-1, 2, len(ids), dtype=torch.float64, device=rewards.device)
    live = rewards.double()
    grads = []
    for impl in (form, "reference"):
        x = live.clone().requires_grad_()
        (group_advantage(x, ids, weights, scale=scale, clip=1.2, impl=impl)[0] * up).sum().backward()
        grads.append(x.grad)
    # the reference's square root has no derivative at 0: NaN in a group that is all equal
    usable = torch.isfinite(grads[1])
    assert usable.any() and torch.allclose(grads[0][usable], grads[1][usable], atol=1e-12) and torch.isfinite(grads[0]).all()


@FORMS
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(form, grad):
    rewards, ids = draw([3, 1, 4], dtype=torch.float64, device=forms.device_of(form))
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64, device=rewards.device)
    for w in (None, weights):
        torch.library.opcheck(native.advantage_op, (rewards.clone().requires_grad_(grad), ids, w, 0, 5.0, 1e-4, True))
    logp, old, away = (torch.randn(6, 3, dtype=torch.float64, device=rewards.device) for _ in range(3))
    advantage = torch.randn(6, dtype=torch.float64, device=rewards.device)
    steps = torch.ones(3, dtype=torch.float64, device=rewards.device)
    for optional in ((None, None), (away.requires_grad_(grad), steps)):
        torch.library.opcheck(native.surrogate_op, (logp.requires_grad_(grad), old, advantage, *optional, 0.1, 1.5, 0.2))


@FORMS
def test_compiles_into_one_graph(form):
    """How many groups there are is known when it runs only, and the compiled graph takes that as it comes."""
    rewards, ids = draw([3, 1, 4], device=forms.device_of(form))
    seen = CompileCounter()

    def normalised(r, g):
        a, mean, _, zero = native.advantage_op(r * 2, g, None, 0, 5.0, 1e-4, False)
        return a + 1, mean.sum(), zero

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(normalised, backend=seen, fullgraph=True)
        for k in (1, 2):
            g = ids // k
            assert all(torch.equal(x, y) for x, y in zip(compiled(rewards, g), normalised(rewards, g), strict=True))
    assert seen.frame_count == 1


@FORMS
def test_public_functions_compile_as_they_are(form):
    rewards, ids = draw([3, 1, 4], device=forms.device_of(form))
    torch._dynamo.reset()
    compiled = torch.compile(lambda r, g: group_advantage(r, g, impl=form)[0] * 2, backend="aot_eager")
    assert torch.equal(compiled(rewards, ids), group_advantage(rewards, ids, impl=form)[0] * 2)


@needs_extension
@pytest.mark.parametrize(
    "change, message",
    [
        ({"rewards": torch.zeros(4, 2, dtype=torch.int32)}, "rewards must be float32 or float64 or bfloat16, got torch.int32"),
        ({"rewards": torch.zeros(4, 4)[:, ::2]}, r"rewards must be contiguous, got strides \(4, 2\)"),
        ({"rewards": torch.zeros(4, 2, device="meta")}, "takes no meta tensors"),
        ({"rewards": torch.zeros(4, 0)}, r"1 to 32 rewards, got \(4, 0\)"),
        ({"rewards": torch.zeros(4, 33)}, r"1 to 32 rewards, got \(4, 33\)"),
        ({"ids": torch.zeros(4, dtype=torch.int32)}, "groups must be int64, got torch.int32"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, r"groups must have shape \(4,\), got \(3,\)"),
        ({"ids": torch.zeros(8, dtype=torch.int64)[::2]}, "groups must be contiguous"),
        ({"ids": torch.zeros(4, dtype=torch.int64, device="meta")}, "groups is on meta, the first argument on cpu"),
        ({"weights": torch.zeros(3)}, r"weights must have shape \(2,\), got \(3,\)"),
        ({"weights": torch.zeros(2, dtype=torch.int64)}, "weights must be float32"),
    ],
)
def test_no_pointer_is_passed_unchecked(change, message):
    given = {"rewards": torch.zeros(4, 2), "ids": torch.zeros(4, dtype=torch.int64), "weights": None} | change
    with pytest.raises(ValueError, match=message):
        native.launch_advantage(*given.values(), 0, 5.0, 1e-4, False)


@needs_extension
@pytest.mark.parametrize(
    "position, value, message",
    [
        (1, torch.zeros(4, 2, dtype=torch.float64), "logp_old must be float32, got torch.float64"),
        (2, torch.zeros(3), r"advantage must have shape \(4,\), got \(3,\)"),
        (3, torch.zeros(2, 4).T, "divergence must be contiguous"),
        (0, torch.zeros(4, 2, dtype=torch.bfloat16), "logp must be float32 or float64, got torch.bfloat16"),
        (0, torch.zeros(0, 2), "at least one sample"),
    ],
)
def test_no_pointer_of_the_surrogate_is_passed_unchecked(position, value, message):
    given = [torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4), None, None]
    given[position] = value
    if len(value) == 0:
        given[1:3] = [value, torch.zeros(0)]
    with pytest.raises(ValueError, match=message):
        native.surrogate_op(*given, 0.1, 1.0, 0.0)


@needs_extension
def test_the_module_checks_what_it_can_itself():
    module = extension.load()[0]
    with pytest.raises(ValueError, match="a pointer is null"):
        module.advantage_cpu(0, 0, 0, 0, 0, 4, 1, 0, 5.0, 1e-4, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="1 to 32 rewards"):
        module.advantage_cpu(1, 0, 1, 0, 0, 4, 99, 0, 5.0, 1e-4, 0, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="only float32 and float64"):
        module.surrogate_cpu(2, 1, 1, 1, 0, 0, 4, 1, 0.1, 1.0, 0.0, 1, 1, 1)
    with pytest.raises(TypeError):
        module.advantage_cpu(-1)


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_driver_the_module_loads_and_says_so():
    module = extension.load()[0]
    if not module.CUDA:
        pytest.skip("built without CUDA")
    with pytest.raises(RuntimeError, match=r"no CUDA device: CUDA error (35|100), \w+"):
        module.devices()
    memory = torch.zeros(1 << 20, dtype=torch.uint8).data_ptr()
    with pytest.raises(RuntimeError, match=r"group_advantage: CUDA error (35|100), \w+"):
        module.advantage_cuda(memory, 0, memory, 0, 0, 4, 1, 0, 5.0, 1e-4, 0, *[memory] * 5, memory, 0, 0)


@pytest.mark.parametrize(
    "module, words",
    [
        (None, "the extension is not built: python setup.py build_ext"),
        (types.SimpleNamespace(INTERFACE=-1), "of another version of ldo"),
        (types.SimpleNamespace(INTERFACE=extension.INTERFACE, CUDA=False), "the extension, on the CPU"),
    ],
)
def test_what_was_chosen_is_said_once(module, words, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "ldo._C", module)
    extension.load.cache_clear()
    dispatch._say.cache_clear()
    caplog.set_level(logging.INFO, logger="ldo.ops")
    try:
        names, why = extension.forms(torch.zeros(1))
        for _ in range(2):
            dispatch.choose("group_advantage", "auto", names, names[0], why)
    finally:
        monkeypatch.undo()
        extension.load.cache_clear()
        dispatch._say.cache_clear()
    assert len(caplog.records) == 1 and words in caplog.text and names[-1] == "reference"


def test_more_rewards_than_the_extension_takes_still_work():
    rewards, ids = draw([4, 4], r=40)
    found = group_advantage(rewards, ids)
    close(found, group_advantage(rewards, ids, impl="reference"), 0)
