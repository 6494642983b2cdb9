"""What was measured of an artifact, for tests that store and compare it."""

from __future__ import annotations

from leanserve.artifacts.manifest import Fidelity, Measurement, OutputFidelity


def measurement() -> Measurement:
    found = Fidelity(
        samples=1,
        score=None,
        score_low=None,
        score_high=None,
        agreement=1.0,
        outputs=(OutputFidelity(name="y", meaning="values", agreement=1.0, error=0.0, channel=0, not_finite=0),),
        batch_dependence=0.0,
        disk_bytes=1,
        parameters=1,
        macs=1,
        peak_memory_bytes=1,
    )
    return Measurement(fidelity=found, cpu="x", threads=1)
