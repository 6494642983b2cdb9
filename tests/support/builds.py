"""Building a config in this process, for tests of what is built and not of what is measured."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from leanserve.artifacts.manifest import Fidelity, Measurement
from leanserve.artifacts.store import ArtifactStore
from leanserve.build import builder as build
from leanserve.build import plan as planning
from leanserve.build.progress import BuildProgress
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Base
from leanserve.evaluation.quality import GateOutputs
from leanserve.evaluation.speed import Stopwatch
from leanserve.hardware import cpu_name, this_hardware


def measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring needs a base that another process can load; end-to-end tests do that."""
    nothing = dict.fromkeys(("score", "score_low", "score_high", "drop", "drop_low", "drop_high"))
    size = dict.fromkeys(
        ("samples", "agreement", "batch_dependence", "disk_bytes", "parameters", "macs", "peak_memory_bytes"), 1
    )
    found = Fidelity.model_validate(nothing | size | {"outputs": ()})
    measured = Measurement(fidelity=found, score_digest="", cpu=cpu_name(), threads=1)
    monkeypatch.setattr(build, "measure", lambda *_: (measured, GateOutputs((), None)))
    monkeypatch.setattr(Stopwatch, "beside_anchor", lambda *_: [])


def constructed(store: ArtifactStore, config: ServiceConfig, base: Base) -> tuple[list[list[str]], str]:
    """Build a config; the keys of all that each variant is made of, and what the progress said."""
    said = io.StringIO()
    work = planning.plan(config, base, this_hardware())
    progress = BuildProgress(Console(file=said, width=200), len(work.keys))
    build.Builder(store, config, base, this_hardware(1), progress).build(work)
    return [[step.key for step in steps] for _, steps in work.recipes], said.getvalue()
