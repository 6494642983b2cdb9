"""The files of the pages at `/` and `/docs`: what browsers are told of them, and what is in them."""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from fakes import CONFIG, open_variants
from leanserve.api.access import Access
from leanserve.api.app import create_app
from leanserve.api.front import Front
from leanserve.api.page_files import FOLDER, page_files
from leanserve.api.starting import StartingApp
from leanserve.config.schema import ServiceConfig
from leanserve.telemetry.startup import Startup

PAGES = {"/": FOLDER / "index.html", "/docs": FOLDER / "docs.html"}
OWN = [path for path in sorted(FOLDER.rglob("*")) if path.is_file() and "vendored" not in path.parts]
VENDORED = {
    "swagger-ui/LICENSE": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
    "swagger-ui/NOTICE": "0d20d1adef18aee3f40dd258172155521ce702ac445cb5f7b7d60ed32dad2fb2",
    "swagger-ui/swagger-ui-bundle.js": "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
    "swagger-ui/swagger-ui-bundle.js.LICENSE.txt": "37eb6e7e59aed57b2c1acf076574b818ea07b74265717e0bd67b59e0baf9abbb",
    "swagger-ui/swagger-ui.css": "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
    "uplot/LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    "uplot/uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uplot/uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}
"""As in the packages of npm: uplot 1.6.32 (MIT) and swagger-ui-dist 5.35.0 (Apache 2.0)."""


def ask(*asked: tuple[str, str, Mapping[str, str]]) -> list[httpx.Response]:
    """What a service answers to (method, path, headers)."""
    gate = threading.Event()
    gate.set()

    async def scenario() -> list[httpx.Response]:
        service = open_variants(gate).service()
        transport = httpx.ASGITransport(create_app(service))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            replies = [await http.request(method, path, headers=headers) for method, path, headers in asked]
        service.fleet.close()
        return replies

    return asyncio.run(scenario())


def test_what_is_vendored_is_what_was_published() -> None:
    folder = FOLDER / "vendored"
    found = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert found == VENDORED


def test_browsers_are_told_to_run_nothing_else() -> None:
    page, docs, script = ask(("GET", "/", {}), ("GET", "/docs", {}), ("GET", "/page/page.js", {}))
    for reply in (page, docs):
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
        assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
        assert (policy["connect-src"], policy["frame-ancestors"]) == ("'self'", "'none'")
        assert (reply.headers["x-frame-options"], reply.headers["referrer-policy"]) == ("DENY", "no-referrer")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert script.headers["x-content-type-options"] == "nosniff"


def test_a_browser_gets_a_file_once() -> None:
    (first,) = ask(("GET", "/page/page.css", {"accept-encoding": "identity"}))
    assert first.content == (FOLDER / "page.css").read_bytes()
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    same, other, head, small = ask(
        ("GET", "/page/page.css", {"if-none-match": tag}),
        ("GET", "/page/page.css", {"if-none-match": 'W/"0"'}),
        ("HEAD", "/page/page.css", {}),
        ("GET", "/page/page.css", {"accept-encoding": "gzip"}),
    )
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    assert "content-length" not in same.headers
    assert (other.status_code, head.status_code) == (200, 200)
    assert (small.headers["content-encoding"], small.headers["vary"]) == ("gzip", "accept-encoding")
    assert int(small.headers["content-length"]) < len(small.content) == len(first.content)


def test_nothing_but_these_files_is_told() -> None:
    paths = ["/page/", "/page/../app.py", "/page/%2e%2e/app.py", "/page/index.html", "/page/page.js/", "/page/no.js"]
    assert [reply.status_code for reply in ask(*(("GET", path, {}) for path in paths))] == [404] * len(paths)
    (wrong,) = ask(("POST", "/", {}))
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD")


def test_the_page_is_there_while_the_service_starts() -> None:
    config = ServiceConfig.model_validate(CONFIG)
    app = Front(StartingApp(Startup(["a"]), config, Access()))

    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return [await http.get(path) for path in ("/", "/page/page.js", "/v1/base")]

    page, script, base = asyncio.run(scenario())
    assert (page.status_code, script.status_code, base.status_code) == (200, 200, 503)


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES)
def test_scripts_and_styles_are_files_that_are_served(path: Path) -> None:
    text = path.read_text()
    assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\son\w+=|javascript:", text)
    used = re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="([^"]+)"', text)
    assert len(used) > 3
    assert {f"/{name}" for name in used} <= set(page_files())


def test_nothing_is_loaded_from_elsewhere() -> None:
    for path in OWN:
        found = set(re.findall(r"(?:https?:)?//[\w-]+\.[\w.-]+[^\s\"'`]*", path.read_text()))
        assert found <= {"http://www.w3.org/2000/svg"}, path.name
        imported = re.findall(r'^import .* from "(.+)";', path.read_text(), re.MULTILINE)
        assert all((path.parent / name).is_file() for name in imported), path.name


def test_text_never_becomes_markup() -> None:
    for path in OWN:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", path.read_text()), path
