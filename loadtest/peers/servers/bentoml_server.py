"""BentoML with its adaptive batching: up to 32 requests.

`python bentoml_server.py NETWORK.onnx PORT`. POST /predict takes a row as JSON, `{"rows": [[...]]}`, which is how
BentoML takes arrays over HTTP, and gives the output as JSON.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bentoml
import numpy as np
import onnxruntime

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
MAX_BATCH = 32
NETWORK = "PEER_NETWORK"


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 1000})
class Network:
    """Rows -> rows."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(os.environ[NETWORK], options, providers=["CPUExecutionProvider"])
        self._dtype = DTYPES[self._session.get_inputs()[0].type]

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=MAX_BATCH, max_latency_ms=1000)
    def predict(self, rows: np.ndarray) -> np.ndarray:
        output: np.ndarray = self._session.run(None, {"x": rows.astype(self._dtype, copy=False)})[0]
        return output


if __name__ == "__main__":
    here, network = Path(__file__), Path(sys.argv[1]).resolve()
    os.chdir(here.parent)
    os.environ[NETWORK] = str(network)
    command = ["serve", f"{here.stem}:Network", "--host", "127.0.0.1", "--port", sys.argv[2]]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", *command])
