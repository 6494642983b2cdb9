"""RowSource dealt out to splits: sizes, copies, small sources, and files that share rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.bases.datasets.splits import cut_splits, refuse_shared
from leanserve.config.data_section import SplitSizes
from leanserve.errors import ConfigError


def digests(count: int) -> list[bytes]:
    return [row.to_bytes(4, "big") for row in range(count)]


def test_a_large_source_gets_the_sizes_asked_for() -> None:
    splits = cut_splits(digests(1000), SplitSizes(calibration=100, gate=200, test=50), seed=0)
    assert {split: len(rows) for split, rows in splits.items()} == {
        "calibration": 100,
        "gate": 200,
        "test": 50,
        "train": 650,
    }
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1000))
    assert list(splits["gate"]) != sorted(splits["gate"]), "a prefix of a split must be a sample of it"


@pytest.mark.parametrize(
    ("rows", "sizes", "expected"),
    [
        (8, None, (1, 4, 0, 3)),
        (200, None, (32, 128, 0, 40)),
        (640, None, (102, 409, 0, 129)),  # sizes nobody chose leave a fifth
        (640, SplitSizes(), (128, 512, 0, 0)),
        (100, SplitSizes(calibration=1000, gate=1, test=1), (79, 1, 1, 19)),
    ],
)
def test_a_small_source_is_cut_in_proportion(
    rows: int, sizes: SplitSizes | None, expected: tuple[int, int, int, int]
) -> None:
    splits = cut_splits(digests(rows), sizes, seed=3)
    assert tuple(len(splits[split]) for split in ("calibration", "gate", "test", "train")) == expected


def test_the_split_of_a_row_follows_its_content_not_its_place() -> None:
    forward, backward = digests(300), digests(300)[::-1]
    one, other = cut_splits(forward, None, seed=1), cut_splits(backward, None, seed=1)
    assert [forward[row] for row in one["gate"]] == [backward[row] for row in other["gate"]]
    assert list(cut_splits(forward, None, seed=2)["gate"]) != list(one["gate"])


@given(st.lists(st.binary(min_size=1, max_size=1), min_size=8, max_size=300), st.integers(0, 5))
def test_copies_never_land_in_two_splits_and_no_row_is_lost(rows: list[bytes], seed: int) -> None:
    if len(set(rows)) < 8:
        with pytest.raises(ConfigError, match="different rows are too few"):
            cut_splits(rows, None, seed)
        return
    splits = cut_splits(rows, None, seed)
    contents = [{rows[row] for row in numbers} for numbers in splits.values()]
    assert sum(map(len, contents)) == len(set(rows))
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(rows)))
    assert len(splits["calibration"]) > 0
    assert len(splits["gate"]) > 0


def test_a_crowd_of_copies_goes_to_train() -> None:
    rows = [b"same"] * 500 + digests(500)
    splits = cut_splits(rows, SplitSizes(calibration=100, gate=100), seed=0)
    assert len(splits["calibration"]) == len(splits["gate"]) == 100
    assert set(range(500)) <= set(splits["train"].tolist())


def test_files_that_share_rows_are_refused_with_examples() -> None:
    with pytest.raises(
        ConfigError, match=r"data.texts: 3 rows of gate .*gate row 0 = train row 2, gate row 1 = train row 3"
    ):
        refuse_shared({"train": digests(5), "gate": digests(9)[2:], "test": [b"other"]}, "data.texts")
    with pytest.raises(ConfigError, match=r"data.images: 1 rows of test .*test b.png = gate a.png"):
        refuse_shared({"gate": [b"1"], "test": [b"1"]}, "data.images", {"gate": ["a.png"], "test": ["b.png"]})
    refuse_shared({"train": [b"1", b"1"], "gate": [b"2"]}, "data.texts")
