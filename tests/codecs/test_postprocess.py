"""Steps of post-processing, each against an implementation of its own: scipy, onnxruntime, plain Python."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from leanserve.codecs.postprocess import AnyStep
from leanserve.codecs.postprocess.boxes import CANDIDATES, corners_of, suppressed
from leanserve.codecs.postprocess.chain import PostChain
from leanserve.codecs.postprocess.columns import Columns, best, together
from leanserve.contracts import Array, ModelSpec, Placement, TensorSpec
from leanserve.errors import BackendFailed, BadInput, ConfigError

RANDOM = np.random.default_rng(0)
STEP: TypeAdapter[Any] = TypeAdapter(AnyStep)


def spec_of(*shapes: tuple[int | None, ...], labels: tuple[str, ...] = (), dtype: str = "float32") -> ModelSpec:
    return ModelSpec((), tuple(TensorSpec(f"y{n}", dtype, shape) for n, shape in enumerate(shapes)), labels)


def chain_of(spec: ModelSpec, *steps: dict[str, Any], folder: Path = Path()) -> PostChain:
    return PostChain([STEP.validate_python(step) for step in steps], spec, folder)


def answered(
    spec: ModelSpec, outputs: tuple[Array, ...], *steps: dict[str, Any], places: Any = (), folder: Path = Path()
) -> list[dict[str, Any]]:
    """What stands in JSON for each row."""
    chain = chain_of(spec, *steps, folder=folder)
    columns = chain.answers(outputs, spec, places, chain.ends)
    told = {name: found.of_rows(len(outputs[0])) for name, found in columns.items()}
    return [dict(zip(told, row, strict=True)) for row in zip(*told.values(), strict=True)]


def test_softmax_and_sigmoid_are_those_of_scipy() -> None:
    from scipy.special import expit, softmax

    logits = (RANDOM.standard_normal((3, 4, 7)) * 30).astype(np.float32)
    logits[0, 0, 0] = -np.inf
    found = answered(spec_of((4, 7)), (logits,), {"kind": "softmax"})
    np.testing.assert_allclose([row["probabilities"] for row in found], softmax(logits, axis=-1), rtol=2e-5, atol=1e-12)
    found = answered(spec_of((4, 7)), (logits,), {"kind": "sigmoid", "name": "shares"})
    np.testing.assert_allclose([row["shares"] for row in found], expit(logits), rtol=2e-5, atol=1e-7)


def test_top_k_is_a_sort_and_names_the_classes() -> None:
    scores = RANDOM.permuted(np.arange(60, dtype=np.float32).reshape(2, 30), axis=1)
    labels = tuple(f"c{number}" for number in range(30))
    found = answered(spec_of((30,), labels=labels), (scores,), {"kind": "top_k", "k": 3})
    for row, told in zip(scores.tolist(), found, strict=True):
        order = sorted(range(30), key=lambda number: -row[number])[:3]
        assert told["top"] == [{"label": f"c{number}", "score": row[number]} for number in order]
    [plain, _] = answered(spec_of((30,)), (scores,), {"kind": "top_k", "k": 1})
    assert plain["top"][0]["class"] == scores[0].argmax()


def test_steps_read_what_earlier_ones_wrote() -> None:
    logits = np.array([[0, 2, 1], [5, 5, -5]], np.float32)
    steps = {"kind": "sigmoid"}, {"kind": "threshold", "output": "probabilities", "min_score": 0.6, "name": "tags"}
    found = answered(spec_of((3,), labels=("a", "b", "c")), (logits,), *steps)
    assert [[tag["label"] for tag in row["tags"]] for row in found] == [["b", "c"], ["a", "b"]]
    assert set(found[0]) == {"tags"}, "what a later step reads is told only if asked for"
    chain = chain_of(spec_of((3,)), *steps)
    assert chain.ends == ("tags",)
    assert set(chain.answers((logits,), spec_of((3,)), (), ["probabilities"])) == {"probabilities"}


def test_a_threshold_that_nobody_reaches_tells_nothing() -> None:
    found = answered(spec_of((3,)), (np.zeros((2, 3), np.float32),), {"kind": "threshold"})
    assert found == [{"found": []}, {"found": []}]


@pytest.mark.parametrize("blank", ["first", "last"])
def test_ctc_is_the_best_path_without_repetitions_and_blanks(blank: Any) -> None:
    alphabet = "abcdefgh"
    scores = RANDOM.random((5, 40, 9)).astype(np.float32)
    scores[0, :, 0 if blank == "first" else 8] = 2  # nothing but blanks
    found = answered(spec_of((40, 9)), (scores,), {"kind": "ctc", "characters": list(alphabet), "blank": blank})
    for row, told in zip(scores, found, strict=True):
        known = ["", *alphabet] if blank == "first" else [*alphabet, ""]
        runs = groupby(row, lambda step: int(step.argmax()))
        read = [(known[number], next(steps).max()) for number, steps in runs if known[number]]
        assert told["text"]["value"] == "".join(letter for letter, _ in read)
        mean = np.mean([score for _, score in read]) if read else 0.0
        assert told["text"]["score"] == pytest.approx(mean, abs=1e-6)
    assert found[0]["text"] == {"value": "", "score": 0.0}


def test_characters_may_come_from_a_file_with_a_space_behind_them(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("a\n \u3000\nb\r\n", encoding="utf-8")
    step = {"kind": "ctc", "characters": "keys.txt", "space": True}
    scores = np.eye(5, dtype=np.float32)[None, [1, 0, 2, 3, 4]]
    [row] = answered(spec_of((5, 5)), (scores,), step, folder=tmp_path)
    assert row["text"]["value"] == "a \u3000b "


def by_onnxruntime(boxes: Array, scores: Array, overlap: float, least: float, most: int, *, per_class: bool) -> Any:
    """(class, corners) of what the operator NonMaxSuppression keeps, best first."""
    import onnxruntime
    from onnx import TensorProto, helper

    names = ("boxes", "scores", "most", "overlap", "least")
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT)
    node = helper.make_node("NonMaxSuppression", names, ["kept"], center_point_box=0)
    shapes: Any = ((1, "n", 4), (1, "c", "n"), (1,), (1,), (1,))
    inputs = [helper.make_tensor_value_info(*item) for item in zip(names, kinds, shapes, strict=True)]
    kept_told = helper.make_tensor_value_info("kept", TensorProto.INT64, ("k", 3))
    graph = helper.make_graph([node], "g", inputs, [kept_told])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    best_class = scores.argmax(axis=1)
    only = np.where(np.arange(scores.shape[1]) == best_class[:, None], scores, -1)
    told = only.T if per_class else scores.max(axis=1)[None]
    limits = np.array([most]), np.array([overlap], np.float32), np.array([least], np.float32)
    fed = dict(zip(names, (boxes[None], told[None].astype(np.float32), *limits), strict=True))
    kept: Any = session.run(None, fed)[0]
    found = ((float(scores[n].max()), int(best_class[n]), tuple(boxes[n].tolist())) for n in kept[:, 2])
    return sorted(found, reverse=True)


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("proposals", ["first", "last"])
@pytest.mark.parametrize("form", ["cxcywh", "xyxy", "xywh"])
def test_nms_keeps_what_onnxruntime_keeps(per_class: bool, proposals: Any, form: Any) -> None:  # noqa: FBT001
    starts = RANDOM.random((200, 2)).astype(np.float32) * 100
    sizes = RANDOM.random((200, 2)).astype(np.float32) * 40 + 10
    corners = np.concatenate([starts, starts + sizes], axis=1)
    scores = RANDOM.random((200, 3)).astype(np.float32)
    boxes = {"xyxy": corners, "xywh": np.concatenate([starts, sizes], 1)}.get(
        form, np.concatenate([starts + sizes / 2, sizes], 1)
    )
    output = np.concatenate([boxes, scores], axis=1)[None]
    output = output if proposals == "first" else output.swapaxes(1, 2)
    step = {"kind": "nms", "form": form, "proposals": proposals, "per_class": per_class, "min_score": 0.6}
    [row] = answered(spec_of(output.shape[1:]), (output,), step | {"max_overlap": 0.3})
    wanted = by_onnxruntime(corners, scores, 0.3, 0.6, 300, per_class=per_class)
    assert len(row["boxes"]) == len(wanted) > 5
    for told, (score, number, box) in zip(row["boxes"], wanted, strict=True):
        assert (told["class"], float(told["score"])) == (number, score)
        np.testing.assert_allclose(told["box"], box, atol=1e-4)


def test_boxes_come_in_pixels_of_the_image() -> None:
    output = np.array([[[320, 320, 64, 32, 1, 0.9, 0.1], [0, 0, 400, 400, 0.5, 0.1, 0.8]]], np.float32)
    place = Placement((1280, 720), (640, 640), (0.5, 0.5), (0, 140))
    step = {"kind": "nms", "objectness": True, "labels": ["cat", "dog"]}
    [row] = answered(spec_of((2, 7)), (output,), step, places=[place])
    assert [(told["label"], told["box"].tolist()) for told in row["boxes"]] == [
        ("cat", [576, 328, 704, 392]),
        ("dog", [0, 0, 400, 120]),
    ]
    assert [round(float(told["score"]), 4) for told in row["boxes"]] == [0.9, 0.4]
    shares = output / np.array([640, 640, 640, 640, 1, 1, 1], np.float32)
    [same] = answered(spec_of((2, 7)), (shares,), step | {"unit": "share"}, places=[place])
    np.testing.assert_allclose([told["box"] for told in same["boxes"]], [told["box"] for told in row["boxes"]], 1e-5)


def test_scores_may_be_an_output_of_their_own() -> None:
    boxes = np.array([[[0, 0, 2, 2], [5, 5, 9, 9]]], np.float32)
    scores = np.array([[[0.1, 0.7], [0.2, 0.1]]], np.float32)
    step = {"kind": "nms", "output": "y0", "scores": "y1", "form": "xyxy"}
    [row] = answered(spec_of((2, 4), (2, 2)), (boxes, scores), step)
    assert [(int(told["class"]), told["box"].tolist()) for told in row["boxes"]] == [(1, [0, 0, 2, 2])]


def test_the_work_of_nms_is_bounded_whatever_is_proposed() -> None:
    output = np.ones((1, 30_000, 5), np.float32)
    output[0, :, :2] = np.arange(30_000)[:, None] * 10  # none overlaps another
    [row] = answered(spec_of((30_000, 5)), (output,), {"kind": "nms", "max_boxes": CANDIDATES})
    assert len(row["boxes"]) == CANDIDATES
    assert len(suppressed(corners_of(output[0, :50, :4], "cxcywh"), None, 0.5, 7)) == 7


def test_rows_with_any_number_of_boxes_are_told_apart() -> None:
    output = np.zeros((3, 2, 5), np.float32)
    output[0, :, :] = [[1, 1, 1, 1, 0.9], [9, 9, 1, 1, 0.8]]
    output[2, 0, :] = [1, 1, 1, 1, 0.7]
    found = answered(spec_of((2, 5)), (output,), {"kind": "nms"})
    assert [len(row["boxes"]) for row in found] == [2, 0, 1]


def test_parts_of_a_request_become_one_in_its_order() -> None:
    ragged = [Columns({"v": np.array(v)}, np.array(r)) for v, r in (([1, 2, 3], [0, 0, 1]), ([4], [0]))]
    found = together(ragged, [[2, 0], [1]])
    assert found.rows is not None
    assert (found.arrays["v"].tolist(), found.rows.tolist()) == ([3, 4, 1, 2], [0, 1, 2, 2])
    whole = together([Columns({"": np.array([[1], [2]])}), Columns({"": np.array([[3]])})], [[2, 0], [1]])
    assert whole.named("y")["y"].tolist() == [[2], [3], [1]]
    with pytest.raises(BadInput, match="ask for JSON"):
        together([Columns({"": np.zeros((1, 2))}), Columns({"": np.zeros((1, 3))})], [[0], [1]])


def test_the_largest_numbers_of_any_list() -> None:
    array = RANDOM.permuted(np.arange(2 * 4 * 50).reshape(2, 4, 50), axis=-1)
    index, value = best(array, 3)
    np.testing.assert_array_equal(index, np.argsort(-array, axis=-1)[..., :3])
    np.testing.assert_array_equal(value, -np.sort(-array, axis=-1)[..., :3])
    assert best(np.array([[2.0, 1.0]]), 9)[0].tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("shape", "step"),
    [((3,), {"kind": "softmax"}), ((2, 5), {"kind": "nms"}), ((2, 2), {"kind": "ctc", "characters": ["a"]})],
)
def test_what_is_no_number_is_a_failure_of_the_model(shape: tuple[int, ...], step: dict[str, Any]) -> None:
    output = np.ones((2, *shape), np.float32)
    output[1] = np.nan
    with pytest.raises(BackendFailed, match="row 1"):
        answered(spec_of(shape), (output,), step)


@pytest.mark.parametrize(
    ("shapes", "step", "said"),
    [
        ([(3,)], {"kind": "top_k", "output": "z"}, r"postprocess\[0\] \(top_k\): output: there is no 'z'.*y0"),
        ([(3,), (4,)], {"kind": "top_k"}, "output: say which, the model gives y0, y1"),
        ([(3, 4)], {"kind": "top_k"}, "one list of scores per row"),
        ([(3,)], {"kind": "top_k", "labels": ["a"]}, "labels: there are 1 for 3 classes"),
        ([(3,)], {"kind": "top_k", "labels": "nowhere.txt"}, "labels: cannot read .*nowhere.txt"),
        ([(3,)], {"kind": "nms"}, "boxes and scores"),
        ([(3, 100)], {"kind": "nms", "proposals": "last"}, "at least 5 numbers.*has 3; is it proposals: first"),
        ([(9, 5), (9, 2)], {"kind": "nms", "output": "y0", "scores": "y1"}, "takes 4 numbers"),
        ([(9, 4)], {"kind": "ctc", "characters": ["a", "b"]}, "2 characters and the blank are 3.*tells 4 apart"),
        ([(3,)], {"kind": "softmax", "name": "y0"}, "the name 'y0' is taken"),
    ],
)
def test_what_does_not_suit_the_model_is_refused_by_the_step(
    shapes: list[tuple[int, ...]], step: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        chain_of(spec_of(*shapes), step)
