"""Make activations easier to quantize: what is large in them moves into the weights (Xiao et al. 2022, "SmoothQuant").

A few inputs of a transformer's linear layers are many times larger than the others, and 8 bits with one range for all
leave the others few steps. Each input is divided by a factor and the weights that multiply it are multiplied by the
same, which leaves the product as it is. The factors are powers of two: the model answers exactly as before, bit by bit.

The division is folded into the norm or the layer before where nothing else reads what that gives; elsewhere it is one
multiplication more per value, which layers with the same input share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, PositiveInt

from leanserve.contracts import BuildContext, Json, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.exported_calls import operator_of, owner_of
from leanserve.passes.toolkit.targets import Targets

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from leanserve.contracts import TorchModel

FACTORS = "input_factors"
"""The buffer of a layer by which its inputs are multiplied first."""


class InputReaders(NamedTuple):
    """Linear layers that read one tensor, by name, and the module into which a factor of it can be folded."""

    layers: tuple[str, ...]
    source: str | None


class Smooth(Pass):
    """Balance the ranges of activations and weights of linear layers."""

    kind: Literal["smooth"] = "smooth"
    alpha: float = Field(default=0.7, ge=0, le=1)
    """How much of an activation's range goes into the weights: 0 evens out the weights, 1 the activations."""
    where: Literal["everywhere", "folded"] = "everywhere"
    """`folded`: only where it costs no multiplication."""
    samples: PositiveInt = 128
    """Calibration rows to see the activations on."""
    targets: Targets = Targets()

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.NUMERIC_PREPARATION

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import torch

        from leanserve.passes.toolkit.structure import copy_of

        made = copy_of(model, self.kind)
        data = context.base.data("calibration", self.samples, made.spec)
        if not len(data):
            raise PassFailed("smooth looks at calibration rows, but the base's calibration split is empty")
        rows = made.spec.most_rows(2)
        example = tuple(torch.from_numpy(array) for array in made.spec.example(rows, seed=context.seed))
        readings = self._readings(made, example)
        factors = self._factors(made, readings, context)
        multiplied = [list(reading.layers) for reading in readings if reading.source is None]
        self.rebuild_structure(made.module, {"multiplied": multiplied})
        with torch.no_grad():
            for reading, factor in zip(readings, factors, strict=True):
                _move(made.module, reading, factor)
        layers = sum(len(reading.layers) for reading in readings)
        facts = {"layers": layers, "folded": len(readings) - len(multiplied), "multiplications": len(multiplied)}
        return Applied(made, {"multiplied": multiplied}, facts)

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        """Let layers multiply their input by a buffer, one for all that read the same tensor."""
        import torch

        for layers in decisions["multiplied"]:
            factors = torch.ones_like(module.get_parameter(f"{layers[0]}.weight")[0])
            for name in layers:
                layer = module.get_submodule(name)
                layer.register_buffer(FACTORS, factors)
                layer.register_forward_pre_hook(_multiply)
        return module

    def _readings(self, model: TorchModel, example: tuple[Tensor, ...]) -> list[InputReaders]:
        from torch import nn

        targeted = set(self.targets.select(model.module, nn.Linear))
        readings = [
            kept
            for reading in _readings(model.module, example)
            if (kept := _within(reading, targeted)) is not None
            and (kept.source is not None or self.where == "everywhere")
        ]
        if not readings:
            raise PassFailed(
                "smooth finds no linear layer that it may change"
                + (
                    "; set where: everywhere"
                    if self.where == "folded"
                    else ", or targets leaves all out; drop the pass"
                )
            )
        return readings

    def _factors(self, model: TorchModel, readings: Sequence[InputReaders], context: BuildContext) -> list[Tensor]:
        """By what the inputs of each reading are divided: powers of two, 1 where an input is always 0."""
        import torch

        from leanserve.passes.toolkit.activations import observe

        first: dict[str, nn.Module] = {item.layers[0]: model.module.get_submodule(item.layers[0]) for item in readings}
        largest: dict[str, Tensor] = {}

        def see(name: str, x: Tensor, _: Tensor) -> None:
            seen = x.abs().flatten(0, -2).amax(0)
            largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

        observe(model, first, context.base.data("calibration", self.samples, model.spec), see, context.progress)
        factors = []
        for reading in readings:
            activations = largest[reading.layers[0]]
            weights = torch.stack([model.module.get_parameter(f"{n}.weight").abs().amax(0) for n in reading.layers])
            ratio = activations.double() ** self.alpha / weights.amax(0).double() ** (1 - self.alpha)
            usable = torch.isfinite(ratio) & (ratio > 0)
            powers = torch.where(usable, ratio, 1.0).log2().round().clamp(-32, 32)
            factors.append(torch.exp2(powers).to(activations.dtype))
        return factors


def _within(reading: InputReaders, targeted: set[str]) -> InputReaders | None:
    """What of a reading is targeted; a factor cannot be folded if a layer is left out that reads the tensor, too."""
    layers = tuple(name for name in reading.layers if name in targeted)
    if not layers:
        return None
    return InputReaders(layers, reading.source if len(layers) == len(reading.layers) else None)


def _readings(module: nn.Module, example: tuple[Tensor, ...]) -> list[InputReaders]:
    """All linear layers by what they read, in the order in which they run; not those whose weight is used twice."""
    import torch
    from torch import nn

    program = torch.export.export(module, example)
    names = program.graph_signature.inputs_to_parameters
    by_tensor: dict[Any, list[str]] = defaultdict(list)
    nodes: Iterable[Any] = program.graph.nodes
    for node in nodes:
        if operator_of(node) == "linear" and node.args[1].name in names and len(node.args[1].users) == 1:
            layer = owner_of(names[node.args[1].name])
            if isinstance(module.get_submodule(layer), nn.Linear):
                by_tensor[node.args[0]].append(layer)
    return [InputReaders(tuple(layers), _source(tensor, len(layers), names)) for tensor, layers in by_tensor.items()]


def _source(tensor: Any, readers: int, names: Mapping[str, str]) -> str | None:
    """The norm or linear layer (before a ReLU, which keeps factors) that gives a tensor to these layers alone."""
    if len(tensor.users) != readers:
        return None
    if operator_of(tensor) == "relu":
        return _source(tensor.args[0], 1, names) if operator_of(tensor.args[0]) == "linear" else None
    place = {"layer_norm": 2, "linear": 1}.get(operator_of(tensor))
    if place is None or len(tensor.args) <= place:
        return None
    weight, *bias = (item for item in tensor.args[place : place + 2] if item is not None)
    own = [item for item in (weight, *bias) if getattr(item, "name", "") in names and len(item.users) == 1]
    return owner_of(names[weight.name]) if len(own) == 1 + len(bias) else None


def _move(module: nn.Module, reading: InputReaders, factors: Tensor) -> None:
    """Multiply the layers' weights by the factors, and divide what they read."""
    for name in reading.layers:
        module.get_parameter(f"{name}.weight").mul_(factors)
    if reading.source is None:
        module.get_buffer(f"{reading.layers[0]}.{FACTORS}").copy_(1 / factors)
        return
    source: Any = module.get_submodule(reading.source)
    source.weight.div_(factors if source.weight.ndim == 1 else factors[:, None])
    if source.bias is not None:
        source.bias.div_(factors)


def _multiply(layer: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0] * layer.input_factors, *inputs[1:])
