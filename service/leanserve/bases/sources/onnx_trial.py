"""Runs a prepared ONNX graph beside the file it came from, in a process of its own.

A process of its own because onnxruntime settles how it treats denormals with the first session of a process, which in
the server must be one that serves; and because a graph that nobody has run before may take the runtime down with it.
Started by `onnx_file` as a child; prints one JSON line.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from leanserve import child
from leanserve.bases.axis_sizes import with_sizes
from leanserve.bases.description import Probed, Tensor
from leanserve.bases.probing import TOLERANCE, OutputPair, Run, SizeBounds, differs, probe, sampled, spec_of_inputs
from leanserve.contracts import Array, Arrays, ModelSpec, RowsTogether
from leanserve.errors import ConfigError
from leanserve.memory import bound_memory
from leanserve.runtime.formats.onnx_session import onnx_session

if TYPE_CHECKING:
    import onnxruntime

TRIAL_S = 300.0
"""How long all of it may take. A loop of a graph may be of 2^62 turns."""
LOOSE_TOLERANCE = 0.1
"""Where activations are quantized while running, one scale serves all rows of a batch and moves their answers. What
rows of token ids do to each other that way is left to `gate.max_batch_dependence`, which looks at the user's own."""


class Trial(BaseModel):
    """What is tried: a graph as it was read, and as it was prepared; it takes `inputs` and gives `outputs`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    original: Path
    candidate: Path
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    fixed_rows: int | None
    """Rows that the original insists on; `None`: any number."""
    scaled_by_batch: bool
    """Whether it quantizes activations while running."""
    rows: RowsTogether
    """Which rows may share a batch."""
    whole: bool
    """Whether a row of the candidate is all that the original takes at once."""
    bounds: SizeBounds
    """Of dynamic axes."""
    written: tuple[int, ...] = ()
    """Sizes that stand in the graph."""
    sample: Path | None = None
    """A `.npz` file with some of the user's rows, in the order of the inputs; `None`: random ones."""


class Verdict(Probed):
    """What was found out about the candidate, or why it cannot be served.

    Its inputs are as they were, or with one size for what is dynamic in the graph and runs on no other.
    """

    error: str = ""


def tried(trial: Trial) -> Verdict:
    """What running the candidate in a child process tells of it.

    Raises:
        ConfigError: it does not run, answers otherwise than the original, or mixes up the rows.
    """
    command = child.command("leanserve.bases.sources.onnx_trial", trial.model_dump_json())
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TRIAL_S)
    except subprocess.TimeoutExpired:
        text = f"it does not answer a few rows within {TRIAL_S:.0f} s; a graph that loops without end is not served"
        raise ConfigError(text) from None
    try:
        verdict = Verdict.model_validate_json(done.stdout.strip().rpartition("\n")[2])
    except ValidationError as error:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise ConfigError(f"onnxruntime {child.how_it_ended(done.returncode)} and said: {said[0]}") from error
    if verdict.error:
        raise ConfigError(verdict.error)
    return verdict


def main(request: str) -> None:
    """Try what the request says and print the verdict."""
    trial = Trial.model_validate_json(request)
    bound_memory()
    try:
        verdict = _verdict(trial)
    except ConfigError as error:
        verdict = Verdict(error=str(error))
    sys.stdout.write(verdict.model_dump_json() + "\n")
    sys.stdout.flush()


def _verdict(trial: Trial) -> Verdict:
    tolerance = LOOSE_TOLERANCE if trial.scaled_by_batch else TOLERANCE
    original, candidate = (_runner(_session(path), trial) for path in (trial.original, trial.candidate))
    try:
        asked = spec_of_inputs(trial.inputs, trial.rows, *trial.bounds)
        if trial.sample is not None:
            with np.load(trial.sample, allow_pickle=False) as stored:
                asked = sampled(asked, [stored[name] for name in stored.files])
        spec, sizes = with_sizes(candidate, asked, trial.outputs, trial.written)
        found = probe(candidate, spec, trial.outputs, tolerance)
        _compare(original, candidate, trial, spec, tolerance)
    except ConfigError as error:
        raise ConfigError(f"{error}{_remedy(trial)}") from error
    return Verdict(**dict(found) | {"caveats": sizes + found.caveats})


def _compare(original: Run, candidate: Run, trial: Trial, spec: ModelSpec, tolerance: float) -> None:
    batch = spec.example(1 if trial.whole else trial.fixed_rows or 1, seed=2)
    try:
        expected = original(tuple(np.asarray(array[0]) for array in batch) if trial.whole else batch)
    except Exception as error:  # whatever the runtime raises
        raise ConfigError(f"the file itself does not run: {str(error).splitlines()[0]}") from error
    for name, one, other in zip(trial.outputs, candidate(batch), expected, strict=True):
        if reason := differs(OutputPair(name, one[0] if trial.whole else one, other), tolerance):
            raise ConfigError(f"as leanserve prepared it, it answers otherwise than the file: {reason}")


def _remedy(trial: Trial) -> str:
    if trial.fixed_rows is None or trial.rows == "one":
        return ""
    axes = ", ".join(f"'{item.name}': {{0: 'rows'}}" for item in trial.inputs)
    return (
        f". Its graph has the number of rows ({trial.fixed_rows}) written into it and could not be made to take any "
        f"number. Export it again with a dynamic batch axis: torch.onnx.export(..., dynamic_shapes or "
        f"dynamic_axes={{{axes}}})"
    )


def _session(path: Path) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        return onnx_session(str(path), options)
    except Exception as error:  # its own errors share no base class
        raise ConfigError(f"onnxruntime does not load it: {str(error).splitlines()[0]}") from error


def _runner(session: onnxruntime.InferenceSession, trial: Trial) -> Run:
    names = [item.name for item in trial.inputs]

    def run(batch: Arrays) -> Sequence[Array]:
        outputs: Any = session.run(list(trial.outputs), dict(zip(names, batch, strict=True)))
        return [_as_array(item) for item in outputs]

    return run


def _as_array(item: Any) -> Any:
    """Maps from classes to numbers, one per row, as the array of these; what else is no array stays what it is."""
    if isinstance(item, list) and item and all(isinstance(row, dict) for row in item):
        return np.array([list(row.values()) for row in item], np.float32)
    return item


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # skip the teardown of thread pools: nothing is left to lose
