"""How good is a model that a pass considers? Answers on the calibration split, beside those of the base.

For passes that search: greedy soups, bits per layer, architectures. They may not look at the gate split, which would
then judge what it had chosen. All runs in the build process, on a lane of its own as models run when they serve; a
single candidate is loaded at a time, and the base's answers are computed once per build.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from leanserve.contracts import Array, Arrays, Base, CandidateQuality, Data, Model, ModelSpec, Share
from leanserve.errors import PassFailed
from leanserve.evaluation.fidelity import fidelity
from leanserve.evaluation.measure import outputs_on
from leanserve.runtime.device import Device
from leanserve.runtime.formats import open_backend

ROWS = 512
"""Rows of the calibration split that are looked at, which bounds time and the memory of their answers."""


class CandidateEvaluator:
    """`BuildContext.evaluate` of one build; close it in the end."""

    def __init__(self, base: Base, threads: int) -> None:
        self._base = base
        self._threads = threads

    def __call__(self, model: Model) -> CandidateQuality:
        """Run a model and compare it with the base.

        Raises:
            PassFailed: the calibration split is empty.
        """
        outputs, labels = self._answers(model), self._labels
        near = fidelity(outputs, self._reference, self._base.spec.outputs)
        score = None if labels is None else self._base.score(outputs, labels)
        return CandidateQuality(len(self._rows), score, min(output.agreement for output in near))

    def close(self) -> None:
        """End the lane, if there was need of one."""
        if "_device" in vars(self):
            self._device.close()

    @cached_property
    def _device(self) -> Device:
        return Device("candidates", self._threads)

    @cached_property
    def _rows(self) -> Data:
        rows = self._base.data("calibration", ROWS)
        if len(rows) < self._base.unit:
            raise PassFailed(f"base '{self._base.name}' has no rows in its calibration split to compare candidates on")
        return self._rows_for(self._base.spec)

    def _rows_for(self, spec: ModelSpec) -> Data:
        """The same rows, prepared for a model of this spec; in whole units."""
        rows = self._base.data("calibration", ROWS, spec)
        whole = len(rows) - len(rows) % self._base.unit
        return self._base.data("calibration", whole, spec)

    @cached_property
    def _labels(self) -> Array | None:
        parts = [batch.labels for batch in self._rows.batches(64)]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None

    @cached_property
    def _reference(self) -> Arrays:
        return self._answers(self._base.model())

    def _answers(self, model: Model) -> Arrays:
        def run() -> Arrays:
            backend = open_backend(model, Share(self._threads))
            try:
                return outputs_on(backend, self._rows_for(model.spec))
            finally:
                backend.close()

        [outputs] = self._device.call_on_each(lambda _: run())
        return outputs
