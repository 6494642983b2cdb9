"""A model as a pass expects it, which takes those of one format.

A file of its own: passes import it, and what a pass imports decides the keys of its artifacts; a change of a backend
shall not.
"""

from __future__ import annotations

from leanserve.contracts import Model, OnnxModel, TorchModel
from leanserve.errors import PassFailed


def torch_model(model: Model, kind: str) -> TorchModel:
    """The model as a pass of this kind changes it.

    Raises:
        PassFailed: it is no torch module, or not any more.
    """
    if isinstance(model, TorchModel):
        return model
    raise PassFailed(
        f"{kind} takes torch modules, but the model is {model.format.upper()} already; put it before the pass that "
        "exports the model, or drop the pass"
    )


def onnx_model(model: Model, kind: str) -> OnnxModel:
    """The model as a pass of this kind takes it.

    Raises:
        PassFailed: it is no ONNX graph.
    """
    if isinstance(model, OnnxModel):
        return model
    raise PassFailed(f"{kind} takes ONNX graphs, but the model is in the format '{model.format}'")
