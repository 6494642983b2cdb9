"""What people write by hand first: FastAPI and onnxruntime in one process, one request at a time, no batching.

`python fastapi_server.py NETWORK.onnx PORT [blocking]`. POST /predict takes the bytes of the input's rows and gives
those of the output: the least work that HTTP leaves. The model runs in FastAPI's thread pool, as its documentation
asks for whatever takes time, so that the event loop stays free. `blocking` runs it in the handler itself: the fastest
way for a model of a few microseconds, and one that answers no health check meanwhile for any other.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def main(network: str, port: int, *, blocking: bool) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    takes = session.get_inputs()[0]
    shape, dtype = (-1, *takes.shape[1:]), DTYPES[takes.type]
    app = FastAPI()

    async def predict(request: Request) -> Response:
        rows = np.frombuffer(await request.body(), dtype).reshape(shape)
        if blocking:
            (output,) = session.run(None, {"x": rows})
        else:
            (output,) = await run_in_threadpool(session.run, None, {"x": rows})
        return Response(output.tobytes(), media_type="application/octet-stream")

    app.add_api_route("/predict", predict, methods=["POST"])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), blocking="blocking" in sys.argv[3:])
