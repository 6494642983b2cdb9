"""The verbs of `/v1/experiment` and `leanserve experiment`: what they change, refuse, write and leave in the log."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from fakes import live_server
from leanserve.__main__ import app
from leanserve.api.v2.grpc_messages import SERVICE, message
from leanserve.errors import StartupError
from leanserve.experiment_client import RunningService
from live_arms import Arm, Arms, play

TWO = {"a": Arm(), "b": Arm()}
CONFIG = "base: pixels\nvariants: [{name: a}, {name: b}]\n"


def test_traffic_is_shared_out_anew_and_written_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)

    async def scene(arms: Arms) -> None:
        before = (await arms.client.get("/v1/experiment")).json()
        assert before["traffic"]["shares"] == {"a": 1.0, "b": 0.0}
        assert (before["traffic"]["decided_by"], before["candidates"]) == ("base", ["b"])
        told = (await arms.verb("PUT", "", {"weights": {"a": 1, "b": 3}, "write": True})).json()["traffic"]
        assert (told["shares"], told["decided_by"]) == ({"a": 0.25, "b": 0.75}, "weights")
        told = (await arms.verb("PUT", "", {"weights": {"b": 1}, "caps": {"b": 0.001}})).json()["traffic"]
        assert [(await arms.ask()).json()["model_version"] for _ in range(3)] == ["b", "a", "a"]
        assert (await arms.client.get("/v1/experiment")).json()["traffic"]["capped"] == {"b": 2}
        assert (await arms.ask(**{"x-variant": "b"})).json()["model_version"] == "b"
        assert "weights:\n    a: 1.0\n    b: 3.0" in (tmp_path / "config.yaml").read_text()

    with caplog.at_level(logging.INFO, "leanserve.audit"):
        play(scene, TWO, tmp_path / "store")
    entries = [json.loads(record.getMessage()) for record in caplog.records if record.name == "leanserve.audit"]
    assert [(entry["action"], entry["outcome"]) for entry in entries] == [("traffic", "ok"), ("traffic", "ok")]
    assert json.loads(entries[1]["target"]) == {"weights": {"b": 1.0}, "caps": {"b": 0.001}}
    assert entries[0]["before"]["shares"] == {"a": 1.0, "b": 0.0}
    assert entries[0]["after"]["shares"] == entries[1]["before"]["shares"] == {"a": 0.25, "b": 0.75}
    assert entries[0]["who"] == "127.0.0.1"


REFUSED = [
    ("PUT", "", {"weights": {"z": 1}}, 400, "names 'z'"),
    ("PUT", "", {"caps": {"a": 1}}, 400, "cannot have one"),
    ("PUT", "", {"weights": {"b": 1}, "write": True}, 409, "nothing has changed: this fleet was made without"),
    ("PUT", "", {"colour": 1}, 400, "'colour' is not taken"),
    ("POST", "/start", {}, 400, "candidate"),
    ("POST", "/start", {"candidate": "z"}, 400, "no variant 'z'"),
    ("POST", "/start", {"candidate": "a"}, 400, "is the base"),
    ("POST", "/start", {"candidate": "b", "limits": {"min_agreement": 2}}, 400, "min_agreement: Input"),
    ("POST", "/start", {"candidate": "b", "stages": [0.5]}, 400, "ascend"),
    ("POST", "/start", {"candidate": "b", "stages": [1], "shadow_share": 0}, 400, "would answer nothing"),
    ("POST", "/promote", {}, 409, "no experiment runs"),
    ("POST", "/abort", {}, 409, "no experiment runs"),
    ("DELETE", "", {}, 405, "GET and PUT"),
]


def test_what_cannot_be_done_is_refused_and_changes_nothing() -> None:
    async def scene(arms: Arms) -> None:
        before = (await arms.client.get("/v1/experiment")).json()
        for method, path, body, status, told in REFUSED:
            reply = await arms.verb(method, path, body)
            assert reply.status_code == status, reply.text
            assert told in reply.json()["error"]
        assert (await arms.client.get("/v1/experiment")).json() == before

    play(scene, TWO)


def test_two_experiments_are_one_too_many_and_pins_stay() -> None:
    async def scene(arms: Arms) -> None:
        assert (await arms.verb("POST", "/start", {"candidate": "b"})).status_code == 200
        assert (await arms.verb("POST", "/start", {"candidate": "b"})).json()["code"] == "conflict"
        assert (await arms.verb("PUT", "", {"weights": {"b": 1}})).json()["code"] == "conflict"
        for name in "ab":
            assert (await arms.ask(**{"x-variant": name})).json()["model_version"] == name
        sticky = {(await arms.ask(**{"x-caller-key": "me"})).json()["model_version"] for _ in range(5)}
        assert len(sticky) == 1
        await arms.verb("POST", "/abort")

    play(scene, TWO)


def test_live_numbers_are_those_of_the_metrics_with_a_price() -> None:
    async def scene(arms: Arms) -> None:
        for _ in range(60):
            await arms.ask()
        live = (await arms.client.get("/v1/live")).json()
        base, other = live["variants"]
        page = (await arms.client.get("/metrics")).text
        samples = {
            (s.name, *sorted(s.labels.items())): s.value
            for f in text_string_to_metric_families(page)
            for s in f.samples
        }
        labels = {"model": "pixels", "version": "a"}
        ok = ("leanserve_requests_total", *sorted((labels | {"outcome": "ok"}).items()))
        assert samples[ok] == base["requests"]["ok"] == sum(base["latency"]["counts"]) == 60
        assert samples[("leanserve_cost_per_million_rows", *sorted(labels.items()))] == base["cost"]["per_million"]
        assert base["cost"]["per_million"] == pytest.approx(base["device_ms_per_row"] / 3.6e6 * 1e6 * 2.0)
        assert base["cost"]["low"] < base["cost"]["per_million"] < base["cost"]["high"]
        assert 0 < base["latency_ms"]["p50"] <= base["latency_ms"]["p99"]
        assert (base["share"], other["share"], other["cost"], other["latency_ms"]["p50"]) == (1.0, 0.0, None, None)
        assert base["requests"]["per_s"] > 0
        assert 0 < base["utilisation"] <= live["device"]["busy"] <= 1

    play(scene, TWO, hardware={"price_per_hour": 2.0})


def experiment_over_grpc(address: str) -> str:
    """What the trailing metadata of a prediction tell."""
    request = message("ModelInferRequest")(model_name="pixels", raw_input_contents=[np.zeros(4, "<f4").tobytes()])
    request.inputs.add(name="image", datatype="FP32", shape=[1, 1, 2, 2])
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer", type(request).SerializeToString)
        return str(dict(infer.with_call(request)[1].trailing_metadata())["x-experiment"])


def test_the_command_starts_watches_and_ends_an_experiment() -> None:
    variants = [{"name": "a"}, {"name": "b"}]
    with live_server(variants=variants, traffic={}, experiment={"shadow_time": 1.0}) as live:

        def run(*arguments: str) -> str:
            done = CliRunner().invoke(app, ["experiment", *arguments, "--url", f"http://{live.http}"])
            if done.exception is not None:
                raise done.exception
            return " ".join(done.output.split())

        assert "no experiment yet; b could be a candidate" in run("show")
        with pytest.raises(StartupError, match=r"409.*no experiment runs"):
            run("abort")
        started = run("start", "b", "--name", "mine", "--stages", "0.5,1")
        assert "b beside a is running with 50 % of the traffic" in started
        assert experiment_over_grpc(live.grpc) == "mine"
        ending = threading.Timer(0.5, lambda: run("abort", "--reason", "seen enough"))
        ending.start()
        assert "seen enough" in run("watch", "--every", "0.2")
        ending.join()
        with pytest.raises(StartupError, match="does not answer"):
            RunningService("http://127.0.0.1:9").document()
