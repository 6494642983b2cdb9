"""What is put under load: the variants that a server offers, and handwritten digits whose true label is known."""

from __future__ import annotations

import io
import json
import urllib.request
from collections.abc import Collection
from functools import cache
from typing import Any, Literal, NamedTuple

Content = Literal["png", "json"]


class TargetError(Exception):
    """The server or the choice of variants is not usable; the message says what to do."""


class Digit(NamedTuple):
    """A request body, its media type and the label that a right answer names."""

    body: bytes
    media_type: str
    label: str


def asked(host: str, path: str) -> dict[str, Any]:
    """What a server says of itself. Raises `TargetError` if it cannot be asked."""
    url = f"{host.rstrip('/')}{path}"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            told = json.load(response)
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot read {url}: {error!r}; is leanserve ready there?") from error
    if not isinstance(told, dict):
        raise TargetError(f"{url} answers something else than leanserve does")
    return told


def serving_variants(host: str, wanted: Collection[str] = ()) -> list[str]:
    """Names of the variants that the server at `host` serves, only the `wanted` ones if any are named.

    Raises `TargetError` if the server cannot be asked, serves nothing, or does not serve a wanted variant.
    """
    states = {entry["name"]: entry["state"] for entry in asked(host, "/v1/variants")["variants"]}
    serving = [name for name, state in states.items() if state == "serving"]
    for name in wanted:
        if name not in serving:
            state = states.get(name, "unknown")
            raise TargetError(f"variant {name!r} is {state} at {host}; choose from: {', '.join(serving)}")
    if not serving:
        raise TargetError(f"{host} serves no variant: {states}")
    return [name for name in serving if name in wanted or not wanted]


@cache
def digits(content: Content) -> list[Digit]:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey values 0-255, as request bodies.

    The variants were trained on most of them, so that the share of right answers compares variants with each other; the
    accuracy on unseen digits is in the quality report.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = (bundle.images * (255 / 16)).round().astype("uint8")
    encode = {"png": _png, "json": _json}[content]
    media_type = {"png": "image/png", "json": "application/json"}[content]
    return [
        Digit(encode(image.tolist()), media_type, str(label))
        for image, label in zip(pixels, bundle.target, strict=True)
    ]


def _png(rows: list[list[int]]) -> bytes:
    from PIL import Image

    image = Image.frombytes("L", (len(rows[0]), len(rows)), bytes(value for row in rows for value in row))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _json(rows: list[list[int]]) -> bytes:
    return json.dumps({"inputs": rows}).encode()
