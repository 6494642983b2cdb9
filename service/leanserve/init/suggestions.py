"""Which variants to try first on this model and this machine, from safe to bold, with what to expect of each.

The expectations are what docs/passes.md measured; the build measures the model itself and says what came of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pydantic import TypeAdapter

from leanserve.contracts import Json
from leanserve.hardware import Hardware
from leanserve.init.profile import ModelProfile
from leanserve.init.reach import Gain, Reach
from leanserve.passes import AnyPass
from leanserve.passes.base import Pass

_PASS: TypeAdapter[Pass] = TypeAdapter(AnyPass)
INT8 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})

FOLD: Json = {"kind": "fold_bn"}
RUNTIME: Json = {"kind": "onnxruntime"}
ASLEEP: Json = {"kind": "onnxruntime", "spinning": "off"}
STATIC: Json = {"kind": "quantize_static", "observer": "mse"}
CAUTIOUS: Json = {"kind": "quantize_static", "observer": "percentile"}
WIDE: Json = {"kind": "quantize_static", "observer": "minmax"}
DYNAMIC: Json = {"kind": "quantize_dynamic"}
RECURRENT: Json = {"kind": "quantize_dynamic", "ops": ["MatMul", "Gemm", "LSTM"], "scale": "tensor"}
BFLOAT: Json = {"kind": "cast", "dtype": "bf16"}
LAYOUT: Json = {"kind": "channels_last"}
SMOOTH: Json = {"kind": "smooth"}
OPENVINO: Json = {"kind": "openvino"}
OPENVINO_BFLOAT: Json = {"kind": "openvino", "precision": "bf16"}
FOLDING: Gain = (1.07, 1.12)
"""What torch gains by it; a runtime folds batch norms itself."""
ASLEEP_EXPECT = "the same answers, later on idle cores, but sooner where other processes keep cores busy"


class Suggestion(NamedTuple):
    """A suggested variant, and what to expect of it against the baseline or the float graph."""

    name: str
    passes: tuple[Json, ...]
    words: str
    """`{gain}` stands for what to expect."""
    gain: Gain = (1.0, 1.0)
    """Where the passes reach all of the model."""
    folding: Gain = (1.0, 1.0)
    """Beside it, of folding all batch norms."""
    reach: Reach = Reach()

    @property
    def expect(self) -> str:
        """What to expect in this model."""
        low, high = (_factor(gain) for gain in self.reach.of(self.gain, self.folding))
        told = self.words.format(gain=f"{low}x" if low == high else f"{low}-{high}x")
        return "; ".join([told, *self.reach.told()])


def _factor(gain: float) -> str:
    return f"{gain:.1f}".removesuffix(".0")


def suggest(profile: ModelProfile, hardware: Hardware, *, trainable: bool) -> tuple[Suggestion, ...]:
    """The variants for a model on this hardware; what cannot pay there is left out.

    `trainable`: there is data of the user's own, so that compression that needs training is worth suggesting.
    """
    fast = (
        "fast int8 instructions found: "
        if INT8.intersection(hardware.isa)
        else "no fast int8 instructions found, expect less than: "
    )
    suggestions = {
        "convolutional": _convolutional,
        "depthwise": _depthwise,
        "attention": _linear,
        "dense": _linear,
        "graph": _graph,
        "program": _program,
    }[profile.shape](profile, fast)
    suggestions = (*suggestions, *_in_openvino(profile, fast))
    if profile.recurs and profile.spec.rows == "one":  # beside others, one scale for all rows fails the gate
        expect = f"{fast}LSTMs in int8: 2-3x their time in float"
        suggestions = (*suggestions, Suggestion("int8-lstm", (RECURRENT, RUNTIME), expect))
    if trainable and profile.shape == "convolutional":
        suggestions = (*suggestions, *_trained(profile))
    if trainable and profile.shape == "attention":
        suggestions = (*suggestions, *_taught(profile))
    return tuple(
        suggestion
        for suggestion in suggestions
        if not any(_PASS.validate_python(step).unsupported_reason(hardware) for step in suggestion.passes)
    )


def _convolutional(profile: ModelProfile, fast: str) -> tuple[Suggestion, ...]:
    fold = _fold(profile)
    return (
        Suggestion("float", (), "the baseline: torch, float32, as brought"),
        Suggestion("onnx", (*fold, RUNTIME), "the same answers, 1.5-2.5x torch"),
        Suggestion(
            "int8", (*fold, STATIC, RUNTIME), f"{fast}{{gain}} the variant onnx, a quarter of its size", (2, 2.5)
        ),
        Suggestion(
            "lowrank-int8",
            ({"kind": "lowrank_conv", "macs": 0.6}, *fold, STATIC, RUNTIME),
            "{gain} the variant int8, without training",
        ),
        *_in_torch(fold),
    )


def _depthwise(profile: ModelProfile, fast: str) -> tuple[Suggestion, ...]:
    fold = _fold(profile)
    return (
        Suggestion("float", (), "the baseline: torch, float32, as brought"),
        Suggestion("onnx", (*fold, RUNTIME), "the same answers, 1.5-2.5x torch"),
        Suggestion(
            "int8",
            (*fold, STATIC, RUNTIME),
            f"{fast}{{gain}} the variant onnx; depthwise layers are easily hurt",
            (1.5, 2.5),
        ),
        Suggestion("int8-percentile", (*fold, CAUTIOUS, RUNTIME), "the same speed, ranges without outliers"),
        *_in_torch(fold),
    )


def _in_torch(fold: tuple[Json, ...]) -> Iterable[Suggestion]:
    """Of images: narrow numbers, and pixels in the order in which convolutions read them."""
    bfloat = "{gain} torch, more at larger batches; nearly the same answers"
    yield Suggestion("bf16", (*fold, BFLOAT, LAYOUT), bfloat, (1.5, 4))
    layout = "the same answers, {gain} torch"
    yield Suggestion("channels-last", (*fold, LAYOUT), layout, (1.1, 1.15), FOLDING if fold else (1.0, 1.0))


def _linear(profile: ModelProfile, fast: str) -> tuple[Suggestion, ...]:
    fold = _fold(profile)
    return (
        Suggestion("float", (), "the baseline: torch, float32, as brought"),
        Suggestion("onnx", (*fold, RUNTIME), "the same answers, 1.2-2x torch"),
        Suggestion(
            "int8", (*fold, DYNAMIC, RUNTIME), f"{fast}{{gain}} the variant onnx, no calibration needed", (1.5, 1.8)
        ),
        Suggestion(
            "int8-static",
            (*fold, SMOOTH, STATIC, RUNTIME),
            f"{fast}{{gain}} the variant onnx: ranges fixed by calibration data, not found while running",
            (1.65, 2),
        ),
        Suggestion(
            "bf16", (*fold, BFLOAT), "{gain} torch, more at larger batches; nearly the same answers", (1.3, 2.5)
        ),
        Suggestion(
            "lowrank",
            ({"kind": "lowrank_linear", "macs": 0.8}, *fold, RUNTIME),
            "{gain} the variant onnx, without training",
        ),
    )


def _graph(profile: ModelProfile, fast: str) -> tuple[Suggestion, ...]:
    return (
        Suggestion("float", (), "the baseline: the file as brought, in onnxruntime"),
        Suggestion("asleep", (ASLEEP,), ASLEEP_EXPECT),
        *_quantized(profile, fast),
    )


def _program(profile: ModelProfile, fast: str) -> tuple[Suggestion, ...]:
    return (
        Suggestion("float", (), "the baseline: the program as brought, in torch"),
        Suggestion("onnx", (RUNTIME,), "the same answers, 1.2-2.5x torch"),
        Suggestion("asleep", (ASLEEP,), ASLEEP_EXPECT),
        *_quantized(profile, fast),
    )


def _quantized(profile: ModelProfile, fast: str) -> Iterable[Suggestion]:
    yield Suggestion("int8", (STATIC, RUNTIME), f"{fast}{{gain}} float, a quarter of its size", (2, 2.5))
    yield Suggestion("int8-percentile", (CAUTIOUS, RUNTIME), "the same speed, ranges without outliers")
    yield Suggestion("int8-minmax", (WIDE, RUNTIME), "the same speed, ranges of all that was seen")
    if profile.multiplies and not profile.convolves:
        yield Suggestion("int8-dynamic", (DYNAMIC, RUNTIME), "ranges found while running: no calibration needed")


def _in_openvino(profile: ModelProfile, fast: str) -> Iterable[Suggestion]:
    """What measured best on x86, where OpenVINO is installed."""
    fold = () if profile.shape in {"graph", "program"} else _fold(profile)
    smooth = (SMOOTH,) if profile.shape in {"attention", "dense"} else ()
    yield Suggestion(
        "int8-openvino",
        (*fold, *smooth, STATIC, OPENVINO),
        f"{fast}{{gain}} float in onnxruntime: the fastest there is for most models",
        (2.5, 3.5),
    )
    yield Suggestion(
        "bf16-openvino",
        (*fold, OPENVINO_BFLOAT),
        "about 2x float in onnxruntime for large layers, uncalibrated",
    )


def _trained(profile: ModelProfile) -> Iterable[Suggestion]:
    fold = _fold(profile)
    pruned: tuple[Json, ...] = ({"kind": "prune_channels", "macs": 0.5}, {"kind": "distill"})
    expect = "{gain} the variant int8, trained to answer like the base: the slowest build, often the fastest variant"
    yield Suggestion("pruned-int8", (*pruned, *fold, STATIC, RUNTIME), expect)
    shallow: tuple[Json, ...] = ({"kind": "student", "blocks": 0.5}, {"kind": "distill"})
    expect = "half of the blocks of every stack, trained likewise: faster than as few operations in thin layers"
    yield Suggestion("shallow-int8", (*shallow, *fold, STATIC, RUNTIME), expect)


def _taught(profile: ModelProfile) -> Iterable[Suggestion]:
    """Half of an encoder's layers, taught by the whole; its learning rate is that of a trained transformer."""
    taught: tuple[Json, ...] = (
        {"kind": "student", "blocks": 0.5},
        {"kind": "distill_features", "epochs": 5, "learning_rate": 0.0005},
    )
    expect = "half of the layers, trained to answer like the base, which needs thousands of texts: a slow build"
    yield Suggestion("student-int8", (*taught, *_fold(profile), SMOOTH, STATIC, RUNTIME), expect)


def _fold(profile: ModelProfile) -> tuple[Json, ...]:
    return (FOLD,) if profile.norms else ()
