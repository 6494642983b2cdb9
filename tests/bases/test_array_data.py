"""Arrays in `.npz` files as the rows of a base."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from animals import NAMELESS, PAIRS, codec, everything, image, rows
from leanserve.bases.description import Tensor
from leanserve.errors import ConfigError


def test_pixels_in_an_array_become_what_their_png_becomes(tmp_path: Path) -> None:
    images = np.stack([image(seed) for seed in range(20)])
    names = np.array(["cat", "dog", "polar bear", "Polar_Bear"] * 5)
    np.savez_compressed(tmp_path / "a.npz", images=images, species=names)
    found = rows({"arrays": "a.npz", "inputs": "images", "labels": "species"}, tmp_path)
    inputs, labels = everything(found.split("gate", None))
    expected = {}
    for pixels, name in zip(images, names, strict=True):
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        key = codec().decode("image/png", buffer.getvalue()).inputs[0].tobytes()
        expected[key] = {"cat": 0, "dog": 1}.get(name, 2)
    assert labels is not None
    assert [expected[row.tobytes()] for row in inputs] == labels.tolist()


@pytest.mark.parametrize("shape", [(9, 5, 8), (9, 5, 8, 1), (9, 5, 8, 4)])
def test_grey_and_transparent_pixels_are_images_too(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    inputs, labels = everything(rows({"arrays": "a.npz"}, tmp_path).split("gate", None))
    assert inputs.shape[1:] == (3, 4, 6)
    assert labels is None


def test_inputs_that_fit_are_taken_as_they_are(tmp_path: Path) -> None:
    left, right = np.arange(40, dtype=np.float32).reshape(20, 2), np.arange(100, dtype=np.int32).reshape(20, 5)
    np.savez(tmp_path / "a.npz", left=left, ids=right, y=np.arange(20, dtype=np.uint8) % 2)
    found = rows({"arrays": "a.npz", "inputs": {"right": "ids"}, "labels": "y"}, tmp_path, PAIRS)
    for batch in found.split("gate", None).batches(4):
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.inputs[1][:, 0], batch.inputs[0][:, 0] / 2 * 5)
        np.testing.assert_array_equal(batch.labels, batch.inputs[0][:, 0] / 2 % 2)
        assert [part.dtype for part in (*batch.inputs, batch.labels)] == [np.float32, np.int64, np.int64]


IMAGES = np.zeros((9, 3, 4, 6), np.float32)
MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no such array": ({"images": IMAGES}, {}, r"data.inputs: there is no array 'image' in .*; it has images"),
    "no such labels": ({"image": IMAGES}, {"labels": "y"}, r"data.labels: there is no array 'y'"),
    "shape": ({"image": IMAGES[:, :, :3]}, {}, r"is float32 \[9, 3, 3, 6\]; .*takes float32 \[rows, 3, 4, 6\]"),
    "dtype": ({"image": IMAGES.astype(np.float64)}, {}, r"is float64 .*or images uint8"),
    "lengths": ({"image": IMAGES, "y": np.zeros(8, int)}, {"labels": "y"}, r"differ in length: .*'image': 9, 'y': 8"),
    "objects": ({"image": IMAGES, "y": np.array([{}] * 9)}, {}, r"'y' .*holds pickled Python objects"),
    "unknown input": ({"image": IMAGES}, {"inputs": {"photo": "image"}}, r"the model has no input 'photo'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_arrays_that_do_not_fit_are_refused_at_once(case: str, tmp_path: Path) -> None:
    arrays, declared, reason = MISFITS[case]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ConfigError, match=reason):
        rows({"arrays": "a.npz"} | declared, tmp_path)


def test_labels_that_the_model_does_not_know(tmp_path: Path) -> None:
    images = IMAGES + np.arange(9, dtype=np.float32)[:, None, None, None]
    number, name, share = np.full(9, 3), np.array(["catt"] * 9), np.full(9, 0.5)
    np.savez(tmp_path / "a.npz", image=images, number=number, name=name, share=share)
    reasons = {
        "number": "row 0: 3 is no label .* numbers from 0 to 2",
        "name": "'catt' is no label .*mean 'cat'",
        "share": "row 0: 0.5 is no label .* a whole number or a name",
    }
    for array, reason in reasons.items():
        with pytest.raises(ConfigError, match=rf"data.labels: the array '{array}' .*{reason}"):
            rows({"arrays": "a.npz", "labels": array}, tmp_path).split("gate", None)
    with pytest.raises(ConfigError, match=r"data.labels: .* neither classes with names \(base.labels\)"):
        rows({"arrays": "a.npz", "labels": "number"}, tmp_path, NAMELESS)


def test_class_numbers_may_be_floats_truth_values_or_a_column(tmp_path: Path) -> None:
    left, right = np.arange(40, dtype=np.float32).reshape(20, 2), np.zeros((20, 5), np.int64)
    parity = np.arange(20) % 2
    arrays = {
        "floats": parity.astype(float),
        "truth": parity == 1,
        "column": parity[:, None],
        "bytes": parity.astype("S"),
    }
    np.savez(tmp_path / "a.npz", left=left, right=right, **arrays)
    for name in arrays:
        found = rows({"arrays": "a.npz", "labels": name}, tmp_path, PAIRS)
        for batch in found.split("gate", None).batches(4):
            assert batch.labels is not None
            np.testing.assert_array_equal(batch.labels, batch.inputs[0][:, 0] / 2 % 2, err_msg=name)
            assert batch.labels.dtype == np.int64


def test_files_of_different_splits_are_read_alike(tmp_path: Path) -> None:
    stars = PAIRS.model_copy(update={"labels": ("1", "2")})
    for split, numbers in (("gate", [1, 1, 1]), ("train", [0, 1, 0])):
        left = np.random.default_rng(len(split)).standard_normal((3, 2)).astype(np.float32)
        np.savez(tmp_path / f"{split}.npz", left=left, right=np.zeros((3, 5), np.int64), y=numbers)
    found = rows({"arrays": {"gate": "gate.npz", "train": "train.npz"}, "labels": "y"}, tmp_path, stars)
    labels = next(found.split("gate", None).batches(9)).labels
    assert labels is not None
    assert labels.tolist() == [1, 1, 1], "numbers from 0, as those of train; alone they would be the name of the first"


PRICES = PAIRS.model_copy(
    update={
        "labels": (),
        "outputs": (
            Tensor(name="price", dtype="float32", shape=(1,)),
            Tensor(name="boxes", dtype="float32", shape=(4,)),
            Tensor(name="other", dtype="float32", shape=(4,)),
        ),
    }
)


def test_labels_of_a_regression_are_numbers_to_be_hit(tmp_path: Path) -> None:
    left, right = np.arange(40, dtype=np.float32).reshape(20, 2), np.zeros((20, 5), np.int64)
    y = left[:, 0] * 1.5
    np.savez(
        tmp_path / "a.npz", left=left, right=right, y=y, whole=y.astype(int), box=np.zeros((20, 4)), name=y.astype(str)
    )
    for name in ("y", "whole"):
        found = rows({"arrays": "a.npz", "labels": name}, tmp_path, PRICES)
        batch = next(found.split("gate", None).batches(4))
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels, batch.inputs[0][:, 0] * 1.5)
        assert batch.labels.dtype == np.float64
    with pytest.raises(
        ConfigError, match=r"'box' of .* \[4\] per row fit several outputs of 'price' \[1\] \(values\), "
    ):
        rows({"arrays": "a.npz", "labels": "box"}, tmp_path, PRICES)
    with pytest.raises(
        ConfigError, match=r"'name' of .* is <U\d+ \[20\]; labels are numbers \(classes need base.labels"
    ):
        rows({"arrays": "a.npz", "labels": "name"}, tmp_path, PRICES)
    np.savez(tmp_path / "a.npz", left=left, right=right, y=np.where(y == 3, np.nan, y))
    with pytest.raises(ConfigError, match=r"the array 'y' of .*: row 1: the label is no finite number"):
        rows({"arrays": "a.npz", "labels": "y"}, tmp_path, PRICES).split("gate", None)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"no zip")
    for name in ("a.npz", "missing.npz"):
        with pytest.raises(ConfigError, match=rf"data.arrays: .*{name} is not a .npz file that can be read"):
            rows({"arrays": name}, tmp_path)
    np.savez(tmp_path / "a.npz", image=np.tile(IMAGES, (100, 1, 1, 1)))
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[100_000] ^= 1
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"the array 'image' of .* is damaged"):
        rows({"arrays": "a.npz"}, tmp_path).split("gate", None)
