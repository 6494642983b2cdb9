"""Joining and splitting batches: rows, padding, dynamic lengths."""

from __future__ import annotations

import numpy as np

from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.runtime.assembly import cut, dynamic_axes, join, longest, rejoin, split, trim

IMAGES = ModelSpec((TensorSpec("image", "float32", (2, 2)),), (TensorSpec("logits", "float32", (3,)),))
TEXT = ModelSpec(
    (TensorSpec("ids", "int64", (None,), pad=7), TensorSpec("mask", "int64", (None,))),
    (TensorSpec("embedding", "float32", (4,)),),
)


def test_a_lone_sample_is_not_copied() -> None:
    sample = IMAGES.example(3)
    assert join([sample], IMAGES, 3)[0] is sample[0]


def test_joined_then_split_gives_the_samples_back_without_the_padding_rows() -> None:
    samples = [IMAGES.example(rows, seed=rows) for rows in (1, 3, 2)]
    joined = join(samples, IMAGES, 8)
    assert joined[0].shape == (8, 2, 2)
    assert not joined[0][6:].any()
    for sample, part in zip(samples, split(joined, [1, 3, 2]), strict=True):
        np.testing.assert_array_equal(sample[0], part[0])


def test_rows_of_different_length_are_padded_with_the_fields_own_value() -> None:
    short = (np.array([[1, 2]]), np.array([[1, 1]]))
    long = (np.array([[3, 4, 5]]), np.array([[1, 1, 1]]))
    ids, mask = join([short, long], TEXT, 2)
    assert ids.tolist() == [[1, 2, 7], [3, 4, 5]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_large_requests_are_cut_and_rejoined_in_order() -> None:
    sample = IMAGES.example(7)
    parts = cut(sample, 3)
    assert [len(part[0]) for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(rejoin(parts)[0], sample[0])
    assert cut(sample, 7)[0] is sample


def test_the_length_is_the_largest_dynamic_axis() -> None:
    axes = dynamic_axes(TEXT.inputs)
    assert axes == ((0, 1), (1, 1))
    assert longest((np.zeros((2, 5)), np.zeros((2, 9))), axes) == 9
    assert dynamic_axes(IMAGES.inputs) == ()
    assert longest(IMAGES.example(1), ()) == 0


def test_answers_at_padded_positions_are_cut_off_and_others_left_alone() -> None:
    outputs = (
        TensorSpec("tags", "float32", (None, 2)),
        TensorSpec("embedding", "float32", (8,)),
        TensorSpec("half", "f4", (None,)),
    )
    reply = (np.zeros((1, 8, 2)), np.zeros((1, 8)), np.zeros((1, 4)))
    trimmed = trim(reply, dynamic_axes(outputs), padded=8, length=5)
    assert [array.shape for array in trimmed] == [(1, 5, 2), (1, 8), (1, 4)]
