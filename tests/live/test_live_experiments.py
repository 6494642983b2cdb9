"""Whole experiments on a service at work: who is promoted, who is sent back, for which reason, and what remains."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

import leanserve.live.director as director_module
from leanserve.config.schema import read_config
from leanserve.serving.traffic import TrafficRules
from live_arms import INFER, LOOK_S, QUICK, Arm, Arms, play


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(director_module, "LOOK_S", LOOK_S)
    monkeypatch.setattr(director_module, "REST", 1)


def test_an_equal_candidate_is_promoted_step_by_step_and_has_all_traffic_also_after_a_restart(tmp_path: Path) -> None:
    async def first(arms: Arms) -> None:
        assert (await arms.ask()).headers.get("x-experiment") is None
        started = (await arms.verb("POST", "/start", {"candidate": "b", "name": "one"})).json()
        assert started["traffic"]["shares"] == {"a": 0.5, "b": 0.5}
        assert (await arms.ask()).headers["x-experiment"] == "one"
        refused = await arms.client.post(INFER, json={"inputs": []})
        assert (refused.status_code, refused.headers["x-experiment"]) == (400, "one")
        told = await arms.until_over()
        assert (told["state"], told["share"]) == ("promoted", 1.0), told["reason"]
        assert {item["question"]: item["answer"] for item in told["questions"]}["agreement"] == "passed"
        assert [entry["action"] for entry in told["history"]] == ["start", "promote"]
        assert told["counts"]["pairs"]["rows"] == told["counts"]["pairs"]["agreed"] > 10
        assert told["counts"]["shadow"]["compared"] > 10
        assert told["counts"]["shadow"]["time_share"] > 0
        assert (await arms.ask()).json()["model_version"] == "b"

    async def again(arms: Arms) -> None:
        assert (await arms.experiment())["state"] == "promoted"
        assert (await arms.ask()).json()["model_version"] == "b"
        await arms.verb("PUT", "", {"weights": {"a": 1}})
        assert (await arms.ask()).json()["model_version"] == "a"

    play(first, {"a": Arm(), "b": Arm()}, tmp_path / "store")
    play(again, {"a": Arm(), "b": Arm()}, tmp_path / "store")


@pytest.mark.parametrize(
    ("candidate", "question"),
    [
        (Arm(wrong=0.5), "agreement"),
        (Arm(nan=0.5), "broken answers"),
        (Arm(fails=0.5), "failures"),
        (Arm(seconds=0.004), "p50 service time"),
    ],
)
def test_a_worse_candidate_is_sent_back_for_what_is_wrong_with_it(candidate: Arm, question: str) -> None:
    async def scene(arms: Arms) -> None:
        await arms.verb("POST", "/start", {"candidate": "b"})
        told = await arms.until_over()
        assert told["state"] == "rejected"
        failed = [item["question"] for item in told["questions"] if item["answer"] == "failed"]
        assert question in failed
        assert question in told["reason"]
        assert "p50 service time" not in failed or question == "p50 service time"
        assert (await arms.ask()).json()["model_version"] == "a"
        assert (await arms.ask()).headers.get("x-experiment") is None

    play(scene, {"a": Arm(), "b": candidate})


def test_an_experiment_goes_on_after_a_restart_with_the_evidence_that_it_had(tmp_path: Path) -> None:
    async def first(arms: Arms) -> None:
        await arms.verb("POST", "/start", {"candidate": "b", "name": "one", "min_stage_s": 3600})
        while (await arms.experiment())["counts"]["pairs"]["rows"] < 5:
            await arms.ask()
            await asyncio.sleep(0.01)

    async def again(arms: Arms) -> None:
        told = await arms.experiment()
        assert (told["name"], told["state"]) == ("one", "running")
        assert told["counts"]["pairs"]["rows"] >= 5
        assert (await arms.ask()).headers["x-experiment"] == "one"
        ended = (await arms.verb("POST", "/abort", {"reason": "enough"})).json()["experiment"]
        assert (ended["state"], ended["reason"], ended["history"][-1]["action"]) == ("aborted", "enough", "abort")

    play(first, {"a": Arm(), "b": Arm()}, tmp_path / "store")
    play(again, {"a": Arm(), "b": Arm()}, tmp_path / "store")


def test_a_promotion_holds_until_the_config_shares_traffic_out_otherwise(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("base: pixels\nvariants: [{name: a}, {name: b}]\n")

    async def first(arms: Arms) -> None:
        director, settings = arms.service.experiments, arms.service.config.experiment
        await arms.verb("POST", "/start", {"candidate": "b", "min_stage_s": 3600})
        await arms.verb("POST", "/promote", {"reason": "I know it", "write": True})
        assert read_config(tmp_path / "config.yaml").traffic.weights == {"b": 1.0}
        arms.service.fleet.direct(TrafficRules({"b": 1.0}))  # as a reload of that file
        director.reconfigure(settings)
        assert (await arms.experiment())["history"][-1]["reason"] == "I know it"
        assert (await arms.ask()).json()["model_version"] == "b"
        arms.service.fleet.direct(TrafficRules({"a": 1.0}))
        director.reconfigure(settings)
        assert (await arms.ask()).json()["model_version"] == "a"

    async def again(arms: Arms) -> None:
        assert (await arms.experiment())["state"] == "promoted"
        assert (await arms.ask()).json()["model_version"] == "a"

    play(first, {"a": Arm(), "b": Arm()}, tmp_path / "store")
    play(again, {"a": Arm(), "b": Arm()}, tmp_path / "store", traffic={"weights": {"a": 1.0}})


def test_what_differs_is_kept_to_be_looked_at_and_inputs_only_where_that_is_asked_for() -> None:
    async def scene(arms: Arms) -> None:
        await arms.verb("POST", "/start", {"candidate": "b", "stages": [1.0]})
        await arms.until_over()
        told = (await arms.client.get("/v1/experiment/disagreements")).json()
        item = told["disagreements"][0]
        assert item["outputs"]["logits"]["class"] != item["outputs"]["logits"]["other"]
        assert (item["payload"] is not None) == told["keeps_payloads"] == arms.service.config.experiment.keep_payloads
        if told["keeps_payloads"]:
            assert np.max(item["payload"]["image"]) == 1.0

    play(scene, {"a": Arm(), "b": Arm(wrong=1.0)})
    play(scene, {"a": Arm(), "b": Arm(wrong=1.0)}, experiment=QUICK | {"keep_payloads": True})
