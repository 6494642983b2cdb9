"""`python rule_fleet.py FOLDER PORT GRPC_PORT CONFIG`: a real server process, drain and all, over scripted variants.

The kind of a variant is its name up to a digit: `rule` obeys its rows, as do `light`, `slow`, `middle` and `heavy`,
which take 0.6, 10, 30 and 100 ms more per batch, and `short`, which the event loop runs itself. `onnx` is a float
network in onnxruntime, `large` one of four times the size. `dynamic` and `tensor` are the float network in 8 bits,
quantized while running by one scale per row and per tensor. `fragile` obeys in a process of its own. CONFIG is a
service config as JSON. FOLDER holds the gate file, the networks, and `config.yaml`, which is read on SIGHUP.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper

from fakes import Opened, PixelBase, report
from leanserve.api.access import Key
from leanserve.api.keys import keys_of
from leanserve.api.server import Address, run_server
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.images import ImageCodec
from leanserve.config.changes import refuse_fixed
from leanserve.config.schema import ServiceConfig, read_config
from leanserve.context import serving_plans, traffic_plan
from leanserve.contracts import Backend, Base, OnnxModel
from leanserve.http.listening import listen
from leanserve.runtime.backends.onnx_runtime import OnnxRuntimeBackend
from leanserve.runtime.device import Device
from leanserve.runtime.isolation.backend import IsolatedBackend
from leanserve.runtime.isolation.life import WorkerProgram
from leanserve.runtime.isolation.workers import Workers
from leanserve.serving.opening import MeasuredLimits, WarmFleet
from leanserve.serving.replanning import FleetPlan, VariantSource
from leanserve.serving.short_batches import SHORT_S
from rules import SPEC, WIDTH, RuleBackend

HIDDEN = {"onnx": 1024, "large": 2048}
SCALES = {"dynamic": "row", "tensor": "tensor"}
BATCH_S = {"rule": 2 * SHORT_S, "light": 0.0006, "slow": 0.01, "middle": 0.03, "heavy": 0.1, "short": 0.0}
"""All but the last are more than what the event loop would run itself."""


class RuleBase(PixelBase):
    """Images of 4 x 2 pixels, or eight numbers."""

    name = "rules"
    spec = SPEC
    codec = ImageCodec(mode="L", size=(4, 2), mean=(0.0,), std=(1.0,), answers=AnswerEncoder(SPEC))


def write_network(path: Path, hidden: int) -> None:
    """8 -> hidden -> hidden -> 8 with random weights: large enough that onnxruntime has threads to share it among."""
    random = np.random.default_rng(0)
    widths = (WIDTH, hidden, hidden, WIDTH)
    weights = [random.standard_normal(pair).astype(np.float32) / pair[0] ** 0.5 for pair in pairwise(widths)]
    constants = [onnx.numpy_helper.from_array(weight, f"w{index}") for index, weight in enumerate(weights)]
    nodes = [
        helper.make_node("Flatten", ["x"], ["h0"]),
        helper.make_node("MatMul", ["h0", "w0"], ["m0"]),
        helper.make_node("Relu", ["m0"], ["h1"]),
        helper.make_node("MatMul", ["h1", "w1"], ["m1"]),
        helper.make_node("Relu", ["m1"], ["h2"]),
        helper.make_node("MatMul", ["h2", "w2"], ["y"]),
    ]
    takes = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 1, 2, 4])
    gives = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", WIDTH])
    graph = helper.make_graph(nodes, "network", [takes], [gives], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def quantize(float_network: Path, path: Path, scale: str) -> None:
    """Write what the pass makes of a network."""
    from leanserve.passes.families.quantize.quantize_dynamic import QuantizeDynamic
    from tiny_base import context_of

    with TemporaryDirectory() as scratch:
        context = context_of(RuleBase(), Path(scratch))  # type: ignore[arg-type]
        pass_ = QuantizeDynamic.model_validate({"scale": scale})
        made = pass_.apply(OnnxModel(float_network, SPEC), context).model
        assert isinstance(made, OnnxModel)
        path.write_bytes(made.path.read_bytes())


def kind_of(name: str) -> str:
    return name.rstrip("0123456789")


def source_of(name: str, folder: Path, stuck_after_s: float) -> VariantSource:
    """How a variant is loaded on the device thread, or beside it while others serve."""
    if kind_of(name) != "fragile":
        return VariantSource(lambda: loader(name, folder))
    workers = Workers(name, stuck_after_s, (0.0, 0.1))
    program = WorkerProgram(name, "fragile_worker", (str(folder),))
    return VariantSource(lambda: lambda _: IsolatedBackend(program, 1, workers), workers)


def fleet_plan(config: ServiceConfig, folder: Path) -> FleetPlan:
    """All variants of a config."""
    plans = [
        replace(plan, measured=MeasuredLimits(trusts_rows=not plan.name.startswith("tensor")))
        for plan in serving_plans(config, [report(item.name, spec=SPEC) for item in config.variants])
    ]
    sources = {item.name: source_of(item.name, folder, config.stuck_after_s) for item in config.variants}
    return FleetPlan(plans, traffic_plan(config), sources)


class RuleReload:
    """An `api.reloading.Reload` of FOLDER/config.yaml, whose variants need no building."""

    def __init__(self, folder: Path, current: ServiceConfig) -> None:
        self._folder = folder
        self._current = current

    def read(self) -> ServiceConfig:
        path = self._folder / "config.yaml"
        self._config = read_config(path)
        refuse_fixed(path, self._current, self._config)
        return self._config

    def keys(self) -> Sequence[Key]:
        return keys_of(self._config.auth, self._folder / "config.yaml", os.environ)

    def build(self) -> None: ...

    def plan(self, lanes: int) -> FleetPlan:
        return fleet_plan(self._config, self._folder)


class RuleStart(Opened):
    """The start of a service that can be reloaded."""

    def reload(self, current: ServiceConfig, base: Base) -> RuleReload:
        return RuleReload(Path(sys.argv[1]), current)


def loader(name: str, folder: Path) -> Callable[[int], Backend]:
    """How to load the variant of that name on the device thread."""
    kind = kind_of(name)
    if kind in HIDDEN | SCALES:
        return lambda threads: OnnxRuntimeBackend(OnnxModel(folder / f"{kind}.onnx", SPEC), threads)
    return lambda threads: RuleBackend(folder, BATCH_S[kind])


def main(folder: Path, port: int, grpc_port: int, config: ServiceConfig) -> None:
    claimed = listen("127.0.0.1", port)
    for kind, hidden in HIDDEN.items():
        write_network(folder / f"{kind}.onnx", hidden)
    for kind in {kind_of(item.name) for item in config.variants} & SCALES.keys():
        quantize(folder / "onnx.onnx", folder / f"{kind}.onnx", SCALES[kind])
    planned = fleet_plan(config, folder)
    warm = WarmFleet(RuleBase(), planned.plans, Device("cpu", 2), planned.traffic)  # type: ignore[arg-type]
    for name, source in planned.sources.items():
        warm.open(name, source.read(), source.read, source.workers)
    run_server(config, Address(claimed, ("127.0.0.1", grpc_port)), RuleStart(config, warm))


if __name__ == "__main__":
    folder, port, grpc_port, settings = sys.argv[1:]
    main(Path(folder), int(port), int(grpc_port), ServiceConfig.model_validate(json.loads(settings)))
