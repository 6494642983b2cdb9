"""The gate: what of a variant is beyond its limits, and what the rows there are cannot decide.

A limit is kept or not by what was measured. Where it is kept, but the 95 % interval of what was measured reaches beyond
it, other rows might have shown otherwise: that is undecided, and the config says what becomes of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from leanserve.artifacts.manifest import OutputFidelity, Quality
from leanserve.config.variant_section import GateConfig
from leanserve.contracts import CLASS_MAPS

ROUNDING = 1e-9
"""Of stored numbers, which is forgiven."""


class GateVerdict(NamedTuple):
    """Why a variant fails its gate, or `None`; and what of it is undecided, or `None`."""

    reason: str | None
    doubt: str | None


class _Finding(NamedTuple):
    """What was measured on the wrong side of a limit, or reaches there with its interval."""

    text: str
    failed: bool


def judged(gate: GateConfig, quality: Quality, base: Quality, *, compressed: bool = True) -> GateVerdict:
    """What the gate says of a variant. A limit that cannot be checked for lack of labels is a reason.

    `compressed`: it has passes; the base itself owes no speed.
    """
    findings = [*_drop(gate, quality, base), *_outputs(gate, quality), *_dependence(gate, quality)]
    if compressed:
        findings += _speed(gate, quality)
    settled = gate.undecided == "fail"
    reasons = [item.text for item in findings if item.failed or settled]
    doubts = [item.text for item in findings if not item.failed]
    return GateVerdict("; ".join(reasons) or None, "; ".join(doubts) or None)


def _drop(gate: GateConfig, quality: Quality, base: Quality) -> Iterator[_Finding]:
    if gate.max_drop is None:
        return
    if quality.score is None or base.score is None or quality.drop is None:
        yield _Finding("gate.max_drop needs labels in the gate split, and there are none", failed=True)
        return
    scores = f"score {quality.score:.4f} is {quality.drop:.4f} below the base's {base.score:.4f}"
    allowed = f"gate.max_drop allows {gate.max_drop}"
    high = math.inf if quality.drop_high is None else quality.drop_high
    if not quality.drop <= gate.max_drop + ROUNDING:
        yield _Finding(f"{scores}; {allowed}", failed=True)
    elif not high <= gate.max_drop + ROUNDING:
        yield _Finding(
            f"{scores}, and over {quality.samples:,} rows the drop may be up to {high:.4f}; {allowed} (undecided: more "
            "gate rows decide it)",
            failed=False,
        )


def _outputs(gate: GateConfig, quality: Quality) -> Iterator[_Finding]:
    for output in quality.outputs:
        if output.constant:
            yield _Finding(f"output '{output.name}' is the same for every row, and the base's is not", failed=True)
        if gate.min_agreement is None:
            continue
        least, asked = gate.min_agreement - ROUNDING, f"gate.min_agreement asks for {gate.min_agreement}"
        if not output.agreement >= least:
            yield _Finding(f"{_distance(output)}; {asked}", failed=True)
        elif not output.agreement_low >= least:
            yield _Finding(
                f"{_distance(output)}, and over {quality.samples:,} rows it may be {output.agreement_low:.4f}; {asked} "
                "(undecided: more gate rows decide it)",
                failed=False,
            )


def _dependence(gate: GateConfig, quality: Quality) -> Iterator[_Finding]:
    if gate.max_batch_dependence is not None and not quality.batch_dependence <= gate.max_batch_dependence:
        yield _Finding(
            f"an answer changes by {quality.batch_dependence:.3g} of the largest output with the rows that share its "
            f"batch; gate.max_batch_dependence allows {gate.max_batch_dependence} (base.rows: one gives every row a "
            "batch to itself)",
            failed=True,
        )


def _speed(gate: GateConfig, quality: Quality) -> Iterator[_Finding]:
    if gate.min_speedup is None:
        return
    asked = f"gate.min_speedup asks for {gate.min_speedup}"
    disturbed = ", measured beside other work" if quality.disturbed else ""
    measured = f"it has {quality.speedup:.2f} times the throughput of the base{disturbed}"
    if quality.speedup < gate.min_speedup - ROUNDING:
        yield _Finding(f"{measured}; {asked}", failed=True)
    elif quality.speedup_low < gate.min_speedup - ROUNDING:
        yield _Finding(
            f"{measured}, and {quality.speedup_low:.2f} times in its slowest round; {asked} (undecided: measure again "
            "on a quiet machine)",
            failed=False,
        )


def _distance(output: OutputFidelity) -> str:
    """How far an output is from the base's, in words."""
    broken = f" ({output.not_finite} numbers are infinite or NaN and should not be)" if output.not_finite else ""
    agreement = f"output '{output.name}'{broken} has an agreement of {output.agreement:.4f}"
    if output.cosine is not None:
        return f"{agreement}, its mean cosine with the base's"
    if output.meaning in CLASS_MAPS:
        where = "" if output.channel is None else f" where that is class {output.channel}"
        return f"{agreement}, the share of places with the base's class{where}"
    if output.error is None:
        return f"{agreement}, the share of rows with the base's answer"
    return f"{agreement}: it is off by {100 * output.error:.1f} % of the base's spread (channel {output.channel})"
