"""`leanserve bench`: rates and gains, also of a variant that has memory for few rows only."""

from __future__ import annotations

import io

from rich.console import Console

from leanserve.bench import print_bench


def test_sizes_for_which_a_variant_has_no_memory_are_dashes() -> None:
    console = Console(file=io.StringIO(), width=120)
    latencies = {"small": {1: [0.01], 8: [0.08]}, "large": {1: [0.005], 8: [0.02], 32: [0.1]}}
    print_bench(latencies, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = {name: next(line for line in lines if name in line).replace("│", " ").split() for name in latencies}
    assert rows["small"] == ["small", "100", "1.00x", "100", "1.00x", "–", "–"]
    assert rows["large"] == ["large", "200", "2.00x", "400", "4.00x", "320", "–"]
