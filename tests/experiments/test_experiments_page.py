"""The numbers of requests in docs/experiments.md are those that the code needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanserve.experiments.proportion import median_rows

PAGE = Path(__file__).parent.parent.parent / "docs" / "experiments.md"
ALPHA = 0.05


def table(title: str) -> list[tuple[float, float]]:
    """Effects in the head (in percent) and requests in the first row below it."""
    lines = PAGE.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {title} |"))
    effects, requests = ([cell.strip() for cell in lines[row].split("|")[2:-1]] for row in (start, start + 2))
    return [
        (float(effect.removesuffix("%")) / 100, float(count.replace(",", "")))
        for effect, count in zip(effects, requests, strict=True)
    ]


def test_the_rows_for_an_agreement_are_those_needed() -> None:
    found = table("agreement, limit 98 %")
    assert len(found) == 7
    for share, rows in found:
        assert median_rows(share, 0.98, ALPHA if share > 0.98 else ALPHA / 4) == pytest.approx(rows, rel=0.01)


def test_the_requests_for_failures_are_those_needed() -> None:
    found = table("failures, limit 1 %")
    assert len(found) == 7
    for share, rows in found:
        needed = median_rows(1 - share, 0.99, ALPHA if share < 0.01 else ALPHA / 4)
        assert needed == pytest.approx(rows, rel=0.01)
