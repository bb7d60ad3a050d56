"""The trainer as it runs on a GPU, on a pretended one (tests/helpers/pretend.py).

What is where, and which forms of the operations are taken.
"""

import json

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ldo.core.distributed import join_processes
from ldo.core.recipe_file import read_recipe
from ldo.models.generator.folder import read_geometry
from ldo.ops import relation, residual
from ldo.run.load import load_run
from ldo.run.validate import validate
from ldo.stages.align import train_align
from ldo.stages.reinforce import train_reinforce
from tests.helpers import models, pretend, recipes

ONE = dict(
    device="cuda", align__steps=1, align__batch=2, rl__updates=1, rl__group_size=2, rl__prompts=2, rl__guidance=2.0
)
ONE |= dict(data__clips=2, critic__contexts=[4], rl__steps=4, rl__window_range=2)


@pytest.fixture
def gpu():
    with pretend.gpu() as marks:
        yield marks


# ---------------------------------------------------------------------------------------------- the pretence itself


def test_refuses_what_a_gpu_refuses(gpu):
    here, there = torch.ones(2, 3), torch.ones(2, 3).to("cuda")
    layer = torch.nn.Linear(3, 4).to(there.device)
    for work in (
        lambda: here + there,
        lambda: layer(here),
        lambda: torch.cat([here, there]),
        lambda: here[there.sum(1).long() % 2],
        lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
        lambda: there.normal_(generator=torch.Generator()),
        lambda: torch.zeros_like(there, device="cpu") + there,
        lambda: here.to(there.device) + there.cpu(),
    ):
        with pytest.raises(RuntimeError, match="device"):
            work()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_allows_what_a_gpu_allows(gpu):
    inputs = torch.ones(2, 3, device="cuda", requires_grad=True)
    layer = torch.nn.Linear(3, 3, device="cuda")
    # scalars and indices may stay on the CPU
    outputs = checkpoint(lambda rows: layer(rows).softmax(-1) * torch.tensor(2.0), inputs, use_reentrant=False)
    (outputs[torch.tensor([1, 0])].quantile(0.5, dim=1).sum() + torch.zeros_like(outputs).sum()).backward()
    assert inputs.grad.is_cuda and layer.weight.grad.is_cuda and inputs.grad.cpu().device.type == "cpu"
    torch.optim.AdamW(layer.parameters(), foreach=True).step()
    drawn = torch.randn(4, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    assert drawn.is_cuda and drawn.to("cpu", torch.bfloat16).device.type == "cpu" and torch.ones(4).copy_(drawn).is_cpu


def test_moves_values_and_gradients_unchanged(gpu):
    inputs = torch.randn(3, requires_grad=True)
    inputs.cuda().double().square().sum().backward()
    assert torch.equal(inputs.grad, 2 * inputs.detach())


# ---------------------------------------------------------------------------------------------- the trainer


@pytest.mark.slow
@pytest.mark.parametrize("family", models.FAMILIES)
def test_both_stages_keep_to_one_device(family, gpu, tmp_path, vjepa_folder, monkeypatch):
    # one family through the interpreted Triton kernels is enough: they take a while
    if family != "wan":
        for operation in (relation, residual):
            monkeypatch.setattr(operation, "choose_triton", lambda name, impl, device, missing, forms, what: forms[-1])
    folder = models.FAMILIES[family](tmp_path / "model")
    recipe = read_recipe(recipes.write(tmp_path, folder, vjepa_folder, model__family=read_geometry(folder)[0], **ONE))
    here = load_run(validate(recipe), join_processes(recipe.device))
    assert here.processes.device.type == "cuda"
    for transformer in here.generator.transformers.values():
        assert all(parameter.is_cuda for parameter in transformer.parameters())
    train_align(here, "align")
    assert all(value.is_cuda for value in train_reinforce(here).values())
    rows = [json.loads(line) for line in (here.folder / "reinforce.jsonl").read_text().splitlines()]
    assert rows[0]["ratio_off"] < 1e-3
