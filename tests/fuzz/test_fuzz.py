"""Bounded fuzzing in every run: the HTTP API by its own OpenAPI document, the infer codec under libFuzzer's guidance.

`make fuzz` fuzzes longer.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fakes import Live, live_server

SECONDS = int(os.environ.get("LEANSERVE_FUZZ_SECONDS", "2"))
EXAMPLES = 12 * SECONDS
PATIENCE_S = 10.0
FUZZER = Path(__file__).parent / "fuzz_open_inference.py"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(variants=[{"name": "a"}, {"name": "b"}]) as server:
        yield server


def operations(live: Live) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies deprecate each other
        schemathesis = importlib.import_module("schemathesis")
        schema = schemathesis.openapi.from_url(f"http://{live.http}/openapi.json")
        return [found.ok() for found in schema.exclude(path="/v1/live/stream").get_all_operations()]  # that has no end


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_no_request_that_the_api_describes_or_nearly_describes_breaks_it(live: Live) -> None:
    from schemathesis import GenerationMode

    threads, tried = threading.active_count(), 0
    for operation in operations(live):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            tried += _fuzz(operation, mode, live)
    assert tried > 10 * EXAMPLES, "the document describes hardly anything"
    assert all(variant.waiting_rows() == 0 for variant in live.fleet.variants.values())
    assert threading.active_count() <= threads + 2, "the decoders' pool is the only one that may have grown"


def _fuzz(operation: Any, mode: Any, live: Live) -> int:
    tried = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        nonlocal tried
        started = time.monotonic()
        response = case.call(timeout=PATIENCE_S)
        assert response.status_code != 500, (case.as_curl_command(), response.text)
        assert time.monotonic() - started < PATIENCE_S
        if response.status_code >= 400 and response.content:
            assert set(response.json()) & {"error", "detail"}, (case.as_curl_command(), response.text)
        tried += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            send()
        except Exception as error:
            if type(error).__name__ != "Unsatisfiable":  # nothing about a bare GET can be made wrong
                raise
    return tried


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this platform")
def test_libfuzzer_finds_no_input_that_breaks_the_infer_codec(tmp_path: Path) -> None:
    found = tmp_path / "crash-"
    done = subprocess.run(
        [sys.executable, str(FUZZER), f"-max_total_time={SECONDS}", f"-artifact_prefix={found}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + 2 * SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DONE" in done.stderr or "Done" in done.stderr, done.stderr[-3000:]
    assert not list(tmp_path.iterdir())
