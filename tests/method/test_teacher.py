"""Predictive Dynamics Alignment: windows, modes, weights, resampling, and which tokens teach."""

import pytest
import torch
import torch.nn.functional as F

from ldo.core.config import TeacherConfig
from ldo.method import alignment
from ldo.method.alignment import AlignmentLoss, frame_of_tokens, time_weights
from ldo.method.teacher import Target, make_target
from ldo.models.world_model import Tokens
from ldo.ops import relation_loss

FORECAST = TeacherConfig()


def long_clips(frames):
    """33 frames: three windows of 16 at 0, 8 and 16."""
    return torch.cat([frames, frames.flip(1)[:, 1:]], 1)


def test_one_window_is_observed_then_forecast(judge, frames):
    target = make_target(judge, frames, FORECAST)
    observed, forecast = judge.forecast(frames[:, 1:], 8)
    assert target.grid == (8, 4, 4)
    assert target.y_BNE.shape == (2, 128, 48)
    assert torch.equal(target.y_BNE[:, :64], observed.x_BND)
    assert torch.equal(target.y_BNE[:, 64:], forecast.x_BND)
    # Observed tokens anchor the geometry but teach nothing.
    assert (target.weight_BN[:, :64] == 0).all()
    assert (target.weight_BN[:, 64:] >= 0.1).all()
    assert (target.weight_BN[:, 64:] <= 1).all()


def test_three_windows_tile_the_clip(judge, frames):
    clips = long_clips(frames)
    target = make_target(judge, clips, FORECAST)
    assert target.grid == (16, 4, 4)
    parts = []
    for start in (0, 8, 16):
        observed, forecast = judge.forecast(clips[:, 1 + start : 17 + start], 8)
        # Only the first window has observed tubelets that no other one has forecast.
        parts += [forecast.x_BND] if parts else [observed.x_BND, forecast.x_BND]
    assert torch.allclose(target.y_BNE, torch.cat(parts, 1), atol=1e-5)


def test_last_window_adds_only_its_new_tubelets(judge, frames):
    # Without frame 0 these are 20 frames: windows start at 0 and 4, and tubelets 8 and 9 are new in the second.
    clips = long_clips(frames)[:, :21]
    target = make_target(judge, clips, FORECAST)
    first, last = judge.forecast(clips[:, 1:17], 8)[1].x_BND, judge.forecast(clips[:, 5:21], 8)[1].x_BND
    assert torch.allclose(target.y_BNE[:, 64:128], first, atol=1e-5)
    assert torch.allclose(target.y_BNE[:, 128:], last[:, 32:], atol=1e-5)


def test_forecast_does_not_depend_on_the_later_half(judge, frames):
    """A clip with a broken later half has the target of the sound clip, which says what should have happened."""
    broken = frames.clone()
    broken[:, 9:] = torch.rand(broken[:, 9:].shape)
    assert torch.equal(make_target(judge, frames, FORECAST).y_BNE, make_target(judge, broken, FORECAST).y_BNE)
    # The encoding does see it: the break is large enough to tell the two modes apart.
    encode = FORECAST.changed(mode="encode")
    encoded, encoded_broken = make_target(judge, frames, encode).y_BNE, make_target(judge, broken, encode).y_BNE
    assert not torch.allclose(encoded, encoded_broken, atol=0.1)


def test_encode_mode_is_the_normed_encoding(judge, frames):
    target = make_target(judge, frames, FORECAST.changed(mode="encode", weights="uniform"))
    assert torch.equal(target.y_BNE, judge.encode(frames[:, 1:]).x_BND)
    assert (target.weight_BN == 1).all()


def test_delta_mode_is_forecast_minus_persistence(judge, frames):
    target = make_target(judge, frames, FORECAST.changed(mode="delta"))
    observed, forecast = judge.forecast(frames[:, 1:], 8)
    last = observed.x_BND[:, -16:].repeat(1, 4, 1)
    assert torch.allclose(target.y_BNE[:, 64:], forecast.x_BND - last, atol=1e-5)
    assert target.skip == 4


def test_moving_regions_weigh_more(judge, frames):
    target = make_target(judge, frames, FORECAST.changed(mode="encode"))
    weight = target.weight_BN.view(2, 8, 16)
    change = target.y_BNE.view(2, 8, 16, -1).diff(dim=1).norm(dim=-1)
    # Not the first tubelet: nothing comes before it, and its weight is that of the second.
    for weights, changes in zip(weight[:, 1:].flatten(1), change.flatten(1), strict=True):
        assert weights[changes.argmax()] == 1
        assert weights[changes.argmin()] == weights.min()


def aligner(**changes):
    return AlignmentLoss(FORECAST.changed(**changes), width=32, dim=48, vae_time=4, tubelet=2)


def test_resampling_is_linear_in_time_and_area_in_space():
    hidden = torch.randn(2, 5 * 6 * 8, 32)
    resampled = aligner().resample(Tokens(hidden, (5, 6, 8)), (8, 3, 4)).view(2, 8, 3, 4, 32)
    volume = hidden.view(2, 5, 6, 8, 32)[:, 1:]
    pooled = F.avg_pool2d(volume.permute(0, 1, 4, 2, 3).flatten(0, 1), 2)
    space = pooled.view(2, 4, 32, 3, 4).permute(0, 1, 3, 4, 2)
    # Half-pixel centres: at twice the rate, the second step lies a quarter of the way to the next one.
    assert torch.allclose(resampled[:, 1], 0.75 * space[:, 0] + 0.25 * space[:, 1], atol=1e-5)
    assert torch.allclose(resampled[:, 0], space[:, 0], atol=1e-5)


def test_equal_grids_pass_unchanged():
    hidden = torch.randn(1, 9 * 16, 32)
    module = AlignmentLoss(FORECAST, width=32, dim=48, vae_time=2, tubelet=2)
    # All but latent frame 0, which is 16 tokens.
    assert torch.equal(module.resample(Tokens(hidden, (9, 4, 4)), (8, 4, 4)), hidden[:, 16:])


def test_wrong_time_ratio_is_refused():
    with pytest.raises(ValueError, match="do not correspond"):
        aligner().resample(Tokens(torch.randn(1, 4 * 16, 32), (4, 4, 4)), (8, 4, 4))


def test_loss_is_the_relation_loss_over_frames():
    hidden, teacher, weight = torch.randn(2, 5 * 16, 32), torch.randn(2, 128, 48), torch.rand(2, 128)
    # None of the options is a default, so that a forgotten one shows.
    options = {"spatial": 0.3, "temporal": 0.9, "margin": 0.05}
    module = aligner(**options)
    tokens = Tokens(hidden, (5, 4, 4))
    loss = module(tokens, Target(teacher, weight, (8, 4, 4)))
    frame = torch.arange(8).repeat_interleave(16)
    student = module.resample(tokens, (8, 4, 4))
    assert torch.equal(loss, relation_loss(student, teacher, frame_N=frame, weight_BN=weight, **options))


def test_loss_is_computed_in_the_models_precision():
    """Resampled in fp32, then rounded to the model's own precision, for which there are tensor cores."""
    hidden, teacher = torch.randn(1, 5 * 16, 32).bfloat16(), torch.randn(1, 128, 48)
    weight = torch.ones(1, 128)
    module, tokens = aligner(), Tokens(hidden, (5, 4, 4))
    loss = module(tokens, Target(teacher, weight, (8, 4, 4)))
    student = module.resample(tokens, (8, 4, 4))
    frame = torch.arange(8).repeat_interleave(16)
    assert student.dtype == torch.float32
    assert loss.dtype == torch.float32
    assert torch.equal(loss, relation_loss(student.bfloat16(), teacher, frame_N=frame, weight_BN=weight))


def test_full_geometry_is_one_mean_over_all_pairs():
    """Token relation distillation: uniform weights, one class."""
    hidden, features = torch.randn(1, 5 * 16, 32), torch.randn(1, 128, 48)
    module, tokens = aligner(geometry="full"), Tokens(hidden, (5, 4, 4))
    loss = module(tokens, Target(features, torch.ones(1, 128), (8, 4, 4)))
    student = F.normalize(module.resample(tokens, (8, 4, 4))[0], dim=-1)
    teacher = F.normalize(features[0], dim=-1)
    difference = (student @ student.T - teacher @ teacher.T).abs()
    # 0.1 is the default margin.
    assert torch.allclose(loss, (difference - 0.1).clamp_min(0).mean(), atol=1e-6)


def test_delta_leaves_observed_tokens_out():
    tokens, teacher = Tokens(torch.randn(1, 5 * 16, 32), (5, 4, 4)), torch.randn(1, 128, 48)
    other = teacher.clone()
    other[:, :64] = torch.randn(1, 64, 48)
    module = aligner(mode="delta")
    # Weights of 1 everywhere: observed tokens must be cut off, since no zero weight leaves them out.
    weight = torch.ones(1, 128)
    expected = module(tokens, Target(teacher, weight, (8, 4, 4), skip=4))
    assert torch.equal(module(tokens, Target(other, weight, (8, 4, 4), skip=4)), expected)


def test_projector_is_trained_and_plain_has_nothing_to_train():
    assert not list(aligner().parameters())
    module = aligner(projector="mlp")
    hidden = torch.randn(1, 5 * 16, 32, requires_grad=True)
    module(Tokens(hidden, (5, 4, 4)), Target(torch.randn(1, 128, 48), torch.ones(1, 128), (8, 4, 4))).backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert hidden.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------- resampling


def library(states, grid):
    """[B, t, h, w, D] to ``grid`` by PyTorch's own interpolation, in the precision of ``states``."""
    batch, steps, _, _, width = states.shape
    flat = states.permute(0, 1, 4, 2, 3).flatten(0, 1)
    pooled = F.adaptive_avg_pool2d(flat, grid[1:]).unflatten(0, (batch, steps)).permute(0, 1, 3, 4, 2)
    flat = pooled.permute(0, 2, 3, 4, 1).flatten(1, 3)
    flat = F.interpolate(flat, grid[0], mode="linear", align_corners=False)
    return flat.unflatten(1, (*grid[1:], width)).permute(0, 4, 1, 2, 3).flatten(1, 3)


GRIDS = [
    # in, out, ratio of their times
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
    # One step more than given, since latent frame 0 is dropped.
    hidden = torch.randn(2, given[0] + 1, *given[1:], 6, generator=generator, requires_grad=True)
    module = AlignmentLoss(TeacherConfig(projector="none"), 6, 6, 4, 4)
    module.ratio = ratio
    resampled = module.resample(Tokens(hidden.flatten(1, 3), (given[0] + 1, *given[1:])), grid)
    wide = hidden.detach().double().requires_grad_()
    expected = library(wide[:, 1:], grid)
    torch.testing.assert_close(resampled.double(), expected, rtol=0, atol=2e-6)
    upstream = torch.randn(resampled.shape, generator=generator)
    resampled.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("other", [1, 2, 4, 7, 16])
def test_weights_are_exactly_the_librarys(size, other):
    """On unit vectors, in fp64, to the last bit but one."""
    cpu = torch.device("cpu")
    # The rows of [1, size, size] each have a single input that is not zero, so the results are the library's weights.
    unit = torch.eye(size, dtype=torch.float64)[None]
    linear = F.interpolate(unit, other, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(time_weights(size, other, cpu).double(), linear, rtol=0, atol=1e-7)
    area = F.adaptive_avg_pool1d(unit, other)[0].T
    torch.testing.assert_close(alignment._area(size, other), area, rtol=0, atol=1e-15)


def test_cached_tensors_are_usable_in_autograd():
    cpu = torch.device("cpu")
    # A tensor made under inference mode could never be used in a backward pass, and these are kept.
    with torch.inference_mode():
        frame = frame_of_tokens(4, 2, 3, 1, cpu)
        weights = time_weights(4, 9, cpu)
    assert frame_of_tokens(4, 2, 3, 1, cpu) is frame
    assert frame.tolist() == [1] * 6 + [2] * 6 + [3] * 6
    assert not frame.is_inference()
    assert not weights.is_inference()
    (weights @ torch.ones(4, 1, requires_grad=True)).sum().backward()


def test_the_relation_loss_gets_the_same_frames_every_time():
    frames_given = []

    def relation(*_, frame_N, **__):
        frames_given.append(frame_N)
        return torch.zeros(())

    module = AlignmentLoss(TeacherConfig(projector="none"), 6, 6, 4, 2, relation)
    hidden = Tokens(torch.randn(1, 5 * 4, 6), (5, 2, 2))
    target = Target(torch.randn(1, 32, 6), torch.ones(1, 32), (8, 2, 2))
    module(hidden, target)
    module(hidden, target)
    # The very same tensor: the loss keeps what it derives from it for only as long as it is given that tensor.
    assert frames_given[0] is frames_given[1]
    assert frames_given[0].dtype == torch.int32
