"""From stored artifacts to a model that can run: replay the structure, load the weights, repeat the load passes.

Nothing here trains or reads data, which is why a start from the cache takes seconds. Weights come from safetensors or
ONNX files only; no code is ever loaded from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import TypeAdapter

from leanserve.artifacts.manifest import Recipe
from leanserve.artifacts.store import ONNX_FILE, TORCH_FILE, ArtifactStore
from leanserve.contracts import Base, Model, OnnxModel, TorchModel
from leanserve.passes import AnyPass
from leanserve.passes.base import Pass

_PASS: TypeAdapter[Pass] = TypeAdapter(AnyPass)


def load_model(store: ArtifactStore, base: Base, key: str) -> Model:
    """Load the artifact `key` of `base`, ready for a backend.

    Raises:
        ArtifactCorrupt: an artifact of the chain is missing or damaged.
    """
    chain = store.chain(key)
    model = _stored_model(store, base, chain)
    for recipe in chain:
        if recipe.kind is not None:
            model = _pass_of(recipe).on_load(model, recipe.decisions)
    return model


def is_onnx(store: ArtifactStore, key: str) -> bool:
    """Whether an artifact is a graph for onnxruntime, with nothing of torch in it."""
    return ONNX_FILE in _holder(store.chain(key)).files


def _holder(chain: Sequence[Recipe]) -> Recipe:
    """The last of the chain that has weights."""
    return next(recipe for recipe in reversed(chain) if recipe.files)


def _stored_model(store: ArtifactStore, base: Base, chain: Sequence[Recipe]) -> Model:
    holder = _holder(chain)
    folder = store.folder(holder.key)
    if ONNX_FILE in holder.files:
        return OnnxModel(folder / ONNX_FILE, base.spec)
    from leanserve.passes.toolkit.masks import unpacked_masks
    from leanserve.passes.toolkit.ties import load_tensors, read_tensors

    module = base.torch_module()
    for recipe in chain[1 : chain.index(holder) + 1]:
        module = _pass_of(recipe).rebuild_structure(module, recipe.decisions)
    weights, masks = unpacked_masks(read_tensors(folder / TORCH_FILE)[0])
    load_tensors(module, weights)
    return TorchModel(module.eval(), base.spec, masks)


def _pass_of(recipe: Recipe) -> Pass:
    return _PASS.validate_python(recipe.options)
