"""What the page is told of base and report: the same numbers as the report has, and what a person could send."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from fakes import PixelBase
from leanserve.api.v1.base import base_document, input_kind
from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.report.document import report_document
from leanserve.report.summary import summarise
from report_samples import a_few


@pytest.mark.parametrize(
    ("media_types", "kind"),
    [
        (("application/json", "image/png"), "image"),
        (("application/json", "audio/wav"), "audio"),
        (("application/json", "text/plain"), "text"),
        (("application/json",), "arrays"),
    ],
)
def test_the_kind_of_input_follows_from_the_content_types(media_types: tuple[str, ...], kind: str) -> None:
    assert input_kind(media_types) == kind


def test_the_base_is_told_with_tensors_and_labels() -> None:
    base: Any = PixelBase()
    told: Any = json.loads(json.dumps(base_document(base)))
    assert (told["name"], told["kind"], told["example"]) == ("pixels", "image", None)
    assert told["inputs"] == [{"name": "image", "dtype": "float32", "shape": [1, 2, 2]}]
    assert told["outputs"][0]["meaning"] == "logits"
    assert told["labels"] == ["zero", "one", "two", "three"]


@pytest.mark.parametrize(("features", "has_example"), [(3, True), (100_000, False)])
def test_where_only_json_says_a_row_there_is_one_to_begin_with(features: int, *, has_example: bool) -> None:
    spec = ModelSpec((TensorSpec("x", "float32", (features,)),), (TensorSpec("y", "float32", (1,)),))
    base: Any = SimpleNamespace(
        name="rows", caveats=(), spec=spec, codec=SimpleNamespace(media_types=("application/json",))
    )
    told: Any = base_document(base)
    assert (told["example"] is not None) == has_example
    if has_example:
        assert len(told["example"]["inputs"]) == features


def test_the_report_has_the_numbers_of_table_and_page() -> None:
    summary = summarise(a_few(), (), "")
    told: Any = orjson.loads(orjson.dumps(report_document(summary)))
    assert [variant["name"] for variant in told["variants"]] == [variant.name for variant in summary.variants]
    assert [variant["name"] for variant in told["variants"] if variant["cheapest"]] == [told["headline"]["name"]]
    for variant, measured in zip(told["variants"], summary.variants, strict=True):
        assert variant["gain"] == measured.measured.gain
        assert variant["value"] == summary.yardstick.value(measured.measured.quality)
        assert [step["label"] for step in variant["steps"]] == [step.measured.label for step in measured.steps]
    assert told["yardstick"]["floor"] == summary.yardstick.floor(summary.reference.quality)
