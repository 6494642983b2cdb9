"""Sequences over REST and gRPC: a model that adds up takes its total from the server, one client beside the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http
from tritonclient.utils import InferenceServerException

from fakes import Live, PixelBase, planned, serving
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.arrays import ArrayCodec
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Arrays, ModelSpec, Result, TensorSpec
from leanserve.runtime.device import Device
from leanserve.serving.short_batches import SHORT_S

SPEC = ModelSpec(
    (TensorSpec("step", "float32", (1,)), TensorSpec("total", "float32", (2,), next_from="next")),
    (TensorSpec("sum", "float32", (1,)), TensorSpec("next", "float32", (2,))),
)
CONFIG = {
    "base": "sums",
    "variants": [{"name": "a"}, {"name": "b"}],
    "traffic": {"weights": {"a": 1, "b": 1}},
    "drain": {"delay_s": 0},
    "model_control": "explicit",
    "sequences": {"most": 8, "idle_s": 2.0},
}
FAIL = -1.0
INFER = "/v2/models/sums/infer"


class SumsBase(PixelBase):
    name = "sums"
    spec = SPEC
    codec = ArrayCodec(AnswerEncoder(SPEC))


class Adding:
    """next = total + step, twice; the sum is its first number. Remembers the rows of its batches."""

    name, self_contained, device = "adding", False, "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self, gate: threading.Event) -> None:
        self.gate, self.rows = gate, [0]

    def run(self, batch: Arrays) -> Result:
        step, total = batch
        assert self.gate.wait(20)
        time.sleep(2 * SHORT_S)  # work for a lane, not for the loop
        self.rows.append(len(step))
        if FAIL in step:
            raise RuntimeError("ordered to fail")
        following = total + step
        return Result((following[:, :1], following))

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def gate() -> threading.Event:
    return threading.Event()


@pytest.fixture(scope="module")
def backends(gate: threading.Event) -> dict[str, Adding]:
    return {name: Adding(gate) for name in "ab"}


@pytest.fixture(scope="module")
def live(gate: threading.Event, backends: dict[str, Adding]) -> Iterator[Live]:
    gate.set()
    opened = planned(ServiceConfig.model_validate(CONFIG), SumsBase(), Device("cpu", 1))
    for name, backend in backends.items():
        opened.warm.open(name, lambda threads, backend=backend: backend)  # type: ignore[misc]
    with serving(opened, gate) as server:
        yield server


@pytest.fixture
def http(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{live.http}", timeout=20) as client:
        yield client


def ask(http: httpx.Client, key: int | str, step: float = 1.0, path: str = INFER, **how: Any) -> httpx.Response:
    inputs = [{"name": "step", "shape": [1, 1], "datatype": "FP32", "data": [step]}, *how.pop("inputs", ())]
    parameters = {"sequence_id": key, **{f"sequence_{name}": value for name, value in how.items()}}
    return http.post(path, json={"parameters": parameters, "inputs": inputs})


def summed(reply: httpx.Response) -> float:
    assert reply.status_code == 200, reply.text
    [output] = reply.json()["outputs"]
    assert output["name"] == "sum", "the state is not sent unless it is asked for"
    return float(output["data"][0])


def refused(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    return str(reply.json()["error"])


def counted(live: Live) -> dict[str, int]:
    counts: dict[str, int] = {"open": 0}
    for variant in live.fleet.metrics.variants.values():
        counts["open"] += variant.sequences
        for how, count in variant.sequences_ended.items():
            counts[how] = counts.get(how, 0) + count
    return counts


def test_the_state_is_kept_from_start_to_end(live: Live, http: httpx.Client) -> None:
    before = counted(live)
    assert summed(ask(http, 7, start=True)) == 1
    answered = {ask(http, 7).headers["x-variant"] for _ in range(6)}
    assert len(answered) == 1, "by the variant that answered the first one"
    assert summed(ask(http, "7", step=5, start=True, end=True)) == 5, "a string is another id"
    assert summed(ask(http, 7, end=True)) == 8
    assert "sequence 7 is not open: its first request says sequence_start" in refused(ask(http, 7), 400)
    after = counted(live)
    assert (after["open"], after["ended"] - before["ended"]) == (0, 2)


def test_a_start_begins_anew_and_may_bring_a_state(http: httpx.Client) -> None:
    total = {"name": "total", "shape": [1, 2], "datatype": "FP32", "data": [40, 50]}
    summed(ask(http, 1, start=True))
    assert summed(ask(http, 1, start=True, inputs=[total])) == 41
    assert "is the state, which the server keeps" in refused(ask(http, 1, inputs=[total]), 400)
    body = {"parameters": {"sequence_id": 1, "sequence_end": True}, "outputs": [{"name": "next"}]}
    step = {"name": "step", "shape": [1, 1], "datatype": "FP32", "data": [1]}
    assert http.post(INFER, json=body | {"inputs": [step]}).json()["outputs"][0]["data"] == [42, 52]


def test_without_an_id_the_state_is_an_input_like_any_other(http: httpx.Client) -> None:
    step, total = ({"name": name, "shape": [2, n], "datatype": "FP32"} for name, n in (("step", 1), ("total", 2)))
    whole = {"inputs": [step | {"data": [1, 2]}, total | {"data": [10, 20, 30, 40]}]}
    outputs = http.post(INFER, json=whole).json()["outputs"]
    assert [output["data"] for output in outputs] == [[11, 32], [11, 21, 32, 42]]
    assert "'total' is missing" in refused(http.post(INFER, json={"inputs": [step | {"data": [1, 2]}]}), 400)
    many = whole | {"parameters": {"sequence_id": 1, "sequence_start": True}}
    assert "a request of a sequence has one row, not 2" in refused(http.post(INFER, json=many), 400)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"sequence_start": True}, "belong to a 'sequence_id'"),
        ({"sequence_id": 0, "sequence_end": True}, "belong to a 'sequence_id'"),
        ({"sequence_id": -1}, "an integer from 1 to 2\\^64 - 1"),
        ({"sequence_id": 1.5}, "an integer from 1"),
        ({"sequence_id": [1]}, "an integer from 1"),
        ({"sequence_id": "x" * 200}, "at most 128 characters"),
        ({"sequence_id": 9, "sequence_start": "yes"}, "must be true or false"),
    ],
)
def test_what_is_no_sequence_is_refused(http: httpx.Client, parameters: dict[str, Any], said: str) -> None:
    step = {"name": "step", "shape": [1, 1], "datatype": "FP32", "data": [1]}
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(refused(http.post(INFER, json={"parameters": parameters, "inputs": [step]}), 400))


def test_a_request_that_fails_leaves_the_state_as_it_was(live: Live, http: httpx.Client) -> None:
    summed(ask(http, 3, step=4, start=True))
    refused(ask(http, 3, step=FAIL), 500)
    assert summed(ask(http, 3, end=True)) == 5
    refused(ask(http, 3, step=FAIL, start=True), 500)
    assert "not open" in refused(ask(http, 3), 400), "a first request that fails begins nothing"
    assert counted(live)["open"] == 0


def test_another_version_does_not_go_on_with_it(http: httpx.Client) -> None:
    versions = "/v2/models/sums/versions/{}/infer"
    summed(ask(http, 4, path=versions.format("a"), start=True))
    assert "is answered by 'a', not by 'b'" in refused(ask(http, 4, path=versions.format("b")), 400)
    assert summed(ask(http, 4, end=True)) == 2


def test_one_after_the_other_within_a_sequence_and_together_across(
    live: Live, gate: threading.Event, backends: dict[str, Adding]
) -> None:
    path = "/v2/models/sums/versions/a/infer"

    def client(key: int) -> list[float]:
        with httpx.Client(base_url=f"http://{live.http}", timeout=20) as http:
            return [summed(ask(http, key, path=path, start=turn == 0, end=turn == 9)) for turn in range(10)]

    del backends["a"].rows[1:]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(client, range(101, 107))) == [[float(turn) for turn in range(1, 11)]] * 6
    assert max(backends["a"].rows) > 1, "requests of several sequences share a batch"
    with httpx.Client(base_url=f"http://{live.http}", timeout=20) as http, ThreadPoolExecutor(5) as pool:
        summed(ask(http, 5, path=path, start=True))
        sums = list(pool.map(lambda _: summed(ask(http, 5, path=path)), range(5)))
        assert sorted(sums) == [2, 3, 4, 5, 6], "no two of them had the same state"
        summed(ask(http, 5, end=True))


def test_no_more_than_so_many_are_open_and_idle_ones_are_forgotten(live: Live, http: httpx.Client) -> None:
    before = counted(live)
    for key in range(1, 9):
        summed(ask(http, key, start=True))
    reply = ask(http, 9, start=True)
    assert "8 sequences with 64 bytes of state are open" in refused(reply, 429)
    assert 1 <= int(reply.headers["retry-after"]) <= 2
    metrics = http.get("/metrics").text
    assert sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("leanserve_sequences{")) == 8
    end = time.monotonic() + 10
    while counted(live)["open"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert counted(live)["expired"] - before["expired"] == 8
    assert "one that nobody asks for 2 s is forgotten" in refused(ask(http, 1), 400)


def test_a_variant_takes_its_sequences_with_it(live: Live, http: httpx.Client) -> None:
    path = "/v2/models/sums/versions/b/infer"
    summed(ask(http, 6, path=path, start=True))
    assert http.post("/v2/repository/models/sums/versions/b/unload").status_code == 200
    assert "not open" in refused(ask(http, 6), 400)
    assert http.post("/v2/repository/models/sums/versions/b/load").status_code == 200
    assert counted(live)["unloaded"] == 1


@pytest.mark.parametrize("front", ["http", "grpc"])
@pytest.mark.parametrize("key", [11, "eleven"])
def test_tritons_clients_speak_it(live: Live, front: str, key: int | str) -> None:
    made: Any = {"http": triton_http, "grpc": triton_grpc}[front]
    step = made.InferInput("step", [1, 1], "FP32")
    step.set_data_from_numpy(np.ones((1, 1), np.float32))
    client = made.InferenceServerClient(getattr(live, front))
    with client:
        for turn in range(1, 4):
            place = {"sequence_id": key, "sequence_start": turn == 1, "sequence_end": turn == 3}
            assert client.infer("sums", [step], **place).as_numpy("sum").item() == turn
        with pytest.raises(InferenceServerException, match="is not open"):
            client.infer("sums", [step], sequence_id=key)
        config = client.get_model_config("sums", **({"as_json": True} if front == "grpc" else {}))
        config = config.get("config", config)
        assert config["sequence_batching"]["state"][0]["output_name"] == "next"
        assert [item.get("optional", False) for item in config["input"]] == [False, True]
        extensions = client.get_server_metadata(**({"as_json": True} if front == "grpc" else {}))["extensions"]
        assert "sequence" in extensions
