"""Clients at saturation while a server is told to end, and what became of each of their requests.

python shutdowns.py N    ends N servers, by SIGTERM and SIGINT in turns, and prints one line for each
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from leanserve.api.v2.grpc_messages import SERVICE, message
from raw_http import HOST, infer_request, read_reply
from rule_service import RuleService, serving
from rules import row

CONNECTIONS, CHANNELS = 64, 8
BEFORE_S = 0.5
DRAIN = {"delay_s": 0.5, "timeout_s": 10}


@dataclass
class Tally:
    """Requests that were answered, over HTTP and gRPC; replies that said that they are the last; what was lost."""

    http: int = 0
    rpc: int = 0
    last: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0


async def keep_asking(port: int, tally: Tally) -> None:
    """One client in a closed loop, on a connection that it keeps, until nobody listens any more."""
    request = infer_request("rule", row(3))
    while True:
        try:
            reader, writer = await asyncio.open_connection(HOST, port)
        except OSError:  # nobody listens, or is about to: no request was sent
            return
        try:
            while True:
                writer.write(request)
                reply = await read_reply(reader)
                if reply.status != 200 or reply.outputs()[0] != 30:
                    tally.lost.append(f"{reply.status}: {reply.body[:100]!r}")
                tally.http += 1
                if reply.headers.get("connection") == "close":
                    tally.last += 1
                    break
        except (OSError, asyncio.IncompleteReadError) as error:
            tally.lost.append(repr(error))
            return
        finally:
            writer.close()


async def keep_calling(port: int, tally: Tally) -> None:
    """The same over gRPC, until the service is not available."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1, 2, 4], "contents": {"fp32_contents": [3.0] * 8}}
    request = message("ModelInferRequest")(model_name="rules", inputs=[tensor])
    async with aio.insecure_channel(f"{HOST}:{port}") as channel:
        infer: Callable[..., Any] = channel.unary_unary(
            f"/{SERVICE}/ModelInfer", type(request).SerializeToString, message("ModelInferResponse").FromString
        )
        while True:
            try:
                await infer(request, timeout=20)
                tally.rpc += 1
            except aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    tally.lost.append(f"{error.code()}: {error.details()}")
                return


async def end(service: RuleService, number: signal.Signals, connections: int = CONNECTIONS) -> Tally:
    """Tell a busy server to end; the result when all clients have noticed, and it has ended."""
    tally = Tally()
    clients = [asyncio.create_task(keep_asking(service.port, tally)) for _ in range(connections)]
    clients += [asyncio.create_task(keep_calling(service.grpc_port, tally)) for _ in range(CHANNELS)]
    await asyncio.sleep(BEFORE_S)
    service.process.send_signal(number)
    began = time.monotonic()
    async with asyncio.timeout(30):
        await asyncio.gather(*clients)
        await asyncio.to_thread(service.process.wait)
    tally.seconds = time.monotonic() - began
    return tally


def main(count: int) -> None:
    lost = 0
    for number in range(count):
        by = (signal.SIGTERM, signal.SIGINT)[number % 2]
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "s", "rule", drain=DRAIN) as service:
            tally = asyncio.run(end(service, by))
        lost += len(tally.lost)
        told = f"{number + 1}: {by.name}, {tally.http} over HTTP, {tally.rpc} over gRPC, {tally.last} told to go"
        print(f"{told}, {len(tally.lost)} lost {tally.lost[:3]}, {tally.seconds:.1f} s", flush=True)
    print(f"{lost} lost in {count} shutdowns")


if __name__ == "__main__":
    main(int(sys.argv[1]))
