"""The pages in a real browser: headless Chromium draws, chooses, starts an experiment, and asks nobody else."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import threading
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from fakes import POOR, Live, PixelBase, planned, report, serving
from leanserve.api.access import Key
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.audio import AudioCodec
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.report.document import report_document
from leanserve.report.summary import summarise
from leanserve.runtime.device import Device
from live_arms import QUICK, Arm
from text_fleet import live_texts

sync_api: Any = pytest.importorskip("playwright.sync_api", reason="no playwright; it is in the extra `dev`")
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CHROMIUM = shutil.which("chromium", path=PATH) or shutil.which("google-chrome", path=PATH)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH; `make browser` gets it on Debian")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY = "k" * 40
CORNER = [(0.1, 0.1), (0.4, 0.1), (0.1, 0.2), (0.4, 0.2), (0.1, 0.3), (0.4, 0.3), (0.1, 0.4), (0.4, 0.4)]
"""Ink in the upper left quarter, the first of the four pixels that the model sees."""
DOT = [(0.95, 0.95)]
"""So that the ink is as large as the pad."""


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """Three variants that answer alike and one that was excluded; admin verbs need a key."""
    names = ("slow", "quick", "other", "poor")
    settings = {"base": "pixels", "variants": [{"name": name} for name in names], "experiment": QUICK}
    config = ServiceConfig.model_validate(settings | {"hardware": {"price_per_hour": 0.2}})
    opened = planned(config, PixelBase(), Device("cpu", 1), {"poor": POOR})
    reports = [report(name, POOR if name == "poor" else None) for name in names]
    opened.warm.report = report_document(summarise(reports, (), ""))
    for name in names[:-1]:
        opened.warm.open(name, lambda threads: Arm())
    gate = threading.Event()
    gate.set()
    with serving(opened, gate) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


class Visit:
    """A page, and what it did that it must not."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.problems: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def _hear(self, told: Any) -> None:
        if told.type in {"error", "warning"}:
            self.problems.append(told.text)

    def draw(self, *strokes: list[tuple[float, float]]) -> None:
        box = self.page.locator(".pad").bounding_box()
        points = [[(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in each] for each in strokes]
        for first, *others in points:
            self.page.mouse.move(*first)
            self.page.mouse.down()
            for x, y in others:
                self.page.mouse.move(x, y)
            self.page.mouse.up()

    def sees(self, selector: str, text: str) -> None:
        sync_api.expect(self.page.locator(selector).first).to_contain_text(text, timeout=20_000)


@pytest.fixture
def visit(browser: Any, live: Live) -> Iterator[Visit]:
    made = Visit(browser, viewport={"width": 1300, "height": 900}, color_scheme="light")
    made.page.goto(f"http://{live.http}/")
    made.page.wait_for_selector(".live tbody tr")
    yield made
    made.page.close()
    assert made.problems == []
    assert made.hosts - {""} == {live.http}


def test_a_visitor_draws_and_sees_what_every_variant_answers(visit: Visit) -> None:
    visit.draw(CORNER, DOT)
    visit.sees(".said", "All 3 variants say zero.")
    rows = visit.page.locator(".answers tbody tr")
    assert rows.count() == 4
    assert rows.nth(3).inner_text().split() == ["4", "poor", "excluded"]
    for index in range(3):
        cells = rows.nth(index).locator("td").all_inner_texts()
        assert cells[0].startswith("zero")
        assert re.fullmatch(r"\d+\.\d %", cells[1].strip())
        assert float(cells[2]) > 0
        assert float(cells[3]) > 0
    visit.page.keyboard.press("Delete")
    visit.sees(".said", "Nothing to ask.")
    for key in ["ArrowLeft"] * 7 + ["ArrowDown"] * 7 + [" ", "ArrowUp", "ArrowRight", " "]:
        visit.page.keyboard.press(key)
    visit.sees(".said", "variants")


def test_json_is_asked_as_it_is_and_a_refusal_is_told(visit: Visit) -> None:
    visit.page.get_by_role("tab", name="Draw").press("ArrowLeft")
    area = visit.page.get_by_role("textbox")
    area.fill('{"inputs": [[0, 0], [255, 0]]}')
    visit.page.get_by_role("button", name="Ask all").click()
    visit.sees(".said", "All 3 variants say two.")
    area.fill('{"inputs": 1}')
    visit.sees(".said", "No variant answered.")
    assert "inputs" in visit.page.locator(".answers td small").first.inner_text()
    visit.problems.clear()  # a browser tells of every refusal


def test_an_image_is_chosen_dropped_and_asked(visit: Visit, tmp_path: Path) -> None:
    visit.page.get_by_role("tab", name="Image").click()
    for name, brightest, said in (("a.png", (0, 1), "two"), ("b.png", (1, 0), "one")):
        image = Image.new("L", (2, 2))
        image.putpixel(brightest, 255)
        image.save(tmp_path / name)
        visit.page.locator("input[type=file]").set_input_files(tmp_path / name)
        visit.sees(".said", f"All 3 variants say {said}.")
    visit.page.wait_for_selector(".drop img[alt='b.png']")
    (tmp_path / "c.png").write_bytes(b"no image")
    visit.page.locator("input[type=file]").set_input_files(tmp_path / "c.png")
    visit.sees(".said", "No variant answered.")
    visit.problems.clear()  # a browser tells of every refusal, and that it cannot show the file


def answered(live: Live) -> int:
    return sum(seen.count for each in live.fleet.metrics.variants.values() for seen in each.requests.values())


def until(seen: Callable[[], bool], page: Any) -> None:
    """Within twenty seconds; what was asked before may still come in."""
    for _ in range(200):
        if seen():
            return
        page.wait_for_timeout(100)
    raise AssertionError(page.locator("#tiles").inner_text())


def visited(browser: Any, live: Live) -> Visit:
    """The page of another service, once it shows variants."""
    made = Visit(browser, viewport={"width": 1300, "height": 900})
    made.page.goto(f"http://{live.http}/")
    made.page.wait_for_selector(".live tbody tr")
    return made


def test_a_sentence_is_asked_as_it_is_typed(browser: Any, tmp_path: Path) -> None:
    with live_texts(tmp_path) as live:
        visit = visited(browser, live)
        visit.page.get_by_role("tab", name="Sentence").click()
        visit.page.get_by_role("textbox").fill("one two")
        rows = visit.page.locator(".answers tbody tr")
        for index in range(3):
            sync_api.expect(rows.nth(index).locator("td").first).to_contain_text("numbers", timeout=20_000)
        assert rows.nth(3).inner_text().split()[-1] == "excluded"
        assert visit.problems == []
        visit.page.close()


def test_a_recording_is_chosen_and_asked(browser: Any, tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="no soundfile; it is in the extra `audio`")
    spec = ModelSpec((TensorSpec("samples", "float32", (4,)),), PixelBase.spec.outputs, PixelBase.spec.labels)
    base = PixelBase()
    base.spec, base.codec = spec, AudioCodec(8000, AnswerEncoder(spec))
    config = ServiceConfig.model_validate({"base": "pixels", "variants": [{"name": "one"}, {"name": "two"}]})
    opened = planned(config, base, Device("cpu", 1))
    for name in ("one", "two"):
        opened.warm.open(name, lambda threads: Arm())
    gate = threading.Event()
    gate.set()
    with wave.open(str(tmp_path / "a.wav"), "wb") as recording:
        recording.setparams((1, 2, 8000, 4, "NONE", ""))
        recording.writeframes(np.array([0, 0, 30_000, 0], "<i2").tobytes())
    with serving(opened, gate) as live:
        visit = visited(browser, live)
        visit.page.get_by_role("tab", name="Sound").click()
        visit.page.locator("input[type=file]").set_input_files(tmp_path / "a.wav")
        visit.sees(".said", "Both variants say two.")
        visit.sees(".drop", "a.wav")
        assert visit.problems == []
        visit.page.close()


def test_the_table_shows_the_numbers_of_the_service_and_a_variant_its_passes(visit: Visit, live: Live) -> None:
    for name in ("quick", "poor"):
        visit.page.locator(".live tbody button", has_text=name).click()
        visit.sees("#passes-title", f"{name}, pass by pass")
    visit.sees(".live tbody tr:nth-child(4) .state", "excluded")
    visit.page.get_by_role("button", name="Ask all").or_(visit.page.get_by_role("tab", name="Draw")).first.click()
    visit.draw(CORNER, DOT)
    visit.sees(".said", "All 3")
    tiles = visit.page.locator("#tiles")
    until(lambda: f"{answered(live)} in all" in tiles.inner_text(), visit.page)
    assert visit.page.locator(".tradeoff .mark").count() == 4
    assert visit.page.locator(".charts canvas").count() == 3


def test_an_experiment_is_started_watched_and_ended(visit: Visit) -> None:
    visit.draw(CORNER, DOT)
    visit.page.get_by_label("Candidate").select_option("other")
    visit.page.get_by_role("button", name="Start shadow experiment").click()
    visit.sees(".versus", "other")
    visit.sees(".versus .pill", "running")
    visit.sees(".questions", "agreement")
    visit.page.get_by_role("button", name="Keep asking").click()
    visit.page.wait_for_selector(".band .sure", timeout=20_000, state="attached")
    visit.page.get_by_role("button", name="Stop asking").click()
    if visit.page.locator(".versus .pill").inner_text() == "running":
        visit.page.get_by_role("button", name="Abort").click()
    sync_api.expect(visit.page.locator(".versus .pill")).to_have_text(re.compile("aborted|promoted"), timeout=20_000)
    visit.page.get_by_text("What happened").click()
    visit.sees("#experiment .list", "by 127.0.0.1")


def test_light_and_dark_are_as_the_system_has_it_until_somebody_chooses(visit: Visit) -> None:
    def ground() -> str:
        return str(visit.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = ground()
    visit.page.emulate_media(color_scheme="dark")
    dark = ground()
    assert light != dark
    toggle = visit.page.get_by_role("button", name="Colours")
    toggle.click()
    assert (ground(), visit.page.locator("html").get_attribute("data-theme")) == (light, "light")
    toggle.click()
    assert ground() == dark
    visit.page.reload()
    visit.page.emulate_media(color_scheme="light")
    visit.page.wait_for_selector(".live tbody tr")
    assert ground() == dark, "the choice is kept"


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Any, live: Live) -> None:
    phone = Visit(browser, viewport={"width": 375, "height": 740}, has_touch=True)
    phone.page.goto(f"http://{live.http}/")
    phone.page.wait_for_selector(".live tbody tr")
    phone.draw(CORNER, DOT)
    phone.sees(".said", "All 3")
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 375
    assert phone.problems == []
    phone.page.close()


def test_the_api_is_described_without_the_internet(browser: Any, live: Live) -> None:
    docs = Visit(browser)
    docs.page.goto(f"http://{live.http}/docs")
    docs.page.wait_for_selector(".opblock")
    assert docs.page.locator(".opblock", has_text="/v1/predict").count() == 1
    assert docs.hosts - {""} == {live.http}
    assert docs.problems == []
    docs.page.close()


def test_a_key_is_asked_for_and_kept_nowhere(browser: Any) -> None:
    config = ServiceConfig.model_validate({"base": "pixels", "variants": [{"name": "a"}]})
    opened = planned(config, PixelBase(), Device("cpu", 1))
    opened.warm.open("a", lambda threads: Arm())
    gate = threading.Event()
    gate.set()
    keys = [Key("me", hashlib.sha256(KEY.encode()).digest(), frozenset({"read", "predict"}))]
    with serving(opened, gate, keys) as live:
        visit = Visit(browser)
        visit.page.goto(f"http://{live.http}/")
        visit.sees("#notice", "asks for a key")
        visit.page.get_by_role("button", name="Key").click()
        visit.page.get_by_label("API key").fill(KEY)
        visit.page.keyboard.press("Enter")
        visit.page.wait_for_selector(".live tbody tr")
        visit.draw(CORNER, DOT)
        visit.sees(".said", "It says zero.")
        kept = visit.page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert KEY not in kept
        visit.page.close()
