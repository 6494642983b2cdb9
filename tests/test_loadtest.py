"""The load test against a small server that answers like leanserve: options, counts, errors and the A/B table."""

from __future__ import annotations

import asyncio
import io
import json
import math
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from sklearn.datasets import load_digits
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from fakes import live_server
from loadtest import compare
from loadtest.rows import LoadRow, rows_for
from loadtest.tally import Tally
from loadtest.target import TargetError, digits, serving_variants
from text_fleet import live_texts

ROOT = Path(__file__).parents[1]
VARIANTS = [
    {"name": "float", "state": "serving"},
    {"name": "int8", "state": "serving"},
    {"name": "tiny", "state": "excluded"},
]


class FakeServer:
    """Knows all digits. `float` takes 20 ms; `int8` answers at once, but one in five requests with an error."""

    def __init__(self) -> None:
        data = load_digits()
        pixels = (data.images * (255 / 16)).round().astype("uint8")
        self.labels = {image.tobytes(): str(label) for image, label in zip(pixels, data.target, strict=True)}
        self.seen: Counter[tuple[str, str]] = Counter()
        routes = [Route("/v1/variants", self.variants), Route("/v1/predict", self.predict, methods=["POST"])]
        self.app = Starlette(routes=routes)

    async def variants(self, request: Request) -> JSONResponse:
        return JSONResponse({"model": "digits", "variants": VARIANTS})

    async def predict(self, request: Request) -> JSONResponse:
        name, media_type, body = request.headers["x-variant"], request.headers["content-type"], await request.body()
        self.seen[name, media_type] += 1
        if name == "int8" and self.seen[name, media_type] % 5 == 0:
            return JSONResponse({"error": "queue full"}, 429)
        if name == "float":
            await asyncio.sleep(0.02)
        if media_type == "image/png":
            pixels = Image.open(io.BytesIO(body)).tobytes()
        else:
            pixels = bytes(value for row in json.loads(body)["inputs"] for value in row)
        return JSONResponse({"label": self.labels[pixels], "variant": name}, headers={"x-variant": name})


@pytest.fixture
def server() -> Iterator[tuple[FakeServer, str]]:
    fake = FakeServer()
    listener = socket.create_server(("127.0.0.1", 0))
    runner = uvicorn.Server(uvicorn.Config(fake.app, log_level="warning"))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 10
    while not runner.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield fake, f"http://127.0.0.1:{listener.getsockname()[1]}"
    runner.should_exit = True
    thread.join(10)
    listener.close()


def locust(host: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--only-summary"]
    command += ["--host", host, "-u", "2", "-r", "2", "-t", "3s", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_locust_loads_every_variant_apart_and_checks_the_answers(
    server: tuple[FakeServer, str], tmp_path: Path
) -> None:
    fake, host = server
    file = tmp_path / "summary.json"
    done = locust(host, "--summary-json", str(file))
    numbers: dict[str, Any] = json.loads(file.read_text())
    assert set(numbers) == {"float", "int8"}, "the excluded variant is not loaded"
    full, small = Tally.from_json(numbers["float"]), Tally.from_json(numbers["int8"])
    assert full.answers > 20
    assert full.right_share == small.right_share == 1.0
    assert full.percentile(0.5) >= 19.5
    assert full.percentile(0.5) > small.percentile(0.5)
    assert full.errors == 0
    assert small.errors / (small.answers + small.errors) == pytest.approx(0.2, abs=0.05)
    # Requests that are under way when locust stops are answered, but no longer counted.
    sent = fake.seen["int8", "image/png"]
    assert sent - 2 <= small.answers + small.errors <= sent
    assert done.returncode == 1, "locust's own verdict: there were failures"
    assert "predict float" in done.stdout + done.stderr
    assert "right %" in done.stdout


@pytest.mark.soak
def test_locust_in_several_processes_with_json_and_a_subset(server: tuple[FakeServer, str], tmp_path: Path) -> None:
    fake, host = server
    file = tmp_path / "summary.json"
    options = ["--processes", "2", "--variants", "float", "--rows", "digits-json", "--wait-ms", "80"]
    done = locust(host, *options, "--summary-json", str(file))
    assert set(fake.seen) == {("float", "application/json")}
    tally = Tally.from_json(json.loads(file.read_text())["float"])
    assert done.returncode == 0, done.stderr
    sent = fake.seen["float", "application/json"]
    assert sent - 2 <= tally.answers <= sent
    assert 3 < tally.answers <= 2 * 4 / 0.1, "two users, each 20 ms of work and 80 ms of pause"
    assert tally.right_share == 1.0


def test_locust_names_a_variant_that_is_not_served(server: tuple[FakeServer, str]) -> None:
    fake, host = server
    done = locust(host, "--variants", "tiny")
    assert done.returncode == 2
    assert "variant 'tiny' is excluded" in done.stderr
    assert "float, int8" in done.stderr
    assert not fake.seen


@pytest.mark.soak
def test_compare_measures_interleaved_rounds_and_writes_the_table(
    server: tuple[FakeServer, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, host = server
    file = tmp_path / "ab.md"
    options = ["--host", host, "--rounds", "2", "--users", "2", "--seconds", "1", "--reference", "float"]
    assert compare.main([*options, "--markdown", str(file)]) == 0
    printed = capsys.readouterr()
    order = [line.split()[2].rstrip(":") for line in printed.err.splitlines() if line.startswith("round")]
    assert order == ["float", "int8", "int8", "float"]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in file.read_text().splitlines() if "|" in line]
    header, _, full, small = table
    assert header == list(compare.COLUMNS)
    assert full[2] == "1 (reference)"
    assert float(small[2].split()[0]) > 1.5
    assert (full[6], full[7], small[7]) == ("0", "100.00", "100.00")
    assert int(small[6]) > 0
    assert "2 interleaved rounds of 1 s" in file.read_text()
    assert "int8" in printed.out


def test_compare_refuses_an_unknown_reference_and_a_dead_server(
    server: tuple[FakeServer, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["--host", server[1], "--reference", "tiny"]) == 2
    assert "reference 'tiny'" in capsys.readouterr().err
    assert compare.main(["--host", "http://127.0.0.1:1"]) == 2
    assert "is leanserve ready" in capsys.readouterr().err


def test_variants_keep_the_server_s_order(server: tuple[FakeServer, str]) -> None:
    assert serving_variants(server[1] + "/", ["int8", "float"]) == ["float", "int8"]
    with pytest.raises(TargetError, match="'typo' is unknown"):
        serving_variants(server[1], ["typo"])


def test_both_contents_carry_the_same_digit() -> None:
    png, plain = digits("png")[7], digits("json")[7]
    assert png.label == plain.label == "7"
    rows = json.loads(plain.body)["inputs"]
    image = Image.open(io.BytesIO(png.body))
    assert (image.mode, image.size) == ("L", (8, 8))
    assert image.tobytes() == bytes(value for row in rows for value in row)
    assert max(map(max, rows)) == 255


def test_tally_percentiles_are_true_to_half_a_percent_and_survive_json_and_addition() -> None:
    source = random.Random(0)
    times = [source.lognormvariate(1, 1) for _ in range(1001)]
    halves = Tally(), Tally()
    for at, milliseconds in enumerate(sorted(times)):
        halves[at % 2].answer(100.0 + at, milliseconds, right=at % 10 != 0)
    halves[1].error(99.0)
    whole = Tally()
    for half in halves:
        whole.add(Tally.from_json(json.loads(json.dumps(half.to_json()))))
    for share in (0.5, 0.95, 0.99):
        exact = sorted(times)[math.ceil(share * len(times)) - 1]
        assert whole.percentile(share) == pytest.approx(exact, rel=0.006)
    assert (whole.answers, whole.errors, whole.right) == (1001, 1, 900)
    assert whole.rate == pytest.approx(1001 / (100 + 1000 - 99), rel=0.01)


def test_an_empty_tally_has_no_numbers() -> None:
    empty = Tally.from_json(json.loads(json.dumps(Tally().to_json())))
    assert empty == Tally()
    assert (empty.answers, empty.rate) == (0, 0.0)
    assert math.isnan(empty.percentile(0.5))
    assert math.isnan(empty.right_share)


@pytest.fixture(scope="module")
def pixels() -> Iterator[str]:
    with live_server() as live:
        yield f"http://{live.http}"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live_texts(tmp_path_factory.mktemp("words")) as live:
        yield f"http://{live.http}"


def sent_to(host: str, row: LoadRow, variant: str) -> httpx.Response:
    return httpx.post(f"{host}{row.path.format(variant=variant)}", content=row.body, headers=row.headers)


def test_rows_of_any_base_come_from_its_description(pixels: str) -> None:
    rows = rows_for(pixels, "auto")
    assert len(rows) > 8
    assert len({row.body for row in rows}) == len(rows)
    reply = sent_to(pixels, rows[0], "a")
    assert (reply.status_code, reply.headers["x-variant"]) == (200, "a"), reply.text


def test_rows_come_from_folders_arrays_and_the_data_of_a_config(pixels: str, tmp_path: Path) -> None:
    for label in ("one", "two"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        Image.new("L", (4, 4), 9).save(tmp_path / "photos" / label / "x.png")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    rows = rows_for(pixels, str(tmp_path / "photos"))
    assert [(row.headers["content-type"], row.label) for row in rows] == [("image/png", "one"), ("image/png", "two")]
    np.savez(tmp_path / "tensors.npz", image=np.random.default_rng(0).random((3, 1, 2, 2), np.float32))
    np.savez(tmp_path / "pixels.npz", x=np.zeros((5, 2, 2), np.uint8))
    (tmp_path / "leanserve.yaml").write_text("data: {images: {train: nowhere, gate: photos}}")
    for source, count in (("tensors.npz", 3), ("pixels.npz", 5), ("leanserve.yaml", 2), ("photos", 2)):
        rows = rows_for(pixels, str(tmp_path / source))
        assert len(rows) == count
        assert sent_to(pixels, rows[-1], "b").status_code == 200


def test_texts_come_from_tables(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('"a, b",1\nc,2\n')
    (tmp_path / "h.tsv").write_text("n\ttext\n1\tx\n")
    (tmp_path / "l.jsonl").write_text('{"text": "y"}\n"z"\n')
    (tmp_path / "c.yaml").write_text("data: {texts: h.tsv, text: text}")
    found = {name: [json.loads(row.body)["inputs"] for row in rows_for("", str(tmp_path / name))] for name in NAMES}
    assert found == {"t.csv": ["a, b", "c"], "l.jsonl": ["y", "z"], "c.yaml": ["x"]}


NAMES = ("t.csv", "l.jsonl", "c.yaml")


@pytest.mark.parametrize(("source", "said"), [("nowhere", "there is no nowhere; rows are"), ("empty", "no rows in")])
def test_a_source_without_rows_says_so(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TargetError, match=said):
        rows_for("", str(tmp_path / source) if source == "empty" else source)


@pytest.mark.parametrize(("base", "rows"), [("pixels", "auto"), ("words", "words.csv")])
def test_locust_loads_bases_that_are_no_digits(
    request: pytest.FixtureRequest, tmp_path: Path, base: str, rows: str
) -> None:
    file = tmp_path / "summary.json"
    (tmp_path / "words.csv").write_text("one two\nthree\n")
    host, source = request.getfixturevalue(base), str(tmp_path / rows) if "." in rows else rows
    done = locust(host, "-t", "1s", "--variants", "a,b", "--rows", source, "--summary-json", str(file))
    tallies = [Tally.from_json(numbers) for numbers in json.loads(file.read_text()).values()]
    assert done.returncode == 0, done.stderr
    assert [tally.errors for tally in tallies] == [0, 0]
    assert all(tally.answers > 1 and math.isnan(tally.right_share) for tally in tallies)
