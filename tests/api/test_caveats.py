"""What is wrong with a base is told wherever its numbers and answers are: to people, to clients, to dashboards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton

from fakes import Live, PixelBase, live_server, report
from leanserve.api.caveats import caveat_headers
from leanserve.bench import print_bench
from leanserve.report.table import print_table, write_html

CAVEATS = ("untrained", "synthetic data")
TOLD = "untrained, synthetic data"
IMAGE = {"inputs": [[0, 1], [2, 3]]}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with marked(CAVEATS) as server:
        yield server


@contextmanager
def marked(caveats: tuple[str, ...]) -> Iterator[Live]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PixelBase, "caveats", caveats)
        with live_server() as server:
            yield server


def v2_infer(live: Live) -> httpx.Response:
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 2, 2], "data": [0, 1, 2, 3]}
    return httpx.post(f"http://{live.http}/v2/models/pixels/infer", json={"inputs": [tensor]})


def test_every_answer_has_the_header(live: Live) -> None:
    plain = httpx.post(f"http://{live.http}/v1/predict", json=IMAGE)
    for reply in (plain, v2_infer(live)):
        assert reply.status_code == 200
        assert reply.headers["x-caveats"] == TOLD
    assert "caveats" not in plain.json()


def test_clients_of_triton_find_it_in_the_configuration(live: Live) -> None:
    told = {"caveats": {"string_value": TOLD}}
    with triton.InferenceServerClient(live.http) as client:
        assert client.get_model_config("pixels")["parameters"] == told
        assert client.get_model_metadata("pixels")["name"] == "pixels"
    with triton_grpc.InferenceServerClient(live.grpc) as client:
        assert client.get_model_config("pixels", as_json=True)["config"]["parameters"] == told


def test_clients_of_triton_infer_as_ever(live: Live) -> None:
    tensor = triton.InferInput("image", [1, 1, 2, 2], "FP32")
    tensor.set_data_from_numpy(np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2))
    with triton.InferenceServerClient(live.http) as client:
        assert client.infer("pixels", [tensor]).as_numpy("logits").argmax() == 3


def test_the_list_of_variants_and_the_metrics_tell_it(live: Live) -> None:
    assert httpx.get(f"http://{live.http}/v1/variants").json()["caveats"] == list(CAVEATS)
    families = text_string_to_metric_families(httpx.get(f"http://{live.http}/metrics").text)
    (sample,) = next(family for family in families if family.name == "leanserve_base_info").samples
    assert (sample.labels, sample.value) == ({"model": "pixels", "caveats": TOLD}, 1)


def test_a_base_without_caveats_says_nothing() -> None:
    with marked(()) as live:
        assert "x-caveats" not in v2_infer(live).headers
        assert "parameters" not in httpx.get(f"http://{live.http}/v2/models/pixels/config").json()
        assert httpx.get(f"http://{live.http}/v1/variants").json()["caveats"] == []


def test_a_caveat_cannot_end_the_header() -> None:
    assert caveat_headers(["trained on\r\nset-cookie: x", "für Zahlen"]) == (
        (b"x-caveats", b"trained on set-cookie: x, f\\xfcr Zahlen"),
    )


def test_the_report_tells_it_first_on_screen_and_on_the_page(tmp_path: Path) -> None:
    reports = [report("a"), report("b")]
    screen = StringIO()
    print_table(reports, Console(file=screen, width=200), CAVEATS)
    write_html(reports, tmp_path / "page.html", "pixels", CAVEATS)
    page = (tmp_path / "page.html").read_text()
    for text in (screen.getvalue(), page):
        assert f"Mind the base: {TOLD}." in text
    assert page.index(TOLD) < page.index("<main>")
    assert screen.getvalue().index(TOLD) < screen.getvalue().index("Variants")
    clean = StringIO()
    print_table(reports, Console(file=clean, width=200))
    assert "Mind the base" not in clean.getvalue()


def test_the_bench_tells_it_below_its_table() -> None:
    screen = StringIO()
    print_bench({"a": {1: [0.1]}}, Console(file=screen, width=120), CAVEATS)
    assert TOLD in screen.getvalue()
