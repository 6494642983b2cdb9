"""What `/openapi.json` says of an endpoint, with its references followed."""

from __future__ import annotations

from typing import Any

import httpx


def body_of(http: httpx.Client, path: str) -> Any:
    """The schema of the JSON that is POSTed to a path."""
    document = http.get("/openapi.json").json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return followed(document, schema)


def followed(document: Any, schema: Any) -> Any:
    """The schema that a reference points to."""
    while "$ref" in schema:
        found = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    return schema
