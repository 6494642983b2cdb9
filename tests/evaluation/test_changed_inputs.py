"""A variant whose passes changed what it takes is judged, timed and calibrated on rows prepared for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from animals import save
from leanserve.artifacts.manifest import Recipe
from leanserve.artifacts.store import ArtifactStore, checksums
from leanserve.bases.datasets.refitted import RefittedRows
from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.contracts import Array, ArrayData, ModelSpec, Split, TensorSpec
from leanserve.errors import PassFailed
from leanserve.evaluation.quality import measure
from leanserve.evaluation.speed import Stopwatch
from leanserve.hardware import this_hardware

SMALL = (3, 4, 4)
BRIGHT = {"size": [12, 12], "mean": [0, 0, 0], "std": [1, 1, 1]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    """The most of each colour anywhere in an image of any size: it differs between the sizes of an image."""
    folder = tmp_path_factory.mktemp("base")
    tensor = helper.make_tensor_value_info
    inputs = [tensor("image", 1, ["rows", 3, "height", "width"])]
    node = helper.make_node("ReduceMax", ["image"], ["most"], axes=[2, 3], keepdims=0)
    graph = helper.make_graph([node], "most", inputs, [tensor("most", 1, ["rows", 3])])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "model.onnx")
    for number in range(24):
        save(folder / "photos", f"{number}.png", number)
    declared = {"images": "photos", "splits": {"gate": 8, "calibration": 8}}
    section = {"onnx": "model.onnx", "image": BRIGHT, "outputs": {"most": "values"}}
    return open_base(Origin.model_validate({"base": section, "data": declared, "folder": folder}))


def shrunk(base: LoadedBase) -> ModelSpec:
    return replace(base.spec, inputs=(replace(base.spec.inputs[0], shape=SMALL),))


def published(store: ArtifactStore, base: LoadedBase, spec: ModelSpec, key: str) -> Recipe:
    with store.workspace(key) as folder:
        folder.joinpath("model.onnx").write_bytes(
            (Path(Origin.model_validate_json(base.origin).folder) / "model.onnx").read_bytes()
        )
        recipe = Recipe(
            key=key, parents=(), base="most", kind=None, options={}, decisions={}, facts={}, simulated=False,
            format="onnx", spec=spec, files=checksums(folder), parameters=0, macs=0, seconds=0.0, versions={},
            hardware=this_hardware(),
        )  # fmt: skip
        store.publish(folder, recipe)
    return recipe


def gate_images(base: LoadedBase, spec: ModelSpec) -> Array:
    return np.concatenate([batch.inputs[0] for batch in base.data("gate", spec=spec).batches(3)])


def test_rows_from_files_are_decoded_for_the_changed_spec(base: LoadedBase) -> None:
    whole, small = gate_images(base, base.spec), gate_images(base, shrunk(base))
    assert (whole.shape, small.shape) == ((8, 3, 12, 12), (8, *SMALL))
    folder = Origin.model_validate_json(base.origin).folder
    codec = base.codec_for(shrunk(base))
    requests = [codec.decode("image/png", path.read_bytes()).inputs[0][0] for path in (folder / "photos").iterdir()]
    assert all(any(np.array_equal(row, request) for request in requests) for row in small)


def test_answers_and_times_are_those_of_its_own_rows(tmp_path: Path, base: LoadedBase) -> None:
    store = ArtifactStore(tmp_path / "store")
    spec, hardware = shrunk(base), this_hardware(1)
    root, changed = published(store, base, base.spec, "a" * 64), published(store, base, spec, "b" * 64)
    whole, reference = measure(store, base, root, None, hardware)
    store.attach(root.key, whole)
    poor, answers = measure(store, base, changed, reference, hardware)
    assert np.array_equal(answers.outputs[0], gate_images(base, spec).max(axis=(2, 3)))
    assert poor.fidelity.agreement < 1.0
    store.attach(changed.key, poor)
    [timed] = Stopwatch(store, base, hardware).beside_anchor(root.key, [changed.key])
    assert set(timed.ratios) == {1, 8, 32}


class Given:
    """A base's own rows, which come as arrays."""

    digest = "own"
    unit = 1

    def __init__(self, *inputs: Array) -> None:
        self._data = ArrayData(inputs, np.arange(len(inputs[0])))

    def split(self, split: Split, n: int | None) -> ArrayData:
        return self._data


def test_own_rows_of_images_are_resized() -> None:
    images = np.random.default_rng(0).random((3, 2, 8, 8)).astype(np.float32)
    spec = ModelSpec((TensorSpec("image", "float32", (2, 4, 6)),), ())
    [batch] = RefittedRows(Given(images), spec).split("gate", None).batches(8)
    wanted = Image.fromarray(images[1, 1], "F").resize((6, 4), Image.Resampling.BILINEAR)
    assert batch.inputs[0].shape == (3, 2, 4, 6)
    assert np.array_equal(batch.inputs[0][1, 1], np.asarray(wanted))
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1, 2]


def test_own_rows_of_tokens_are_cut_and_keep_their_end_mark() -> None:
    ids = np.array([[1, 5, 6, 7, 9], [1, 5, 9, 0, 0], [1, 5, 6, 9, 0]])
    spec = ModelSpec((TensorSpec("input_ids", "int64", (None,)), TensorSpec("attention_mask", "int64", (None,))), ())
    rows = RefittedRows(Given(ids, (ids > 0).astype(np.int64)), replace(spec, max_length=3))
    [batch] = rows.split("gate", None).batches(8)
    assert batch.inputs[0].tolist() == [[1, 5, 9]] * 3
    assert batch.inputs[1].tolist() == [[1, 1, 1]] * 3


def test_own_rows_that_cannot_be_fitted_are_refused() -> None:
    rows = RefittedRows(Given(np.zeros((3, 5), np.float32)), ModelSpec((TensorSpec("x", "float32", (4,)),), ()))
    with pytest.raises(PassFailed, match=r"'x' was changed to \[4\], and the base's own rows \[5\] are neither"):
        list(rows.split("gate", None).batches(8))
