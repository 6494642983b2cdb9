"""HTTP/1.1 by hand over asyncio streams: thousands of sockets at once, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal, NamedTuple

import numpy as np

from leanserve.contracts import Array

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
HOST = "127.0.0.1"
JSON_LENGTH = "inference-header-content-length"


class PendingResult(NamedTuple):
    """One whole reply; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The parsed body; of a binary reply, its head."""
        return json.loads(self.body[: int(self.headers.get(JSON_LENGTH, len(self.body)))])

    def outputs(self) -> list[float]:
        """The numbers of the first output of an infer reply."""
        return [float(number) for number in self.json()["outputs"][0]["data"]]

    def binary(self) -> Array:
        """The float32 numbers of a binary infer reply."""
        return np.frombuffer(self.body[int(self.headers[JSON_LENGTH]) :], np.float32)

    def how(self, name: str) -> float:
        """`queue_ms`, `inference_ms` or `batch_rows` of an infer reply."""
        return float(self.json()["parameters"][name])


def post(path: str, body: bytes, *headers: str) -> bytes:
    """The bytes of a POST request."""
    head = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def infer_request(variant: str, rows: Array, *headers: str) -> bytes:
    """An infer request for these rows [n, 1, 2, 4] to that variant."""
    tensor = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "data": rows.ravel().tolist()}
    return post(f"/v2/models/rules/versions/{variant}/infer", json.dumps({"inputs": [tensor]}).encode(), *headers)


def binary_request(variant: str, rows: Array, reply: Literal["binary", "json"] = "binary") -> bytes:
    """The same with the rows as bytes, which may be NaN."""
    size = {"binary_data_size": rows.nbytes}
    tensor = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "parameters": size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": reply == "binary"}}).encode()
    path = f"/v2/models/rules/versions/{variant}/infer"
    return post(path, head + rows.tobytes(), f"{JSON_LENGTH}: {len(head)}")


async def read_reply(reader: asyncio.StreamReader) -> PendingResult:
    """The next reply on a connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return PendingResult(int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"])))


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    """A connection of its own."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def ask(port: int, request: bytes) -> PendingResult:
    """Send one request on a connection of its own."""
    async with asyncio.timeout(30), connected(port) as (reader, writer):
        writer.write(request)
        return await read_reply(reader)
