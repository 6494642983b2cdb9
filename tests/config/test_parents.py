"""Variants made of other variants: what a config may say of parents, and the line of every error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from leanserve.config.lineage import building_order, lineage
from leanserve.config.schema import ServiceConfig, read_config
from leanserve.errors import ConfigError

MERGE = {"kind": "merge"}
PRUNE = {"kind": "prune_channels", "ratio": 0.5}


def variant(name: str, *passes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "passes": list(passes), **more}


def document(*variants: dict[str, Any]) -> dict[str, Any]:
    return {"base": "digits", "variants": list(variants)}


@pytest.mark.parametrize(
    ("variants", "at", "text"),
    [
        (
            [variant("a", parent="b")],
            "parent: b",
            "variants[0].parent of variant 'a': 'b' is no variant; variants are a",
        ),
        (
            [variant("pruned", PRUNE), variant("b", parent="prund")],
            "parent: prund",
            "'prund' is no variant; did you mean 'pruned'?",
        ),
        (
            [variant("a", parent="c"), variant("b", parent="a"), variant("c", parent="b")],
            "parent: c",
            "a circle, a <- b <- c <- a; one of them must begin with the base",
        ),
        ([variant("a", parent="a")], "parent: a", "a circle, a <- a;"),
        ([variant("a"), variant("b", MERGE, parents=["a"])], "parents:", "one alone is not joined; write 'parent: a'"),
        ([variant("a"), variant("b", MERGE, parents=["a", "a"])], "parents:", "'a' is named twice"),
        (
            [variant("a"), variant("b"), variant("c", PRUNE, parents=["a", "b"])],
            "parents:",
            "several are joined by the first pass, and it is none that joins; those that do: distill_ensemble, merge",
        ),
        ([variant("a"), variant("b"), variant("c", parents=["a", "b"])], "parents:", "several are joined by the first"),
        (
            [variant("a", PRUNE, MERGE)],
            "kind: merge",
            "variants[0].passes[1] of variant 'a': 'merge' joins several variants: it is the first pass",
        ),
        ([variant("a"), variant("b", MERGE, parent="a")], "kind: merge", "'merge' joins several variants"),
        (
            [variant("a"), variant("b"), variant("c", MERGE, parent="a", parents=["a", "b"])],
            "parents:",
            "'parent' is the one that it goes on from, 'parents' are several that it joins; write one of the two",
        ),
        (
            [variant("a", {"kind": "onnxruntime"}), variant("b", PRUNE, parent="a")],
            "kind: prune_channels",
            "cannot come after 'onnxruntime'",
        ),
        (
            [variant("a", {"kind": "onnxruntime"}), variant("b"), variant("c", MERGE, parents=["b", "a"])],
            "kind: merge",
            "cannot come after 'onnxruntime'",
        ),
        (
            [variant("a", {"kind": "cast"}), variant("b"), variant("c", MERGE, parents=["b", "a"])],
            "kind: merge",
            "cannot come after 'cast'",
        ),
    ],
)
def test_what_is_wrong_with_parents_is_told_with_its_line(
    tmp_path: Path, variants: list[dict[str, Any]], at: str, text: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document(*variants), sort_keys=False))
    lines = path.read_text().splitlines()
    line = max(number for number, content in enumerate(lines, start=1) if content.strip(" -").startswith(at))
    with pytest.raises(ConfigError) as refused:
        read_config(path)
    assert text in str(refused.value)
    assert str(refused.value).startswith(f"{path}:{line}: ")


def test_a_variant_may_name_one_that_stands_below_it() -> None:
    config = ServiceConfig.model_validate(
        document(
            variant("soup-int8", {"kind": "quantize_static"}, parent="soup"),
            variant("soup", MERGE, parents=["long", "short"]),
            variant("long", {"kind": "distill", "epochs": 2}, parent="pruned"),
            variant("short", {"kind": "distill", "epochs": 1}, parent="pruned"),
            variant("pruned", PRUNE),
            variant("float"),
        )
    )
    places = {item.name: place for place, item in enumerate(building_order(config.variants))}
    assert all(places[parent] < places[item.name] for item in config.variants for parent in item.parent_names)
    names = [item.name for item in lineage(config.variants, config.variants[0])]
    assert (names[0], names[-2:]) == ("pruned", ["soup", "soup-int8"])
    assert sorted(names[1:3]) == ["long", "short"]


def test_a_joined_model_can_do_only_what_all_its_parents_can() -> None:
    """`prune_channels` is done before factorising in one of the two."""
    lowrank = {"kind": "lowrank_conv", "energy": 0.9}
    parents = [variant("a", lowrank), variant("b", {"kind": "distill"})]
    with pytest.raises(ValueError, match="cannot come after 'lowrank_conv'"):
        ServiceConfig.model_validate(document(*parents, variant("c", MERGE, PRUNE, parents=["b", "a"])))
    ServiceConfig.model_validate(document(*parents, variant("c", MERGE, {"kind": "fold_bn"}, parents=["b", "a"])))
