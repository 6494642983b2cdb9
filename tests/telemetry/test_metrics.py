"""The exported page: parseable, cumulative, free of NaN, true to what was observed, and cheap to observe."""

from __future__ import annotations

import math
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample

from call_costs import CALLS_OF_A_REQUEST, in_calls
from leanserve.errors import QueueFull, ServiceError
from leanserve.telemetry.hardware_metrics import Sources
from leanserve.telemetry.metrics import FACTS, REQUESTS, TRAFFIC, TRITON_REASONS, Metrics
from leanserve.telemetry.observations import OUTCOMES, SECONDS, VariantFacts, VariantMetrics

FACTS_OF_INT8 = VariantFacts(
    passes=("fold_bn", "quantize_static"),
    backend="onnxruntime",
    device="cpu",
    lanes=2,
    quality={
        "score": 0.99,
        "agreement": 0.3,
        "outputs": [
            {"name": "logits", "meaning": "logits", "agreement": 1.0, "kl": None, "cosine": math.nan},
            {"name": "boxes", "meaning": "values", "agreement": 0.3, "error": 0.7, "channel": 2},
        ],
        "latency_ms": {1: 2.5, 8: 9.0},
    },
    build_seconds=(0.5, 12.0),
)


def metrics() -> Metrics:
    """Two variants, the second excluded, and some traffic."""
    made = Metrics("digits")
    served = made.add("int8", FACTS_OF_INT8)
    served.queue_rows, served.queue_requests = lambda: 7, lambda: 3
    made.add("tiny", VariantFacts(state="excluded", reason='agreement 0.8 < 0.9, "gate"'))
    served.batch_done(6, 2, 0.004, [0.0001, 0.02], input_s=0.001, output_s=0.002)
    served.batch_done(1, 0, 0.002, [0.5])
    served.lane_s += 0.004 + 2 * 0.002
    served.padding_tokens += 5
    served.add_backend_facts({"escalated": 2, "recompiled": 1})
    served.add_backend_facts({"escalated": 3})
    for seconds in (0.005, 0.03, 99.0):
        served.request_done("ok", seconds)
    served.request_done("queue_full", 0.00001)
    made.unrouted.request_done("not_found", 0.0002)
    return made


def samples(made: Metrics) -> list[Sample]:
    page, _ = made.render()
    return [sample for family in parse_text(page.decode()) for sample in family.samples]


def value(found: list[Sample], name: str, **labels: str) -> float:
    """The one sample of this name that carries these labels."""
    (match,) = [s for s in found if s.name == name and labels.items() <= s.labels.items()]
    return match.value


def test_counts_are_true() -> None:
    found = samples(metrics())
    assert value(found, "leanserve_requests_total", version="int8", outcome="ok") == 3
    assert value(found, "leanserve_requests_total", version="int8", outcome="queue_full") == 1
    assert value(found, "leanserve_requests_total", version="", outcome="not_found") == 1
    assert value(found, "leanserve_request_duration_seconds_sum", version="int8", outcome="ok") == pytest.approx(99.035)
    assert value(found, "leanserve_queue_duration_seconds_count", version="int8") == 3
    assert value(found, "leanserve_inference_duration_seconds_count", version="int8") == 2
    assert value(found, "leanserve_batch_rows_sum", version="int8") == 7
    assert value(found, "leanserve_padding_rows_total", version="int8") == 2
    assert value(found, "leanserve_padding_tokens_total", version="int8") == 5
    assert value(found, "leanserve_backend_facts_total", version="int8", fact="escalated") == 5
    assert value(found, "leanserve_backend_facts_total", version="int8", fact="recompiled") == 1
    assert value(found, "leanserve_queue_rows", version="int8") == 7
    assert value(found, "leanserve_device_lanes", version="int8", device="cpu") == 2
    assert value(found, "leanserve_device_busy_seconds_total", version="int8", device="cpu") == pytest.approx(0.008)


def test_triton_names_sum_over_requests() -> None:
    found = samples(metrics())
    expected = {
        "nv_inference_request_success": 3,
        "nv_inference_count": 7,
        "nv_inference_exec_count": 2,
        "nv_inference_pending_request_count": 3,
        "nv_inference_request_duration_us": 99_035_000,
        "nv_inference_queue_duration_us": 520_100,
        "nv_inference_compute_input_duration_us": 2_000,
        "nv_inference_compute_infer_duration_us": 2 * 4_000 + 2_000,
        "nv_inference_compute_output_duration_us": 4_000,
    }
    assert {name: value(found, name, model="digits", version="int8") for name in expected} == expected
    assert value(found, "nv_inference_request_failure", version="int8", reason="REJECTED") == 1
    assert value(found, "nv_inference_request_failure", version="int8", reason="BACKEND") == 0
    assert set(TRITON_REASONS) <= set(OUTCOMES)


def test_facts_of_serving_and_excluded_variants() -> None:
    found = samples(metrics())
    labels = {"passes": "fold_bn,quantize_static", "backend": "onnxruntime", "device": "cpu", "state": "serving"}
    assert value(found, "leanserve_variant_info", version="int8", reason="", **labels) == 1
    reason = 'agreement 0.8 < 0.9, "gate"'
    assert value(found, "leanserve_variant_info", version="tiny", state="excluded", reason=reason) == 1
    assert value(found, "leanserve_build_seconds", **{"pass": "quantize_static", "position": "2"}) == 12
    quality = [sample for sample in found if sample.name == "leanserve_variant_quality"]
    measures = {(sample.labels["output"], sample.labels["measure"]): sample.value for sample in quality}
    assert measures == {
        ("", "score"): 0.99,
        ("", "agreement"): 0.3,
        ("", "latency_ms_1"): 2.5,
        ("", "latency_ms_8"): 9.0,
        ("logits", "agreement"): 1.0,
        ("boxes", "agreement"): 0.3,
        ("boxes", "error"): 0.7,
    }
    assert not [s for s in found if s.name == "nv_inference_count" and s.labels["version"] == "tiny"]


def test_histograms_are_cumulative_and_end_at_their_count() -> None:
    found = samples(metrics())
    series: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for sample in found:
        if sample.name.endswith("_bucket"):
            key = (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "le"))
            series.setdefault(key, []).append((float(sample.labels["le"]), sample.value))
    assert len(series) == 8  # requests: int8 ok, queue_full; tiny ok; unrouted ok, not_found; queue, inference, rows
    for buckets in series.values():
        assert buckets == sorted(buckets)
        assert math.isinf(buckets[-1][0])
    waits = dict(series["leanserve_queue_duration_seconds_bucket", "digits", "int8"])
    assert (waits[0.0001], waits[0.015], waits[0.02], waits[0.5], waits[math.inf]) == (1, 1, 2, 3, 3)
    assert not [s for s in found if math.isnan(s.value)]


def test_bounds_span_a_tenth_of_a_millisecond_to_ten_seconds() -> None:
    assert (SECONDS[0], SECONDS[-1]) == (0.0001, 10.0)
    assert list(SECONDS) == sorted(set(SECONDS))
    assert max(high / low for low, high in pairwise(SECONDS)) < 1.7


def names_in_openmetrics(page: bytes) -> set[str]:
    families = parse_openmetrics(page.decode())  # type: ignore[no-untyped-call]
    return {family.name for family in families}


def test_every_declared_family_is_exported_in_both_formats() -> None:
    made = metrics()
    declared = {family.name for family in (*REQUESTS, *FACTS, *TRAFFIC)}
    text, plain = made.render()
    modern, openmetrics = made.render("application/openmetrics-text; version=1.0.0")
    assert plain.startswith("text/plain")
    assert openmetrics.startswith("application/openmetrics-text")
    assert declared <= {family.name for family in parse_text(text.decode())}
    assert declared <= names_in_openmetrics(modern)
    assert {"process_resident_memory_bytes", "nv_cpu_memory_used_bytes"} <= {
        family.name for family in parse_text(text.decode())
    }
    assert b"nv_gpu" not in text
    assert b"# TYPE nv_inference_count untyped" in text


def test_every_error_is_an_outcome_and_nothing_else_is() -> None:
    assert {"ok", ServiceError.code, QueueFull.code} <= set(OUTCOMES)
    assert len(set(OUTCOMES)) == len(OUTCOMES)
    variant = VariantMetrics("a", VariantFacts())
    for outcome in OUTCOMES:
        variant.request_done(outcome, 0.1)
    with pytest.raises(KeyError):
        variant.request_done("typo", 0.1)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\nHugePages_Total: 0\n")
    (tmp_path / "stat").write_text("cpu 100 0 0 100 0 0 0 0 50 0\ncpu0 1 2\nbtime 1\n")
    return tmp_path


def test_host_utilisation_is_the_share_since_the_last_scrape(proc: Path) -> None:
    made = Metrics("digits", Sources(proc))
    (proc / "stat").write_text("cpu 120 5 5 160 10 0 0 0 70 0\n")
    found = samples(made)
    assert value(found, "nv_cpu_utilization") == pytest.approx(30 / 100)
    assert value(found, "nv_cpu_memory_used_bytes") == 600 * 1024
    assert value(samples(made), "nv_cpu_utilization") == pytest.approx(30 / 100), "no time passed: the last value stays"


def test_host_gauges_are_absent_without_proc(tmp_path: Path) -> None:
    assert not [s for s in samples(Metrics("digits", Sources(tmp_path))) if s.name.startswith(("nv_cpu", "process"))]


def test_reading_while_writing_keeps_every_page_consistent() -> None:
    made = Metrics("digits")
    stop = threading.Event()

    def write() -> None:
        variant = made.add("a", VariantFacts())
        while not stop.is_set():
            variant.batch_done(2, 0, 0.001, [0.001, 0.3])
            variant.request_done("ok", 0.3)
            made.add("b", VariantFacts())

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            for family in parse_text(made.render()[0].decode()):
                last = {s.name: s.value for s in family.samples if s.labels.get("version") == "a"}
                if family.type == "histogram" and last:
                    assert last[f"{family.name}_bucket"] == last[f"{family.name}_count"]
    finally:
        stop.set()
        writer.join()


def test_observing_costs_under_a_hundredth_of_a_request() -> None:
    variant = VariantMetrics("a", VariantFacts())
    request = in_calls(lambda: variant.request_done("ok", 0.01))
    alone = in_calls(lambda: variant.batch_done(1, 0, 0.01, [0.001]))
    assert request + alone < CALLS_OF_A_REQUEST / 100
