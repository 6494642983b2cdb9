"""Clients that others wrote, unmodified, against a live server."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tritonclient import http as triton
from tritonclient import utils
from tritonclient.http import aio

from fakes import Live, live_server

# Where `make perf-analyzer` puts it, or on the PATH.
PERF_ANALYZER = shutil.which("perf_analyzer", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
PIXELS = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
LOGITS = PIXELS.reshape(2, 4) * 10


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as server:
        yield server


def image(form: Literal["binary", "json"]) -> triton.InferInput:
    tensor = triton.InferInput("image", list(PIXELS.shape), "FP32")
    tensor.set_data_from_numpy(PIXELS, binary_data=form == "binary")
    return tensor


def test_triton_client_describes(live: Live) -> None:
    with triton.InferenceServerClient(live.http) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("pixels")
        assert not client.is_model_ready("pixels", "poor")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "leanserve"
        assert client.get_model_metadata("pixels", "a")["inputs"][0]["shape"] == [-1, 1, 2, 2]
        assert client.get_model_config("pixels")["max_batch_size"] == 32
        assert [item["state"] for item in client.get_model_repository_index()][-1] == "UNAVAILABLE"
        client.infer("pixels", [image("binary")], model_version="b")
        (stats,) = client.get_inference_statistics("pixels", "b")["model_stats"]
        assert stats["inference_stats"]["success"]["count"] >= 1


@pytest.mark.parametrize("form", ["binary", "json"])
@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
def test_triton_client_infers(live: Live, form: Literal["binary", "json"], encoding: str | None) -> None:
    output = triton.InferRequestedOutput("logits", binary_data=form == "binary")
    with triton.InferenceServerClient(live.http) as client:
        result = client.infer(
            "pixels",
            [image(form)],
            outputs=[output],
            request_id="7",
            timeout=5_000_000,
            priority=1,
            request_compression_algorithm=encoding,
            response_compression_algorithm=encoding,
        )
    np.testing.assert_array_equal(result.as_numpy("logits"), LOGITS)
    assert result.get_response()["id"] == "7"
    assert result.get_response()["parameters"]["batch_rows"] == 2


def test_triton_client_runs_requests_side_by_side(live: Live) -> None:
    with triton.InferenceServerClient(live.http, concurrency=8) as client:
        pending = [client.async_infer("pixels", [image("binary")]) for _ in range(64)]
        for request in pending:
            np.testing.assert_array_equal(request.get_result().as_numpy("logits"), LOGITS)


def test_triton_client_shows_our_error_texts(live: Live) -> None:
    with triton.InferenceServerClient(live.http) as client:
        with pytest.raises(utils.InferenceServerException, match="no version '9' of 'pixels'"):
            client.infer("pixels", [image("binary")], model_version="9")
        wrong = triton.InferInput("photo", list(PIXELS.shape), "FP32")
        wrong.set_data_from_numpy(PIXELS)
        with pytest.raises(utils.InferenceServerException, match="unknown input 'photo'; the model has image"):
            client.infer("pixels", [wrong])


def test_triton_aio_client(live: Live) -> None:
    async def scenario() -> None:
        async with aio.InferenceServerClient(live.http) as client:
            assert await client.is_server_ready()
            assert (await client.get_model_config("pixels", "a"))["name"] == "pixels"
            assert len((await client.get_inference_statistics())["model_stats"]) == 4
            answers = await asyncio.gather(
                *(
                    client.infer("pixels", [image("binary")], response_compression_algorithm=encoding)
                    for encoding in (None, "gzip", "deflate") * 8
                )
            )
            for answer in answers:
                np.testing.assert_array_equal(answer.as_numpy("logits"), LOGITS)
            with pytest.raises(utils.InferenceServerException, match="no model 'other'"):
                await client.get_model_metadata("other")

    asyncio.run(scenario())


KSERVE = """
import asyncio, sys, numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

url, pixels, logits = sys.argv[1], np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2), []

async def scenario():
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_live(url) and await client.is_server_ready(url)
    assert await client.is_model_ready(url, "pixels")
    for binary in (False, True):
        tensor = InferInput("image", list(pixels.shape), "FP32")
        tensor.set_data_from_numpy(pixels, binary_data=binary)
        reply = await client.infer(url, InferRequest("pixels", [tensor]), model_name="pixels")
        print(reply.outputs[0].as_numpy().tolist())
    await client.close()

asyncio.run(scenario())
"""


def test_kserve_client(live: Live) -> None:
    # Not in this process: it brings the protocol's messages, as tritonclient does, and protobuf takes a name only once.
    command = [sys.executable, "-c", KSERVE, f"http://{live.http}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(LOGITS.tolist())] * 2


@pytest.mark.skipif(
    PERF_ANALYZER is None, reason="no perf_analyzer on the PATH; `make perf-analyzer` gets it on Debian"
)
@pytest.mark.parametrize("arguments", [("-b", "2"), ("-x", "a"), ("-x", "b", "-i", "grpc")])
def test_perf_analyzer(live: Live, arguments: tuple[str, ...]) -> None:
    address = live.grpc if "grpc" in arguments else live.http
    assert PERF_ANALYZER is not None
    command = [PERF_ANALYZER, "-m", "pixels", "-u", address, *arguments, "--concurrency-range", "2"]
    settled = ["--measurement-interval", "500", "--stability-percentage", "400", "--max-trials", "5"]
    done: Any = subprocess.run([*command, *settled], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"throughput: ([\d.]+) infer/sec", done.stdout)
    assert found, done.stdout
    assert float(found[1]) > 10


def test_the_server_and_a_grpc_client_fit_into_one_process() -> None:
    """Both define the protocol's messages; protobuf takes a name only once in a pool."""
    code = "import leanserve.api.v2.grpc_messages, tritonclient.grpc, leanserve.api.v2.grpc_server"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
