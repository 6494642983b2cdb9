"""The networks that the comparisons serve: one input `x`, one output `y`, random weights, for speed only.

Single tensors, because that is what every peer can take without code of its own; sizes as in the models people serve.
`mlp` is written node by node and needs no torch; the others are exported as the service exports its own bases.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from leanserve.contracts import Array, ModelSpec, TensorSpec

if TYPE_CHECKING:
    from torch import nn

MLP_WIDTHS = (64, 128, 10)
ENCODER_VOCABULARY, ENCODER_WIDTH, ENCODER_HEADS, ENCODER_INNER, ENCODER_LAYERS = 30_522, 384, 12, 1536, 6
SPECS = {
    "mlp": ModelSpec((TensorSpec("x", "float32", (64,)),), (TensorSpec("y", "float32", (10,)),)),
    "resnet50": ModelSpec((TensorSpec("x", "float32", (3, 224, 224)),), (TensorSpec("y", "float32", (1000,)),)),
    "encoder": ModelSpec((TensorSpec("x", "int64", (64,)),), (TensorSpec("y", "float32", (384,)),)),
}


def write_network(name: str, folder: Path) -> Path:
    """The network as an ONNX file in `folder`, made if it is not there yet; `name` is one of `SPECS`."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        {"mlp": _write_mlp, "resnet50": _exporter(_resnet50), "encoder": _exporter(_encoder)}[name](path)
    return path


def example(name: str, rows: int = 1) -> Array:
    """A random batch that the network takes."""
    return SPECS[name].example(rows, seed=1)[0]


def _write_mlp(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    random = np.random.default_rng(0)
    width, hidden, classes = MLP_WIDTHS
    first = onnx.numpy_helper.from_array(random.standard_normal((width, hidden), np.float32) / 8, "w1")
    second = onnx.numpy_helper.from_array(random.standard_normal((hidden, classes), np.float32) / 11, "w2")
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    takes = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])
    gives = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", classes])
    graph = helper.make_graph(nodes, "mlp", [takes], [gives], [first, second])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def _exporter(build: Callable[[], nn.Module]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import torch

        from leanserve.contracts import TorchModel
        from leanserve.passes.toolkit.lowering import export_onnx

        torch.manual_seed(0)
        unfinished = path.with_suffix(".part")
        export_onnx(TorchModel(build().eval(), SPECS[path.stem]), unfinished)
        unfinished.rename(path)

    return write


def _resnet50() -> nn.Module:
    from torch import Tensor, nn
    from torch.nn import functional as F

    def convolution(inner: int, outer: int, kernel: int, stride: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outer))

    class Bottleneck(nn.Module):
        def __init__(self, inner: int, width: int, stride: int) -> None:
            super().__init__()
            outer = 4 * width
            self.narrow = convolution(inner, width, 1)
            self.middle = convolution(width, width, 3, stride)
            self.widen = convolution(width, outer, 1)
            self.skip = nn.Identity() if (inner, stride) == (outer, 1) else convolution(inner, outer, 1, stride)

        def forward(self, x: Tensor) -> Tensor:
            inside = F.relu(self.middle(F.relu(self.narrow(x))))
            return F.relu(self.widen(inside) + self.skip(x))

    blocks: list[nn.Module] = []
    inner = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            blocks.append(Bottleneck(inner, 64 << stage, 2 if stage and not block else 1))
            inner = 256 << stage
    stem = [convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def _encoder() -> nn.Module:
    from torch import Tensor, nn
    from torch.nn import functional as F

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj = nn.Linear(ENCODER_WIDTH, 3 * ENCODER_WIDTH)
            self.out_proj = nn.Linear(ENCODER_WIDTH, ENCODER_WIDTH)
            self.widen = nn.Linear(ENCODER_WIDTH, ENCODER_INNER)
            self.narrow = nn.Linear(ENCODER_INNER, ENCODER_WIDTH)
            self.norm_attention = nn.LayerNorm(ENCODER_WIDTH)
            self.norm_inner = nn.LayerNorm(ENCODER_WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.in_proj(x).unflatten(-1, (3 * ENCODER_HEADS, -1)).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(*heads.chunk(3, dim=1)).transpose(1, 2).flatten(2)
            x = self.norm_attention(x + self.out_proj(mixed))
            y: Tensor = self.norm_inner(x + self.narrow(F.gelu(self.widen(x))))
            return y

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(ENCODER_VOCABULARY, ENCODER_WIDTH)
            self.layers = nn.Sequential(*(Layer() for _ in range(ENCODER_LAYERS)))

        def forward(self, x: Tensor) -> Tensor:
            pooled: Tensor = self.layers(self.words(x)).mean(dim=1)
            return pooled

    return Encoder()
