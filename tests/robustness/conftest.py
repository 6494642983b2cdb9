"""One server with the limits that a config has by default, for all tests here that need no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rule_service import RuleService
from rule_service import serving as serve_rules


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuleService]:
    """Answers by rule; nothing that clients do to it may end in a stack in its log."""
    folder = tmp_path_factory.mktemp("robustness")
    with serve_rules(folder, "rule") as running:
        yield running
    assert "Traceback" not in (folder / "log").read_text()
