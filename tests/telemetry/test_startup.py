"""What a start says of itself: in a body for machines, in a sentence for people."""

from __future__ import annotations

import pytest

from leanserve.telemetry.startup import BuildNews, Startup

NAMES = ("float", "onnx", "int8")


def states(startup: Startup) -> list[str]:
    return [state for state, _ in startup.variants.values()]


def progress(startup: Startup) -> tuple[object, ...]:
    told = startup.progress()
    assert told.pop("seconds") >= 0
    return tuple(told.values())


def test_a_start_from_its_first_to_its_last_word() -> None:
    startup = Startup(NAMES)
    assert progress(startup) == ("opening", None, None, None, None)
    assert str(startup) == "the service is starting: opening the base, 0 s so far"
    assert (states(startup), startup.built, startup.retry_after_s) == (["waiting"] * 3, 0.0, 5.0)

    startup.building(BuildNews("onnx", "fold_bn", 1, 5))
    assert progress(startup) == ("building", "onnx", "fold_bn", 1, 5)
    assert "building variant 'onnx' (fold_bn), 1 of 5 artifacts done" in str(startup)
    assert (states(startup), startup.built) == (["built", "building", "waiting"], 0.2)
    startup.building(BuildNews("onnx", "fold_bn", 1, 5, share=0.5))
    assert startup.built == pytest.approx(0.3)

    startup.building(BuildNews(None, "all, side by side", 4, 5))
    assert progress(startup) == ("measuring", None, "all, side by side", 4, 5)
    assert "timing all variants side by side, 4 of 5 artifacts done" in str(startup)
    assert states(startup) == ["built"] * 3

    startup.all_built()
    startup.exclude("int8", "score 0.5")
    assert startup.variants["int8"] == ("excluded", "score 0.5")
    startup.enter("float", "loading")
    assert progress(startup) == ("loading", "float", None, 0, 2)
    assert (startup.built, startup.retry_after_s) == (1.0, 1.0)
    startup.enter("float", "warming")
    assert progress(startup)[:2] == ("warming", "float")
    startup.enter("float", "warm")
    assert progress(startup) == ("loading", None, None, 1, 2)
    assert states(startup) == ["warm", "built", "excluded"]
    startup.enter("onnx", "loading")
    assert "loading variant 'onnx', 1 of 2 variants done" in str(startup)


def test_what_the_build_tells_travels_as_lines() -> None:
    for news in (BuildNews("float", "base", 0, 3), BuildNews(None, "all, side by side", 2, 3, 0.25)):
        line = news.to_line()
        assert line.count("\n") == 1
        assert BuildNews.from_line(line) == news
