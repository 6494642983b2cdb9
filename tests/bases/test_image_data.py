"""Images in folders as the rows of a base."""

from __future__ import annotations

import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from animals import ANIMALS, IMAGE, NAMELESS, PAIRS, codec, everything, image, rows, save
from leanserve.codecs.images import ImageCodec
from leanserve.config.base_section import ImageInput
from leanserve.contracts import Decoded
from leanserve.errors import ConfigError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty images in folders of three classes, each class named in another way."""
    for number in range(30):
        save(
            tmp_path, f"photos/{('cat', 'Dog', 'polar_bear')[number % 3]}/{number}.{('png', 'jpg')[number % 2]}", number
        )
    save(tmp_path, "photos/cat/.hidden.png", 99)
    (tmp_path / "photos/cat/notes.txt").write_text("no image")
    return tmp_path


def test_images_become_what_a_request_with_the_same_bytes_becomes(photos: Path) -> None:
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
    with pytest.raises(ConfigError, match=r"data.label: .*0003_x.jpg: '0003' is no label .* numbers from 0 to 2"):
        rows({"images": ".", "label": "prefix"}, tmp_path)
    save(tmp_path, "cat.jpg", 51)
    with pytest.raises(ConfigError, match=r"cat.jpg begins with no class number"):
        rows({"images": ".", "label": "prefix"}, tmp_path)


def test_folders_and_prefixes_that_are_numbers(tmp_path: Path) -> None:
    names = ("zero", "one", "two")
    for number in range(24):
        save(tmp_path, f"photos/{number % 3}/{number}.png", number)
        save(tmp_path, f"flat/{number % 3 + 1:02d}_{number}.png", number)
    for declared, labels in (
        ({"images": "photos"}, names),
        ({"images": "photos"}, ("1", "2", "3")),
        ({"images": "photos"}, ("0", "1", "2")),
        ({"images": "flat", "label": "prefix"}, ("1", "2", "3")),
    ):
        found = rows(declared, tmp_path, ANIMALS.model_copy(update={"labels": labels}))
        inputs, classes = everything(found.split("gate", None))
        assert classes is not None
        known = {}
        for path in (tmp_path / "photos").glob("*/*"):
            known[codec().decode("image/png", path.read_bytes()).inputs[0].tobytes()] = int(path.stem) % 3
        assert [known[row.tobytes()] for row in inputs] == classes.tolist()
    with pytest.raises(ConfigError, match=r"/03_\d+.png: '03' is no label .* count from 1: subtract 1.*'01' -> 'one'"):
        rows({"images": "flat", "label": "prefix"}, tmp_path, ANIMALS.model_copy(update={"labels": names}))


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


def test_a_missing_folder_and_one_without_images_are_named(photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.images: there is no folder .*nowhere"):
        rows({"images": "nowhere"}, photos)
    (photos / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data.images.gate: there is no image in .*empty. Read are .avif, .*.webp$"):
        rows({"images": {"gate": "empty"}}, photos)
    (photos / "empty" / "a.heic").write_bytes(b"....ftypheic")
    with pytest.raises(ConfigError, match=r"no image in .*empty; other files are skipped: 1 .heic"):
        rows({"images": "empty"}, photos)


def test_files_that_are_no_images_are_named_before_anything_is_decoded(photos: Path) -> None:
    for number, content in enumerate((b"", b"text", b"<html>", b"\0\0\0\x20ftypheic", b"%PDF", b"PK", b"\0")):
        (photos / f"photos/cat/{number * 3}.png").write_bytes(content)
    listed = r"/0.png: it is empty; .*/12.png: .* like no image; .*/15.png: .*; .*/18.png: [^;]* and 3 more"
    with pytest.raises(
        ConfigError, match=rf"data.images: image files cannot be used: .*{listed}. Repair or remove them"
    ):
        rows({"images": "photos"}, photos)


def test_damaged_images_are_named_together_whatever_split_they_are_in(photos: Path) -> None:
    names = [f"photos/cat/{number}.{('png', 'jpg')[number % 2]}" for number in (0, 3, 6, 9, 12)]
    for name in names:
        path = photos / name
        path.write_bytes(path.read_bytes()[: 60 if name.endswith("png") else -20])
    found = rows({"images": "photos"}, photos)
    for split in ("calibration", "gate", "train"):
        try:
            everything(found.split(split, None))
        except ConfigError as error:
            text = str(error)
    assert text.startswith("data.images: image files cannot be used: ")
    assert text.endswith(" and 1 more. Repair or remove them")
    assert sum(name in text for name in names) == 4
    assert text.count("(9 x 7) cannot be decoded: image file is truncated") == 4


@pytest.mark.parametrize("form", ["WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_a_class_of_any_format_that_is_read_is_there(photos: Path, form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    folder = photos / "photos/polar_bear"
    shutil.rmtree(folder)
    folder.mkdir()
    known = {}
    for number in range(8):
        path = folder / f"{number}.{form.lower()}"
        Image.fromarray(image(200 + number)).save(path, form)
        known[codec().decode(f"image/{form.lower()}", path.read_bytes()).inputs[0].tobytes()] = 2
    found = rows({"images": "photos", "splits": {"calibration": 1, "gate": 26}}, photos)
    inputs, labels = everything(found.split("gate", None))
    assert labels is not None
    mine = [label for row, label in zip(inputs, labels.tolist(), strict=True) if row.tobytes() in known]
    assert len(mine) >= 6
    assert set(mine) == {2}


def test_a_class_whose_files_are_all_skipped_is_an_error_that_names_it(photos: Path) -> None:
    for path in (photos / "photos/polar_bear").iterdir():
        path.rename(path.with_suffix(".heic"))
    said = r"data.images: folders of classes have no image that is read: .*photos/polar_bear \(10 .heic\). Convert"
    with pytest.raises(ConfigError, match=said):
        rows({"images": "photos"}, photos)
    assert everything(rows({"images": "photos", "label": "none"}, photos).split("gate", None))[1] is None


def test_what_is_skipped_is_told_on_one_line(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (photos / "photos/Dog/Thumbs.db").write_bytes(b"x")
    (photos / "photos/LICENSE").write_text("free")
    rows({"images": "photos"}, photos)
    assert caplog.messages == [
        "data.images: 30 images in 3 folders (Dog, cat, polar_bear): 15 .jpg, 15 .png; "
        "3 other files are skipped: 1 .db, 1 .txt, 1 without an ending"
    ]
    caplog.clear()
    (photos / "photos/cat/notes.txt").unlink()
    (photos / "photos/Dog/Thumbs.db").unlink()
    (photos / "photos/LICENSE").unlink()
    rows({"images": "photos"}, photos)
    assert caplog.messages == [], "nothing is skipped, nothing is said"


def test_an_empty_folder_of_a_class_is_told(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(photos / "photos/polar_bear")
    (photos / "photos/polar_bear").mkdir()
    (photos / "photos/cache").mkdir()
    rows({"images": "photos", "splits": {"calibration": 2, "gate": 4}}, photos)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert warned[0].startswith("data.images: the folder of the class 'polar_bear' is empty: ")


def test_formats_that_are_switched_off_are_skipped_in_data_as_in_requests(photos: Path) -> None:
    jpeg = ANIMALS.model_copy(update={"image": ImageInput(**IMAGE, formats=("jpeg",))})
    found = rows({"images": "photos", "label": "none"}, photos, jpeg)
    assert sum(len(found.split(split, None)) for split in ("calibration", "gate", "train")) == 15
    (photos / "photos/Dog/1.jpg").unlink()
    for path in (photos / "photos/Dog").glob("*.jpg"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"photos/Dog \(5 .png\). Convert .* read are .jfif, .jpe, .jpeg, .jpg$"):
        rows({"images": "photos"}, photos, jpeg)


def test_orientation_is_applied_in_data_as_in_requests(photos: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(30):
        Image.fromarray(image(number)).save(photos / f"photos/cat/{number}.webp", exif=exif, lossless=True)
    for orientation, turn in (("stored", 0), ("exif", -90)):
        turned = ANIMALS.model_copy(update={"image": ImageInput(**IMAGE, orientation=orientation)})
        found = rows({"images": "photos", "splits": {"calibration": 1, "gate": 59}}, photos, turned)
        inputs = {row.tobytes() for row in everything(found.split("gate", None))[0]}
        wanted = set()
        for number in range(30):
            stream = BytesIO()
            Image.fromarray(image(number)).rotate(turn, expand=True).save(stream, "PNG")
            wanted.add(codec().decode("image/png", stream.getvalue()).inputs[0].tobytes())
        assert len(inputs & wanted) >= 29


def test_a_row_keeps_its_split_whatever_else_lies_around(photos: Path) -> None:
    """Its content and the seed decide: neither its name and ending, nor files that are skipped."""
    splits = {"calibration": 6, "gate": 10}

    def dealt() -> dict[bytes, str]:
        found = rows({"images": "photos", "splits": splits}, photos)
        return {
            row.tobytes(): split
            for split in ("calibration", "gate", "train")
            for row in everything(found.split(split, None))[0]
        }

    before = dealt()
    for path in sorted((photos / "photos/cat").glob("[0-9]*")):
        path.rename(path.with_suffix("" if path.stem in "0369" else ".webp"))
    (photos / "photos/cat/more.txt").write_text("skipped")
    assert dealt() == before


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


def test_images_for_a_model_that_takes_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.images: the model takes no images"):
        rows({"images": "."}, tmp_path, PAIRS)
