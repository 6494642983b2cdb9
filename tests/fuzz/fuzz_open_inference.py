"""Fuzzes the infer codec: whatever the bytes, the answer is a request that fits the spec, or a `ServiceError`.

`python tests/fuzz/fuzz_open_inference.py -max_total_time=60 [folder of inputs]`: libFuzzer (atheris) mutates the seeds
below under guidance of the codec's own branches. `test_fuzz.py` runs it for some seconds in every test run.

An input is one byte that chooses where the JSON ends (nowhere, at once, behind the first line, at a place that is
hardly right), one that chooses the spec, then the body.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def target() -> Callable[[bytes], str]:
    """The check itself. Imports here, so that atheris can instrument what it imports."""
    import numpy as np

    from leanserve.codecs.open_inference import InferDecoder, encode_infer
    from leanserve.contracts import ModelSpec, TensorSpec
    from leanserve.errors import ServiceError

    scores = TensorSpec("scores", "float32", (2,))
    fields = {
        0: (TensorSpec("x", "float32", (2,)),),
        1: (TensorSpec("ids", "int64", (None,)), TensorSpec("flag", "bool", ()), TensorSpec("text", "string", ())),
        2: (TensorSpec("b", "bfloat16", (None, 2)), TensorSpec("h", "float16", ()), TensorSpec("u", "uint8", (2,))),
    }
    specs = {number: ModelSpec(fields[number], (*fields[number], scores)) for number in fields}
    decoders = {number: InferDecoder(spec) for number, spec in specs.items()}

    def check(data: bytes) -> str:
        choice, body = data[1] if len(data) > 1 else 0, data[2:]
        number = choice % len(specs)
        end_of_json = (None, 0, body.find(b"\n") + 1, choice - 1)[data[0] % 4 if data else 0]
        try:
            request = decoders[number].decode(body, end_of_json)
        except ServiceError:
            return "refused"
        for array, field in zip(request.inputs, specs[number].inputs, strict=True):
            dtype = np.dtype("float32") if field.dtype == "bfloat16" else field.array_dtype
            fixed = all(want in (None, size) for want, size in zip(field.shape, array.shape[1:], strict=True))
            assert array.dtype == dtype, field
            assert array.shape[0] == request.rows >= 1, field
            assert fixed, field
            assert array.size <= len(body), field
        outputs = (*request.inputs, np.zeros((request.rows, 2), dtype=np.float32))
        try:
            reply = encode_infer(request.options, outputs, "model", "version")
        except ServiceError:  # NaN, half floats or foreign bytes were asked for as JSON
            return "refused"
        json.loads(reply.body[: reply.json_length], parse_constant=_refuse)
        return "answered"

    return check


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} in a JSON reply")


def seeds() -> list[bytes]:
    """Good inputs of every kind, from which the fuzzer starts."""

    def tensor(name: str, datatype: str, shape: list[int], sent: Any) -> dict[str, Any]:
        data = {"parameters": {"binary_data_size": sent}} if isinstance(sent, int) else {"data": sent}
        return {"name": name, "datatype": datatype, "shape": shape} | data

    def document(*inputs: dict[str, Any], **more: Any) -> bytes:
        return json.dumps({"inputs": inputs, **more}, separators=(",", ":")).encode()

    ids, flag = tensor("ids", "INT64", [2, 1], [[5], [-6]]), tensor("flag", "BOOL", [2], [True, False])
    text, text_bytes = tensor("text", "BYTES", [2], ["a", "é"]), b"\2\0\0\0ab\1\0\0\0c"
    asked = [{"name": "scores", "parameters": {"binary_data": True}}, {"name": "ids"}]
    binary = {"binary_data_output": True, "timeout": 5, "priority": 1}
    halves = (tensor("b", "BF16", [1, 2, 2], 8), tensor("h", "FP16", [1], 2), tensor("u", "UINT8", [1, 2], [0, 255]))
    return [
        b"\0\0" + document(tensor("x", "FP32", [2, 2], [[1, 2.5], [3, 4]]), id="7"),
        b"\1\0" + bytes(16),
        b"\2\0" + document(tensor("x", "FP32", [1, 2], 8)) + b"\n" + bytes(8),
        b"\2\0" + document(tensor("x", "BF16", [1, 2], 4), parameters=binary) + b"\n" + bytes(4),
        b"\0\1" + document(text, flag, ids, outputs=asked),
        b"\2\1" + document(ids, flag, tensor("text", "BYTES", [2], 11), parameters=binary) + b"\n" + text_bytes,
        b"\2\1" + document(tensor("flag", "BOOL", [2], 2), ids, text) + b"\n\0\1",
        b"\2\2" + document(*halves, parameters=binary) + b"\n" + bytes(10),
    ]


def main() -> None:
    atheris = importlib.import_module("atheris")
    sys.path.insert(0, str(ROOT))
    with atheris.instrument_imports(include=["leanserve"]):
        check = target()
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds()):
            (Path(folder) / f"seed{number}").write_bytes(seed)
        atheris.Setup([*sys.argv, folder], lambda data: check(data) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
