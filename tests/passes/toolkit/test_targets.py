"""The grammar of targets: what a pattern selects, and what a misspelt one is told."""

from __future__ import annotations

import pytest
from torch import nn

from leanserve.errors import PassFailed
from leanserve.passes.toolkit.targets import Targets
from structural_nets import Residual


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (("*",), (), ["stem.0", "conv1", "conv2", "down"]),
        (("conv*",), (), ["conv1", "conv2"]),
        (("*",), ("conv2", "down"), ["stem.0", "conv1"]),
        (("stem",), (), ["stem.0"]),  # a block stands for everything inside it
        (("type:_ConvNd",), ("type:Sequential",), ["conv1", "conv2", "down"]),
        (("stem.*", "down"), (), ["stem.0", "down"]),
        (("*",), ("head",), ["stem.0", "conv1", "conv2", "down"]),  # exists, though it is no convolution
        ((), (), []),
    ],
)
def test_selects(include: tuple[str, ...], exclude: tuple[str, ...], names: list[str]) -> None:
    module = Residual()
    selected = Targets(include=include, exclude=exclude).select(module, nn.Conv2d)
    assert list(selected) == names
    assert all(selected[name] is module.get_submodule(name) for name in names)


def test_without_types_every_submodule_but_the_root_can_be_selected() -> None:
    assert list(Targets(include=("stem",)).select(Residual())) == ["stem", "stem.0", "stem.1", "stem.2"]
    assert "" not in Targets().select(Residual())


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (Targets(include=("conv_1",)), ["targets.include", "'conv_1'", "conv1"]),
        (Targets(include=("head",)), ["targets.include", "'head'"]),  # no convolution
        (Targets(exclude=("hed",)), ["targets.exclude", "'hed'", "head"]),
        (Targets(include=("type:Conv3d",)), ["'type:Conv3d'", "Conv2d"]),
        (Targets(exclude=("xyz",)), ["'xyz'", "it has", "stem"]),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(targets: Targets, words: list[str]) -> None:
    with pytest.raises(PassFailed) as error:
        targets.select(Residual(), nn.Conv2d)
    assert all(word in str(error.value) for word in words), error.value
