"""What the extension refuses, how it says that it is missing, and which form is then chosen."""

import logging
import sys
import types

import pytest
import torch

from ldo.ops import custom_ops, dispatch, extension, group_advantage, native
from ldo.ops.dispatch import choose_form
from tests.helpers.advantages import close, draw
from tests.helpers.forms import needs_extension


@needs_extension
@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"rewards": torch.zeros(4, 2, dtype=torch.int32)},
            "rewards must be float32 or float64 or bfloat16, got torch.int32",
        ),
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
        custom_ops.surrogate_op(*given, 0.1, 1.0, 0.0)


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
    with pytest.raises(
        ValueError, match="a pointer is null" if module.CUDA else "built without CUDA|a pointer is null"
    ):
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
    # real memory: should the module follow a pointer after all, the test fails instead of crashing
    memory = torch.zeros(1 << 20, dtype=torch.uint8).data_ptr()
    with pytest.raises(RuntimeError, match=r"group_advantage: CUDA error (35|100), \w+"):
        places = dict.fromkeys(
            ("rewards", "ids", "advantage", "mean", "deviation", "zero", "info", "workspace"), memory
        )
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
        names, reason = extension.forms(torch.zeros(1))
        for _ in range(2):
            choose_form("group_advantage", "auto", names, names[0], reason)
    finally:
        monkeypatch.undo()
        extension.load.cache_clear()
        dispatch._say.cache_clear()
    assert len(caplog.records) == 1 and words in caplog.text and names[-1] == "reference"


def test_more_rewards_than_the_extension_takes_still_work():
    rewards, ids = draw([4, 4], kinds=40)
    found = group_advantage(rewards, ids)
    close(found, group_advantage(rewards, ids, impl="reference"), 0)
