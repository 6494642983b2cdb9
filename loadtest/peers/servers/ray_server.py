"""Ray Serve with its batching: one proxy, one replica, up to 32 requests, as little waiting as it allows.

`python ray_server.py NETWORK.onnx PORT`. POST /predict takes the bytes of one row and gives those of the output.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np
import onnxruntime
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
MAX_BATCH = 32


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
class Network:
    """Bytes -> row -> batch -> rows -> bytes."""

    def __init__(self, network: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
        takes = self._session.get_inputs()[0]
        self._shape, self._dtype = takes.shape[1:], DTYPES[takes.type]

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.0)
    async def run(self, rows: list[Any]) -> list[Any]:
        return list(self._session.run(None, {"x": np.stack(rows)})[0])

    async def __call__(self, request: Request) -> Response:
        row = np.frombuffer(await request.body(), self._dtype).reshape(self._shape)
        return Response((await self.run(row)).tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Network.bind(sys.argv[1]), route_prefix="/predict")
    while True:
        time.sleep(60)
