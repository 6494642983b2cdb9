"""MLServer with its adaptive batching: up to 32 requests, 1 ms at most, the model in the server's own process.

`python mlserver_server.py NETWORK.onnx PORT`. The Open Inference Protocol with JSON, which its REST front takes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

MAX_BATCH = 32


class Network(MLModel):
    """Rows -> rows."""

    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        network = self.settings.parameters.uri
        self._session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = NumpyCodec.decode_input(payload.inputs[0])
        output = self._session.run(None, {"x": np.ascontiguousarray(rows)})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", output)], id=payload.id)


def main(network: Path, port: int) -> None:
    folder = network.resolve().parent / "mlserver"
    folder.mkdir(exist_ok=True)
    ports = {"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2}
    settings = {"host": "127.0.0.1", "parallel_workers": 0, "debug": False, **ports}
    (folder / "settings.json").write_text(json.dumps(settings))
    model = {
        "name": network.stem,
        "implementation": f"{Path(__file__).stem}.Network",
        "max_batch_size": MAX_BATCH,
        "max_batch_time": 0.001,
        "parameters": {"uri": str(network.resolve())},
    }
    (folder / "model-settings.json").write_text(json.dumps(model))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    program = "from mlserver.cli import main; main()"
    os.execve(sys.executable, [sys.executable, "-c", program, "start", str(folder)], environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
