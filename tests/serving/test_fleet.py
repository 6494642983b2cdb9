"""The fleet before the first request: which shapes are warmed, how large batches may get."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from service.config import BatchConfig, ServiceConfig
from service.contracts import Arrays, Field, InputSpec
from service.serving.device import Device
from service.serving.fleet import Fleet

SPEC = InputSpec((Field("x", "float32", (2,)),), (Field("y", "float32", (2,)),))


class CompiledBackend:
    """Runs only the shapes it was compiled for, and remembers them."""

    name = "compiled"

    def __init__(self, row_buckets: tuple[int, ...]) -> None:
        self.row_buckets = row_buckets
        self.shapes: set[int] = set()

    def run(self, batch: Arrays) -> Arrays:
        assert len(batch[0]) in self.row_buckets
        self.shapes.add(len(batch[0]))
        return batch

    def close(self) -> None: ...


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    config = ServiceConfig.model_validate({"base": "fake", "variants": [{"name": "a"}]})
    fleet = Fleet(SimpleNamespace(name="fake", spec=SPEC, caveats=()), config, [], Device("cpu", 1))
    yield fleet
    fleet.close()


@pytest.mark.parametrize(("max_rows", "warmed"), [(32, (1, 8)), (6, (1,)), (8, (1, 8))])
def test_a_compiled_variant_is_warmed_in_its_own_shapes_only(
    fleet: Fleet, max_rows: int, warmed: tuple[int, ...]
) -> None:
    backend = CompiledBackend((1, 8))
    fleet.open("a", lambda: backend, BatchConfig(max_rows=max_rows))
    variant = fleet.variants["a"]
    assert backend.shapes == set(warmed) == set(variant.costs.buckets)
    assert variant.batcher.limits.max_rows <= max(warmed)


def test_a_shape_above_the_limit_is_filled_no_further_than_the_limit(fleet: Fleet) -> None:
    fleet.open("a", lambda: CompiledBackend((16,)), BatchConfig(max_rows=4))
    assert fleet.variants["a"].costs.buckets == (16,)
    assert fleet.variants["a"].batcher.limits.max_rows == 4


def test_the_split_is_worked_out_when_a_variant_is_opened(fleet: Fleet) -> None:
    assert fleet.weights == {}
    fleet.open("a", lambda: CompiledBackend((1,)), BatchConfig(max_rows=1))
    assert fleet.weights == {"a": 1.0}
    assert fleet.weights is fleet.weights
    assert fleet.choose(None, None) is fleet.variants["a"]
