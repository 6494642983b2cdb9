"""Every two passes: a legal pair builds, is stored and loaded, and answers; any other is refused with a remedy.

The pairs are made of the registry and the rules of composition, so that a new pass meets all others by itself. All of
them take an hour (`make soak`); some, drawn by lot, are built always.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from pydantic import TypeAdapter

from builds import constructed, measure_nothing
from hybrid_net import CLASSES, hybrid_base
from leanserve.artifacts.load import load_model
from leanserve.artifacts.store import ArtifactStore
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Share
from leanserve.hardware import this_hardware
from leanserve.passes import AnyPass
from leanserve.passes.base import Pass
from leanserve.passes.composition import find_violation
from leanserve.runtime.formats import open_backend
from lora_files import lora_files
from pass_cases import BEFORE, CASES
from tiny_base import TinyBase

PASS: Final[TypeAdapter[Pass]] = TypeAdapter(AnyPass)
OTHERWISE: Final[Mapping[str, Mapping[str, Any]]] = {
    "student": {"blocks": 0.67},
    "prune_channels": {"ratio": 0.34, "round_to": 4, "targets": {"include": ["stem", "conv1", "layers.*.up"]}},
    "prune_heads": {"heads": 0.3, "feed_forward": 0.25},
    "lowrank_conv": {"rank": 2},
    "lowrank_linear": {"rank": 12},
    "merge_lora": lora_files(16),
}
"""Options that `Hybrid` asks for, where they are others than in `CASES`."""
PASSES: Final[Mapping[str, Pass]] = {
    kind: PASS.validate_python({"kind": kind, **OTHERWISE.get(kind, options)}) for kind, (options, _) in CASES.items()
}
PAIRS: Final = list(product(PASSES, PASSES))

CHEAPEST: Final = "no layer gets cheaper by factorising"
REFUSED: Final[Mapping[tuple[str, str], str]] = {
    **{(first, "qat"): "put fold_bn before it" for first in PASSES if first != "fold_bn"},
    ("fold_bn", "fold_bn"): "no batch norm follows a convolution or linear layer",
    ("lowrank_conv", "lowrank_conv"): CHEAPEST,
    ("lowrank_linear", "lowrank_linear"): CHEAPEST,
}
"""Legal pairs that this network is refused, and the remedy or reason: tags know nothing of batch norms and ranks."""


def is_legal(first: str, second: str) -> bool:
    """By the rules of composition alone; what joins several variants stands first."""
    return not PASSES[second].joins and find_violation([PASSES[first], PASSES[second]]) is None


LEGAL: Final = [pair for pair in PAIRS if is_legal(*pair)]
QUICK: Final = random.Random(18).sample([pair for pair in LEGAL if not {"torch_compile", "aot_inductor"} & {*pair}], 2)


@pytest.fixture(scope="module")
def base() -> TinyBase:
    return hybrid_base()


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_nothing(monkeypatch)


def config_of(first: str, seconds: Iterable[str]) -> ServiceConfig:
    """A variant `first-second` for each of `seconds`; what joins variants joins the base and a student of it."""
    steps = {kind: PASSES[kind].model_dump(mode="json", exclude_unset=True) for kind in (first, *seconds)}
    joins = PASSES[first].joins
    student = {"name": "student", "passes": [{"kind": "distill", **CASES["distill"][0]}]}
    parents = {"parents": ["teacher", "student"]} if joins else {}
    pairs = [
        {"name": f"{first}-{other}", "passes": [*BEFORE.get(first, ()), steps[first], steps[other]], **parents}
        for other in seconds
    ]
    return ServiceConfig.model_validate(
        {
            "base": "tiny",
            "gate": {"on_fail": "exclude"},
            "variants": [{"name": "teacher"}, *([student] if joins else []), *pairs],
        }
    )


def complaint(store: ArtifactStore, base: TinyBase, keys: Iterable[str]) -> str | None:
    """What is wrong with a pair of these artifacts, if anything is."""
    *_, last = keys
    if failed := [failure.reason for key in keys if (failure := store.failure(key)) is not None]:
        return failed[0]
    backend = open_backend(load_model(store, base, last), Share(1))
    for rows in (1, 4):
        [answers] = backend.run(tuple(array[:rows] for array in base.inputs)).outputs
        if answers.shape != (rows, CLASSES) or answers.dtype != np.float32 or not np.isfinite(answers).all():
            return f"answers of {rows} rows: {answers.dtype}{answers.shape}, finite {np.isfinite(answers).all()}"
    backend.close()
    return None


def complaints(first: str, seconds: Iterable[str], base: TinyBase, folder: Path) -> dict[str, str]:
    """By the second pass, what is wrong with the pair: it answers wrongly, or is refused, or is not and should be."""
    able = [kind for kind in seconds if PASSES[kind].unsupported_reason(this_hardware()) is None]
    if not able or PASSES[first].unsupported_reason(this_hardware()) is not None:
        return {}
    config, store = config_of(first, able), ArtifactStore(folder)
    keys, _ = constructed(store, config, base)
    found = {kind: complaint(store, base, chain) for kind, chain in zip(able, keys[-len(able) :], strict=True)}
    wanted = {kind: REFUSED.get((first, kind)) for kind in able}
    return {kind: str(reason) for kind, reason in found.items() if not _as_wanted(reason, wanted[kind])}


def _as_wanted(reason: str | None, refusal: str | None) -> bool:
    return reason is None if refusal is None else reason is not None and refusal in reason


@pytest.mark.soak
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("first", dict.fromkeys(first for first, _ in LEGAL))
def test_whatever_may_follow_a_pass_builds_and_answers(first: str, base: TinyBase, tmp_path: Path) -> None:
    assert complaints(first, [second for other, second in LEGAL if other == first], base, tmp_path) == {}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("first", "second"), QUICK)
def test_some_pairs_build_and_answer(first: str, second: str, base: TinyBase, tmp_path: Path) -> None:
    assert complaints(first, [second], base, tmp_path) == {}


def test_any_other_pair_is_refused_with_a_remedy() -> None:
    refused = [pair for pair in PAIRS if pair not in LEGAL and not PASSES[pair[1]].joins]
    print(f"\n{len(PASSES)} passes: {len(LEGAL)} pairs are legal, {len(PAIRS) - len(LEGAL)} are refused")
    for first, second in refused:
        violation = find_violation([PASSES[first], PASSES[second]])
        assert violation is not None
        assert violation.position == 1
        assert "A legal order: " in violation.message or "drop one of them" in violation.message
