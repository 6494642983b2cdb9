"""Answers of base and candidate to the same rows, compared a few batches at a time, beside the loop."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import orjson

from leanserve.contracts import Array, Arrays, Json, ModelSpec
from leanserve.experiments.answer_pairs import AgreementRule, AnswerPairs, PairedRows, pair_answers
from leanserve.experiments.disagreements import Disagreement, DisagreementRing, row_details
from leanserve.live.rerun import AnsweredRequest, Rerun
from leanserve.live.shadows import AnsweredAgain
from leanserve.request_identity import request_id
from leanserve.runtime.assembly import dynamic_axes
from leanserve.texts import KINDS

MOST_TOLD = 8
"""Disagreements of one comparison that are kept; a candidate that is wrong everywhere needs no more examples."""


class _Pair(NamedTuple):
    request: AnsweredRequest
    ours: Arrays
    theirs: Arrays


class Comparison:
    """The sums of one experiment. `add` belongs to one thread at a time; what it makes is replaced, never changed.

    `repeated` has the rows that the base answered twice, and how many of them alike.
    """

    def __init__(self, spec: ModelSpec, rule: AgreementRule, ring: DisagreementRing, *, keep_payloads: bool) -> None:
        self.pairs = AnswerPairs()
        self.repeated = AnswerPairs()
        self._spec = spec
        self._rule = rule
        self._ring = ring
        self._keep_payloads = keep_payloads
        self._varies = bool(dynamic_axes(spec.inputs))

    def add(self, batches: Sequence[AnsweredAgain]) -> None:
        """Compare the candidate's answers, and the base's second ones, with those that clients got."""
        for pairs in _alike(_pairs(batches, [batch.candidate for batch in batches])):
            found = self._compared(pairs)
            self.pairs = self.pairs.merged(found.sums)
            self._keep(pairs, found)
        for pairs in _alike(_pairs(batches, [batch.base for batch in batches])):
            sums = self._compared(pairs).sums
            self.repeated = self.repeated.merged(AnswerPairs(sums.rows, sums.agreed, sums.broken))

    def disagreements(self) -> list[Json]:
        """The last rows that were answered differently, the newest first."""
        return [
            {
                "at": item.at,
                "request": item.request,
                "row": item.row,
                "outputs": item.outputs,
                "payload": None if item.payload is None else orjson.loads(item.payload),
            }
            for item in list(self._ring)
        ]

    def _compared(self, pairs: Sequence[_Pair]) -> PairedRows:
        ours, theirs = (_joined([getattr(pair, side) for pair in pairs]) for side in ("ours", "theirs"))
        lengths = [pair.request.length for pair in pairs for _ in range(pair.request.rows)] if self._varies else ()
        return pair_answers(ours, theirs, self._spec.outputs, self._rule, lengths)

    def _keep(self, pairs: Sequence[_Pair], found: PairedRows) -> None:
        """Keep some of the rows that differ, to be looked at."""
        places = [(pair, row) for pair in pairs for row in range(pair.request.rows)]
        for place in found.disagreed[:MOST_TOLD]:
            pair, row = places[place]
            told = row_details(found.found, place)
            for field, ours in zip(self._spec.outputs, pair.ours, strict=True):
                if "class" in told[field.name]:
                    told[field.name]["other"] = str(int(ours[row].argmax()))
            identity = pair.request.identity
            name = request_id(identity) if identity else ""
            payload = self._payload(pair.request, row) if self._keep_payloads else None
            self._ring.add(Disagreement(time.time(), name, row, told, payload))

    def _payload(self, request: AnsweredRequest, row: int) -> bytes:
        pairs = zip(self._spec.inputs, request.sample, strict=True)
        rows = {field.name: _plain(array[row : row + 1]) for field, array in pairs}
        return orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY)


def _plain(row: Array) -> Json:
    """One row [1, ...] without its first axis, as the JSON library takes it."""
    return row.tolist()[0] if row.dtype.kind in KINDS else np.ascontiguousarray(row[0])


def _pairs(batches: Iterable[AnsweredAgain], reruns: Iterable[Rerun]) -> Iterator[_Pair]:
    for batch, made in zip(batches, reruns, strict=True):
        for request, answer in zip(batch.requests, made.answers, strict=True):
            if answer is not None and _shapes(answer) == _shapes(request.answer):
                yield _Pair(request, answer, request.answer)


def _alike(pairs: Iterable[_Pair]) -> list[list[_Pair]]:
    """Those whose rows have the same shapes together: they can be joined."""
    groups: defaultdict[object, list[_Pair]] = defaultdict(list)
    for pair in pairs:
        groups[tuple(array.shape[1:] for array in pair.theirs)].append(pair)
    return list(groups.values())


def _shapes(arrays: Arrays) -> list[tuple[int, ...]]:
    return [array.shape for array in arrays]


def _joined(answers: Sequence[Arrays]) -> Arrays:
    return answers[0] if len(answers) == 1 else tuple(np.concatenate(each) for each in zip(*answers, strict=True))
