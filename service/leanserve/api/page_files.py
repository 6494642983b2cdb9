"""The files of the page at `/` and of the API's page at `/docs`: what is in the folder `page`, and nothing else.

They hold no secret and are for everybody, also while the service starts; what they show they ask for with the key of
whoever looks. All scripts and styles are files of this service, so that the pages work without the internet, and a
browser can be told to run no others.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType

from leanserve.api.endpoint import Endpoint
from leanserve.http.content_encoding import compress, permits_gzip
from leanserve.http.messages import Headers, Request, Response, Route

FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
    ".txt": b"text/plain; charset=utf-8",
    "": b"text/plain; charset=utf-8",
}
"""Licences have no suffix."""
_NAMED = {"index.html": "/", "docs.html": "/docs"}


class PageFile:
    """One file, read and compressed when somebody asks for it first."""

    def __init__(self, path: Path, styles: str = "'self'") -> None:
        """`styles` are the sources of styles that it may use, as a Content-Security-Policy has them."""
        self._path = path
        self._headers = (
            (b"content-type", _TYPES[path.suffix]),
            (b"cache-control", b"no-cache"),  # a browser keeps it, and asks whether it is still the same
            (b"vary", b"accept-encoding"),
            *(page_headers(styles) if path.suffix == ".html" else ((b"x-content-type-options", b"nosniff"),)),
        )
        self._reading = threading.Lock()
        self._read: tuple[bytes, bytes, bytes] | None = None

    async def answer(self, request: Request) -> Response:
        """The file; only that it is the same, where the client has it already."""
        if self._read is None:
            await asyncio.to_thread(self._load)
        assert self._read is not None
        body, smaller, tag = self._read
        headers = ((b"etag", tag), *self._headers)
        if tag in request.headers.get(b"if-none-match", b""):
            return Response(b"", headers, 304)
        if permits_gzip(request.header(b"accept-encoding") or ""):
            return Response(smaller, (*headers, (b"content-encoding", b"gzip")))
        return Response(body, headers)

    def _load(self) -> None:
        with self._reading:
            if self._read is None:
                body = self._path.read_bytes()
                tag = f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'  # weak: the compressed one is no other
                self._read = body, compress(body, "gzip"), tag.encode()


@cache
def page_files() -> Mapping[str, PageFile]:
    """All of them by their paths in a URL."""
    # React gives elements styles by attribute, which is all that the page of the API is allowed beyond its files.
    own = {"docs.html": "'self'"}
    names = (path.relative_to(FOLDER) for path in sorted(FOLDER.rglob("*")) if path.is_file())
    return MappingProxyType(
        {
            _NAMED.get(str(name), f"/page/{name.as_posix()}"): PageFile(FOLDER / name, own.get(str(name), "'self'"))
            for name in names
        }
    )


def page_endpoints() -> list[Endpoint]:
    """Their rows in the table of endpoints; of which nothing is told in `/openapi.json`."""
    return [
        Endpoint(path, {path: Route("GET", "open", partial(PageFile.answer, file))})
        for path, file in page_files().items()
    ]


def page_headers(styles: str) -> Headers:
    """Of a page: it runs only scripts of this service, is in no frame, asks nobody else, tells nobody."""
    policy = (
        f"default-src 'none'; script-src 'self'; style-src {styles}; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return (
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
    )
