"""The Open Inference Protocol over gRPC: `tritonclient` unmodified, and a plain channel for what it does not send."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from tritonclient import grpc as triton
from tritonclient import utils
from tritonclient.grpc import aio as triton_aio
from tritonclient.grpc import model_config_pb2, service_pb2

from fakes import POOR, Live, PixelBackend, live_server, open_variants
from leanserve.api.access import Access
from leanserve.api.v2.grpc_answers import model_answers
from leanserve.api.v2.grpc_infer import GrpcInferDecoder, encode
from leanserve.api.v2.grpc_messages import PROTOCOL, SERVICE, message
from leanserve.api.v2.grpc_refusals import grpc_status
from leanserve.api.v2.grpc_server import METHODS, GrpcPort, start_grpc
from leanserve.api.v2.grpc_wire import ContentsForm, parse
from leanserve.api.v2.open_inference import OpenInference
from leanserve.config.limits_section import LimitsConfig
from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.errors import BadInput, ServiceError, StartupError
from leanserve.telemetry.startup import BuildNews, Startup

LIMITS = LimitsConfig(body_bytes=2**20).http

PIXELS = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
LOGITS = PIXELS.reshape(2, 4) * 10
LIMIT = 64 * 2**10
Request = message("ModelInferRequest")
Reply = message("ModelInferResponse")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(limits={"body_bytes": LIMIT}) as server:
        yield server


@pytest.fixture
def client(live: Live) -> Iterator[Any]:
    with triton.InferenceServerClient(live.grpc) as made:
        yield made


@pytest.fixture
def infer(live: Live) -> Iterator[Any]:
    """The bare call."""
    with grpc.insecure_channel(live.grpc) as channel:
        reply = message("ModelInferResponse")
        yield channel.unary_unary(f"/{SERVICE}/ModelInfer", Request.SerializeToString, reply.FromString)


def image() -> Any:
    tensor = triton.InferInput("image", list(PIXELS.shape), "FP32")
    tensor.set_data_from_numpy(PIXELS)
    return tensor


def typed(version: str = "a", **contents: Any) -> Any:
    """A request whose only row is in typed contents."""
    contents = contents or {"fp32_contents": [0, 1, 2, 3]}
    made = Request(model_name="pixels", model_version=version, id="7")
    made.inputs.add(name="image", datatype="FP32", shape=[1, 1, 2, 2], contents=contents)
    return made


def test_descriptions(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("pixels")
    assert not client.is_model_ready("pixels", "poor")
    assert client.get_server_metadata().name == "leanserve"
    metadata = client.get_model_metadata("pixels")
    assert (metadata.versions, metadata.inputs[0].shape) == (["a", "b", "broken", "held"], [-1, 1, 2, 2])
    config = client.get_model_config("pixels", "a").config
    assert (config.max_batch_size, config.input[0].dims) == (32, [1, 2, 2])
    batching = config.dynamic_batching
    assert (batching.priority_levels, batching.default_priority_level) == (3, 2)
    assert config.input[0].data_type == model_config_pb2.TYPE_FP32
    index = client.get_model_repository_index().models
    assert [(item.version, item.state, item.reason) for item in index][-1] == ("poor", "UNAVAILABLE", POOR)


def test_statistics_are_those_of_rest(client: Any) -> None:
    def counts() -> tuple[int, int]:
        (stats,) = client.get_inference_statistics("pixels", "b").model_stats
        return stats.inference_stats.success.count, stats.inference_stats.fail.count

    success, fail = counts()
    client.infer("pixels", [image()], model_version="b")
    with pytest.raises(utils.InferenceServerException, match="unknown output"):
        client.infer("pixels", [image()], model_version="b", outputs=[triton.InferRequestedOutput("other")])
    assert counts() == (success + 1, fail + 1)


def test_infer_with_raw_tensors(client: Any) -> None:
    result = client.infer(
        "pixels", [image()], request_id="7", outputs=[triton.InferRequestedOutput("logits")], timeout=5_000_000
    )
    np.testing.assert_array_equal(result.as_numpy("logits"), LOGITS)
    reply = result.get_response()
    assert (reply.id, reply.model_name) == ("7", "pixels")
    assert reply.parameters["batch_rows"].int64_param == 2
    assert reply.parameters["queue_ms"].double_param >= 0


def test_headers_choose_like_those_of_rest(client: Any) -> None:
    def version(**headers: str) -> str:
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        return str(client.infer("pixels", [image()], headers=headers).get_response().model_version)

    assert version(x_variant="b") == "b"
    assert {version() for _ in range(40)} == {"a", "b"}
    sticky = [{version(x_caller_key=str(key)) for _ in range(3)} for key in range(12)]
    assert all(len(seen) == 1 for seen in sticky)


def test_typed_contents_are_answered_typed(infer: Any) -> None:
    reply = infer(typed())
    assert reply.outputs[0].contents.fp32_contents == [0, 10, 20, 30]
    assert not reply.raw_output_contents


def test_a_call_has_as_many_headers_as_a_request(infer: Any) -> None:
    assert infer(typed(), metadata=[(f"x-{number}", "b") for number in range(80)])
    assert infer(typed(), metadata=[("x-long", "b" * 60_000)]), "more than gRPC itself allows"
    with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
        infer(typed(), metadata=[("x-long", "b" * 66_000)])
    with pytest.raises(grpc.RpcError) as refused:
        infer(typed(), metadata=[(f"x-{number}", "b") for number in range(101)])
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "limits.headers" in refused.value.details()


def changed(change: Callable[[Any], Any]) -> Any:
    made = typed()
    change(made)
    return made


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (changed(lambda r: setattr(r, "model_name", "other")), "NOT_FOUND", "no model 'other'"),
        (typed("9"), "NOT_FOUND", "no variant '9'"),
        (typed("poor"), "UNAVAILABLE", "excluded: score 0.5"),
        (typed("broken", fp32_contents=[1, 1, 1, 1]), "INTERNAL", "under id"),
        (typed(fp32_contents=[1]), "INVALID_ARGUMENT", "1 elements in fp32_contents, its shape [1, 1, 2, 2] takes 4"),
        (typed(int_contents=[1, 2, 3, 4]), "INVALID_ARGUMENT", "0 elements in fp32_contents"),
        (changed(lambda r: r.inputs.pop()), "INVALID_ARGUMENT", "input 'image' is missing"),
        (changed(lambda r: r.inputs.append(r.inputs[0])), "INVALID_ARGUMENT", "given twice"),
        (changed(lambda r: setattr(r.inputs[0], "datatype", "X")), "INVALID_ARGUMENT", "datatype 'X', the model takes"),
        (changed(lambda r: setattr(r.inputs[0], "datatype", "FP16")), "INVALID_ARGUMENT", "use raw_input_contents"),
        (changed(lambda r: r.raw_input_contents.append(bytes(16))), "INVALID_ARGUMENT", "has 'contents', but"),
        (changed(lambda r: r.raw_input_contents.extend([b"", b""])), "INVALID_ARGUMENT", "2 entries for 1 inputs"),
        (typed(fp32_contents=[0] * LIMIT), "RESOURCE_EXHAUSTED", "message larger than max"),
    ],
)
def test_refusals(infer: Any, request_: Any, code: str, text: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        infer(request_)
    assert refused.value.code().name == code
    assert text.lower() in refused.value.details().lower()


def test_a_bug_of_ours_shows_no_stack(infer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanserve.api.v2.grpc_answers.encode", lambda *_: 1 / 0)
    with pytest.raises(grpc.RpcError) as refused:
        infer(typed())
    assert refused.value.code() is grpc.StatusCode.INTERNAL
    assert "division" not in refused.value.details()


def test_priorities_are_kept_and_who_cancels_or_passes_a_deadline_is_not_executed(live: Live, infer: Any) -> None:
    held = live.fleet.variants["held"]
    backend = held.backend
    assert isinstance(backend, PixelBackend)
    ran = backend.ran
    live.gate.clear()
    try:
        first = infer.future(typed("held"))
        until(lambda: backend.waits)
        urgent = changed(lambda made: made.parameters["priority"].__setattr__("int64_param", 1))
        urgent.model_version = "held"
        second, third = infer.future(urgent), infer.future(typed("held"), timeout=0.2)
        until(lambda: held.batcher.waiting_rows == 2)
        assert held.batcher.rows_before(1) == 1
        second.cancel()
        assert third.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: held.metrics.requests["client_gone"].count == 2)
    finally:
        live.gate.set()
    assert first.result().model_version == "held"
    until(lambda: held.batcher.waiting_rows == 0)
    assert backend.ran == ran + 1


def until(happened: Callable[[], bool], seconds: float = 10) -> None:
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.002)


def test_a_full_queue_tells_when_to_come_again() -> None:
    batch = {"queue_rows": 1, "max_rows": 1, "timeout_ms": 10_000}
    with live_server(batch=batch) as live, grpc.insecure_channel(live.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer", Request.SerializeToString)
        live.gate.clear()
        backend = live.fleet.variants["held"].backend
        assert isinstance(backend, PixelBackend)
        first = call.future(typed("held"))
        until(lambda: backend.waits)
        second = call.future(typed("held"))
        until(lambda: live.fleet.variants["held"].batcher.waiting_rows == 1)
        with pytest.raises(grpc.RpcError) as refused:
            call(typed("held"))
        live.gate.set()
        assert first.result()
        assert second.result()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(refused.value.trailing_metadata())
    assert int(trailing["retry-after"]) >= 1


def test_a_service_that_starts_is_alive_and_not_ready_and_the_same_channel_is_answered_afterwards() -> None:
    gate = threading.Event()
    gate.set()
    opened = open_variants(gate)
    startup = Startup(["a"])
    startup.building(BuildNews("a", "fold_bn", 1, 4))

    async def scenario() -> None:
        service = opened.service()
        server = await start_grpc(GrpcPort("127.0.0.1", 0, LIMITS), startup, Access())
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            assert await client.is_server_live()
            assert not await client.is_server_ready()
            for call in (client.get_server_metadata, client.get_model_repository_index):
                with pytest.raises(
                    utils.InferenceServerException, match=r"building variant 'a' \(fold_bn\)"
                ) as refused:
                    await call()
                assert refused.value.status() == "StatusCode.UNAVAILABLE"
            server.serve(service)
            assert await client.is_server_ready()
            assert (await client.get_server_metadata()).name == "leanserve"
            service.fleet.draining = True
            assert not await client.is_server_ready()
        await server.stop(0)

    try:
        asyncio.run(scenario())
    finally:
        opened.warm.close()


def test_every_call_of_the_protocol_is_offered(live: Live) -> None:
    assert {*model_answers(OpenInference(live.service)), "ServerLive", "ServerReady"} == set(METHODS)


def test_a_taken_port_is_refused_and_a_stop_lets_open_calls_finish() -> None:
    gate = threading.Event()
    gate.set()
    opened = open_variants(gate)

    async def scenario() -> None:
        service = opened.service()
        startup = Startup(["held"])
        server = await start_grpc(GrpcPort("127.0.0.1", 0, LIMITS), startup, Access())
        server.serve(service)
        with pytest.raises(StartupError, match=f"127.0.0.1:{server.port}; choose another port"):
            await start_grpc(GrpcPort("127.0.0.1", server.port, LIMITS), startup, Access())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer", Request.SerializeToString)
            gate.clear()
            open_call = call(typed("held"))
            backend = service.fleet.variants["held"].backend
            assert isinstance(backend, PixelBackend)
            while not backend.waits:
                await asyncio.sleep(0.01)
            stopping = asyncio.create_task(server.stop(10))
            await asyncio.sleep(0.05)
            gate.set()
            assert await open_call
            await stopping

    try:
        asyncio.run(scenario())
    finally:
        opened.warm.close()


DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")


@pytest.mark.parametrize("dtype", [*DTYPES, "string"])
def test_every_datatype_travels_typed_and_raw(dtype: str) -> None:
    field = TensorSpec("x", dtype, (2,))
    spec = ModelSpec((field,), (field,))
    values = np.array([["", "Ünder"]], object) if dtype == "string" else np.array([[0, 1]], dtype)
    decoder = GrpcInferDecoder(spec)
    for form in ("typed", "raw"):
        empty = decoder.decode(parse(_request(dtype, values, form).SerializeToString()))
        reply = Reply.FromString(encode(empty.options, (values,), form, ("m", "v"), {}))
        (back,) = decoder.decode(parse(_mirrored(reply).SerializeToString())).inputs
        assert back.dtype == values.dtype
        assert back.tolist() == values.tolist()


def _request(dtype: str, values: np.ndarray[Any, Any], form: str) -> Any:
    tensor = triton.InferInput("x", [1, 2], "BYTES" if dtype == "string" else utils.np_to_triton_dtype(values.dtype))
    tensor.set_data_from_numpy(values)
    made = Request()
    raw = tensor._get_content()
    made.inputs.add(name="x", datatype=tensor.datatype(), shape=[1, 2])
    if form == "raw":
        made.raw_input_contents.append(raw)
    else:
        kind = {
            "b": "bool",
            "i": "int64" if dtype == "int64" else "int",
            "u": "uint64" if dtype == "uint64" else "uint",
        }
        kind |= {"f": "fp32" if dtype == "float32" else "fp64", "O": "bytes"}
        plain = values.ravel().tolist()
        elements = [text.encode() for text in plain] if dtype == "string" else plain
        getattr(made.inputs[0].contents, f"{kind[values.dtype.kind]}_contents").extend(elements)
    return made


def _mirrored(reply: Any) -> Any:
    """The reply's outputs as the inputs of a request."""
    made = Request(raw_input_contents=reply.raw_output_contents)
    for output in reply.outputs:
        made.inputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        if output.HasField("contents"):
            made.inputs[-1].contents.CopyFrom(output.contents)
    return made


def test_typed_numbers_out_of_range_are_refused() -> None:
    spec = ModelSpec((TensorSpec("x", "int8", (1,)),), (TensorSpec("y", "float32", (1,)),))
    made = Request()
    made.inputs.add(name="x", datatype="INT8", shape=[1, 1], contents={"int_contents": [128]})
    with pytest.raises(BadInput, match="a number is out of the range of INT8"):
        GrpcInferDecoder(spec).decode(parse(made.SerializeToString()))


def test_half_precision_makes_a_typed_reply_raw() -> None:
    spec = ModelSpec((TensorSpec("x", "int8", (1,)),), (TensorSpec("y", "float16", (1,)),))
    made = Request()
    made.inputs.add(name="x", datatype="INT8", shape=[1, 1], contents={"int_contents": [1]})
    options = GrpcInferDecoder(spec).decode(parse(made.SerializeToString())).options
    reply = Reply.FromString(encode(options, (np.ones((1, 1), np.float16),), "typed", ("m", "v"), {}))
    assert reply.raw_output_contents == [np.float16(1).tobytes()]


@pytest.mark.parametrize("form", ["typed", "raw"])
@pytest.mark.parametrize("rows", [1, 31, 33, 5000, 600_000])
def test_replies_of_any_size_are_what_protobuf_makes_of_them(form: ContentsForm, rows: int) -> None:
    """Lengths of one to three bytes, and more numbers than are converted at once."""
    spec = ModelSpec((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))
    values = np.arange(rows, dtype=np.float32).reshape(-1, 1)
    made = Request()
    made.inputs.add(name="x", datatype="FP32", shape=[1, 1], contents={"fp32_contents": [1]})
    options = GrpcInferDecoder(spec).decode(parse(made.SerializeToString())).options
    reply = Reply.FromString(encode(options, (values,), form, ("m", "v"), {"batch_rows": rows}))
    assert list(reply.outputs[0].shape) == [rows, 1]
    assert reply.parameters["batch_rows"].int64_param == rows
    told = (
        reply.outputs[0].contents.fp32_contents
        if form == "typed"
        else np.frombuffer(reply.raw_output_contents[0], "<f4")
    )
    np.testing.assert_array_equal(told, values[:, 0])


def test_our_messages_are_those_of_the_protocol() -> None:
    """Every field has the name, number and type that an independent client gives it."""
    file = message("ModelInferRequest").DESCRIPTOR.file
    theirs: dict[str, Any] = {}
    for module in (service_pb2, model_config_pb2):
        theirs |= dict(module.DESCRIPTOR.message_types_by_name.items())
    for name, ours in file.message_types_by_name.items():
        _compare(ours, theirs[name])
    methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for method in file.services_by_name["GRPCInferenceService"].methods:
        assert method.input_type.full_name == methods[method.name].input_type.full_name
        assert method.output_type.full_name == methods[method.name].output_type.full_name


def _compare(ours: Any, theirs: Any) -> None:
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated)
        if field.enum_type:
            values = {value.name: value.number for value in other.enum_type.values}
            assert {value.name: value.number for value in field.enum_type.values} == values
    for nested in ours.nested_types:
        _compare(nested, theirs.nested_types_by_name[nested.name])


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")
@pytest.mark.parametrize("name", ["open_inference", "health"])
def test_a_descriptor_is_that_of_its_proto_file(tmp_path: Path, name: str) -> None:
    made = tmp_path / "made.binpb"
    source = ["-I", str(PROTOCOL), f"--descriptor_set_out={made}", f"{name}.proto"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *source], check=True, timeout=60)
    read = FileDescriptorSet.FromString
    assert read(made.read_bytes()) == read((PROTOCOL / f"{name}.binpb").read_bytes())


GRPC_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    409: "FAILED_PRECONDITION",
    413: "RESOURCE_EXHAUSTED",
    415: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""What gRPC says where REST says that status; `ServiceError`s have no other."""


def every_error(family: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    yield family
    for child in family.__subclasses__():
        yield from every_error(child)


@pytest.mark.parametrize("error", sorted(set(every_error()), key=str))
def test_every_error_is_told_over_grpc_as_over_rest(error: type[ServiceError]) -> None:
    assert grpc_status(error.status).name == GRPC_STATUS[error.status]
