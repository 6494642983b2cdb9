"""What an answer costs by its form: bytes, and milliseconds to make them, for a recogniser of text's [40, 6625] floats.

python -m loadtest.benchmarks.answer_forms
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from leanserve.api.v1.answer_forms import AnswerForms, AnswerWish, OutputRows, archive
from leanserve.codecs.postprocess.chain import PostChain
from leanserve.codecs.postprocess.ctc import Ctc
from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.http.messages import json_response

STEPS, CHARACTERS = 40, 6625
SPEC: Final = ModelSpec((), (TensorSpec("scores", "float32", (STEPS, CHARACTERS)),))
ROUNDS = 15


def ways(rows: OutputRows) -> dict[str, Callable[[], bytes]]:
    """How the rows may be answered."""
    characters = tuple(chr(0x4E00 + number) for number in range(CHARACTERS - 1))
    plain = AnswerForms(SPEC, PostChain((), SPEC, Path()))
    read = AnswerForms(SPEC, PostChain([Ctc(characters=characters)], SPEC, Path()))
    groups = [range(len(rows.outputs[0]))]

    def as_json(forms: AnswerForms, wish: AnswerWish) -> bytes:
        return json_response({"predictions": forms.told(rows, wish)}).body

    def as_npz(forms: AnswerForms, wish: AnswerWish) -> bytes:
        return archive([forms.columns(rows, wish)], groups, ())

    return {
        "JSON of Python's floats, as before": lambda: orjson.dumps({"scores": rows.outputs[0].tolist()}),
        "JSON": lambda: as_json(plain, AnswerWish()),
        "npz": lambda: as_npz(plain, AnswerWish(form="npz")),
        "`top=1`": lambda: as_json(plain, AnswerWish(top=1)),
        "`top=1`, npz": lambda: as_npz(plain, AnswerWish(top=1, form="npz")),
        "`ctc`": lambda: as_json(read, AnswerWish()),
    }


def main() -> None:
    """Measure all ways in turns and print one line for each."""
    shares = np.random.default_rng(0).dirichlet(np.full(CHARACTERS, 0.05), (1, STEPS)).astype(np.float32)
    found = ways(OutputRows((shares,), SPEC, ()))
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(ROUNDS):
        for name, make in found.items():
            began = time.perf_counter()
            make()
            taken[name].append(time.perf_counter() - began)
    table = Table("answer", "bytes", "ms", "least to most")
    for name, make in found.items():
        times = [1e3 * seconds for seconds in taken[name]]
        spread = f"{min(times):.2f} to {max(times):.2f}"
        table.add_row(name, f"{len(make()):,}", f"{statistics.median(times):.2f}", spread)
    Console().print(table)


if __name__ == "__main__":
    main()
