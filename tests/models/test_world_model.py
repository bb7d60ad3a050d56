"""The world model wrapper: no leak from the future, square uncropped input, normed features, batching."""

import logging

import pytest
import torch
import torch.nn.functional as F

from ldo.models.world_model import WorldModel, layer_norm, window_starts
from tests.helpers import models


def test_forecast_does_not_see_the_future(judge, frames):
    clips = frames[:, 1:]
    changed = clips.clone()
    changed[:, 8:] = torch.rand(changed[:, 8:].shape)
    seen, forecast = judge.forecast(clips, 8)
    changed_seen, changed_forecast = judge.forecast(changed, 8)
    assert torch.equal(seen.x_BND, changed_seen.x_BND)
    assert torch.equal(forecast.x_BND, changed_forecast.x_BND)
    # the test can fail: a change of the context does reach the forecast
    past = clips.clone()
    past[:, 6:8] = torch.rand(past[:, 6:8].shape)
    assert not torch.allclose(judge.forecast(past, 8)[1].x_BND, forecast.x_BND, atol=1e-3)


def test_the_stock_forward_leaks(judge, frames):
    """The reason for this wrapper; if transformers fixes it, this test says so."""
    clips = judge.prepare(frames[:, 1:])
    changed = clips.clone()
    changed[:, 8:] += 1
    index = torch.arange(128).expand(2, 128)
    masks = dict(context_mask=[index[:, :64]], target_mask=[index[:, 64:]])
    with torch.no_grad():
        plain_output = judge.model(clips, **masks).predictor_output.last_hidden_state
        changed_output = judge.model(changed, **masks).predictor_output.last_hidden_state
    # rounding is below 1e-6; how much leaks depends on the random weights, which differ between versions
    assert (plain_output - changed_output).abs().max() > 1e-4


def test_forecast_equals_predictor_on_only_the_context(judge, frames):
    clips = frames[:, 1:]
    seen, forecast = judge.forecast(clips, 8, normalize=False)
    index = torch.arange(128).expand(2, 128)
    with torch.no_grad():
        hidden = judge.model.encoder(judge.prepare(clips[:, :8])).last_hidden_state
        predicted = judge.model.predictor(hidden, [index[:, :64]], [index[:, 64:]]).last_hidden_state
    assert torch.equal(forecast.x_BND, predicted)
    assert torch.equal(seen.x_BND, layer_norm(hidden))
    assert torch.equal(judge.forecast(clips, 8)[1].x_BND, F.layer_norm(predicted, (48,)))


def test_grids_and_norm(judge, frames):
    tokens = judge.encode(frames[:, 1:])
    assert tokens.grid == (8, 4, 4) and tokens.x_BND.shape == (2, 128, 48)
    # a layer norm without affine: mean 0 and deviation 1 in every token
    assert tokens.x_BND.mean(-1).abs().max() < 1e-5
    assert (tokens.x_BND.std(-1, correction=0) - 1).abs().max() < 1e-2
    seen, forecast = judge.forecast(frames[:, 1:], 4)
    assert seen.grid == (2, 4, 4) and forecast.grid == (6, 4, 4)


def test_tokens_are_in_time_height_width_order(judge):
    """A change in one corner late in the clip moves the last tubelet's last token most."""
    blank = torch.zeros(1, 16, 3, 32, 32)
    marked = blank.clone()
    marked[:, 14:, :, 24:, 24:] = 1
    # before attention, which spreads a change to all tokens
    patches = judge.model.encoder.embeddings
    with torch.no_grad():
        change = (patches(judge.prepare(blank)) - patches(judge.prepare(marked))).norm(dim=-1)[0]
    assert change.argmax() == 127 and (change[:127] < 1e-6).all()


def test_any_picture_is_resized_whole(judge):
    wide = torch.zeros(1, 2, 3, 32, 96)
    # a stripe at the left edge: a centre crop would lose it
    wide[..., :8] = 1
    resized = judge.prepare(wide) * judge.std + judge.mean
    assert resized.shape[-2:] == (32, 32)
    assert resized[..., 0].min() > 0.9 and resized[..., 8:].abs().max() < 1e-5


def test_gradient_reaches_the_frames(judge, frames):
    clips = frames[:1, 1:].clone().requires_grad_()
    judge.encode(clips).x_BND.square().sum().backward()
    assert clips.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in judge.parameters())


def test_batching_changes_nothing(judge, frames):
    clips = torch.cat([frames[:, 1:]] * 4)
    together = judge.forecast(clips, 8)[1].x_BND
    assert torch.equal(together[:4], judge.forecast(clips[:4], 8)[1].x_BND)


@pytest.mark.parametrize("context", [0, 3, 16, 18])
def test_bad_context(judge, frames, context):
    with pytest.raises(ValueError, match="context"):
        judge.forecast(frames[:, 1:], context)


def test_odd_frame_count(judge, frames):
    with pytest.raises(ValueError, match="17 frames"):
        judge.encode(frames)


def test_untrained_mask_token_warns(tmp_path, caplog):
    from transformers import VJEPA2Model

    model = VJEPA2Model.from_pretrained(models.write_vjepa(tmp_path))
    with caplog.at_level(logging.WARNING):
        WorldModel(model)
        assert not caplog.records
        torch.nn.init.zeros_(model.predictor.embeddings.mask_tokens)
        WorldModel(model)
    assert "mask token" in caplog.text


@pytest.mark.parametrize(
    ("frames", "window", "stride", "starts"),
    [(32, 16, 8, [0, 8, 16]), (16, 16, 8, [0]), (36, 16, 8, [0, 8, 16, 20]), (18, 16, 8, [0, 2])],
)
def test_window_starts(frames, window, stride, starts):
    assert window_starts(frames, window, stride) == starts


def test_window_too_long():
    with pytest.raises(ValueError, match="fewer than a window"):
        window_starts(12, 16, 8)
