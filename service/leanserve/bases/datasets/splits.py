"""Which rows calibrate, train, gate and test, when they come from one source or from a file per split.

A variant is judged on rows that no pass has seen. Copies are what breaks that in practice (the same photo under two
names, a sentence that occurs twice), so rows are dealt out in groups of equal content, by the digest of the content.
The order of the groups is that of sha256(seed, digest): the same rows give the same splits on every machine, whatever
their order in the file, and a few rows more or less move few others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from leanserve.config.data_section import SplitSizes
from leanserve.contracts import Split
from leanserve.errors import ConfigError

LEAST = 8
"""Different rows below which there is nothing to learn from a split."""
SHARE = 0.8
"""Of a source that is too small for its splits: what they get together; the rest is `train`."""
SHOWN = 2
RowSource = NDArray[np.int64]


def cut_splits(digests: Sequence[bytes], sizes: SplitSizes | None, seed: int) -> dict[Split, RowSource]:
    """Row numbers of each split of one source; rows with equal digests share a split.

    Calibration, gate and test get their sizes and `train` the rest. A source that is too small is cut in
    proportion, so that neither calibration, gate nor train is empty. Sizes that the user did not choose leave a fifth
    for `train`.

    Raises:
        ConfigError: fewer than 8 rows differ.
    """
    waiting = _groups(digests, seed)
    if len(waiting) < LEAST:
        raise ConfigError(
            f"data: {len(waiting)} different rows are too few to cut into splits; at least {LEAST} are needed"
        )
    splits: dict[Split, RowSource] = {}
    for split, size in _sizes(len(digests), sizes).items():
        taken, waiting = _take(waiting, size)
        splits[split] = np.array(taken, dtype=np.int64)
    splits["train"] = _joined(waiting)
    return splits


def deal(
    digests: Mapping[Split, Sequence[bytes]],
    sizes: SplitSizes | None,
    seed: int,
    key: str,
    names: Mapping[Split, Sequence[str]] | None = None,
) -> dict[Split, tuple[Split, RowSource]]:
    """Splits that have files of their own: whose file has the rows of a split, and which rows of it.

    Without files for calibration, its rows are taken out of those of train, half of them at most. Train and test may be
    empty. The rows are shuffled as by `cut_splits`, since files are often sorted by class and passes take the first
    rows.

    Raises:
        ConfigError: there are no files for the gate, or splits share rows.
    """
    if not digests.get("gate"):
        raise ConfigError(
            f"{key}: there are no files for the split 'gate', on which variants are compared with the base"
        )
    refuse_shared(digests, key, names)
    dealt: dict[Split, tuple[Split, RowSource]] = {split: ("gate", _joined([])) for split in ("train", "test")}
    dealt |= {split: (split, _joined(_groups(rows, seed))) for split, rows in digests.items()}
    if "calibration" not in digests and digests.get("train"):
        groups = _groups(digests["train"], seed)
        size = min((sizes or SplitSizes()).calibration, max(1, len(digests["train"]) // 2))
        taken, left = _take(groups, size)
        dealt |= {"calibration": ("train", np.array(taken, dtype=np.int64)), "train": ("train", _joined(left))}
    return dealt


def _groups(digests: Sequence[bytes], seed: int) -> list[list[int]]:
    """Row numbers of equal content, in the order that seed and content decide."""
    groups: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        groups.setdefault(digest, []).append(row)
    order = sorted(groups, key=lambda digest: hashlib.sha256(seed.to_bytes(8, "big") + digest).digest())
    return [groups[digest] for digest in order]


def _joined(groups: list[list[int]]) -> RowSource:
    return np.array([row for group in groups for row in group], dtype=np.int64)


def _sizes(rows: int, sizes: SplitSizes | None) -> dict[Split, int]:
    chosen = sizes or SplitSizes()
    wanted: dict[Split, int] = {"calibration": chosen.calibration, "gate": chosen.gate, "test": chosen.test}
    total = sum(wanted.values())
    room = rows if sizes is not None and total <= rows else int(SHARE * rows)
    if total <= room:
        return wanted
    return {split: max(min(size, 1), size * room // total) for split, size in wanted.items()}


def _take(groups: list[list[int]], size: int) -> tuple[list[int], list[list[int]]]:
    """At most `size` rows in whole groups, in order, and what is left; at least one group unless the size is 0."""
    taken: list[int] = []
    left: list[list[int]] = []
    for group in groups:
        if len(taken) + len(group) <= size:
            taken += group
        else:
            left.append(group)
    if size and not taken and left:
        taken = left.pop(left.index(min(left, key=len)))
    return taken, left


def refuse_shared(
    digests: Mapping[Split, Sequence[bytes]], key: str, names: Mapping[Split, Sequence[str]] | None = None
) -> None:
    """Check splits that have files of their own; `names` are those of the rows (`row 17` by default).

    Raises:
        ConfigError: rows of equal content are in two splits; the text starts with `key` and names examples.
    """
    where: dict[bytes, tuple[Split, int]] = {}
    for split, rows in digests.items():
        own = {digest: row for row, digest in reversed(list(enumerate(rows)))}
        shared = [(digest, row) for digest, row in own.items() if digest in where]
        if shared:
            shown = [
                f"{_named(split, row, names)} = {_named(*where[digest], names)}" for digest, row in shared[-SHOWN:]
            ]
            raise ConfigError(
                f"{key}: {len(shared)} rows of {split} are also in another split, which would make its results too "
                f"good: {', '.join(reversed(shown))}. Remove them from one of the two"
            )
        where |= {digest: (split, row) for digest, row in own.items()}


def _named(split: Split, row: int, names: Mapping[Split, Sequence[str]] | None) -> str:
    return f"{split} {f'row {row}' if names is None else names[split][row]}"
