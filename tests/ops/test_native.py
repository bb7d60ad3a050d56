"""The extension under torch: large and odd groups against the reference, opcheck, torch.compile, gradients, and that bad tensors are refused."""

import itertools
import logging
import sys
import time
import types

import forms
import pretend
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ldo.ops import dispatch, extension, group_advantage, grpo_surrogate, native

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
def test_a_traced_call_stays_one_operation():
    rewards, ids = draw([3, 1, 4])
    logp, advantage = torch.randn(8, 1), torch.randn(8)

    def both(r, x):
        return group_advantage(r, ids, impl="cpp")[0] + grpo_surrogate(x, None, advantage, clip=0.1, impl="cpp").total

    traced = make_fx(both)(rewards, logp)
    called = {str(n.target) for n in traced.graph.nodes if n.op == "call_function"}
    assert {"ldo.group_advantage.default", "ldo.grpo_surrogate.default"} <= called
    assert torch.equal(traced(rewards * 2, logp + 0.01), both(rewards * 2, logp + 0.01))


class Operations(TorchDispatchMode):
    """The names of the aten operations that reach a backend."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        self.names.append(function.name().removeprefix("aten::"))
        return function(*args, **kwargs or {})


def caller(name, impl, device):
    """One call of an operation at a common size."""
    rewards, ids = draw([16] * 4, r=1, device=device)
    logp, old, away = (torch.randn(64, 1, device=device) for _ in range(3))
    advantage, flat = torch.randn(64, device=device), rewards[:, 0].clone()
    logp.requires_grad_(name == "grpo_surrogate and backward")

    def surrogate():
        return grpo_surrogate(logp, old, advantage, away, clip=0.1, kl=0.1, weight=1.5, impl=impl).total

    def step():
        logp.grad = None
        surrogate().backward()

    return {"group_advantage": lambda: group_advantage(flat, ids, impl=impl), "grpo_surrogate": surrogate, "grpo_surrogate and backward": step}[name]


CALLS = {"group_advantage": 6, "grpo_surrogate": 3, "grpo_surrogate and backward": 12}  # and how many aten operations each may dispatch


@FORMS
@pytest.mark.parametrize("name", CALLS)
def test_a_call_dispatches_few_operations(form, name):
    """Each costs the host microseconds, which at these sizes is all that a call costs."""
    call = caller(name, form, forms.device_of(form))
    call()
    with Operations() as seen:
        call()
    assert len(seen.names) <= CALLS[name], seen.names
    assert not any(n.startswith("ldo::") or "zeros" in n or "copy" in n for n in seen.names), seen.names


@FORMS
@pytest.mark.parametrize("name", CALLS)
def test_a_call_takes_the_host_less_than_the_reference(form, name):
    """It takes half or a quarter of that. The least of many is free of what else the machine does."""
    found = {}
    pair = {impl: caller(name, impl, forms.device_of(form)) for impl in (form, "reference")}
    for _ in range(200):
        for impl, call in pair.items():
            began = time.perf_counter()
            call()
            found[impl] = min(found.get(impl, 1e9), time.perf_counter() - began)
    assert found[form] < found["reference"], found


@pytest.fixture
def launches(monkeypatch):
    """CPU tensors pass for those of GPU 3. What each launch is given is kept here; the CPU does it."""
    fake, kept = pretend.as_gpu(extension.load()[0]), []

    def recorded(call):
        return lambda **given: kept.append(given) or call(**given)

    fake.group_advantage, fake.grpo_surrogate = recorded(fake.group_advantage), recorded(fake.grpo_surrogate)
    fake.advantage_workspace, fake.surrogate_workspace = lambda n, r: 4096, lambda n, s: 1024 if n * s > 8192 else 0
    monkeypatch.setattr(native, "_module", lambda: fake)
    monkeypatch.setattr(native, "_index", lambda *_: 3)
    monkeypatch.setattr(native, "_stream", lambda index: 70 + index)
    return kept


@needs_extension
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("sizes", [[1], [3, 4, 6], [16] * 100])
def test_one_launch_with_one_wait_has_all_it_needs(launches, monkeypatch, sizes, shuffle, wide):
    """Scratch memory, the info and the results are apart and aligned; unordered ids take a second launch."""
    rewards, ids = draw(sizes, dtype=torch.float64, shuffle=shuffle)
    found = native.advantage(rewards, ids, None, 0, 5.0, 1e-4, wide)
    assert len(launches) == 1 + bool(shuffle and len(sizes) > 1)
    for given in launches:
        assert (given["device"], given["stream"], given["wait"]) == (3, 73, True)
        size, n, r = 8 if wide else 4, *rewards.shape
        taken = sorted([(given["mean"], n * r * size), (given["deviation"], n * r * size), (given["info"], 24), (given["workspace"], 4096)])
        assert all(a + length <= b for (a, length), (b, _) in itertools.pairwise(taken))
        assert given["info"] % 8 == given["workspace"] % 16 == 0
    monkeypatch.undo()
    expected = native.advantage(rewards, ids, None, 0, 5.0, 1e-4, wide)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_extension
@pytest.mark.parametrize("n", [5, 9000])
@pytest.mark.parametrize("grad", [False, True])
def test_a_launch_of_the_surrogate_takes_no_more_than_it_needs(launches, n, grad):
    """No log-probs of zero, no slopes without a gradient, no scratch memory where one block does."""
    native.surrogate(torch.randn(n, requires_grad=grad), None, torch.randn(n), None, None, 0.1, 1.0, 0.0)
    (given,) = launches
    assert given["logp_old"] == given["divergence"] == given["weights"] == 0 and (given["device"], given["stream"]) == (3, 73)
    assert bool(given["slope"]) == grad and bool(given["workspace"]) == (n > 8192)


@needs_extension
def test_results_that_are_kept_hold_no_large_buffer_and_can_be_saved(tmp_path):
    rewards, ids = draw([16] * 5000)
    a, stats = group_advantage(rewards, ids, impl="cpp")
    for x in (a, *vars(stats).values()):
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    few = group_advantage(rewards[:64], ids[:64], impl="cpp")
    torch.save([few[0], *vars(few[1]).values()], tmp_path / "kept.pt")
    assert all(x.untyped_storage().nbytes() <= 2048 for x in torch.load(tmp_path / "kept.pt"))


@needs_extension
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("which", ["total", "policy", "divergence", "ratio", "all"])
def test_the_call_as_it_is_and_the_custom_op_give_the_same_bits(weighted, which):
    g = torch.Generator().manual_seed(0)
    logp, old, away = (0.1 * torch.randn(40, 3, generator=g) for _ in range(3))
    advantage, steps = torch.randn(40, generator=g), torch.rand(3, generator=g) if weighted else None

    def run(call):
        x, d = logp.clone().requires_grad_(), away.clone().requires_grad_()
        total, policy, divergence, clipped, ratio = call(x, old, advantage, d, steps, 0.05, 1.0 if weighted else 1.7, 0.3)
        parts = {"total": total, "policy": policy, "divergence": divergence, "ratio": (ratio**2).sum()}
        loss = sum(parts.values()) if which == "all" else parts[which]
        assert not clipped.requires_grad
        return total, policy, divergence, clipped, ratio, *torch.autograd.grad(loss, (x, d), allow_unused=True)

    def custom(*given):
        scalars, ratio, _ = native.surrogate_op(*given)
        return *scalars.unbind()[:3], scalars[3].detach(), ratio

    for a, b in zip(run(native.surrogate), run(custom), strict=True):
        assert torch.equal(b, torch.zeros_like(b) if a is None else a)  # None where the custom op gives zeros


@needs_extension
def test_gradients_of_the_call_as_it_is():
    logp, old, away = (0.1 * torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    advantage, steps = torch.randn(4, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    def scalars_and_ratio(x, d):
        total, policy, divergence, _, ratio = native.surrogate(x, old, advantage, d, steps, 0.02, 1.0, 0.3)
        return total, policy, divergence, ratio

    assert torch.autograd.gradcheck(scalars_and_ratio, (logp.requires_grad_(), away.requires_grad_()), eps=1e-7)


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


# what the module takes, with addresses that it refuses to follow only where they are 0
ADVANTAGE = dict(rewards=1, rewards_type=0, ids=1, samples=4, kinds=1, scale=0, clip=5.0, eps=1e-4, out_type=0)
ADVANTAGE |= dict(advantage=1, mean=1, deviation=1, zero=1)
SURROGATE = dict(type=0, logp=1, advantage=1, samples=4, steps=1, clip=0.1, weight=1.0, kl=0.0, scalars=1, ratio=1)


@needs_extension
def test_the_module_checks_what_it_can_itself():
    module = extension.load()[0]
    with pytest.raises(ValueError, match="a pointer is null"):
        module.group_advantage(**ADVANTAGE | {"mean": 0})
    with pytest.raises(ValueError, match="1 to 32 rewards"):
        module.group_advantage(**ADVANTAGE | {"kinds": 99})
    with pytest.raises(ValueError, match="unknown scale"):
        module.group_advantage(**ADVANTAGE | {"scale": 3})
    with pytest.raises(ValueError, match="only float64 rewards"):
        module.group_advantage(**ADVANTAGE | {"out_type": 1})
    with pytest.raises(ValueError, match="a pointer is null" if module.CUDA else "built without CUDA|a pointer is null"):
        module.group_advantage(**ADVANTAGE | {"device": 0})
    with pytest.raises(ValueError, match="the device is negative" if module.CUDA else "built without CUDA"):
        module.group_advantage(**ADVANTAGE | {"device": -2, "info": 1, "workspace": 1})
    with pytest.raises(ValueError, match="only float32 and float64"):
        module.grpo_surrogate(**SURROGATE | {"type": 2})
    with pytest.raises(ValueError, match="a pointer is null"):
        module.grpo_surrogate(**SURROGATE | {"ratio": 0})
    with pytest.raises(ValueError, match="at least one sample and one step"):
        module.grpo_surrogate(**SURROGATE | {"steps": 0})
    for wrong in ({"rewards": -1}, {"reward": 1}, {"clip": None}):
        with pytest.raises(TypeError):
            module.group_advantage(**ADVANTAGE | wrong)
    with pytest.raises(TypeError):
        module.group_advantage(*ADVANTAGE.values())


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
        places = dict.fromkeys(("rewards", "ids", "advantage", "mean", "deviation", "zero", "info", "workspace"), memory)
        module.group_advantage(**ADVANTAGE | places | {"device": 0})


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
