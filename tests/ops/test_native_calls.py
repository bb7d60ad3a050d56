"""Calls into the extension: custom ops, tracers, torch.compile, their cost on the host, and what a launch is given."""

import itertools
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ldo.ops import custom_ops, extension, group_advantage, grpo_surrogate, native
from tests.helpers import forms, pretend
from tests.helpers.advantages import draw
from tests.helpers.forms import needs_extension

FORMS = pytest.mark.parametrize("form", forms.NATIVE)


@FORMS
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(form, grad):
    rewards, ids = draw([3, 1, 4], dtype=torch.float64, device=forms.device_of(form))
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64, device=rewards.device)
    for given in (None, weights):
        torch.library.opcheck(
            custom_ops.advantage_op, (rewards.clone().requires_grad_(grad), ids, given, 0, 5.0, 1e-4, True)
        )
    logp, old, away = (torch.randn(6, 3, dtype=torch.float64, device=rewards.device) for _ in range(3))
    advantage = torch.randn(6, dtype=torch.float64, device=rewards.device)
    steps = torch.ones(3, dtype=torch.float64, device=rewards.device)
    for optional in ((None, None), (away.requires_grad_(grad), steps)):
        torch.library.opcheck(
            custom_ops.surrogate_op, (logp.requires_grad_(grad), old, advantage, *optional, 0.1, 1.5, 0.2)
        )


@FORMS
def test_compiles_into_one_graph(form):
    """The number of groups is known only when the graph runs, and one graph serves any number."""
    rewards, ids = draw([3, 1, 4], device=forms.device_of(form))
    seen = CompileCounter()

    def normalised(rewards, groups):
        advantage, mean, _, zero = custom_ops.advantage_op(rewards * 2, groups, None, 0, 5.0, 1e-4, False)
        return advantage + 1, mean.sum(), zero

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(normalised, backend=seen, fullgraph=True)
        for divisor in (1, 2):
            groups = ids // divisor
            for ours, theirs in zip(compiled(rewards, groups), normalised(rewards, groups), strict=True):
                assert torch.equal(ours, theirs)
    assert seen.frame_count == 1


@FORMS
def test_public_functions_compile_as_they_are(form):
    rewards, ids = draw([3, 1, 4], device=forms.device_of(form))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda rewards, groups: group_advantage(rewards, groups, impl=form)[0] * 2, backend="aot_eager"
    )
    assert torch.equal(compiled(rewards, ids), group_advantage(rewards, ids, impl=form)[0] * 2)


@needs_extension
def test_a_traced_call_stays_one_operation():
    rewards, ids = draw([3, 1, 4])
    logp, advantage = torch.randn(8, 1), torch.randn(8)

    def both(rewards, logp):
        surrogate = grpo_surrogate(logp, None, advantage, clip=0.1, impl="cpp")
        return group_advantage(rewards, ids, impl="cpp")[0] + surrogate.total

    traced = make_fx(both)(rewards, logp)
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
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
    rewards, ids = draw([16] * 4, kinds=1, device=device)
    logp, old, away = (torch.randn(64, 1, device=device) for _ in range(3))
    advantage, flat = torch.randn(64, device=device), rewards[:, 0].clone()
    logp.requires_grad_(name == "grpo_surrogate and backward")

    def surrogate():
        return grpo_surrogate(logp, old, advantage, away, clip=0.1, kl=0.1, weight=1.5, impl=impl).total

    def step():
        logp.grad = None
        surrogate().backward()

    return {
        "group_advantage": lambda: group_advantage(flat, ids, impl=impl),
        "grpo_surrogate": surrogate,
        "grpo_surrogate and backward": step,
    }[name]


# The aten operations that each call may dispatch.
CALLS = {"group_advantage": 6, "grpo_surrogate": 3, "grpo_surrogate and backward": 12}


@FORMS
@pytest.mark.parametrize("name", CALLS)
def test_a_call_dispatches_few_operations(form, name):
    """Each operation costs the host microseconds, and at these sizes a call costs nothing else."""
    call = caller(name, form, forms.device_of(form))
    call()
    with Operations() as seen:
        call()
    assert len(seen.names) <= CALLS[name], seen.names
    assert not any(
        operation.startswith("ldo::") or "zeros" in operation or "copy" in operation for operation in seen.names
    ), seen.names


@FORMS
@pytest.mark.parametrize("name", CALLS)
def test_a_call_takes_the_host_less_than_the_reference(form, name):
    """It takes a half or a quarter of that. The shortest of many times leaves out what else the machine does."""
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
    """CPU tensors pass for tensors of GPU 3. Records what each launch is given; the CPU does the work."""
    fake, kept = pretend.as_gpu(extension.load()[0]), []

    def recorded(call):
        return lambda **given: kept.append(given) or call(**given)

    fake.group_advantage, fake.grpo_surrogate = recorded(fake.group_advantage), recorded(fake.grpo_surrogate)
    # scratch memory as a GPU would ask for it: the surrogate only where one block is not enough
    fake.advantage_workspace = lambda samples, kinds: 4096
    fake.surrogate_workspace = lambda samples, steps: 1024 if samples * steps > 8192 else 0
    monkeypatch.setattr(native, "_module", lambda: fake)
    monkeypatch.setattr(native, "_index", lambda *_: 3)
    monkeypatch.setattr(native, "_stream", lambda index: 70 + index)
    return kept


@needs_extension
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("sizes", [[1], [3, 4, 6], [16] * 100])
def test_one_launch_with_one_wait_has_all_it_needs(launches, monkeypatch, sizes, shuffle, wide):
    """Scratch memory, info and results do not overlap and are aligned; unordered ids take a second launch."""
    rewards, ids = draw(sizes, dtype=torch.float64, shuffle=shuffle)
    found = native.advantage(rewards, ids, None, 0, 5.0, 1e-4, wide)
    assert len(launches) == 1 + bool(shuffle and len(sizes) > 1)
    for given in launches:
        assert (given["device"], given["stream"], given["wait"]) == (3, 73, True)
        table = rewards.numel() * (8 if wide else 4)
        sizes_in_bytes = {"mean": table, "deviation": table, "info": 24, "workspace": 4096}
        # buffers in the order of their addresses: each must end before the next begins
        taken = sorted((given[name], length) for name, length in sizes_in_bytes.items())
        assert all(start + length <= after for (start, length), (after, _) in itertools.pairwise(taken))
        assert given["info"] % 8 == given["workspace"] % 16 == 0
    monkeypatch.undo()
    expected = native.advantage(rewards, ids, None, 0, 5.0, 1e-4, wide)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@needs_extension
@pytest.mark.parametrize("samples", [5, 9000])
@pytest.mark.parametrize("grad", [False, True])
def test_a_launch_of_the_surrogate_takes_no_more_than_it_needs(launches, samples, grad):
    """No log-probs of zero, no slopes without a gradient, and no scratch memory if one block is enough."""
    native.surrogate(torch.randn(samples, requires_grad=grad), None, torch.randn(samples), None, None, 0.1, 1.0, 0.0)
    (given,) = launches
    assert given["logp_old"] == given["divergence"] == given["weights"] == 0
    assert (given["device"], given["stream"]) == (3, 73)
    assert bool(given["slope"]) == grad and bool(given["workspace"]) == (samples > 8192)


@needs_extension
def test_results_that_are_kept_hold_no_large_buffer_and_can_be_saved(tmp_path):
    rewards, ids = draw([16] * 5000)
    advantage, stats = group_advantage(rewards, ids, impl="cpp")
    # a view would keep, and save, all of the buffer that it was cut from
    for kept in (advantage, *vars(stats).values()):
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    few = group_advantage(rewards[:64], ids[:64], impl="cpp")
    torch.save([few[0], *vars(few[1]).values()], tmp_path / "kept.pt")
    assert all(kept.untyped_storage().nbytes() <= 2048 for kept in torch.load(tmp_path / "kept.pt"))


@needs_extension
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("which", ["total", "policy", "divergence", "ratio", "all"])
def test_the_call_as_it_is_and_the_custom_op_give_the_same_bits(weighted, which):
    generator = torch.Generator().manual_seed(0)
    logp, old, away = (0.1 * torch.randn(40, 3, generator=generator) for _ in range(3))
    advantage, steps = torch.randn(40, generator=generator), torch.rand(3, generator=generator) if weighted else None

    def run(call):
        logp_leaf, away_leaf = logp.clone().requires_grad_(), away.clone().requires_grad_()
        total, policy, divergence, clipped, ratio = call(
            logp_leaf, old, advantage, away_leaf, steps, 0.05, 1.0 if weighted else 1.7, 0.3
        )
        parts = {"total": total, "policy": policy, "divergence": divergence, "ratio": (ratio**2).sum()}
        loss = sum(parts.values()) if which == "all" else parts[which]
        assert not clipped.requires_grad
        gradients = torch.autograd.grad(loss, (logp_leaf, away_leaf), allow_unused=True)
        return total, policy, divergence, clipped, ratio, *gradients

    def custom(*given):
        scalars, ratio, _ = custom_ops.surrogate_op(*given)
        return *scalars.unbind()[:3], scalars[3].detach(), ratio

    for ours, theirs in zip(run(native.surrogate), run(custom), strict=True):
        # the direct call gives None where the custom op gives zeros
        assert torch.equal(theirs, torch.zeros_like(theirs) if ours is None else ours)


@needs_extension
def test_gradients_of_the_call_as_it_is():
    logp, old, away = (0.1 * torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    advantage, steps = torch.randn(4, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    def scalars_and_ratio(logp, away):
        total, policy, divergence, _, ratio = native.surrogate(logp, old, advantage, away, steps, 0.02, 1.0, 0.3)
        return total, policy, divergence, ratio

    assert torch.autograd.gradcheck(scalars_and_ratio, (logp.requires_grad_(), away.requires_grad_()), eps=1e-7)
