"""Encoded clips: which rows are held out, and that no file is on both sides."""

from pathlib import Path

import pytest
import torch

from ldo.stages.encoded_clips import EncodedClips, clip_batch

SMALL, LARGE = (17, 32, 32), (17, 64, 64)


def clips_of(files, sizes=None):
    """Rows of some files, named by letters, that hold their own number."""
    rows = torch.arange(len(files))
    return EncodedClips(
        prompts=list(files),
        sizes=sizes or [SMALL] * len(files),
        files=[Path(file) for file in files],
        read=lambda index: {
            "latents": rows[index].float(),
            "y": torch.zeros(len(index), 4, 2, dtype=torch.float16),
            "weight": torch.ones(len(index), 4),
            "grid": torch.tensor([[1, 2, 2, 0]] * len(index)),
        },
    )


@pytest.mark.parametrize(
    ("files", "training"),
    [
        ("abcdefgh", 7),  # the last eighth
        ("abcdefg", 7),  # fewer than eight: none
        ("aabbccddeeffgghh", 14),  # two rows, of one file
        ("aabbccddeeffghhh", 13),  # the cut would go through h, and moves back to its beginning
        ("aaaaaaaaaaaaaaab", 14),  # a is nearly the whole bucket: it is on both sides
        ("abbbbbbbbbbbbbbb", 14),  # and so is b here
        ("a", 1),
    ],
)
def test_the_last_eighth_is_held_out_file_by_file(files, training):
    ((kept,), (held_out,)) = clips_of(files).split()
    assert len(kept) == training and kept + held_out == list(range(len(files)))


def test_never_more_than_32_of_a_size_are_held_out():
    clips = clips_of([str(number) for number in range(400)])
    ((kept,), (held_out,)) = clips.split()
    assert len(held_out) == 32 and len(kept) == 368


def test_each_size_is_a_bucket_of_its_own():
    clips = clips_of("abcd", [SMALL, LARGE, SMALL, LARGE])
    assert clips.buckets() == [[0, 2], [1, 3]]
    taken = clip_batch(clips.buckets(), 0, "test", 0, 2)
    assert sorted(taken.tolist()) in ([0, 2], [1, 3])


def test_targets_come_back_in_full_precision():
    latents, target = clips_of("abc").take(torch.tensor([2, 0]))
    assert latents.tolist() == [2, 0] and target.y_BNE.dtype == torch.float32
    assert target.grid == (1, 2, 2) and target.skip == 0
