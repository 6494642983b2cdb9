"""How many directions each factorised layer keeps: one rule for every low-rank pass.

A factorised layer is cheaper only below its break-even rank; beyond it the layer is left as it was, and the reason is
written down. This file needs no torch, because its options are validated with the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, Field, model_validator

from leanserve.errors import PassFailed
from leanserve.passes.toolkit.rank_ladders import Losses, Ranks, Rung, ladder, least_loss

DEFAULT_MULTIPLE = 16
"""Chosen ranks are rounded up to it: kernels work on whole vectors, and 16 floats fill the widest (AVX-512)."""


@dataclass(frozen=True)
class Candidate:
    """A layer that could be factorised.

    `spectra` holds, for each rank to be chosen, the energies (squared singular values) of the directions, strongest
    first. `dense` is the layer's cost as it is and `cost` its cost with given ranks, both in MACs per row.
    `sides` are those of the matrix behind each spectrum, where it is a matrix of weights.
    """

    spectra: tuple[Sequence[float], ...]
    dense: int
    cost: Callable[[Ranks], int]
    sides: tuple[tuple[int, int], ...] = ()
    seconds: Callable[[Ranks], float] | None = None
    """Measured time of a row with given ranks; with none, of the layer as it is."""
    losses: Losses | None = None

    def price(self, ranks: Ranks, *, timed: bool) -> float:
        """In seconds or MACs of a row; without ranks, of the layer as it is."""
        if timed:
            assert self.seconds is not None
            return self.seconds(ranks)
        return self.cost(ranks) if ranks else self.dense


class Choice(NamedTuple):
    """Ranks by layer, and the layers left as they were with the reason."""

    ranks: dict[str, Ranks]
    left: dict[str, str]


class RankRule(BaseModel):
    """Options of a pass that chooses ranks: exactly one of `rank`, `energy`, `macs`, `latency` and `vbmf`."""

    rank: int | None = Field(default=None, ge=1)
    """The same rank for every layer."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """Share of each layer's energy that is kept."""
    macs: float | None = Field(default=None, gt=0, lt=1)
    """Share of the model's MACs that may remain."""
    latency: float | None = Field(default=None, gt=0, lt=1)
    """Share of the model's time for one row that may remain, in torch on this machine; as `macs`, with layers timed."""
    vbmf: bool = False
    """Keep what of each layer's weight is more than noise, by variational Bayes."""
    round_to: int | None = Field(default=None, ge=1)
    """Ranks chosen by any of these but `rank` are rounded up to a multiple of it; 16 by default."""
    sensitivity: Literal["energy", "answers"] = "energy"
    """What `macs` or `latency` look at to divide a model among its layers: the energy of each, or what the answers to
    calibration rows lose by each layer alone, measured at a few ranks."""
    break_even: Literal["macs", "time"] | None = None
    """By what a layer must get cheaper to be factorised; `time` is measured here. By default as ranks are chosen."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = self._given
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of rank, energy, macs, latency and vbmf (got {', '.join(given) or 'none'})"
            )
        if self.rank is not None and self.round_to is not None:
            raise ValueError("round_to rounds chosen ranks; with rank there is nothing to choose, so drop one of them")
        if self.sensitivity == "answers" and self.macs is None and self.latency is None:
            raise ValueError("sensitivity: answers divides what macs or latency leave; give one of them, or drop it")
        if self.latency is not None and self.break_even == "macs":
            raise ValueError("latency chooses by time, and so does its break-even; drop break_even: macs")
        return self

    @property
    def times(self) -> bool:
        """Whether time is measured to decide."""
        return self.latency is not None or self.break_even == "time"

    def choose(self, candidates: Mapping[str, Candidate], total: float, left: Mapping[str, str]) -> Choice:
        """Choose ranks for the candidates of a model that costs `total` MACs, with `latency` seconds, for a row; `left`
        tells what was ruled out before.

        Raises:
            PassFailed: the share cannot be reached, or no layer gets cheaper.
        """
        wanted = self._wanted(candidates, total)
        choice = Choice({}, dict(left))
        for name, ranks in wanted.items():
            candidate = candidates[name]
            cost, dense = (candidate.price(given, timed=self.times) for given in (ranks, ()))
            if cost < dense:
                choice.ranks[name] = ranks
            elif not ranks:
                choice.left[name] = "the answers lose less by the other layers"
            else:
                told = f"{cost / (dense or 1):.2f} times the layer's {'time' if self.times else 'MACs'}"
                choice.left[name] = f"rank {'x'.join(map(str, ranks))} would cost {told}"
        if not choice.ranks:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.left.items())
            raise PassFailed(
                f"{self._rule()}: no layer gets cheaper by factorising ({reasons}); lower it or drop the pass"
            )
        return choice

    def _wanted(self, candidates: Mapping[str, Candidate], total: float) -> dict[str, Ranks]:
        if self.rank is not None:
            rank = self.rank
            return {
                name: tuple(min(rank, len(spectrum)) for spectrum in candidate.spectra)
                for name, candidate in candidates.items()
            }
        if self.energy is not None:
            return self._by_energy(candidates, self.energy)
        if self.vbmf:
            return {name: self._above_noise(candidate) for name, candidate in candidates.items()}
        share = self.macs or self.latency or 0.0
        if self.sensitivity == "answers":
            return self._by_answers(candidates, total, share)
        return self._by_cost(candidates, total, share)

    def _by_energy(self, candidates: Mapping[str, Candidate], energy: float) -> dict[str, Ranks]:
        return {name: self._with_energy(candidate, energy) for name, candidate in candidates.items()}

    def _with_energy(self, candidate: Candidate, energy: float) -> Ranks:
        multiple = self.round_to or DEFAULT_MULTIPLE
        return tuple(_rank(spectrum, energy, multiple) for spectrum in candidate.spectra)

    def _above_noise(self, candidate: Candidate) -> Ranks:
        from leanserve.passes.toolkit.noise_rank import directions_above_noise

        multiple = self.round_to or DEFAULT_MULTIPLE
        found = [directions_above_noise(*item) for item in zip(candidate.spectra, candidate.sides, strict=True)]
        return tuple(
            min(-(-rank // multiple) * multiple, len(spectrum))
            for rank, spectrum in zip(found, candidate.spectra, strict=True)
        )

    def _by_cost(self, candidates: Mapping[str, Candidate], total: float, share: float) -> dict[str, Ranks]:
        """The highest energy, common to all layers, at which the model fits into its share of the cost."""
        timed = self.latency is not None

        def remaining(energy: float) -> float:
            ranks = self._by_energy(candidates, energy)
            costs = (
                (item.price((), timed=timed), item.price(ranks[name], timed=timed)) for name, item in candidates.items()
            )
            return (total - sum(max(0.0, dense - cost) for dense, cost in costs)) / total

        low, high = 0.0, 1.0
        if (least := remaining(low)) > share:
            raise self._out_of_reach(share, least)
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if remaining(middle) <= share else (low, middle)
        return self._by_energy(candidates, low)

    def _by_answers(self, candidates: Mapping[str, Candidate], total: float, share: float) -> dict[str, Ranks]:
        """Those with which the model fits into its share of the cost and the answers lose least."""
        ladders = {name: self._ladder(candidate) for name, candidate in candidates.items()}
        fixed = total - sum(rungs[0].cost for rungs in ladders.values())
        found = least_loss(ladders, share * total - fixed)
        if found is None:
            least = fixed + sum(min(rung.cost for rung in rungs) for rungs in ladders.values())
            raise self._out_of_reach(share, least / total)
        dear = [name for name, rungs in ladders.items() if len(rungs) == 1]  # at any rank, as `choose` tells
        return found | {name: self._with_energy(candidates[name], 0.0) for name in dear}

    def _ladder(self, candidate: Candidate) -> list[Rung]:
        assert candidate.losses is not None
        shares = sorted({float(part) for spectrum in candidate.spectra for part in _kept_shares(spectrum)})
        ranks = list(dict.fromkeys(self._with_energy(candidate, share) for share in shares))
        return ladder(ranks, partial(candidate.price, timed=self.latency is not None), candidate.losses)

    def _out_of_reach(self, share: float, least: float) -> PassFailed:
        [name] = self._given
        what = "MACs" if self.latency is None else "time"
        return PassFailed(f"{name}: {share} cannot be reached, the lowest ranks still leave {least:.3f} of the {what}")

    def _rule(self) -> str:
        [name] = self._given
        return f"{name} {getattr(self, name)}"

    @property
    def _given(self) -> list[str]:
        return [
            name for name in ("rank", "energy", "macs", "latency", "vbmf") if getattr(self, name) not in (None, False)
        ]


def _kept_shares(spectrum: Sequence[float]) -> list[float]:
    """Of the energy, by the rank."""
    whole = sum(spectrum) or 1.0
    return [kept / whole for kept in accumulate(spectrum)]


def _rank(spectrum: Sequence[float], energy: float, multiple: int) -> int:
    """The lowest rank, rounded up, that keeps the share `energy`; never more than the spectrum is long."""
    wanted = energy * sum(spectrum) * (1 - 1e-9)
    kept, rank = 0.0, 0
    while rank < len(spectrum) and (rank == 0 or kept < wanted):
        kept += spectrum[rank]
        rank += 1
    return min(-(-rank // multiple) * multiple, len(spectrum))
