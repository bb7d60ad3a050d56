"""Buckets: which size a clip falls into, and which clips a step takes."""

import numpy as np
import pytest

from ldo.data.buckets import batch_indices, bucket_batch, choose_bucket
from ldo.data.video import VideoInfo

WIDE, TALL, SHORT, HD = (81, 480, 832), (81, 832, 480), (17, 480, 832), (81, 720, 1280)
ALL = (WIDE, TALL, SHORT, HD)


def info(height, width, frames=200, fps=16):
    return VideoInfo(frames, fps, height, width, (frames - 1) / fps)


@pytest.mark.parametrize(
    ("clip", "size"),
    [
        (info(480, 832), WIDE),
        (info(480, 848), WIDE),
        # both wide shapes fit nearly as well: the larger
        (info(1080, 1920), HD),
        # enlarged by 3%
        (info(700, 1250), HD),
        # HD would enlarge by 12%
        (info(640, 1140), WIDE),
        (info(1920, 1080), TALL),
        # a square is as near to both, and HD would enlarge it
        (info(1080, 1080), TALL),
        (info(832, 600), TALL),
        # too short for the others
        (info(480, 832, frames=80), SHORT),
        (info(1080, 1920, frames=41), SHORT),
        # 81 frames at 16 fps
        (info(480, 832, frames=162, fps=32), WIDE),
        (info(480, 832, frames=158, fps=32), SHORT),
    ],
)
def test_a_clip_goes_where_it_fits_best(clip, size):
    assert choose_bucket(clip, 16, ALL) == size
    # whatever the order in which the recipe names them
    assert choose_bucket(clip, 16, ALL[::-1]) == size


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        (info(480, 832, frames=16), "it gives 16 frames at 16 fps and 17 are needed"),
        (
            info(360, 640),
            "its 640 x 360 pixels are too few for the smallest bucket that it is long enough for, 832 x 480|480 x 832",
        ),
    ],
)
def test_a_clip_that_fits_nowhere_says_why(clip, reason):
    with pytest.raises(ValueError, match=reason):
        choose_bucket(clip, 16, ALL)


def test_a_single_size_takes_pictures_of_any_size():
    assert choose_bucket(info(16, 16), 16, [WIDE]) == WIDE
    with pytest.raises(ValueError, match="81 are needed"):
        choose_bucket(info(480, 832, frames=80), 16, [WIDE])


# ------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize("batch, count", [(1, 5), (4, 10), (3, 7), (5, 5), (12, 5), (23, 4), (2, 1)])
def test_every_epoch_visits_each_item_once(batch, count):
    drawn = np.concatenate([batch_indices(3, "align", step, batch, count) for step in range(4 * count)])
    epochs = drawn[: len(drawn) // count * count].reshape(-1, count)
    assert len(epochs) >= 4 and (np.sort(epochs, 1) == np.arange(count)).all()
    assert count < 4 or len({tuple(epoch) for epoch in epochs}) > 1


def test_batches_depend_only_on_seed_purpose_and_step():
    def draw(seed=3, purpose="align"):
        return np.concatenate([batch_indices(seed, purpose, step, 4, 50) for step in (2, 9, 30)])

    first = draw()
    # steps may be asked for in any order, and whatever else is drawn
    np.random.default_rng(0).random()
    np.testing.assert_array_equal(draw(), first)
    assert (draw(seed=4) != first).any() and (draw(purpose="rl") != first).any()


def test_one_bucket_is_the_plain_order():
    for step in range(20):
        bucket, rows = bucket_batch(3, "align", step, 4, [10])
        assert bucket == 0
        np.testing.assert_array_equal(rows, batch_indices(3, "align", step, 4, 10))


@pytest.mark.parametrize("counts", [[40, 12, 3], [5, 5], [1, 100]])
def test_buckets_take_turns_by_size_and_visit_every_clip(counts):
    batch = 4
    turns = [max(round(count / batch), 1) for count in counts]
    batches = [bucket_batch(3, "align", step, batch, counts) for step in range(12 * sum(turns))]
    buckets = np.array([bucket for bucket, _ in batches])
    orders = buckets.reshape(-1, sum(turns))
    for order in orders:
        assert [int((order == bucket).sum()) for bucket in range(len(counts))] == turns
    for bucket, count in enumerate(counts):
        drawn = np.concatenate([rows for taken, rows in batches if taken == bucket])
        epochs = drawn[: len(drawn) // count * count].reshape(-1, count)
        assert len(epochs) >= 4 and (np.sort(epochs, 1) == np.arange(count)).all()
    # drawn afresh each epoch; two buckets of one turn each have only two orders
    assert min(turns) == max(turns) == 1 or len(np.unique(orders, axis=0)) > 1


def test_the_step_and_the_seed_decide():
    def draw(seed):
        batches = [bucket_batch(seed, "align", step, 4, [40, 12, 3]) for step in (17, 5, 30)]
        return [(bucket, rows.tolist()) for bucket, rows in batches]

    first = draw(3)
    np.random.default_rng(0).random()
    assert draw(3) == first and draw(4) != first
