"""What hundreds of clients may send in the same moment: a table of requests, each with how many of them come at once.

A bomb (`bombs.py`) asks for much by itself. Here every request is cheap enough to be answered by the event loop, or by
a thread that holds Python's lock, and the sum of them is not.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from io import BytesIO
from typing import Final, NamedTuple

import grpc
import numpy as np
from grpc import aio
from PIL import Image

from bombs import FORM, INFER, JSON, MB, Bomb, binary, field, form_of, png, predict_with, repeated, tensor
from leanserve.api.v2.grpc_messages import SERVICE
from raw_http import HOST, Connection

KB63 = 63_000
"""Bytes that V2 parses on the loop, at most 64 KiB, and that come with their head."""
WORDS_MODEL = "words"


class Flood(NamedTuple):
    """A request, and how many connections send it in the same moment."""

    request: Callable[[], bytes]
    times: int = 300


def _get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: x", *headers]).encode() + b"\r\n\r\n"


def _posted(bomb: Bomb, *, model: str = "rules") -> bytes:
    return bomb.request(model)


def _inputs(size: int, item: bytes) -> Bomb:
    return predict_with(b'{"inputs":' + repeated(item, size) + b"}")


def _photo(side: int) -> bytes:
    """Noise, of which a PNG has as many bytes as pixels."""
    stream = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _chunked(content: bytes, size: int) -> bytes:
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    head = f"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: {JSON}\r\ntransfer-encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def _gzipped(bomb: Bomb) -> Bomb:
    return bomb._replace(body=gzip.compress(bomb.body), headers=(*bomb.headers, "content-encoding: gzip"))


def _texts(count: int, *, text: str = "one two three") -> Bomb:
    return Bomb("/v1/embeddings", JSON, json.dumps({"model": WORDS_MODEL, "input": [text] * count}).encode())


def _embedded(item: bytes, size: int) -> Bomb:
    return Bomb("/v1/embeddings", JSON, b'{"model":"words","input":' + repeated(item, size) + b"}")


def _many_headers(path: str, count: int, size: int) -> bytes:
    return _get(path, *(f"x-{number}: {'a' * size}" for number in range(count)))


V2_LISTS = Bomb(INFER, JSON, b'{"inputs":' + repeated(b"[]", KB63) + b"}")
PREDICT_FLOODS: Final[Mapping[str, Flood]] = {
    "forms of 40 transparent images": Flood(
        lambda: _posted(predict_with(form_of([png(1000, 1000, 4)] * 40), FORM)), 100
    ),
    "forms of 49 small images": Flood(lambda: _posted(predict_with(form_of([png(64, 64)] * 49), FORM)), 300),
    "forms of tiny parts, 63 kB": Flood(lambda: _posted(predict_with(form_of([b""] * 950), FORM)), 300),
    "forms of tiny parts, 4 MB": Flood(lambda: _posted(predict_with(form_of([b""] * 62_000), FORM)), 100),
    "forms of one part of 4 MB": Flood(lambda: _posted(predict_with(form_of([b"\n-" * (2 * MB)]), FORM)), 100),
    "json: lists, 63 kB": Flood(lambda: _posted(_inputs(KB63, b"[]")), 300),
    "json: numbers, 63 kB": Flood(lambda: _posted(_inputs(KB63, b"0.123456")), 300),
    "json: rows, 63 kB": Flood(lambda: _posted(_inputs(KB63, b"[[0,1,2,3],[4,5,6,7]]")), 300),
    "json: texts, 63 kB": Flood(lambda: _posted(_inputs(KB63, b'"a"')), 300),
    "json: chunked, 63 kB": Flood(lambda: _chunked(_inputs(KB63, b"[]").body, 1000), 300),
    "json: in chunks of a byte, 4 kB": Flood(lambda: _chunked(_inputs(4000, b"[]").body, 1), 300),
    "json: gzip, 63 kB": Flood(lambda: _posted(_gzipped(_inputs(KB63, b"[]"))), 300),
    "json: gzip, 4 MB": Flood(lambda: _posted(_gzipped(_inputs(4 * MB, b"[]"))), 300),
    "png: photos of 63 kB": Flood(lambda: _posted(predict_with(_photo(250), "image/png")), 300),
    "png: small": Flood(lambda: _posted(predict_with(png(64, 64), "image/png")), 500),
    "v2: lists, 63 kB": Flood(lambda: _posted(V2_LISTS), 300),
    "v2: lists, 4 kB": Flood(lambda: _posted(Bomb(INFER, JSON, b'{"inputs":' + repeated(b"[]", 4000) + b"}")), 1000),
    "v2: numbers, 63 kB": Flood(lambda: _posted(tensor(repeated(b"0.123456", KB63), "[875,1,2,4]")), 300),
    "v2: one row": Flood(lambda: _posted(tensor(b"[1,2,3,4,5,6,7,8]", "[1,1,2,4]")), 500),
    "v2: gzip, 63 kB": Flood(lambda: _posted(_gzipped(V2_LISTS)), 300),
    "v2: binary float16, 1 MB": Flood(lambda: _posted(binary("FP16", [MB // 16, 1, 2, 4], bytes(MB - 512))), 100),
    "v2: binary float16, 63 kB": Flood(lambda: _posted(binary("FP16", [3900, 1, 2, 4], bytes(62_400))), 300),
    "v2: binary float32, 1 MB": Flood(lambda: _posted(binary("FP32", [30_000, 1, 2, 4], bytes(960_000))), 100),
}
"""Predictions, by a base of images."""
OTHER_FLOODS: Final[Mapping[str, Flood]] = {
    **{
        f"GET {path}": Flood(partial(_get, path), 300)
        for path in (
            "/",
            "/docs",
            "/metrics",
            "/healthz",
            "/readyz",
            "/openapi.json",
            "/v1/variants",
            "/v1/base",
            "/v1/report",
            "/v1/live",
            "/v1/experiment",
            "/v1/models",
            "/v2",
            "/v2/models/stats",
            "/v2/models/rules/config",
            "/v2/models/rules/stats",
        )
    },
    "GET /metrics, gzip": Flood(lambda: _get("/metrics", "accept-encoding: gzip"), 300),
    "GET /metrics, each its own Accept": Flood(lambda: _get("/metrics", "accept: text/plain;version=1"), 300),
    "GET what is not there, 8 kB": Flood(lambda: _get("/" + "a" * 8000), 300),
    "GET what is not there in V2, 8 kB": Flood(lambda: _get("/v2/models/" + "a" * 8000), 300),
    "GET with a query of 8 kB": Flood(lambda: _get("/v1/variants?" + "a=%41&" * 1300), 300),
    "GET with 64 kB of headers": Flood(lambda: _many_headers("/v1/variants", 98, 600), 300),
    "GET with 98 headers": Flood(lambda: _many_headers("/v1/variants", 98, 1), 300),
    "GET with too many headers": Flood(lambda: _many_headers("/v1/variants", 5000, 1), 300),
    "probes with 98 headers": Flood(lambda: _many_headers("/healthz", 98, 1), 300),
    "no HTTP": Flood(lambda: b"\x16\x03\x01 what is this?\r\n\r\n", 1000),
    "listeners": Flood(lambda: _get("/v1/live/stream"), 500),
    "GET, 200 in a row": Flood(lambda: _get("/v1/variants") * 200, 20),
    "predictions, 200 in a row": Flood(lambda: _posted(tensor(b"[1,2,3,4,5,6,7,8]", "[1,1,2,4]")) * 200, 20),
    "repository/index": Flood(lambda: _posted(Bomb("/v2/repository/index", JSON, b'{"ready":false}')), 300),
    "admin: JSON of 63 kB": Flood(
        lambda: _posted(
            Bomb("/v2/repository/models/{model}/load", JSON, b'{"parameters":' + repeated(b"[]", KB63) + b"}")
        ),
        300,
    ),
    "admin: an experiment, 63 kB": Flood(
        lambda: _posted(Bomb("/v1/experiment/start", JSON, b'{"variant":' + repeated(b"[]", KB63) + b"}")), 300
    ),
}
TEXT_FLOODS: Final[Mapping[str, Flood]] = {
    "embeddings: one text": Flood(lambda: _posted(_texts(1)), 500),
    "embeddings: 200 texts": Flood(lambda: _posted(_texts(200)), 300),
    "embeddings: 2,048 texts": Flood(lambda: _posted(_texts(2048)), 100),
    "embeddings: a text of 63 kB": Flood(lambda: _posted(_texts(1, text="one " * 15_000)), 300),
    "embeddings: ids": Flood(lambda: _posted(_embedded(b"4", KB63)), 300),
    "embeddings: ids, 4 MB": Flood(lambda: _posted(_embedded(b"4", 4 * MB)), 20),
    "embeddings: lists": Flood(lambda: _posted(_embedded(b"[]", KB63)), 300),
    "embeddings: lists, 100 kB": Flood(lambda: _posted(_embedded(b"[]", 100_000)), 100),
    "embeddings: lists, 3 MB": Flood(lambda: _posted(_embedded(b"[]", 3 * MB)), 20),
    "embeddings: tiny texts, 3 MB": Flood(lambda: _posted(_embedded(b'"a"', 3 * MB)), 20),
    "predict: a text of 63 kB": Flood(lambda: _posted(predict_with(b'{"inputs":"' + b"one " * 15_000 + b'"}')), 300),
    "predict: texts of 63 kB": Flood(lambda: _posted(_inputs(KB63, b'"one two"')), 300),
    "GET /v1/models (texts)": Flood(lambda: _get("/v1/models"), 300),
}
"""By a base of texts."""


async def all_at_once(port: int, flood: Flood) -> Counter[int]:
    """Open as many connections, then send all requests in one moment: how many got which status."""
    request = flood.request()
    connections = [await asyncio.open_connection(HOST, port) for _ in range(flood.times)]
    try:
        async with asyncio.timeout(60):
            return Counter(await asyncio.gather(*(_status(connection, request) for connection in connections)))
    finally:
        for _, writer in connections:
            writer.close()


async def _status(connection: Connection, request: bytes) -> int:
    """That of the first reply, of which no more than the head is read where it has no end."""
    reader, writer = connection
    try:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        _, found, rest = head.partition(b"content-length: ")
        await reader.readexactly(int(rest.partition(b"\r")[0]) if found else 0)
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0
    return int(head.split()[1])


class GrpcFlood(NamedTuple):
    """A call with this message and metadata, how often it comes at once, and on how many connections."""

    method: str
    message: Callable[[], bytes] = lambda: b""
    metadata: Callable[[], tuple[tuple[str, str], ...]] = tuple
    times: int = 300
    connections: int = 10


def _infer(contents: bytes, shape: bytes = b"\x18\x01") -> bytes:
    return field(1, b"rules") + field(5, field(1, b"x") + field(2, b"FP32") + shape + field(5, contents))


_ROW = field(6, struct.pack("<8f", *range(8)))
_OF_EIGHT = b"\x18\x01\x18\x01\x18\x02\x18\x04"
GRPC_FLOODS: Final[Mapping[str, GrpcFlood]] = {
    "grpc: one value of 12 MB": GrpcFlood("ServerLive", metadata=lambda: (("x-a", "a" * 12_000_000),), times=1),
    "grpc: ten values of 12 MB": GrpcFlood("ServerLive", metadata=lambda: (("x-a", "a" * 12_000_000),), times=10),
    "grpc: 100,000 fields": GrpcFlood(
        "ServerLive", metadata=lambda: tuple((f"x-{number}", "a" * 100) for number in range(100_000)), times=1
    ),
    "grpc: 1 MB of fields": GrpcFlood(
        "ServerLive", metadata=lambda: tuple((f"x-{number}", "a" * 100) for number in range(9_000)), times=30
    ),
    "grpc: 90 fields of 80 bytes": GrpcFlood(
        "ServerLive", metadata=lambda: tuple((f"x-{number}", "a" * 80) for number in range(90))
    ),
    "grpc: ServerLive": GrpcFlood("ServerLive"),
    "grpc: ModelStatistics": GrpcFlood("ModelStatistics"),
    "grpc: RepositoryIndex": GrpcFlood("RepositoryIndex"),
    "grpc: one row": GrpcFlood("ModelInfer", lambda: _infer(_ROW, _OF_EIGHT)),
    "grpc: texts, 63 kB": GrpcFlood("ModelInfer", lambda: _infer(field(8, b"") * (KB63 // 2))),
    "grpc: tensors, 63 kB": GrpcFlood("ModelInfer", lambda: field(1, b"rules") + field(5, b"") * (KB63 // 2)),
    "grpc: numbers, 63 kB": GrpcFlood("ModelInfer", lambda: _infer((b"\x35" + bytes(4)) * (KB63 // 5))),
}


async def all_calls_at_once(port: int, flood: GrpcFlood) -> Counter[str]:
    """Connect, then call in one moment: how many got which status."""
    unlimited = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    channels = [aio.insecure_channel(f"{HOST}:{port}", unlimited) for _ in range(min(flood.connections, flood.times))]
    try:
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        message, metadata = flood.message(), flood.metadata()
        calls = [
            _code(channels[number % len(channels)], flood.method, message, metadata) for number in range(flood.times)
        ]
        return Counter(await asyncio.gather(*calls))
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def _code(channel: aio.Channel, method: str, message: bytes, metadata: tuple[tuple[str, str], ...]) -> str:
    call: Callable[..., Awaitable[bytes]] = channel.unary_unary(f"/{SERVICE}/{method}")
    try:
        await call(message, timeout=30, metadata=metadata)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"
