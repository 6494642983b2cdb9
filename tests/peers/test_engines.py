"""Engines beside their bare loops: the loops run, and their numbers become ratios within a round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loadtest.peers import engines
from loadtest.peers.bare import Bare, Subject, Way, measure
from loadtest.peers.callers import Closed
from loadtest.peers.engines import Round, Served
from loadtest.peers.network import example, write_network
from loadtest.peers.process import PeerError, Running
from loadtest.peers.roster import PEERS
from loadtest.peers.wrk import Load
from tables import shown


def test_openvino_has_a_bare_loop_too(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    found = measure(Subject(write_network("mlp", tmp_path), "mlp", "openvino-f32"), Way(2, 1, 4), 0.1)
    assert found.rate > 1000
    assert 0 < found.p50_ms < 50


def rounds() -> list[Round]:
    """Of one variant served, in a slow minute and in a fast one."""
    made = []
    for pace in (1.0, 2.0):
        best = {"float": Bare(50 * pace, 20), "int8": Bare(80 * pace, 12), "openvino-int8": Bare(200 * pace, 5)}
        served = Served({8: Closed(190 * pace, 40, 50, 0, 0.3)}, Load(1, 0, 5.5, 6, 1, 0), Bare(200, 5.0))
        made.append(Round(best, {"openvino-int8": served}))
    return made


def test_what_is_served_is_told_by_the_loops_of_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "CORES", 2)
    ways = dict.fromkeys(rounds()[0].best, Way(2, 1, 4))
    assert "4.00x" in shown(engines.bare_table(rounds(), ways, "title"))
    text = shown(engines.served_table(rounds(), 3.0, "title"))
    for told in ("95.0%", "3.80x", "2.38x", "5.0%"):  # of its loop, by float, by the best int8, the client's share
        assert told in text, text
    line = engines.idle_line("openvino-int8", rounds())
    assert line == "openvino-int8, idle: p50 5.50 ms, bare 5.00 ms, added 0.50 ms"


@pytest.mark.parametrize(("scale", "right"), [(1.01, True), (-1.0, False)])
def test_an_answer_must_be_near_to_that_in_float(monkeypatch: pytest.MonkeyPatch, scale: float, right: bool) -> None:  # noqa: FBT001
    peer = PEERS["leanserve"]
    request = peer.form.request("mlp", example("mlp"))
    answer = np.linspace(1, 2, 10, dtype=np.float32)
    head = b'{"outputs": [{"name": "y"}]}'
    monkeypatch.setattr(engines, "ask", lambda *_: (200, head + (scale * answer).astype(np.float32).tobytes()))
    if right:
        engines.check(Running(peer, 1, 1), request, answer)
    else:
        with pytest.raises(PeerError, match=r"cosine .* is -1\.000"):
            engines.check(Running(peer, 1, 1), request, answer)
