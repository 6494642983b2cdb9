"""The types on which all rooms agree: what a model takes and gives, what a base, a backend and a codec must do.

Imports nothing of ours, so that every layer may import it. Arrays travel as tuples in the order of the spec's fields:
`Arrays` is always a batch, its first axis counts *rows*. A field may have dynamic axes (`None`), which is how token ids
with a mask are declared; a base may have no labels, and outputs may be embeddings as well as class logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from leanserve.hardware import Hardware
from leanserve.texts import STRING, array_of_texts, numpy_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

Array: TypeAlias = NDArray[Any]
Arrays: TypeAlias = tuple[Array, ...]
Json: TypeAlias = Any
Split = Literal["train", "calibration", "gate", "test"]
Meaning = Literal[
    "logits",
    "probabilities",
    "log_probabilities",
    "independent_probabilities",
    "embedding",
    "classes_first",
    "classes_last",
    "values",
]
"""What the numbers of an output are, which decides how they are answered, compared and trained.

`logits` become the probabilities of classes by a softmax; `probabilities` are that already, `log_probabilities` their
logarithms; `independent_probabilities` are one of each class by itself (a sigmoid's), any number of which may be true.
`embedding` is a direction, compared by angles. `classes_first` [classes, ...] and `classes_last` [..., classes] have a
score per class at every place of a row, as segmentation and taggers do, of which the best one counts. `values` are
everything else.
"""
CLASSES: frozenset[Meaning] = frozenset({"logits", "probabilities", "log_probabilities", "independent_probabilities"})
"""Meanings of an output with one number per class."""
CLASS_MAPS: frozenset[Meaning] = frozenset({"classes_first", "classes_last"})
"""Meanings of an output with one number per class at every pixel, step or proposal."""
RowsTogether = Literal["any", "one_length", "one"]
"""Which rows may share a batch: any, only those of equal length (nothing is padded), or none (one row per batch)."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor. `shape` is that of a single row (no batch axis); `None` marks a dynamic axis.

    `pad` fills the dynamic axes when rows of different length share a batch. `next_from` is that of an input which is
    state: the name of the output that is its value for the next request of a sequence. `values` are the least and the
    greatest that an element may have, where the model cannot run with others (token ids); `None`: any of its dtype.
    `dtype` is numpy's name, or `string`: arrays of Python's `str`. `words` are texts that the model knows, per column
    of the last axis or for all of them at once: examples are drawn from these. `meaning` is that of an output; of an
    input it says nothing.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    pad: float = 0.0
    values: tuple[int, int] | None = None
    meaning: Meaning = "values"
    next_from: str | None = None
    words: tuple[tuple[str, ...], ...] = ()

    @property
    def array_dtype(self) -> np.dtype[Any]:
        """That of its arrays; there is none for `bfloat16`."""
        return numpy_dtype(self.dtype)

    @property
    def filler(self) -> float | str:
        """What stands at padded positions."""
        return "" if self.dtype == STRING else self.pad


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a model takes (`inputs`), what it gives (`outputs`) and, for classifiers, the names of its classes.

    `max_length` bounds the dynamic axes of what it takes: longer requests are refused. `labelled` is the position of
    the output whose classes the labels name; without labels it says nothing. `rows` says which rows it keeps apart when
    they share a batch. Dynamic axes have sizes of at least `least`, in multiples of `step`: what halves an image five
    times and joins the halves again takes multiples of 32.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    max_length: int = 512
    labelled: int = 0
    rows: RowsTogether = "any"
    step: int = 1
    least: int = 1

    def most_rows(self, wanted: int) -> int:
        """The rows that a batch of `wanted` rows may have at most: a single one where no other may share its batch."""
        return 1 if self.rows == "one" else wanted

    def example(self, rows: int, length: int = 16, seed: int = 0) -> Arrays:
        """A random batch of `rows` rows that fits the spec; dynamic axes get `length`, or the next size they take."""
        random = np.random.default_rng(seed)
        return tuple(_random_field(random, item, rows, self.size(length)) for item in self.inputs)

    def size(self, wanted: int) -> int:
        """The least size of a dynamic axis that is not below `wanted`."""
        return -(-max(wanted, self.least) // self.step) * self.step


def _random_field(random: np.random.Generator, item: TensorSpec, rows: int, length: int) -> Array:
    shape = (rows, *(length if size is None else size for size in item.shape))
    if item.dtype == STRING:
        return _random_texts(random, item, shape)
    if np.issubdtype(np.dtype(item.dtype), np.floating):
        return random.standard_normal(shape).astype(item.dtype)
    drawn = random.integers(0, 2, shape).astype(item.dtype)
    drawn.reshape(rows, -1)[:, :1] = 1  # a mask without a single 1 would be a row of nothing
    return drawn


def _random_texts(random: np.random.Generator, item: TensorSpec, shape: tuple[int, ...]) -> Array:
    """Words that the model knows, those of a column in that column; without any, words of three letters."""
    known = item.words or (tuple("".join(letters) for letters in random.choice(list("aeinrst"), (8, 3))),)
    flat = math.prod(shape)
    columns = np.arange(flat) % len(known)  # one for all, or as many as the last axis has
    drawn = random.integers(0, 2**31, flat)
    texts = [known[column][number % len(known[column])] for column, number in zip(columns, drawn, strict=True)]
    return array_of_texts(texts, shape)


class Batch(NamedTuple):
    """Some rows of a data split; `labels` is `None` where the data has none."""

    inputs: Arrays
    labels: Array | None


class Data(Protocol):
    """A stream of samples from one split; it may be read many times."""

    def __len__(self) -> int:
        """Number of rows."""

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """Yield batches of at most `size` rows, in stored order or shuffled by the seed."""


@dataclass(frozen=True, slots=True)
class ArrayData:
    """`Data` held in memory."""

    inputs: Arrays
    labels: Array | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        order = np.arange(len(self))
        if shuffle_seed is not None:
            np.random.default_rng(shuffle_seed).shuffle(order)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield Batch(tuple(array[rows] for array in self.inputs), None if self.labels is None else self.labels[rows])


class Base(Protocol):
    """Architecture, weights, input spec, data splits and score of the one model that the variants compress."""

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def codec(self) -> Codec:
        """That of `spec`."""

    def codec_for(self, spec: ModelSpec) -> Codec:
        """How requests become the inputs of a variant whose passes have changed the spec, and its outputs answers.

        Images are resized to what it takes, texts are cut to its `max_length`.
        """

    @property
    def origin(self) -> str:
        """What a process of its own needs to open this base again (`leanserve.bases.opening.reopen_base`)."""

    @property
    def digest(self) -> str:
        """sha256 over everything that decides the base's answers and data: source, weights, library versions."""

    @property
    def caveats(self) -> tuple[str, ...]:
        """What everyone who sees a result must know: `untrained` weights, `synthetic data`."""

    @property
    def unit(self) -> int:
        """Consecutive rows of the data that are scored together: 2 for pairs of texts, else 1."""

    def model(self) -> Model:
        """The uncompressed model, fresh: a torch module with its weights, or the ONNX file that was brought."""

    def torch_module(self) -> nn.Module:
        """The torch module of `model`, in eval mode, float32, on the CPU. A base that is an ONNX file has none."""

    def data(self, split: Split, n: int | None = None, spec: ModelSpec | None = None) -> Data:
        """The first `n` rows of a split (all by default), prepared for a model of `spec` (the base's by default), as
        `codec_for` prepares requests. Splits never share samples, and have the same ones for every spec.
        """

    def score(self, outputs: Arrays, labels: Array) -> float:
        """Quality of the outputs against the labels, higher is better (accuracy, Spearman ...)."""

    @property
    def scored_as(self) -> str:
        """What the score is called, such as `accuracy`."""

    @property
    def score_digest(self) -> str:
        """sha256 over what decides the score and is no part of `digest`; empty: nothing."""


class Model(Protocol):
    """A model in memory, as passes hand it on. Its class belongs to its format, and says so by its name."""

    @property
    def format(self) -> str:
        """Name of the format, a key of `leanserve.runtime.formats.FORMATS`."""

    @property
    def spec(self) -> ModelSpec: ...


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A model as a torch module in eval mode that takes the spec's fields as positional tensors.

    `masks` holds the sparsity that passes made: by the name of a parameter, bool in its shape, `False` where it stays
    zero. They are stored with the weights; of a weight that is gone or was reshaped they say nothing. `storage` says
    which parameters are stored in fewer bits that hold them exactly: `bf16`, `fp16` or `fp8`.
    """

    format: ClassVar[str] = "torch"
    module: nn.Module
    spec: ModelSpec
    masks: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    storage: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A model as an ONNX file; `session` holds what the runtime pass decided for the inference session."""

    format: ClassVar[str] = "onnx"
    path: Path
    spec: ModelSpec
    session: Mapping[str, Json] = field(default_factory=dict)


class ModelSize(NamedTuple):
    """What a model costs before it is timed: multiply-accumulates per row (0: they cannot be told), and parameters."""

    macs: int
    parameters: int


AModel = TypeVar("AModel", bound=Model)
Made = TypeVar("Made")


class Share(NamedTuple):
    """What of the machine a backend gets."""

    threads: int
    """CPU threads for every batch."""
    devices: tuple[str, ...] = ("cpu",)
    """`cpu`, or GPUs (`cuda:0`) of which each computes some of the batches."""
    alone: bool = False
    """Whether no other model is run in this process."""
    callers: int = 1
    """Threads that run the backend at once if it is self-contained; each of them has `threads` CPU threads."""
    processors: tuple[int, ...] = ()
    """One for each of its threads, the first for the lane that runs it; empty: any that are free."""

    @property
    def device(self) -> str:
        """The first of the devices."""
        return self.devices[0]


class Format(Protocol[AModel]):
    """How models of one kind are saved, loaded, sized and opened: one file in `leanserve.runtime.formats` each.

    The file is imported when a model of that format is met; it imports heavy libraries within its methods only.
    """

    @property
    def name(self) -> str: ...

    @property
    def libraries(self) -> tuple[str, ...]:
        """Distributions whose versions decide the answers of its models."""

    @property
    def runtime_module(self) -> str:
        """The module that its backend needs; imported before memory is measured, for it is not the model's."""

    @property
    def self_contained(self) -> bool:
        """What all its backends are (`Backend.self_contained`)."""

    @property
    def places_threads(self) -> bool:
        """Whether its backends keep their threads on `Share.processors`, so that a lane may stay on its own, too.

        Threads that a backend starts without that would inherit the one processor of the lane.
        """

    @property
    def in_memory(self) -> bool:
        """Whether a model lives without the files that it was made or loaded from."""

    def save(self, model: AModel, folder: Path) -> None:
        """Write all that `load` needs; subfolders are allowed, pickles are not."""

    def load(self, folder: Path, spec: ModelSpec, rebuild: Callable[[], nn.Module]) -> AModel:
        """What `save` wrote there, as a model of this spec.

        `rebuild` makes the torch module of the base with the structure that the passes gave it, and with other weights;
        formats that store no weights for a torch module do without.
        """

    def size(self, model: AModel) -> ModelSize: ...

    def open(self, model: AModel, share: Share) -> Backend:
        """A backend for this share of the machine. Call it on the thread that will run it."""


class Result(NamedTuple):
    """What a backend made of a batch.

    `facts` are numbers of its own that can be added up, none below 0: rows that left early, that were escalated to a
    larger model, graphs that were compiled anew. Their sums are metrics of the variant; most backends have none.
    """

    outputs: Arrays
    facts: Mapping[str, float] = MappingProxyType({})


class Backend(Protocol):
    """Runs a loaded model, on one thread at a time unless it is `self_contained`.

    At start it is created on the lane of the device that will run it; batches of microseconds are run by the event loop
    in the lane's stead. Loaded again while others serve, it is created,
    warmed and closed apart from the lanes, and then run by a lane on which one like it was created before.
    """

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str:
        """Where it computes: `cpu`, or `cuda:0` while its lane waits; of several GPUs `cuda:0,cuda:1`."""

    @property
    def self_contained(self) -> bool:
        """Whether its threads are its own: several lanes may run it at once, and others like it may have more threads.

        If not, the process has one setting for all, and every lane runs one of its own.
        """

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """The numbers of rows it was compiled for, ascending: batches are padded up to the next. Empty: any number."""

    def run(self, batch: Arrays) -> Result:
        """Run one batch; the outputs keep the order of the spec's outputs and the number of rows.

        Raises:
            BadInput: only the values are to blame, such as an index beyond the table that it is looked up in.
        """

    def close(self) -> None: ...


class Codec(Protocol):
    """Wire format <-> arrays, for one base. Thread-safe and free of state."""

    @property
    def media_types(self) -> tuple[str, ...]:
        """The content types that `decode` takes."""

    def prepare(self, media_type: str, body: bytes) -> Weighed[Decoded]:
        """Check what headers and counts tell of a body, before what takes time or memory.

        Takes at most some milliseconds. Raises as `decode`.
        """

    def decode(self, media_type: str, body: bytes) -> Decoded:
        """Check and decode a body. Raises `BadInput`, `BodyTooLarge` or `UnsupportedMediaType`."""

    def encode(self, outputs: Arrays, most: int | None = None) -> list[dict[str, Json]]:
        """One answer per row, as JSON with numpy's numbers; `most`: how many of the scores of labels."""


class Placement(NamedTuple):
    """Where an image lies on the model's input: its point (x, y) is at (x, y) * `scale` + `offset` there.

    `size` is (width, height) of the image as it is seen, `input` that of the model's input, both in pixels; `offset` is
    negative where edges of the image were cut off.
    """

    size: tuple[int, int]
    input: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[int, int]

    def told(self) -> dict[str, Json]:
        """As it stands in an answer."""
        return {"image": self._asdict()}


class Span(NamedTuple):
    """Which part of a recording a row is, in seconds from its beginning; `file` numbers those of a request."""

    file: int
    start_s: float
    end_s: float

    def told(self) -> dict[str, Json]:
        """As it stands in an answer."""
        return self._asdict()


Place: TypeAlias = Placement | Span
"""From where in what was sent a row is taken."""


class Decoded(NamedTuple):
    """A decoded request: the batch, and whether the client sent a list of samples or a single one.

    `lengths` are those that the rows had before shorter ones were padded; empty where they cannot differ. `places` are
    told with the answers where `tells_places`; empty where there is nothing to tell.
    """

    inputs: Arrays
    many: bool
    lengths: tuple[int, ...] = ()
    places: tuple[Place, ...] = ()
    tells_places: bool = False


class SequenceStep(NamedTuple):
    """A request's place in a sequence: whose, whether it is the first or the last, and the positions of the inputs for
    which the server keeps the state."""

    id: int | str
    start: bool
    end: bool
    keeps: frozenset[int]


class Weighed(NamedTuple, Generic[Made]):
    """Work that was looked at and not begun: about how long it takes one core, and the work."""

    seconds: float
    finish: Callable[[], Made]


class Progress(Protocol):
    """Told by long work how far it is."""

    def __call__(self, done: float, total: float, note: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class CandidateQuality:
    """What a model answers on `samples` rows of the calibration split."""

    samples: int
    score: float | None
    """The base's own, higher is better; `None` where the rows have no labels."""
    agreement: float
    """With the base, of the output that is farthest from it, 0..1 (`OutputFidelity`)."""

    @property
    def value(self) -> float:
        """By which candidates are compared: the score, without labels the agreement."""
        return self.agreement if self.score is None else self.score


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What a pass may use besides the model: data and teacher (`base`), a seed, the hardware, scratch space, progress.

    `evaluate` tells how good a candidate is, for passes that choose among several: it runs the model on the calibration
    split, never on the rows that the gate judges by.

    `scratch` survives an interruption (the same pass on the same input gets the same folder again), so that long
    training resumes from its last checkpoint; it is deleted once the pass has succeeded.
    """

    base: Base
    seed: int
    hardware: Hardware
    scratch: Path
    progress: Progress
    evaluate: Callable[[Model], CandidateQuality]
    device: str = "cpu"
    """Where torch trains: `cpu`, or a GPU of this machine (`cuda:0`). Models are on the CPU before and after."""

    @property
    def threads(self) -> int:
        """CPU threads that the pass may use."""
        return self.hardware.threads
