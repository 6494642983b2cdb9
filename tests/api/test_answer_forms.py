"""Answers as clients want them, over HTTP: labels and boxes, npz, some outputs, the largest numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tritonclient import grpc as triton

from fakes import Live, PixelBase, live_server, planned, serving
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.images import ImageCodec
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Array, Arrays, ModelSpec, Result, TensorSpec
from leanserve.runtime.device import Device
from openapi import followed

SPEC = ModelSpec(
    (TensorSpec("image", "float32", (3, 64, 64)),),
    (TensorSpec("proposals", "float32", (3, 6)), TensorSpec("steps", "float32", (4, 5)), TensorSpec("n", "int64", ())),
)
STEPS = np.eye(5, dtype=np.float32)[[1, 1, 0, 2]]
STEPPED: dict[str, Any] = {
    "postprocess": [
        {"kind": "nms", "output": "proposals", "labels": ["cat", "dog"], "min_score": 0.3},
        {"kind": "softmax", "output": "steps"},
        {"kind": "ctc", "output": "probabilities", "characters": ["a", "b", "c", "d"]},
    ]
}


class Detector:
    """Finds a light rectangle; a second proposal overlaps it, a third has a low score."""

    name = "detector"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def run(self, batch: Arrays) -> Result:
        boxes = np.stack([_proposals(row) for row in batch[0]])
        rows = len(boxes)
        return Result((boxes, np.repeat(STEPS[None], rows, 0), np.arange(rows)))

    def close(self) -> None: ...


def _proposals(row: Array) -> Array:
    light = np.argwhere(row[0] > 0.5)
    (top, left), (bottom, right) = (light.min(0), light.max(0) + 1) if len(light) else ((0, 0), (1, 1))
    centre = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    return np.array([[*centre, 0.1, 0.9], [*centre, 0.1, 0.8], [9, 9, 2, 2, 0.2, 0.1]], np.float32)


class DetectorBase(PixelBase):
    name = "detector"
    spec = SPEC
    codec = ImageCodec("RGB", (64, 64), (0.0,) * 3, (1.0,) * 3, AnswerEncoder(SPEC), fit="letterbox")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    config = ServiceConfig.model_validate({"base": "detector", "variants": [{"name": "a"}], **STEPPED})
    opened = planned(config, DetectorBase(), Device("cpu", 1))
    opened.warm.open("a", lambda threads: Detector())
    gate = threading.Event()
    with serving(opened, gate) as server:
        yield server


def image(size: tuple[int, int], box: tuple[int, int, int, int]) -> bytes:
    made = Image.new("RGB", size)
    made.paste((255, 255, 255), box)
    stream = BytesIO()
    made.save(stream, "PNG")
    return stream.getvalue()


def post(live: Live, *images: bytes, query: str = "", **headers: str) -> httpx.Response:
    files = [("file", (f"{number}.png", content)) for number, content in enumerate(images)]
    return httpx.post(f"http://{live.http}/v1/predict{query}", files=files, headers=headers)


def arrays_of(reply: httpx.Response) -> dict[str, Array]:
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/x-npz"), reply.text
    with np.load(BytesIO(reply.content), allow_pickle=False) as stored:
        return dict(stored)


def test_boxes_are_labelled_and_in_pixels_of_the_image(live: Live) -> None:
    answer = post(live, image((256, 128), (64, 32, 128, 96))).json()
    assert answer["boxes"] == [{"box": [64, 32, 128, 96], "label": "dog", "score": pytest.approx(0.9)}]
    assert answer["text"]["value"] == "ab"
    assert answer["image"] == {"size": [256, 128], "input": [64, 64], "scale": [0.25, 0.25], "offset": [0, 16]}
    assert "outputs" not in answer
    assert answer["variant"] == "a"


def test_several_images_are_each_mapped_to_their_own_pixels(live: Live) -> None:
    answer = post(live, image((256, 128), (64, 32, 128, 96)), image((64, 128), (0, 0, 16, 64))).json()
    assert [row["boxes"][0]["box"] for row in answer["predictions"]] == [[64, 32, 128, 96], [0, 0, 16, 64]]


def test_npz_holds_everything_by_name(live: Live) -> None:
    images = image((256, 128), (64, 32, 128, 96)), image((64, 128), (0, 0, 16, 64))
    reply = post(live, *images, query="?outputs=boxes,text,n", accept="application/x-npz")
    arrays = arrays_of(reply)
    assert arrays["boxes.box"].tolist() == [[64, 32, 128, 96], [0, 0, 16, 64]]
    assert (arrays["boxes.label"].tolist(), arrays["boxes.row"].tolist()) == (["dog", "dog"], [0, 1])
    assert (arrays["text.value"].tolist(), arrays["n"].tolist()) == (["ab", "ab"], [0, 1])
    assert arrays["image.offset"].tolist() == [[0, 16], [16, 0]]
    assert (reply.headers["x-variant"], reply.headers["x-batch-rows"]) == ("a", "2")
    assert float(reply.headers["x-inference-ms"]) >= 0


def test_outputs_and_answers_are_chosen_by_name(live: Live) -> None:
    sent = image((64, 64), (0, 0, 8, 8))
    answer = post(live, sent, query="?outputs=steps&outputs=probabilities").json()
    np.testing.assert_array_equal(answer["outputs"]["steps"], STEPS)
    np.testing.assert_allclose(np.sum(answer["probabilities"], axis=1), 1, rtol=1e-5)
    assert not {"boxes", "text"} & set(answer)


@pytest.mark.parametrize("form", ["json", "x-npz"])
def test_only_the_largest_numbers(live: Live, form: str) -> None:
    reply = post(live, image((64, 64), (0, 0, 8, 8)), query="?outputs=steps,n&top=1", accept=f"application/{form}")
    if form == "json":
        outputs = reply.json()["outputs"]
        assert outputs == {"steps": {"index": [[1], [1], [0], [2]], "value": [[1], [1], [1], [1]]}, "n": 0}
    else:
        assert arrays_of(reply)["steps.index"].tolist() == [[[1], [1], [0], [2]]]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?outputs=boxen", "outputs: there is no 'boxen'; there are proposals, steps, n, boxes, probabilities, text"),
        ("?top=3", "top shortens outputs of the model, and none is asked for; name one"),
        ("?outputs=steps&top=0", "top is a number from 1 to 1000, not '0'"),
        ("?outputs=steps&top=1e3", "not '1e3'"),
        ("?pretty=1", "unknown parameter 'pretty' in the address; there are outputs and top"),
    ],
)
def test_wishes_that_cannot_be_granted_are_refused(live: Live, query: str, said: str) -> None:
    reply = post(live, image((64, 64), (0, 0, 8, 8)), query=query)
    assert reply.status_code == 400
    assert said in reply.json()["error"]


def test_v2_gives_the_models_own_tensors_unless_it_is_asked(live: Live) -> None:
    tensor = np.zeros((2, 3, 64, 64), np.float32)
    tensor[1, :, 8:16, 16:32] = 1
    body = {"inputs": [{"name": "image", "shape": [2, 3, 64, 64], "datatype": "FP32", "data": tensor.ravel().tolist()}]}
    url = f"http://{live.http}/v2/models/detector/infer"
    assert [item["name"] for item in httpx.post(url, json=body).json()["outputs"]] == ["proposals", "steps", "n"]
    told = httpx.post(url, json=body | {"parameters": {"postprocess": True}}).json()["outputs"]
    found = {item["name"]: item for item in told}
    assert set(found) == {"boxes.box", "boxes.label", "boxes.score", "boxes.row", "text.value", "text.score"}
    assert (found["boxes.box"]["shape"], found["boxes.box"]["data"][4:]) == ([2, 4], [16, 8, 32, 16])
    assert (found["boxes.label"]["datatype"], found["boxes.label"]["data"]) == ("BYTES", ["dog", "dog"])
    both = body | {"parameters": {"postprocess": True}, "outputs": [{"name": "n"}]}
    assert "leave 'outputs' out" in httpx.post(url, json=both).json()["error"]


def test_v2_over_grpc_does_the_same(live: Live) -> None:
    with triton.InferenceServerClient(live.grpc) as client:
        sent = triton.InferInput("image", [1, 3, 64, 64], "FP32")
        sent.set_data_from_numpy(np.zeros((1, 3, 64, 64), np.float32))
        found = client.infer("detector", [sent], parameters={"postprocess": True})
        assert found.as_numpy("text.value").tolist() == [b"ab"]
        assert found.as_numpy("boxes.box").shape == (1, 4)


def test_the_description_tells_what_is_answered(live: Live) -> None:
    told = httpx.get(f"http://{live.http}/v1/variants").json()["postprocess"]
    assert [(item["name"], item["kind"], item["told"]) for item in told] == [
        ("boxes", "nms", True),
        ("probabilities", "softmax", False),
        ("text", "ctc", True),
    ]
    document = httpx.get(f"http://{live.http}/openapi.json").json()
    operation = document["paths"]["/v1/predict"]["post"]
    assert {"outputs", "top"} <= {item["name"] for item in operation["parameters"] if item["in"] == "query"}
    content = operation["responses"]["200"]["content"]
    assert set(content) == {"application/json", "application/x-npz"}
    one = followed(document, content["application/json"]["schema"]["anyOf"][0])
    assert one["properties"]["boxes"]["items"]["required"] == ["box", "score"]
    assert one["properties"]["text"]["required"] == ["value", "score"]


def test_without_steps_labels_are_told_as_ever_and_may_be_fewer() -> None:
    with live_server() as plain:
        body = {"inputs": [[0, 255], [10, 5]]}

        def ask(query: str, **headers: str) -> httpx.Response:
            url = f"http://{plain.http}/v1/predict{query}"
            return httpx.post(url, json=body, headers={"x-variant": "a", **headers})

        assert list(ask("").json()["scores"]) == ["one", "two", "three", "zero"]
        assert list(ask("?top=2").json()["scores"]) == ["one", "two"]
        np.testing.assert_allclose(ask("?outputs=logits").json()["outputs"]["logits"], [0, 10, 0.39215687, 0.19607843])
        assert arrays_of(ask("", accept="application/x-npz"))["logits"].shape == (1, 4)
        tensor = {"name": "image", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": [0, 1, 0, 0]}
        refused = httpx.post(
            f"http://{plain.http}/v2/models/pixels/infer",
            json={"inputs": [tensor], "parameters": {"postprocess": True}},
        )
        assert refused.status_code == 400
        assert "no section postprocess" in refused.json()["error"]
