"""Predictive Dynamics Alignment: windows, modes, weights, resampling, and what teaches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ldo import teacher
from ldo.config import Teacher
from ldo.ops import relation_loss
from ldo.teacher import Aligner, Target, make_target
from ldo.world_model import Tokens

FORECAST = Teacher()


def long_clips(frames):
    """33 frames: three windows of 16 at 0, 8 and 16."""
    return torch.cat([frames, frames.flip(1)[:, 1:]], 1)


def test_one_window_is_observed_then_forecast(judge, frames):
    target = make_target(judge, frames, FORECAST)
    seen, foretold = judge.forecast(frames[:, 1:], 8)
    assert target.grid == (8, 4, 4) and target.y_BNE.shape == (2, 128, 48)
    assert torch.equal(target.y_BNE[:, :64], seen.x_BND)
    assert torch.equal(target.y_BNE[:, 64:], foretold.x_BND)
    assert (target.weight_BN[:, :64] == 0).all()
    assert ((target.weight_BN[:, 64:] >= 0.1) & (target.weight_BN[:, 64:] <= 1)).all()


def test_three_windows_tile_the_clip(judge, frames):
    x = long_clips(frames)
    target = make_target(judge, x, FORECAST)
    assert target.grid == (16, 4, 4)
    parts = [judge.forecast(x[:, 1 + s : 17 + s], 8) for s in (0, 8, 16)]
    expected = torch.cat([parts[0][0].x_BND, *(p[1].x_BND for p in parts)], 1)
    assert torch.allclose(target.y_BNE, expected, atol=1e-5)


def test_last_window_adds_only_its_new_tubelets(judge, frames):
    x = long_clips(frames)[:, :21]  # 20 frames: windows at 0 and 4; tubelets 8 and 9 are new
    target = make_target(judge, x, FORECAST)
    first, last = judge.forecast(x[:, 1:17], 8)[1].x_BND, judge.forecast(x[:, 5:21], 8)[1].x_BND
    assert torch.allclose(target.y_BNE[:, 64:128], first, atol=1e-5)
    assert torch.allclose(target.y_BNE[:, 128:], last[:, 32:], atol=1e-5)


def test_forecast_does_not_depend_on_what_came(judge, frames):
    """The target of a clip whose later half is broken is that of the whole clip: it says what should have happened."""
    broken = frames.clone()
    broken[:, 9:] = torch.rand(broken[:, 9:].shape)
    assert torch.equal(make_target(judge, frames, FORECAST).y_BNE, make_target(judge, broken, FORECAST).y_BNE)
    encode = replace(FORECAST, mode="encode")
    assert not torch.allclose(make_target(judge, frames, encode).y_BNE, make_target(judge, broken, encode).y_BNE, atol=0.1)


def test_encode_mode_is_the_normed_encoding(judge, frames):
    target = make_target(judge, frames, replace(FORECAST, mode="encode", weights="uniform"))
    assert torch.equal(target.y_BNE, judge.encode(frames[:, 1:]).x_BND)
    assert (target.weight_BN == 1).all()


def test_delta_mode_is_forecast_minus_persistence(judge, frames):
    target = make_target(judge, frames, replace(FORECAST, mode="delta"))
    seen, foretold = judge.forecast(frames[:, 1:], 8)
    last = seen.x_BND[:, -16:].repeat(1, 4, 1)
    assert torch.allclose(target.y_BNE[:, 64:], foretold.x_BND - last, atol=1e-5)
    assert target.skip == 4


def test_moving_regions_weigh_more(judge, frames):
    target = make_target(judge, frames, replace(FORECAST, mode="encode"))
    weight = target.weight_BN.view(2, 8, 16)
    change = target.y_BNE.view(2, 8, 16, -1).diff(dim=1).norm(dim=-1)
    for w, c in zip(weight[:, 1:].flatten(1), change.flatten(1), strict=True):
        assert w[c.argmax()] == 1 and w[c.argmin()] == w.min()


def aligner(**changes):
    return Aligner(replace(FORECAST, **changes), width=32, dim=48, vae_time=4, tubelet=2)


def test_resampling_is_linear_in_time_and_area_in_space():
    x = torch.randn(2, 5 * 6 * 8, 32)
    out = aligner().resample(Tokens(x, (5, 6, 8)), (8, 3, 4)).view(2, 8, 3, 4, 32)
    volume = x.view(2, 5, 6, 8, 32)[:, 1:]
    space = F.avg_pool2d(volume.permute(0, 1, 4, 2, 3).flatten(0, 1), 2).view(2, 4, 32, 3, 4).permute(0, 1, 3, 4, 2)
    assert torch.allclose(out[:, 1], 0.75 * space[:, 0] + 0.25 * space[:, 1], atol=1e-5)  # half-pixel centres
    assert torch.allclose(out[:, 0], space[:, 0], atol=1e-5)


def test_equal_grids_pass_unchanged():
    x = torch.randn(1, 9 * 16, 32)
    same = Aligner(FORECAST, width=32, dim=48, vae_time=2, tubelet=2)
    assert torch.equal(same.resample(Tokens(x, (9, 4, 4)), (8, 4, 4)), x[:, 16:])


def test_wrong_time_ratio_is_refused():
    with pytest.raises(ValueError, match="do not correspond"):
        aligner().resample(Tokens(torch.randn(1, 4 * 16, 32), (4, 4, 4)), (8, 4, 4))


def test_loss_is_the_relation_loss_over_frames():
    hidden, y, w = torch.randn(2, 5 * 16, 32), torch.randn(2, 128, 48), torch.rand(2, 128)
    module = aligner(spatial=0.3, temporal=0.9, margin=0.05)
    tokens = Tokens(hidden, (5, 4, 4))
    found = module(tokens, Target(y, w, (8, 4, 4)))
    frame = torch.arange(8).repeat_interleave(16)
    student = module.resample(tokens, (8, 4, 4))
    expected = relation_loss(student, y, frame_N=frame, weight_BN=w, margin=0.05, spatial=0.3, temporal=0.9)
    assert torch.equal(found, expected)


def test_loss_is_computed_in_the_models_precision():
    """Resampled in fp32, then rounded to what the model computes in, where tensor cores are."""
    hidden, y = torch.randn(1, 5 * 16, 32).bfloat16(), torch.randn(1, 128, 48)
    module, tokens = aligner(), Tokens(hidden, (5, 4, 4))
    found = module(tokens, Target(y, torch.ones(1, 128), (8, 4, 4)))
    student = module.resample(tokens, (8, 4, 4))
    frame = torch.arange(8).repeat_interleave(16)
    assert student.dtype == torch.float32 and found.dtype == torch.float32
    assert torch.equal(found, relation_loss(student.bfloat16(), y, frame_N=frame, weight_BN=torch.ones(1, 128)))


def test_full_geometry_is_one_mean_over_all_pairs():
    """Token relation distillation: uniform weights, one class."""
    hidden, y = torch.randn(1, 5 * 16, 32), torch.randn(1, 128, 48)
    module = aligner(geometry="full")
    found = module(Tokens(hidden, (5, 4, 4)), Target(y, torch.ones(1, 128), (8, 4, 4)))
    s, t = (F.normalize(v[0], dim=-1) for v in (module.resample(Tokens(hidden, (5, 4, 4)), (8, 4, 4)), y))
    assert torch.allclose(found, ((s @ s.T - t @ t.T).abs() - 0.1).clamp_min(0).mean(), atol=1e-6)


def test_delta_leaves_observed_tokens_out():
    hidden, y = torch.randn(1, 5 * 16, 32), torch.randn(1, 128, 48)
    other = y.clone()
    other[:, :64] = torch.randn(1, 64, 48)
    module, weight = aligner(mode="delta"), torch.ones(1, 128)
    a, b = (module(Tokens(hidden, (5, 4, 4)), Target(v, weight, (8, 4, 4), skip=4)) for v in (y, other))
    assert torch.equal(a, b)


def test_projector_is_trained_and_plain_has_nothing_to_train():
    assert not list(aligner().parameters())
    module = aligner(projector="mlp")
    hidden = torch.randn(1, 5 * 16, 32, requires_grad=True)
    module(Tokens(hidden, (5, 4, 4)), Target(torch.randn(1, 128, 48), torch.ones(1, 128), (8, 4, 4))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert hidden.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------- resampling


def library(x, grid):
    """[B, t, h, w, D] to ``grid`` by PyTorch's own interpolation, in the precision of x."""
    b, t, _, _, d = x.shape
    flat = x.permute(0, 1, 4, 2, 3).flatten(0, 1)
    x = torch.nn.functional.adaptive_avg_pool2d(flat, grid[1:]).unflatten(0, (b, t)).permute(0, 1, 3, 4, 2)
    flat = x.permute(0, 2, 3, 4, 1).flatten(1, 3)
    flat = torch.nn.functional.interpolate(flat, grid[0], mode="linear", align_corners=False)
    return flat.unflatten(1, (*grid[1:], d)).permute(0, 4, 1, 2, 3).flatten(1, 3)


GRIDS = [  # in, out, ratio of their times
    ((4, 4, 4), (8, 4, 4), 2.0),
    ((8, 15, 26), (16, 16, 16), 2.0),
    ((3, 7, 5), (12, 3, 4), 4.0),
    ((5, 2, 3), (5, 5, 8), 1.0),
    ((1, 1, 1), (2, 1, 1), 2.0),
    ((6, 9, 9), (3, 9, 9), 0.5),
]


@pytest.mark.parametrize(("given", "grid", "ratio"), GRIDS)
def test_resampling_is_the_librarys(given, grid, ratio):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, given[0] + 1, *given[1:], 6, generator=generator, requires_grad=True)
    aligner = Aligner(Teacher(projector="none"), 6, 6, 4, 4)
    aligner.ratio = ratio
    found = aligner.resample(Tokens(x.flatten(1, 3), (given[0] + 1, *given[1:])), grid)
    wide = x.detach().double().requires_grad_()
    expected = library(wide[:, 1:], grid)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    upstream = torch.randn(found.shape, generator=generator)
    found.backward(upstream), expected.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("other", [1, 2, 4, 7, 16])
def test_weights_are_exactly_the_librarys(size, other):
    """On unit vectors, in fp64, to the last bit but one."""
    cpu = torch.device("cpu")
    unit = torch.eye(size, dtype=torch.float64)[None]  # [1, size, size]: every input alone
    linear = torch.nn.functional.interpolate(unit, other, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(teacher.time_weights(size, other, cpu).double(), linear, rtol=0, atol=1e-7)
    area = torch.nn.functional.adaptive_avg_pool1d(unit, other)[0].T
    torch.testing.assert_close(teacher._area(size, other), area, rtol=0, atol=1e-15)


def test_what_is_made_once_is_the_same_tensor():
    cpu = torch.device("cpu")
    with torch.inference_mode():
        first = teacher.frame_of_tokens(4, 2, 3, 1, cpu)
        weights = teacher.time_weights(4, 9, cpu)
    assert teacher.frame_of_tokens(4, 2, 3, 1, cpu) is first and first.tolist() == [t for t in (1, 2, 3) for _ in range(6)]
    assert not first.is_inference() and not weights.is_inference()
    (weights @ torch.ones(4, 1, requires_grad=True)).sum().backward()  # usable in autograd, wherever it was made first


def test_the_same_frames_are_handed_over_every_time(monkeypatch):
    seen = []
    monkeypatch.setattr(teacher, "relation_loss", lambda *_, frame_N, **__: seen.append(frame_N) or torch.zeros(()))
    aligner = Aligner(Teacher(projector="none"), 6, 6, 4, 2)
    hidden, target = Tokens(torch.randn(1, 5 * 4, 6), (5, 2, 2)), Target(torch.randn(1, 32, 6), torch.ones(1, 32), (8, 2, 2))
    aligner(hidden, target), aligner(hidden, target)
    assert seen[0] is seen[1] and seen[0].dtype == torch.int32
