"""Triton with its Python backend, as PyPI's `nvidia-pytriton` brings it: the wheel carries no other backend.

`python triton_server.py NETWORK.onnx PORT`. Writes a model repository, beside the network, whose `model.py` joins the
requests of a batch, runs onnxruntime once and splits the outputs: what pytriton generates, less its own proxy in
between. Triton itself replaces this process.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

MAX_BATCH = 32
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
CONFIG = """
backend: "python"
max_batch_size: {batch}
input [{{name: "x", data_type: {takes}, dims: [{takes_dims}]}}]
output [{{name: "y", data_type: {gives}, dims: [{gives_dims}]}}]
instance_group [{{count: 1, kind: KIND_CPU}}]
dynamic_batching {{max_queue_delay_microseconds: 0}}
parameters {{key: "network", value: {{string_value: "{network}"}}}}
"""
MODEL = """
import json
import os
import sys

sys.path.insert(0, {packages!r})  # else the numpy of the system, which Triton may not understand, comes first

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        network = json.loads(args["model_config"])["parameters"]["network"]["string_value"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        joined = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        (output,) = self.session.run(["y"], {"x": joined})
        responses, start = [], 0
        for array in inputs:
            rows = output[start : start + len(array)]
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array(rows))]))
            start += len(array)
        return responses
"""


def write_repository(network: Path, folder: Path) -> None:
    """A repository with the one model, called like the network."""
    import onnxruntime

    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    takes, gives = session.get_inputs()[0], session.get_outputs()[0]
    model = folder / network.stem
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.py").write_text(MODEL.replace("{packages!r}", repr(sysconfig.get_path("purelib"))))
    config = CONFIG.format(
        batch=MAX_BATCH,
        takes=TYPES[takes.type],
        takes_dims=", ".join(map(str, takes.shape[1:])),
        gives=TYPES[gives.type],
        gives_dims=", ".join(map(str, gives.shape[1:])),
        network=network.resolve(),
    )
    (model / "config.pbtxt").write_text(config)


def main(network: Path, port: int) -> None:
    import pytriton

    root = Path(pytriton.__file__).parent
    shipped = root / "tritonserver"
    folder = network.resolve().parent / "triton"
    shutil.rmtree(folder, ignore_errors=True)
    write_repository(network, folder / "models")
    shutil.copytree(shipped / "backends", folder / "backends")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = shipped / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, folder / "backends" / "python")
    libraries = [
        root / "tritonserver" / "external_libs",
        root.parent / "nvidia_pytriton.libs",
        sysconfig.get_config_var("LIBDIR"),
    ]
    environment = os.environ | {
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PYTHONHOME": sys.base_prefix,
    }
    options = {
        "--model-repository": folder / "models",
        "--backend-directory": folder / "backends",
        "--http-address": "127.0.0.1",
        "--http-port": port,
        "--allow-grpc": "false",
        "--allow-metrics": "false",
        "--log-error": "true",
    }
    binary = shipped / "bin" / "tritonserver"
    os.execve(binary, [str(binary), *(f"{name}={value}" for name, value in options.items())], environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
