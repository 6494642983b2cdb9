"""Experiments at 50 requests a second on the real service: who is sent back for what, who is promoted, how soon."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from random import expovariate, randrange

import httpx
import numpy as np
import pytest

from leanserve.contracts import Json

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
RATE = 50.0
STAY = {"candidate": "equal", "stages": [1.0], "min_stage_s": 3600}
CONFIG = """\
base: digits
variants:
  - {name: base, passes: [{kind: onnxruntime}]}
  - {name: equal, passes: [{kind: onnxruntime}]}
  - {name: slower}
  - {name: worse, passes: [{kind: prune_channels, macs: 0.3}, {kind: onnxruntime}]}
experiment:
  store: FOLDER/experiments.sqlite
  ramp: {min_stage_s: 5}
hardware: {price_per_hour: 0.2}
drain: {delay_s: 0}
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("soak")
    (folder / "service.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "leanserve", "serve", "--config", str(folder / "service.yaml")]
    environment = os.environ | {"LEANSERVE_CACHE": os.environ.get("LEANSERVE_CACHE", str(folder / "cache"))}
    process = subprocess.Popen([*command, "--port", str(port)], env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(6000):
            assert process.poll() is None
            try:
                if httpx.get(f"{address}/readyz").is_success:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def traffic(url: str) -> Iterator[list[float]]:
    """Poisson traffic of real digits; the latencies so far."""
    from leanserve_models.digits import images

    rows = [{"inputs": image.tolist()} for image in images("test", 300)[0]]
    latencies: list[float] = []
    over = threading.Event()

    def client() -> None:
        with httpx.Client(base_url=url) as http:
            while not over.wait(expovariate(RATE / 4)):
                began = time.perf_counter()
                reply = http.post("/v1/predict", json=rows[randrange(len(rows))])
                latencies.append(time.perf_counter() - began)
                assert reply.status_code == 200, reply.text

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    yield latencies
    over.set()
    for thread in threads:
        thread.join()


def decided(url: str, wish: Json) -> Json:
    """The experiment once it is over, after 15 minutes at most; its figures are printed."""
    began = time.monotonic()
    httpx.post(f"{url}/v1/experiment/start", json=wish).raise_for_status()
    while time.monotonic() - began < 900:
        told = httpx.get(f"{url}/v1/experiment").json()["experiment"]
        if told["state"] != "running":
            break
        time.sleep(0.5)
    counts, pairs = told["counts"], told["counts"]["pairs"]
    print(
        f"\n{wish}: {told['state']} after {time.monotonic() - began:.0f} s, {told['requests']:.0f} requests, "
        f"{pairs['rows']:.0f} pairs, {counts['base']['timed']:.0f} timed, dropped {counts['shadow']['dropped']}, "
        f"time share {100 * counts['shadow']['time_share']:.2f} %: {told['reason']}"
    )
    return told


@pytest.mark.parametrize(
    ("candidate", "state", "why", "wish"),
    [
        ("worse", "rejected", "agreement", {}),
        ("slower", "rejected", "p95 service time", {"shadow_time": 0.1}),
        # Of the median: other work on the machine makes the 95th percentile anything.
        ("equal", "promoted", "", {"shadow_time": 0.1, "limits": {"quantile": 0.5}}),
        ("equal", "promoted", "", {"shadow_time": 0.1}),
    ],
)
def test_a_candidate_is_judged_for_what_it_is(
    url: str, traffic: list[float], candidate: str, state: str, why: str, wish: Json
) -> None:
    httpx.put(f"{url}/v1/experiment", json={"weights": {"base": 1}}).raise_for_status()
    told = decided(url, {"candidate": candidate, **wish})
    assert told["state"] == state
    assert why in told["reason"]
    shares = httpx.get(f"{url}/v1/experiment").json()["traffic"]["shares"]
    assert shares[candidate if state == "promoted" else "base"] == 1.0


def test_at_saturation_shadows_are_dropped_and_users_answered_as_before(url: str) -> None:
    """Interleaved, closed loop: 10 s with an experiment that shadows all batches, 10 s without, three times."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(6):
        shadows = bool(turn % 2)
        httpx.put(f"{url}/v1/experiment", json={"weights": {"base": 1}})
        if shadows:
            httpx.post(f"{url}/v1/experiment/start", json=STAY).raise_for_status()
        rates[shadows].append(answered_per_second(url, 10.0))
        if shadows:
            counts = httpx.post(f"{url}/v1/experiment/abort", json={}).json()["experiment"]["counts"]["shadow"]
            dropped = sum(counts["dropped"].values())
            print(f"compared {counts['compared']}, dropped {counts['dropped']}, {100 * counts['time_share']:.2f} %")
            assert dropped > 10 * counts["compared"]
    ratios = [ours / theirs for ours, theirs in zip(rates[True], rates[False], strict=True)]
    print(f"requests/s with shadows over without: {np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def answered_per_second(url: str, seconds: float) -> float:
    """By sixteen clients that ask again as soon as they are answered."""
    answered = [0] * 16
    until = time.monotonic() + seconds

    def client(number: int) -> None:
        row = {"inputs": [[0] * 28] * 28}
        with httpx.Client(base_url=url) as http:
            while time.monotonic() < until:
                answered[number] += http.post("/v1/predict", json=row).status_code == 200

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(answered))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(answered) / seconds


def test_shadowing_everything_hardly_shows_in_live_latency(url: str, traffic: list[float]) -> None:
    """Turns of 20 s without an experiment, and with one that answers all batches again, in two parts of the time."""
    httpx.put(f"{url}/v1/experiment", json={"weights": {"base": 1}})
    arms: dict[float, list[list[float]]] = {0.0: [], 0.005: [], 0.01: []}
    for turn in range(18):
        share = [*arms, *reversed(arms)][turn % 6]
        if share:
            httpx.post(f"{url}/v1/experiment/start", json=STAY | {"shadow_time": share}).raise_for_status()
        before = len(traffic)
        time.sleep(20)
        arms[share].append(traffic[before:])
        if share:
            httpx.post(f"{url}/v1/experiment/abort", json={}).raise_for_status()
            httpx.put(f"{url}/v1/experiment", json={"weights": {"base": 1}})
    for share, turns in list(arms.items())[1:]:
        for quantile in (0.5, 0.95, 0.99):
            ratio, low, high = compared(turns, arms[0.0], quantile)
            without_ms = 1000 * np.quantile(np.concatenate(arms[0.0]), quantile)
            told = f"{100 * share:g} % of the time: p{100 * quantile:g} {without_ms:.2f} ms without"
            print(f"{told}, with them x {ratio:.3f} ({low:.3f} to {high:.3f})")
            assert quantile > 0.5 or ratio < 1.5


def compared(ours: list[list[float]], theirs: list[list[float]], quantile: float) -> tuple[float, float, float]:
    """The ratio of the pooled quantiles, with a bootstrap interval (95 %) over turns."""
    draws = np.random.default_rng(1)

    def ratio(pick: list[int]) -> float:
        pooled = [np.quantile(np.concatenate([turns[number] for number in pick]), quantile) for turns in (ours, theirs)]
        return float(pooled[0] / pooled[1])

    everything = list(range(len(theirs)))
    ratios = [ratio(draws.choice(everything, len(everything)).tolist()) for _ in range(500)]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return ratio(everything), float(low), float(high)
