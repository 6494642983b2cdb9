"""Arrays in `.npz` files as the rows of a base."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from animals import NAMELESS, PAIRS, codec, everything, picture, rows
from PIL import Image

from service.errors import ConfigError


def test_pixels_in_an_array_become_what_their_png_becomes(tmp_path: Path) -> None:
    pictures = np.stack([picture(seed) for seed in range(20)])
    names = np.array(["cat", "dog", "polar bear", "Polar_Bear"] * 5)
    np.savez_compressed(tmp_path / "a.npz", images=pictures, species=names)
    found = rows({"arrays": "a.npz", "inputs": "images", "labels": "species"}, tmp_path)
    inputs, labels = everything(found.split("gate", None))
    expected = {}
    for pixels, name in zip(pictures, names, strict=True):
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        key = codec().decode("image/png", buffer.getvalue()).inputs[0].tobytes()
        expected[key] = {"cat": 0, "dog": 1}.get(name, 2)
    assert labels is not None
    assert [expected[row.tobytes()] for row in inputs] == labels.tolist()


@pytest.mark.parametrize("shape", [(9, 5, 8), (9, 5, 8, 1), (9, 5, 8, 4)])
def test_grey_and_transparent_pixels_are_pictures_too(shape: tuple[int, ...], tmp_path: Path) -> None:
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
    "no such array": ({"pictures": IMAGES}, {}, r"data.inputs: there is no array 'image' in .*; it has pictures"),
    "no such labels": ({"image": IMAGES}, {"labels": "y"}, r"data.labels: there is no array 'y'"),
    "shape": ({"image": IMAGES[:, :, :3]}, {}, r"is float32 \[9, 3, 3, 6\]; .*takes float32 \[rows, 3, 4, 6\]"),
    "dtype": ({"image": IMAGES.astype(np.float64)}, {}, r"is float64 .*or pictures uint8"),
    "lengths": ({"image": IMAGES, "y": np.zeros(8, int)}, {"labels": "y"}, r"differ in length: .*'image': 9, 'y': 8"),
    "objects": ({"image": IMAGES, "y": np.array([{}] * 9)}, {}, r"'y' .*holds pickled Python objects"),
    "unknown input": ({"image": IMAGES}, {"inputs": {"picture": "image"}}, r"the model has no input 'picture'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_arrays_that_do_not_fit_are_refused_at_once(case: str, tmp_path: Path) -> None:
    arrays, declared, reason = MISFITS[case]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ConfigError, match=reason):
        rows({"arrays": "a.npz"} | declared, tmp_path)


def test_labels_that_the_model_does_not_know(tmp_path: Path) -> None:
    images = IMAGES + np.arange(9, dtype=np.float32)[:, None, None, None]
    number, name, share = np.full(9, 3), np.array(["catt"] * 9), np.zeros(9)
    np.savez(tmp_path / "a.npz", image=images, number=number, name=name, share=share)
    reasons = {
        "number": "row 0 has class 3",
        "name": "'catt' is no label .*mean 'cat'",
        "share": "float64 .9.; labels are",
    }
    for array, reason in reasons.items():
        with pytest.raises(ConfigError, match=rf"data.labels: the array '{array}' .*{reason}"):
            rows({"arrays": "a.npz", "labels": array}, tmp_path).split("gate", None)
    with pytest.raises(ConfigError, match=r"data.labels: .* name them in base.labels"):
        rows({"arrays": "a.npz", "labels": "number"}, tmp_path, NAMELESS)


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
