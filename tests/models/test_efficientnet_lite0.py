"""The base `efficientnet_lite0`: the network of the paper with its real weights, its rows, and its int8 variant."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.bases.sources.timm_model import imported_timm
from leanserve.config.schema import read_config
from leanserve.contracts import Base, Model, Share
from leanserve.evaluation.measure import outputs_on
from leanserve.runtime.formats import open_backend
from leanserve_models import choose_pieces
from leanserve_models import efficientnet_lite0 as lite0
from leanserve_models.efficientnet import EfficientNetLite0
from tiny_base import context_of

SPLITS: tuple[lite0.Split, ...] = ("train", "calibration", "gate", "test")
CONFIG = Path(__file__).parents[2] / "models" / "efficientnet_lite0.yaml"


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return lite0.build()


@pytest.fixture(scope="module")
def base() -> Base:
    return open_base(Origin.shipped("efficientnet_lite0"))


def logits(network: torch.nn.Module, images: lite0.Array) -> lite0.Array:
    with torch.inference_mode():
        return np.asarray(network(torch.from_numpy(images)).numpy())


def rows(split: lite0.Split, n: int) -> lite0.Array:
    return next(lite0.data(split, n).batches(n)).inputs[0]


def test_the_network_is_the_one_of_timm(network: EfficientNetLite0) -> None:
    """An implementation by others, given the same weights, gives the same answers."""
    theirs = imported_timm().create_model("tf_efficientnet_lite0").eval()
    ours = network.state_dict()
    shapes = [tensor.shape for tensor in ours.values()]
    assert [tensor.shape for tensor in theirs.state_dict().values()] == shapes
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.values(), strict=True)))
    images = rows("gate", 4)
    np.testing.assert_allclose(logits(network, images), logits(theirs, images), atol=1e-4)


def test_the_network_has_the_documented_size(network: EfficientNetLite0) -> None:
    assert sum(weight.numel() for weight in network.parameters()) == 4_652_008
    assert not network.training
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}


def test_it_knows_what_is_in_the_bundled_photos(base: Base, network: EfficientNetLite0) -> None:
    from sklearn.datasets import load_sample_images

    for photo, label in zip(load_sample_images().images, ("palace", "daisy"), strict=True):  # type: ignore[no-untyped-call]
        stream = BytesIO()
        Image.fromarray(photo).save(stream, "JPEG", quality=95)
        inputs = base.codec.decode("image/jpeg", stream.getvalue()).inputs
        answer = base.codec.encode((logits(network, inputs[0]),))[0]
        assert answer["label"] == label
        assert len(answer["scores"]) == 5
        assert 0.25 < answer["scores"][label] < 0.5


def test_a_row_is_answered_alike_alone_and_in_company(network: EfficientNetLite0) -> None:
    images = rows("gate", 5)
    alone = np.concatenate([logits(network, images[row : row + 1]) for row in range(5)])
    np.testing.assert_allclose(alone, logits(network, images), atol=1e-4)


def test_labels_are_those_of_imagenet_in_the_usual_order() -> None:
    assert len(set(lite0.LABELS)) == 1000
    places = {
        "tench": 0,
        "goldfish": 1,
        "crane (bird)": 134,
        "crane (machine)": 517,
        "maillot": 638,
        "toilet tissue": 999,
    }
    assert {label: lite0.LABELS.index(label) for label in places} == places
    imagenet = __import__("timm.data", fromlist=["ImageNetInfo"]).ImageNetInfo()
    names = [imagenet.index_to_description(index).partition(",")[0] for index in range(1000)]
    different = {ours for ours, theirs in zip(lite0.LABELS, names, strict=True) if ours != theirs}
    assert different == {"crane (bird)", "crane (machine)", "maillot (tank suit)"}


def test_rows_are_prepared_as_requests_are(base: Base) -> None:
    images = rows("calibration", 4)
    assert images.dtype == lite0.INPUTS[0]["dtype"]
    for index, row in enumerate(images):
        stream = BytesIO()
        lite0.image("calibration", index).save(stream, "PNG")
        np.testing.assert_array_equal(base.codec.decode("image/png", stream.getvalue()).inputs[0][0], row)


def test_splits_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photos whose pixels tell their own number and column show where the pieces come from."""
    columns = np.broadcast_to(np.arange(640), (427, 640))
    photos = [np.stack([columns % 256, columns // 256, np.full_like(columns, number)], axis=2) for number in (0, 1)]
    drawn = tuple(Image.fromarray(photo.astype(np.uint8)) for photo in photos)
    monkeypatch.setattr(lite0, "_photos", lambda: drawn)
    seen = {}
    for split in SPLITS:
        pieces = [np.asarray(lite0.image(split, row)).astype(int) for row in range(64)]
        seen[split] = {
            (piece[0, x, 2], piece[0, x, 0] + 256 * piece[0, x, 1]) for piece in pieces for x in range(piece.shape[1])
        }
    assert all(seen[one].isdisjoint(seen[other]) for one, other in combinations(SPLITS, 2))
    assert {number for number, _ in seen["calibration"]} == {0, 1}


def test_a_split_is_the_same_in_every_order_and_length() -> None:
    data = lite0.data("gate", 6)
    assert (len(data), len(lite0.data("gate")), len(lite0.data("test", 999))) == (6, 256, 64)
    stored = np.concatenate([batch.inputs[0] for batch in data.batches(4)])
    assert stored.shape == (6, 3, 224, 224)
    np.testing.assert_array_equal(rows("gate", 3), stored[:3])
    (shuffled,) = (batch.inputs[0] for batch in data.batches(6, shuffle_seed=3))
    assert not np.array_equal(shuffled, stored)
    assert {row.tobytes() for row in shuffled} == {row.tobytes() for row in stored}


def test_gate_rows_are_those_on_which_the_base_is_sure(network: EfficientNetLite0) -> None:
    chosen = lite0._chosen()
    assert {split: len(numbers) for split, numbers in chosen.items()} == {"gate": 256, "test": 64}
    assert choose_pieces.chosen(network, "gate", 12) == chosen["gate"][:12]


def test_opening_it_imports_no_heavy_library() -> None:
    program = (
        "import sys; from leanserve.bases.opening import *; base = open_base(Origin.shipped('efficientnet_lite0'));"
        "base.digest; print(*{'torch', 'sklearn', 'timm', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.soak
def test_the_int8_variant_answers_like_the_base(base: Base, network: EfficientNetLite0, tmp_path: Path) -> None:
    """As its config builds it, calibrated on fewer rows."""
    variant = next(variant for variant in read_config(CONFIG).variants if variant.name == "int8")
    context = context_of(base, tmp_path)
    model: Model = base.model()
    for pass_ in variant.passes:
        quick = pass_.model_copy(update={"samples": 16} if pass_.kind == "quantize_static" else {})
        model = quick.apply(model, context).model
    backend = open_backend(model, Share(1))
    (found,) = outputs_on(backend, base.data("gate", 24))
    backend.close()
    wanted = logits(network, rows("gate", 24))
    assert np.mean(found.argmax(axis=1) == wanted.argmax(axis=1)) >= 0.95
    cosine = np.sum(found * wanted, axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert 0.98 < cosine.mean() < 0.99999  # 8 bits, and not float32 by mistake
