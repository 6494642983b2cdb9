"""The rule that chooses ranks: energy, MACs, break-even."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from leanserve.errors import PassFailed
from leanserve.passes.toolkit.noise_rank import directions_above_noise
from leanserve.passes.toolkit.ranks import Candidate, RankRule


def candidate(spectrum: list[float], inputs: int = 100, outputs: int = 100) -> Candidate:
    return Candidate((spectrum,), inputs * outputs, lambda ranks: ranks[0] * (inputs + outputs))


FALLING = [2.0**-index for index in range(100)]
FLAT = [1.0] * 100


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 4, "energy": 0.5},
        {"energy": 0.5, "macs": 0.5},
        {"rank": 4, "round_to": 8},
        {"macs": 1.0},
        {"vbmf": True, "rank": 4},
        {"energy": 0.9, "sensitivity": "answers"},
    ],
)
def test_exactly_one_rule(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        RankRule.model_validate(options)


def test_options_survive_a_dump_with_defaults_filled() -> None:
    for rule in (RankRule(rank=3), RankRule(energy=0.9), RankRule(macs=0.5, round_to=4)):
        assert RankRule.model_validate(rule.model_dump()) == rule


def test_energy_keeps_the_lowest_rank_that_has_it() -> None:
    assert RankRule(energy=0.75, round_to=1).choose({"a": candidate(FALLING)}, 10_000, {}).ranks == {"a": (2,)}
    assert RankRule(energy=0.76, round_to=1).choose({"a": candidate(FALLING)}, 10_000, {}).ranks == {"a": (3,)}
    assert RankRule(energy=0.76).choose({"a": candidate(FALLING)}, 10_000, {}).ranks == {"a": (16,)}


def test_a_layer_beyond_break_even_is_left_alone_and_says_why() -> None:
    choice = RankRule(energy=0.9).choose({"steep": candidate(FALLING), "flat": candidate(FLAT)}, 20_000, {"x": "why"})
    assert list(choice.ranks) == ["steep"]
    assert choice.left == {"x": "why", "flat": "rank 96 would cost 1.92 times the layer's MACs"}


def test_a_layer_that_no_rank_makes_cheaper_says_so_where_the_answers_decide() -> None:
    asked = [
        replace(item, losses=lambda ranks: [0.1] * len(ranks)) for item in (candidate(FLAT), candidate(FLAT, 8, 8))
    ]
    choice = RankRule(macs=0.9, sensitivity="answers").choose(dict(zip("ab", asked, strict=True)), 10_064, {})
    assert list(choice.ranks) == ["a"]
    assert choice.left == {"b": "rank 16 would cost 4.00 times the layer's MACs"}


def test_rank_at_break_even_is_left_alone() -> None:
    layers = {"a": candidate(FLAT)}
    assert RankRule(rank=49).choose(layers, 10_000, {}).ranks == {"a": (49,)}
    with pytest.raises(PassFailed, match=r"rank 50: no layer gets cheaper .*\(a: rank 50 would cost 1.00 times"):
        RankRule(rank=50).choose(layers, 10_000, {})


@given(st.floats(0.15, 0.95), st.lists(st.floats(0.5, 1), min_size=1, max_size=4), st.integers(0, 20_000))
def test_macs_are_met_from_below_and_nearly_used(share: float, decays: list[float], rest: int) -> None:
    layers = {str(i): candidate([decay**index for index in range(100)]) for i, decay in enumerate(decays)}
    total = 10_000 * len(layers) + rest
    rule = RankRule(macs=share, round_to=1)
    try:
        choice = rule.choose(layers, total, {})
    except PassFailed as error:
        if "cannot be reached" in str(error):
            assert rest + 200 * len(layers) > share * total
        return
    used = rest + sum(layers[name].cost(choice.ranks[name]) if name in choice.ranks else 10_000 for name in layers)
    assert used <= share * total


def test_macs_out_of_reach_say_what_remains() -> None:
    with pytest.raises(PassFailed, match=r"macs: 0.3 cannot be reached, the lowest ranks still leave 0.510"):
        RankRule(macs=0.3, round_to=1).choose({"a": candidate(FALLING)}, 20_000, {})


def spectrum_of(rank: int, noise: float, sides: tuple[int, int] = (60, 200)) -> list[float]:
    random = np.random.default_rng(0)
    signal = random.standard_normal((sides[0], rank)) @ random.standard_normal((rank, sides[1]))
    values = np.linalg.svd(signal + noise * random.standard_normal(sides), compute_uv=False)
    squares: list[float] = (values**2).tolist()
    return squares


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_what_is_more_than_noise_is_counted(rank: int, noise: float) -> None:
    assert directions_above_noise(spectrum_of(rank, noise), (60, 200)) == rank
    assert directions_above_noise(spectrum_of(rank, noise), (200, 60)) == rank


def test_noise_alone_has_one_direction_and_a_layer_gets_what_its_weight_has() -> None:
    assert directions_above_noise(spectrum_of(0, 1.0), (60, 200)) == 1
    item = Candidate((spectrum_of(5, 0.1),), 12_000, lambda ranks: ranks[0] * 260, ((60, 200),))
    assert RankRule(vbmf=True, round_to=1).choose({"a": item}, 12_000, {}).ranks == {"a": (5,)}
    assert RankRule(vbmf=True).choose({"a": item}, 12_000, {}).ranks == {"a": (16,)}
