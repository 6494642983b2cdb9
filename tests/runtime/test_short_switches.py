"""Turns of Python's threads are short while anybody needs that, and usual afterwards."""

from __future__ import annotations

import sys

from leanserve.runtime.short_switches import SWITCH_S, ShortSwitches


def test_the_last_one_who_leaves_brings_back_what_was_before() -> None:
    switches, usual = ShortSwitches(), sys.getswitchinterval()
    assert usual > SWITCH_S
    with switches:
        with switches:
            assert sys.getswitchinterval() == SWITCH_S
        assert sys.getswitchinterval() == SWITCH_S
    assert sys.getswitchinterval() == usual
