"""Made-up variant reports for the tests of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from leanserve.artifacts.manifest import Manifest, OutputFidelity, Quality, VariantReport
from leanserve.contracts import Meaning, ModelSpec
from leanserve.hardware import Hardware

HOSTILE = "<script>alert(1)</script>[red]&\"'$x^2$"
UNLABELLED = dict.fromkeys(("score", "score_low", "score_high", "drop", "drop_low", "drop_high"))


def output(name: str, meaning: Meaning, agreement: float, **more: Any) -> OutputFidelity:
    """An output of this agreement, which the rows leave no doubt about; all rows are as good as they are together."""
    known = {"agreement": agreement, "agreement_low": agreement, "agreement_high": agreement} | {
        "worst_agreement": agreement,
        "worst_row": 0,
        "not_finite": 0,
        "constant": False,
    }
    return OutputFidelity(name=name, meaning=meaning, **(known | more))


def classes(agreement: float, name: str = "logits") -> OutputFidelity:
    """An output of classes of this agreement."""
    return output(name, "logits", agreement, kl=0.0123)


def values(error: float, name: str = "boxes") -> OutputFidelity:
    """An output of values of which channel 2 is that far off."""
    return output(name, "values", max(0.0, 1 - error), error=error, channel=2)


def embedding(cosine: float) -> OutputFidelity:
    """An output of embeddings of this cosine."""
    return output("embedding", "embedding", cosine, cosine=cosine, rank_agreement=0.9942)


NO_CLASSES = UNLABELLED | {"agreement": 0.9987, "outputs": (embedding(0.9987),)}


def artifact(kind: str | None = None, gain: float = 1.0, score: float | None = 0.99, **more: Any) -> Manifest:
    """An artifact of a base that runs 100 rows/s at 99 %; `more` goes to its quality or to its manifest.

    Its agreement is that of the worst of its `outputs`.
    """
    quality: dict[str, Any] = {
        "samples": 450,
        "score": score,
        "score_low": None if score is None else score - 0.01,
        "score_high": None if score is None else score + 0.006,
        "drop": None if score is None else 0.99 - score,
        "drop_low": None if score is None else 0.99 - score,
        "drop_high": None if score is None else 0.99 - score,
        "agreement": 0.9945,
        "outputs": (classes(0.9945),),
        "batch_dependence": 1.2e-6,
        "disk_bytes": 4_800_000,
        "parameters": 1_190_000,
        "macs": 148_000_000,
        "latency_ms": {1: 10 / gain, 8: 80 / gain, 32: 320 / gain},
        "throughput": 100 * gain,
        "speedup": gain,
        "speedup_low": gain,
        "speedup_high": gain,
        "rounds": 7,
        "waited": 0.01,
        "peak_memory_bytes": 64_000_000,
    }
    manifest: dict[str, Any] = {
        "key": f"{kind}-{gain}-{score}",
        "parents": (),
        "base": "digits",
        "kind": kind,
        "options": {},
        "decisions": {},
        "facts": {},
        "simulated": False,
        "format": "torch",
        "spec": ModelSpec((), ()),
        "files": {},
        "parameters": 1_190_000,
        "macs": 148_000_000,
        "seconds": 2.5,
        "versions": {"torch": "2.13.0"},
        "hardware": Hardware("x", 2, ("avx2", "avx512_vnni")),
        "cpu": "Test CPU 3000",
        "change": None,
        "threads": 2,
    }
    quality |= {name: value for name, value in more.items() if name in quality}
    quality["agreement"] = min(output.agreement for output in quality["outputs"])
    manifest |= {name: value for name, value in more.items() if name in manifest and name not in quality}
    return Manifest(**manifest, quality=Quality(**quality))


BASE = artifact()


def variant(
    name: str,
    *passes: Manifest,
    base: Manifest = BASE,
    state: Literal["serving", "excluded"] = "serving",
    reason: str | None = None,
) -> VariantReport:
    return VariantReport(name=name, state=state, reason=reason, ancestry=(base, *passes))


def a_few() -> list[VariantReport]:
    fold = artifact("fold_bn", gain=1.1)
    return [
        variant("eager"),
        variant("onnx", fold, artifact("onnxruntime", gain=2)),
        variant(
            "int8",
            fold,
            artifact(
                "quantize_static",
                gain=5,
                score=0.987,
                disk_bytes=1_200_000,
                options={"observer": "entropy", "keep_float": ["head"]},
                facts={"nodes_quantized": 22.0},
            ),
        ),
        variant("pruned", artifact("prune_channels", gain=9, score=0.9)),
        variant(
            "sparse",
            artifact("prune_magnitude", gain=20, simulated=True),
            state="excluded",
            reason="agreement 99.45 % is below min_agreement 99.9 %",
        ),
    ]


def changed(reports: Iterable[VariantReport], quality: Mapping[str, Any]) -> list[VariantReport]:
    """The reports with these values in the quality of every artifact."""
    return [
        report.model_copy(
            update={
                "ancestry": tuple(
                    manifest.model_copy(update={"quality": manifest.quality.model_copy(update=quality)})
                    for manifest in report.ancestry
                )
            }
        )
        for report in reports
    ]
