"""Which ranks the layers get when they compete by what the answers lose: the least that fits into a cost.

A layer's ladder leads from the layer as it is down to its lowest rank. What the answers lose is measured at a few of
its rungs, with this layer alone factorised; between them the loss's logarithm is taken to follow the cost. Losses of
several layers nearly add up, and all layers should then pay one price per unit of cost (Shoham and Gersho, "Efficient
bit allocation for an arbitrary set of quantizers", 1988).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

Ranks: TypeAlias = tuple[int, ...]
Losses: TypeAlias = Callable[[Sequence[Ranks]], Sequence[float]]
"""Distances of a model's answers from what they are, with each of these ranks of one layer alone."""

MOST_RUNGS = 24
"""Ranks of one layer that are considered."""
MEASURED = 5
"""Those of them whose loss is measured."""
LEAST_LOSS, WORST_LOSS = 1e-9, 1e9
"""Below is rounding, of which a logarithm needs some; above are answers that are no numbers."""


class Rung(NamedTuple):
    """Ranks of a layer (none: the layer as it is), what it costs with them, and what the answers lose."""

    ranks: Ranks
    cost: float
    loss: float


class Move(NamedTuple):
    """Of one layer to another of its rungs, and by how much the sums change."""

    layer: str
    rung: Rung
    cost: float
    loss: float


def ladder(ranks: Sequence[Ranks], cost: Callable[[Ranks], float], losses: Losses) -> list[Rung]:
    """The rungs of a layer, of ranks in growing order; those that cost no less than the layer are left out."""
    dense = cost(())
    some = [ranks[place] for place in _spread(len(ranks), MOST_RUNGS)]
    cheaper = sorted((price, item) for item in some if (price := cost(item)) < dense)
    if not cheaper:
        return [Rung((), dense, 0.0)]
    prices, kept = [price for price, _ in cheaper], [item for _, item in cheaper]
    asked = _spread(len(kept), MEASURED)
    found = np.nan_to_num(losses([kept[place] for place in asked]), nan=WORST_LOSS)
    measured = np.log(np.clip(found, LEAST_LOSS, WORST_LOSS))
    between = np.exp(np.interp(prices, [prices[place] for place in asked], measured))
    return [Rung((), dense, 0.0), *map(Rung, kept, prices, map(float, between))]


def least_loss(ladders: Mapping[str, Sequence[Rung]], budget: float) -> dict[str, Ranks] | None:
    """The ranks of every layer whose costs are at most `budget` in sum, for the least sum of losses; `None`: there are
    none so cheap."""
    chosen = {name: rungs[0] for name, rungs in ladders.items()}
    while (over := sum(rung.cost for rung in chosen.values()) - budget) > 0:
        down = [move for move in _moves(ladders, chosen) if move.cost < 0]
        if not down:
            return None
        best = min(down, key=lambda move: move.loss / -move.cost)
        chosen[best.layer] = best.rung
    while up := [move for move in _moves(ladders, chosen) if move.cost <= -over and move.loss < 0]:
        best = min(up, key=lambda move: move.loss)
        chosen[best.layer] = best.rung
        over += best.cost
    return {name: rung.ranks for name, rung in chosen.items()}


def _moves(ladders: Mapping[str, Sequence[Rung]], chosen: Mapping[str, Rung]) -> Iterator[Move]:
    for name, rungs in ladders.items():
        now = chosen[name]
        for rung in rungs:
            if rung != now:
                yield Move(name, rung, rung.cost - now.cost, rung.loss - now.loss)


def _spread(length: int, most: int) -> list[int]:
    """At most so many places of a sequence, both ends among them."""
    return sorted({round(place) for place in np.linspace(0, length - 1, min(length, most))})
