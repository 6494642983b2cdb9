"""A look at a model: what it is made of decides which passes are worth trying."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from leanserve.bases.description import Tensor
from leanserve.bases.loaded import LoadedBase
from leanserve.contracts import ModelSpec, OnnxModel, TensorSpec, TorchModel
from leanserve.texts import STRING

if TYPE_CHECKING:
    from torch import nn

RowShape = Literal["convolutional", "depthwise", "attention", "dense", "graph", "program"]

AGE = re.compile(r"^(in|out|input|output|new|next|old|prev|past|present)[_.]|([_.](in|out|new|next|old|prev)|n|0|1)$")
STATE = re.compile(r"state|hidden|cache|memory")


@dataclass(frozen=True)
class ModelProfile:
    """What was seen."""

    name: str
    spec: ModelSpec
    shape: RowShape
    """What dominates it; `graph`: an ONNX file, `program`: an exported program, both without layers to replace."""
    parameters: int
    norms: bool
    """Whether there are batch norms to fold."""
    convolves: bool
    multiplies: bool
    """Whether there are linear layers, or matrix products in a graph."""
    recurs: bool
    """Whether there are LSTMs."""
    caveats: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    """Its outputs, with the evidence for what they mean."""

    @property
    def outputs(self) -> str:
        """What it gives, in words."""
        if self.spec.labels:
            return f"{len(self.spec.labels)} classes"
        return ", ".join(f"{item.name} {_sizes(item.shape)} ({item.meaning})" for item in self.spec.outputs)

    @property
    def inputs(self) -> str:
        """What it takes, in words."""
        return ", ".join(f"{item.name} {item.dtype} {_sizes(item.shape)}" for item in self.spec.inputs)


def inspect(base: LoadedBase, form: str) -> ModelProfile:
    """Load the model and count what it consists of."""
    model = base.model()
    if model.format == OnnxModel.format:
        seen = _seen_in_graph(cast("OnnxModel", model))
    else:
        seen = _seen_in_module(cast("TorchModel", model), form)
    return ModelProfile(base.name, base.spec, *seen, base.caveats, base.outputs)


def _seen_in_module(model: TorchModel, form: str) -> tuple[RowShape, int, bool, bool, bool, bool]:
    from torch import nn

    layers: Counter[str] = Counter()
    for module in model.module.modules():
        layers[type(module).__name__] += 1
    parameters = sum(weight.numel() for weight in model.module.parameters())
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.module.modules())
    convolves, multiplies = layers["Conv2d"] > 0, layers["Linear"] > 0
    if form == "torch_export":
        return "program", parameters, False, True, True, False
    return _shape_of(model.module, model.spec), parameters, norms, convolves, multiplies, layers["LSTM"] > 0


def _shape_of(module: nn.Module, spec: ModelSpec) -> RowShape:
    from torch import nn

    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    inner = [layer for layer in convolutions if layer.kernel_size != (1, 1)]
    if len(convolutions) >= 4:
        # Where most spatial kernels see one channel, there is no rank to lower.
        return "depthwise" if 2 * sum(layer.groups > 1 for layer in inner) > len(inner) else "convolutional"
    sequence = any(None in item.shape for item in spec.inputs)
    normed = any(isinstance(layer, nn.LayerNorm) for layer in module.modules())
    return "attention" if sequence or normed else "dense"


def _seen_in_graph(model: OnnxModel) -> tuple[RowShape, int, bool, bool, bool, bool]:
    import onnx

    graph = onnx.load(model.path, load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    parameters = sum(math.prod(weight.dims) for weight in graph.initializer)
    multiplies = bool(operators["MatMul"] + operators["Gemm"])
    return "graph", parameters, False, operators["Conv"] > 0, multiplies, operators["LSTM"] > 0


def likely_state(spec: ModelSpec) -> dict[str, str]:
    """Inputs that look like state, and the outputs that look like their next values: names alike, and the same tensor.

    Of an input that is called a state a single output of its kind is enough.
    """
    pairs: dict[str, str] = {}
    for item in spec.inputs:
        alike = [given.name for given in spec.outputs if _same_kind(item, given) and given.name not in pairs.values()]
        named = [name for name in alike if _stem(name) == _stem(item.name)]
        called = alike if len(alike) == 1 and STATE.search(item.name.casefold()) else []
        if found := named or called:
            pairs[item.name] = found[0]
    return pairs if len(pairs) < len(spec.inputs) else {}


def _same_kind(one: TensorSpec, other: TensorSpec) -> bool:
    known = bool(one.shape) and None not in one.shape and one.dtype != STRING
    return known and (one.dtype, one.shape) == (other.dtype, other.shape)


def _stem(name: str) -> str:
    """A name without what tells an old value from a new one: h0 and hn, state and stateN, past_key and present_key."""
    return AGE.sub("", name.casefold()).strip("_.")


def _sizes(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
