"""Pictures in folders as the rows of a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from animals import NAMELESS, PAIRS, codec, everything, rows, save

from service.api.codecs.image import ImageCodec
from service.contracts import Decoded
from service.errors import ConfigError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty pictures in folders of three classes, each class named in another way."""
    for number in range(30):
        save(
            tmp_path, f"photos/{('cat', 'Dog', 'polar_bear')[number % 3]}/{number}.{('png', 'jpg')[number % 2]}", number
        )
    save(tmp_path, "photos/cat/.hidden.png", 99)
    (tmp_path / "photos/cat/notes.txt").write_text("no picture")
    return tmp_path


def test_pictures_become_what_a_request_with_the_same_bytes_becomes(photos: Path) -> None:
    found = rows({"images": "photos"}, photos)
    inputs, labels = everything(found.split("gate", None))
    assert labels is not None
    known = {}
    for path in photos.glob("photos/*/[0-9]*"):
        kind = "image/png" if path.suffix == ".png" else "image/jpeg"
        known[codec().decode(kind, path.read_bytes()).inputs[0].tobytes()] = int(path.stem) % 3
    assert [known[row.tobytes()] for row in inputs] == labels.tolist()
    assert {len(found.split(split, None)) for split in ("calibration", "train")} == {4, 7}
    assert len(labels) == 19
    assert found.unit == 1


def test_splits_hold_random_prefixes_and_share_nothing(photos: Path) -> None:
    found = rows({"images": "photos", "splits": {"calibration": 9, "gate": 12}}, photos)
    seen = [
        row.tobytes() for split in ("calibration", "gate", "train") for row in everything(found.split(split, None))[0]
    ]
    assert len(seen) == len(set(seen)) == 30
    whole = everything(found.split("gate", None))
    first = everything(found.split("gate", 6))
    np.testing.assert_array_equal(first[0], whole[0][:6])
    assert first[1] is not None
    assert len(set(first[1].tolist())) > 1, "files are sorted by class; a split must not be"


def test_shuffled_batches_are_the_same_rows_with_their_labels(photos: Path) -> None:
    data = rows({"images": "photos"}, photos).split("gate", None)
    (stored, stored_labels), (shuffled, labels) = everything(data), everything(data, shuffle_seed=1)
    assert stored_labels is not None
    assert labels is not None
    label_of = {row.tobytes(): label for row, label in zip(stored, stored_labels, strict=True)}
    assert [label_of.pop(row.tobytes()) for row in shuffled] == labels.tolist()
    assert not np.array_equal(stored, shuffled)


def test_the_digest_follows_content_names_splits_and_seed_not_the_place(photos: Path) -> None:
    def digest(**more: Any) -> str:
        return rows({"images": "photos"} | more, photos).digest

    first = digest()
    digests = [first, digest(seed=1), digest(splits={"gate": 5}), digest(label="none")]
    (photos / "photos/cat/0.png").rename(photos / "photos/Dog/0.png")
    digests.append(digest())
    (photos / "photos/Dog/0.png").rename(photos / "photos/cat/0.png")
    assert digest() == first
    save(photos, "photos/cat/0.png", 100)
    digests.append(digest())
    assert len(set(digests)) == len(digests)
    save(photos, "photos/cat/0.png", 0)
    (photos / "photos").rename(photos / "moved")
    assert rows({"images": "moved"}, photos).digest == first


def test_a_flat_folder_has_classes_only_by_prefix(tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path, f"{number % 3:04d}_{number}.jpg", number)
    assert everything(rows({"images": "."}, tmp_path).split("gate", None))[1] is None
    labels = everything(rows({"images": ".", "label": "prefix"}, tmp_path).split("gate", None))[1]
    assert labels is not None
    assert set(labels.tolist()) <= {0, 1, 2}
    save(tmp_path, "0003_x.jpg", 50)
    with pytest.raises(ConfigError, match=r"data.label: row 12 has class 3, the model has 0 to 2"):
        rows({"images": ".", "label": "prefix"}, tmp_path)
    save(tmp_path, "cat.jpg", 51)
    with pytest.raises(ConfigError, match=r"cat.jpg begins with no class number"):
        rows({"images": ".", "label": "prefix"}, tmp_path)


def test_folders_that_are_no_classes(photos: Path) -> None:
    save(photos, "photos/polar-baer/a.png", 70)
    with pytest.raises(ConfigError, match=r"`none` ignores them\): 'polar-baer' is no label .*mean 'polar bear'\?"):
        rows({"images": "photos"}, photos)
    assert everything(rows({"images": "photos", "label": "none"}, photos).split("gate", None))[1] is None
    assert everything(rows({"images": "photos"}, photos, NAMELESS).split("gate", None))[1] is None
    with pytest.raises(ConfigError, match=r"data.label: .* name them in base.labels"):
        rows({"images": "photos", "label": "folder"}, photos, NAMELESS)
    save(photos, "photos/loose.png", 71)
    with pytest.raises(ConfigError, match=r"loose.png lies in no folder of a class"):
        rows({"images": "photos"}, photos)


def test_broken_and_missing_pictures_are_named(photos: Path) -> None:
    path = photos / "photos/cat/0.png"
    for content, reason in ((path.read_bytes()[:60], "cannot be"), (b"text", "neither a JPEG nor a PNG")):
        path.write_bytes(content)
        found = rows({"images": "photos"}, photos)
        with pytest.raises(ConfigError, match=rf"data.images: .*cat/0.png cannot be used: .*{reason}"):
            [everything(found.split(split, None)) for split in ("calibration", "gate", "train")]
    with pytest.raises(ConfigError, match=r"data.images: there is no folder .*nowhere"):
        rows({"images": "nowhere"}, photos)
    (photos / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data.images.gate: there is no .jpeg, .jpg, .png file"):
        rows({"images": {"gate": "empty"}}, photos)


def test_a_folder_per_split(photos: Path) -> None:
    for number in range(40, 44):
        save(photos, f"val/cat/{number}.png", number)
    found = rows({"images": {"train": "photos", "gate": "val"}, "splits": {"calibration": 12}}, photos)
    assert [len(found.split(split, None)) for split in ("train", "calibration", "gate", "test")] == [18, 12, 4, 0]
    taken = {row.tobytes() for split in ("train", "calibration") for row in everything(found.split(split, None))[0]}
    assert len(taken) == 30, "calibration is taken out of train"
    only = rows({"images": {"gate": "val"}}, photos)
    assert len(only.split("train", None)) == 0
    with pytest.raises(ConfigError, match=r"data.images: there are no files for the split 'calibration'"):
        only.split("calibration", None)
    with pytest.raises(ConfigError, match=r"no files for the split 'gate'"):
        rows({"images": {"train": "photos"}}, photos).split("train", None)
    save(photos, "val/cat/copy.png", 0)
    with pytest.raises(ConfigError, match=r"data.images: 1 rows of gate .*gate cat/copy.png = train cat/0.png"):
        rows({"images": {"train": "photos", "gate": "val"}}, photos).split("gate", None)


def test_rows_are_prepared_when_a_batch_is_drawn_and_not_before(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    original = ImageCodec.decode

    def decode(self: ImageCodec, media_type: str, body: bytes) -> Decoded:
        decoded.append(media_type)
        return original(self, media_type, body)

    monkeypatch.setattr(ImageCodec, "decode", decode)
    found = rows({"images": "photos"}, photos)
    assert found.digest
    batches = found.split("gate", None).batches(2)
    assert decoded == []
    next(batches)
    assert len(decoded) == 2


def test_pictures_for_a_model_that_takes_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.images: the model takes no pictures"):
        rows({"images": "."}, tmp_path, PAIRS)
