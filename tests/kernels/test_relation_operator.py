"""The fused relation loss as an operator of PyTorch, and at sizes where offsets pass 2^31."""

import pytest
import torch

from ldo.kernels import relation, relation_plan, support
from ldo.ops import relation_loss
from tests.helpers import regions, relations
from tests.helpers.fused import DEVICE, POINTERS, fused, inputs


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter's wrap-around")
@pytest.mark.parametrize("config", [relation_plan.ON_CPU, POINTERS], ids=["tma", "pointers"])
def test_offsets_past_two_to_the_31(config, monkeypatch):
    """The elements of the last of many clips lie past 2^31, where 32-bit offsets wrap.

    Only that clip's memory is touched.
    """
    tokens, width, clips = 70, 1024, 2**31 // (70 * 1024) + 2
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(1, tokens, width, generator=generator).half()
    large = torch.empty(clips, tokens, width, dtype=torch.float16)
    large[-1] = small[0]
    assert large[-1].storage_offset() > 2**31
    monkeypatch.setattr(relation_plan, "choose_config", lambda *_: config)
    found = []
    for student, clip in ((small, 0), (large, clips - 1)):
        key = relation_plan.Key(
            len(student),
            tokens,
            width,
            width,
            student.dtype,
            student.device,
            False,
            None,
            0.1,
            "hinge",
            0.5,
            0.5,
            True,
            tokens * 64 * 2,
            "tf32",
        )
        plan = relation_plan.Plan(key)
        panel = plan.panels[-1]
        assert panel.clips == slice(clip, clip + 1)
        ones, partial = torch.ones(len(student), plan.padded), torch.zeros(len(student), plan.tiles)
        matrix = plan.space_of(panel, torch.zeros(plan.space))
        per_token = (ones, 0.5 * ones, None, None, None, torch.ones(len(student), 2))
        panel.launch(
            *plan.operands(student, student), *plan.outputs(matrix), *per_token, panel.tiles, partial, *panel.fixed
        )
        found.append((partial[clip], matrix.clone()))
    (near_sums, near_matrix), (far_sums, far_matrix) = found
    assert near_sums.abs().sum() > 0
    assert torch.equal(near_sums, far_sums) and torch.equal(near_matrix, far_matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    student, teacher, named = inputs(2, 40, 16, 8, dtype=dtype)
    frame, weight = named["frame_N"].int(), named["weight_BN"].float()
    for gradient in (True, False):
        arguments = (student.clone().requires_grad_(gradient), teacher, frame, weight, 0.1, "hinge", 0.5, 0.5, gradient)
        torch.library.opcheck(relation._forward, arguments)
    loss, product, scale = relation._forward(student, teacher, None, None, 0.1, "hinge", 1.0, 0.0, True)
    torch.library.opcheck(relation._backward, (torch.ones_like(loss), product, scale, student))


@pytest.mark.parametrize("inside", regions.AUTOCAST, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(dtype, inside):
    student, teacher, named = inputs(2, 40, 16, 8, dtype=dtype)
    regions.assert_same(lambda argument: relation_loss(argument, teacher, impl="triton", **named), student, inside)


def test_torch_compile_does_not_break():
    student, teacher, named = inputs(2, 40, 16, 8)
    loss, gradient = fused(student, teacher, **named)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(argument):
        return 2 * relation_loss(2 * argument, teacher, impl="triton", **named)

    leaf = student.clone().requires_grad_()
    found = compiled(leaf)
    found.backward()
    torch.testing.assert_close(found.detach(), 2 * loss)
    torch.testing.assert_close(leaf.grad, 2 * gradient)


def test_who_serves_what():
    student, teacher, _ = inputs(1, 8, 8, 8)
    with pytest.raises(ValueError, match=r"impl='triton' is not available.*take fp32, bf16, fp16, not float64"):
        relation_loss(student.double(), teacher.double(), impl="triton")
    if DEVICE.type == "cpu":
        assert support.INTERPRET
        leaf = student.clone().requires_grad_()
        assert "Chunked" in str(relation_loss(leaf, teacher).grad_fn), "auto must not interpret"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4097, 13_000])
def test_real_sizes(tokens):
    """One panel, and several with the real workspace, at the widths of Wan 1.3B and V-JEPA 2 L."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    student, teacher = (
        torch.randn(1, tokens, width, generator=generator, device="cuda").bfloat16() for width in (1536, 1024)
    )
    frame = torch.arange(tokens, device="cuda") // 256
    weight = torch.rand(1, tokens, generator=generator, device="cuda")
    options = {"frame_N": frame, "weight_BN": weight, "margin": 0.02}
    loss, slope = relations.loss_and_gradient(student.double(), teacher.double(), impl="chunked", **options)
    found, gradient = fused(student, teacher, **options)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5) and relations.distance(gradient, slope) <= 5e-3


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    tokens, width = 256, 4096
    clips = 2**31 // (tokens * width) + 2
    generator = torch.Generator(device="cuda").manual_seed(0)
    one = torch.randn(1, tokens, width, generator=generator, device="cuda").bfloat16()
    student = one.expand(clips, tokens, width).contiguous()
    loss, gradient = fused(one, one[..., :64].contiguous())
    found, wide = fused(student, student[..., :64].contiguous(), upstream=clips)
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(wide[-1], gradient[0], rtol=1e-2, atol=1e-7)
