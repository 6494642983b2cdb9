"""What a model that runs gives back, found out by running it: its outputs, and whether rows stay out of each other.

Whatever a file or a class declares, only a run tells, on rows of the user's own where there are some. A row is run
alone, several times, then in company: beside rows of its own length, one of which is ten thousand times as large, and
padded to a longer row. A model whose answer to that row changes (a softmax over the batch, statistics or a scale of
the batch, padding that no mask hides, dropout left on) would let strangers change each other's answers, so it is
refused before anybody waits for a build, unless the config says that such rows never share a batch (`base.rows`). What
only rounds otherwise in another number of rows is served, with a caveat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar

import numpy as np

from leanserve.bases.description import Probed, Tensor
from leanserve.bases.meanings import guessed
from leanserve.comparison import largest_difference, largest_finite
from leanserve.contracts import Array, Arrays, ModelSpec, RowsTogether, TensorSpec
from leanserve.errors import ConfigError
from leanserve.runtime.assembly import dynamic_axes, join, trim
from leanserve.texts import KINDS, STRING, as_numbers, dtype_name

Run = Callable[[Arrays], Sequence[Array]]
Found = TypeVar("Found")

ROWS = 3
SHORT = 16
"""Of the dynamic axes in a first run, if the model runs on it; a second one is half as long again: what differs between
them is a dynamic axis of an output."""
TOLERANCE = 1e-3
"""Largest accepted difference, relative to the largest output: kernels add in another order in another batch."""
ROUNDING = 0.02
"""Largest difference that is taken for rounding, if a row in the company of its own copies differs like that, too."""
ROUNDING_TIMES = 4
"""How many times as much a row may differ among others as among its own copies."""
READABLE = f"biuf{KINDS}"
"""Kinds of numpy dtypes that outputs may have: numbers and texts."""
AGAIN = 4
"""How often a row is asked again: dropout over three numbers looks the same by chance once in eight times."""
PADDED = 6
"""Rows that are padded, besides the two that are always tried."""
HUGE = 1e4
"""How many times as large as the others a row is that shows a scale which is shared by the whole batch."""
MASK = "attention_mask"
"""The input that is all ones where nothing is padded; other inputs of integers are random."""
ONE = "Mend that, or say base.rows: one, and every row runs by itself"
ONE_LENGTH = "Mend that, or say base.rows: one_length, and only rows of equal length share a batch"


class OutputPair(NamedTuple):
    """One output of two models for the same rows."""

    name: str
    one: Array
    other: Array


class SizeBounds(NamedTuple):
    """The largest and the smallest size that dynamic axes may have."""

    longest: int = 512
    least: int = 1


@dataclass(frozen=True, slots=True)
class SampledSpec(ModelSpec):
    """A spec of which examples are rows of the user's own: of their size, or cut or repeated to another."""

    sample: Arrays = ()
    """Per input, some rows [rows, ...] whose fixed axes are those of the spec."""

    def example(self, rows: int, length: int = 16, seed: int = 0) -> Arrays:
        size = self.size(length)
        return tuple(_resized(*pair, rows, size, seed) for pair in zip(self.inputs, self.sample, strict=True))

    @property
    def own_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of a row per input."""
        return tuple(array.shape[1:] for array in self.sample)


def _resized(item: TensorSpec, array: Array, rows: int, size: int, seed: int) -> Array:
    found = array[(np.arange(rows) + seed * rows) % len(array)]
    for axis, wanted in enumerate(item.shape, start=1):
        if wanted is None:
            found = np.take(found, np.arange(size) % found.shape[axis], axis)
    return np.ascontiguousarray(found, item.array_dtype)


def sampled(spec: ModelSpec, sample: Sequence[Array]) -> ModelSpec:
    """The spec with these rows for examples, if they fit its inputs."""
    fitting = len(sample) == len(spec.inputs) and all(map(_fits, spec.inputs, sample))
    if not fitting:
        return spec
    given = {item.name: getattr(spec, item.name) for item in fields(ModelSpec)}
    return SampledSpec(**given, sample=tuple(sample))


def _fits(item: TensorSpec, array: Array) -> bool:
    sizes = array.shape[1:]
    same = len(sizes) == len(item.shape) and all(map(lambda has, want: want in {None, has}, sizes, item.shape))
    if not same or array.size == 0:
        return False
    return array.dtype.kind in KINDS if item.dtype == STRING else np.can_cast(array.dtype, item.dtype, "safe")


def spec_of_inputs(inputs: Sequence[Tensor], rows: RowsTogether, longest: int = 512, least: int = 1) -> ModelSpec:
    """What takes these inputs, as far as it is known."""
    return ModelSpec(tuple(item.field() for item in inputs), (), max_length=longest, rows=rows, least=least)


def probe(run: Run, spec: ModelSpec, names: Sequence[str], tolerance: float = TOLERANCE) -> Probed:
    """The outputs of a model that takes the inputs of the spec, one output per name.

    Raises:
        ConfigError: it does not run on batches of 1 and of 3 rows, gives no arrays of numbers, or mixes up the rows.
    """
    most = spec.most_rows(ROWS)
    short, long = two_lengths(spec)
    together = or_row_by_row(lambda rows: attempt(run, spec.example(rows, short), names), most)
    dynamic = bool(dynamic_axes(spec.inputs))
    longer = attempt(run, spec.example(most, long, seed=1), names) if dynamic else together
    outputs = tuple(_output(*item, most) for item in zip(names, together, longer, strict=True))
    return Probed(
        inputs=tuple(
            Tensor(name=item.name, dtype=item.dtype, shape=item.shape, pad=item.pad, words=item.words)
            for item in spec.inputs
        ),
        outputs=outputs,
        step=spec.step,
        least=spec.least,
        max_length=spec.max_length,
        caveats=check_rows(run, spec, names, tolerance),
    )


def two_lengths(spec: ModelSpec) -> tuple[int, int]:
    """Two sizes that the dynamic axes may have."""
    short = spec.size(SHORT)
    return short, spec.size(short * 3 // 2)


def or_row_by_row(runs: Callable[[int], Found], rows: int) -> Found:
    """What comes of an attempt with so many rows; where it fails and one with a single row does not, the error says so.

    Raises:
        ConfigError: the attempt with so many rows did.
    """
    try:
        return runs(rows)
    except ConfigError as error:
        try:
            runs(1)
        except ConfigError:
            raise error from None
        raise ConfigError(f"{error}. It does run on a single row. {ONE}") from error


def check_rows(run: Run, spec: ModelSpec, names: Sequence[str], tolerance: float = TOLERANCE) -> tuple[str, ...]:
    """See that a model answers a row as it would alone, whatever rows share its batch; `spec.rows` says which may.

    Returns:
        Caveats: what everyone must know, where answers are rounded otherwise in another batch.

    Raises:
        ConfigError: it does not; the text says in which company, and which value of `base.rows` it can be served with.
    """
    trial = _Trial(run, spec, names, tolerance)
    trial.answer_again()
    if spec.rows != "one":
        trial.share_a_batch()
    if spec.rows == "any" and dynamic_axes(spec.inputs):
        trial.be_padded()
    return trial.caveats


class _Trial:
    """Two rows whose answers alone are known, and what becomes of these in company."""

    def __init__(self, run: Run, spec: ModelSpec, names: Sequence[str], tolerance: float) -> None:
        self._run = run
        self._spec = spec
        self._names = names
        self._tolerance = tolerance
        self._short, self._long = two_lengths(spec)
        self.caveats: tuple[str, ...] = ()
        self._rows = [self._row(self._short, seed) for seed in (3, 4)]
        self._alone = [self._answers(row) for row in self._rows]

    def answer_again(self) -> None:
        again = (self._change(self._alone[0], self._answers(self._rows[0])) for _ in range(AGAIN))
        if reason := next(filter(None, again), None):
            raise ConfigError(
                f"the same row gets another answer the second time ({reason}), so that no answer can be trusted and no "
                "variant compared. Is dropout left on (F.dropout without training=self.training), is noise added, or "
                "something kept from call to call?"
            )

    def share_a_batch(self) -> None:
        """The rows before and behind a huge one: what goes along the batch, either way, meets one of them."""
        first, last = self._rows
        together = self._together([first, self._huge(), last])
        for place, alone in ((0, self._alone[0]), (2, self._alone[1])):
            reason = self._change(alone, _part(together, place))
            if reason and self._is_rounding(alone, _part(together, place), self._rows[place // 2]):
                self.caveats = (f"answers are rounded otherwise with other numbers of rows in a batch: {reason}",)
            elif reason:
                raise ConfigError(
                    f"the answer to a row depends on the other rows of its batch (alone and together, {reason}), so "
                    "that strangers would change each other's answers: is it in training mode, or does it work across "
                    f"the first axis (a mean, a softmax, a scale of the whole batch)? {ONE}"
                )

    def _is_rounding(self, alone: Sequence[Array], among: Sequence[Array], row: Arrays) -> bool:
        """Whether a row that differs little among others differs like that among its copies, which tell nothing."""
        copies = self._answers(join([row] * ROWS, self._spec, ROWS))
        others = max(map(_relative_change, among, alone))
        own = max(max(map(_relative_change, _part(copies, place), alone)) for place in range(ROWS))
        return others <= min(ROUNDING, ROUNDING_TIMES * own)

    def be_padded(self) -> None:
        """Rows behind a longer one, which they are padded to; what is answered at padded positions is cut off.

        Of one row a softmax that is sure of its answer may hide what padding does to it, so that there are several.
        """
        rows = [*self._rows, *(self._row(self._short, seed) for seed in range(7, 7 + PADDED))]
        alone = [*self._alone, *map(self._answers, rows[len(self._alone) :])]
        together = self._answers(join([self._row(self._long, seed=5), *rows], self._spec, 1 + len(rows)))
        for place, answers in enumerate(alone, start=1):
            padded = _part(together, place)
            own = trim(tuple(padded), _varying(answers, padded), self._long, self._short)
            reason = self._change(answers, own)
            if reason:
                raise ConfigError(
                    f"the answer to a row depends on how far it is padded when a longer one shares its batch ({reason})"
                    ", so that strangers would change each other's answers: padding is not told from the row itself. "
                    f"{ONE_LENGTH}"
                )

    def _together(self, rows: Sequence[Arrays]) -> list[Array]:
        try:
            return self._answers(join(rows, self._spec, len(rows)))
        except ConfigError:  # a model may refuse what is out of its range, and the next best is an ordinary row
            return self._answers(join([rows[0], self._row(self._short, seed=6), rows[2]], self._spec, len(rows)))

    def _huge(self) -> Arrays:
        row = self._row(self._short, seed=6)
        return tuple(np.asarray(part * HUGE, part.dtype) if part.dtype.kind == "f" else part for part in row)

    def _row(self, length: int, seed: int) -> Arrays:
        drawn = self._spec.example(1, length, seed)
        pairs = zip(self._spec.inputs, drawn, strict=True)
        return tuple(np.ones_like(array) if item.name == MASK else array for item, array in pairs)

    def _answers(self, batch: Arrays) -> list[Array]:
        return attempt(self._run, batch, self._names)

    def _change(self, one: Sequence[Array], other: Sequence[Array]) -> str | None:
        pairs = zip(self._names, one, other, strict=True)
        reasons = (differs(OutputPair(name, theirs, ours), self._tolerance) for name, ours, theirs in pairs)
        return next(filter(None, reasons), None)


def _part(outputs: Sequence[Array], row: int) -> list[Array]:
    return [array[row : row + 1] for array in outputs]


def _varying(short: Sequence[Array], long: Sequence[Array]) -> list[tuple[int, int]]:
    """Position of the output and axis, wherever the size depends on the length of the rows."""
    pairs = enumerate(zip(short, long, strict=True))
    return [(index, axis) for index, (a, b) in pairs for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]]


def differs(answer: OutputPair, tolerance: float = TOLERANCE) -> str | None:
    """How one output differs from the other, as text; `None` if it does not."""
    if answer.one.shape != answer.other.shape:
        return f"output '{answer.name}' has shape {list(answer.one.shape)}, not {list(answer.other.shape)}"
    one, other = as_numbers(answer.one, answer.other)
    change, largest = largest_difference(one, other), largest_finite(other)
    if change <= tolerance * largest:
        return None
    if answer.other.dtype.kind in KINDS:
        return f"output '{answer.name}' has other texts"
    return f"output '{answer.name}' differs by {change:.2g}, where its largest value is {largest:.2g}"


def _relative_change(one: Array, other: Array) -> float:
    """The largest difference, relative to the largest value; infinite where shapes differ."""
    if one.shape != other.shape:
        return np.inf
    one, other = as_numbers(one, other)
    change, largest = largest_difference(one, other), largest_finite(other)
    return float(change / largest) if largest else (np.inf if change else 0.0)


def attempt(run: Run, batch: Arrays, names: Sequence[str]) -> list[Array]:
    """The outputs for a batch, one per name.

    Raises:
        ConfigError: the model does not run on it, or gives no arrays of numbers or texts.
    """
    try:
        outputs = list(run(batch))
    except Exception as error:  # whatever a runtime raises on a model that it has never seen
        shapes = ", ".join(str(list(array.shape)) for array in batch)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"it does not run on {shapes}: {lines[0] if lines else type(error).__name__}") from error
    if len(outputs) != len(names):
        raise ConfigError(f"it gives {len(outputs)} outputs, not {len(names)} ({', '.join(names)})")
    for name, output in zip(names, outputs, strict=True):
        if not isinstance(output, np.ndarray) or output.dtype.kind not in READABLE:
            kind = output.dtype if isinstance(output, np.ndarray) else type(output).__name__
            raise ConfigError(f"its output '{name}' has neither numbers nor texts ({kind}); leave it out of the export")
    return outputs


def _output(name: str, together: Array, longer: Array, rows: int) -> Tensor:
    if together.shape[:1] != (rows,) or longer.shape[:1] != (rows,):
        raise ConfigError(
            f"its output '{name}' has shape {list(together.shape)} for {rows} rows: the first axis must count the "
            "rows, or requests cannot share a batch"
        )
    shape = tuple(a if a == b else None for a, b in zip(together.shape[1:], longer.shape[1:], strict=True))
    return guessed(Tensor(name=name, dtype=dtype_name(together), shape=shape), (together, longer))
