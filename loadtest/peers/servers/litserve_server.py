"""LitServe with its batching: up to 32 requests, as little waiting as it allows.

`python litserve_server.py NETWORK.onnx PORT`. POST /predict takes one row as JSON, `{"row": [...]}`, for
bodies that are no JSON do not reach its workers, and gives the output as JSON.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
MAX_BATCH = 32


class Network(litserve.LitAPI):
    """Bytes -> row -> batch -> rows -> bytes."""

    def __init__(self, network: str) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=0.001)
        self._network = network

    def setup(self, _device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(self._network, options, providers=["CPUExecutionProvider"])
        takes = self._session.get_inputs()[0]
        self._shape, self._dtype = takes.shape[1:], DTYPES[takes.type]

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads an annotation as a pydantic model
        return np.asarray(request["row"], self._dtype).reshape(self._shape)

    def batch(self, inputs: list[Any]) -> Any:
        return np.stack(inputs)

    def predict(self, batch: Any) -> Any:
        return self._session.run(None, {"x": batch})[0]

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def encode_response(self, output: Any) -> list[float]:
        numbers: list[float] = output.tolist()
        return numbers


if __name__ == "__main__":
    server = litserve.LitServer(Network(sys.argv[1]), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", generate_client_file=False)
