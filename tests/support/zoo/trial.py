"""One model, brought as a new user would: init, build, serve, and every variant's answers beside the original's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from zoo.answers import Answers
from zoo.catalogue import Brought, ZooModel
from zoo.reference import Array

ROWS = 2
EXACT = 1e-5
"""Largest error of a base's answers, relative to the largest number of the output."""


class Outcome(BaseModel):
    """What became of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    accepted: bool = False
    built: bool = False
    serving: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    error: float | None = None
    """Worst relative error of the base's outputs."""
    variants: dict[str, float] = {}
    """The same of every variant that serves."""
    answers: tuple[int, int] | None = None
    """Images whose answers after post-processing are those of the model's own library, and all that were asked."""
    speed: float = 1.0
    """Rows per second of the fastest variant that serves, in those of the base."""
    seconds: float = 0.0
    said: str = ""
    """The last line of what went wrong."""

    @property
    def right(self) -> bool:
        """Whether it serves and its base answers like the original."""
        exact = self.error is not None and self.error <= EXACT
        return self.accepted and self.built and exact and (self.answers is None or self.answers[0] == self.answers[1])


@dataclass(frozen=True)
class Trial:
    """How models are tried."""

    measure_s: float = 5.0
    """Seconds that timing may take, all variants of a model together."""
    limit_s: float = 900.0
    """Seconds that a model may take, from init to its last answer."""

    def of(self, model: ZooModel, folder: Path) -> Outcome:
        """Bring a model into an empty folder; whatever goes wrong is part of the outcome."""
        started = time.monotonic()
        commands = Commands(folder, started + self.limit_s)
        outcome = Outcome(name=model.name)
        try:
            brought = model.bring(folder)
            commands.run("init", *brought.arguments)
            outcome = outcome.model_copy(update={"accepted": True})
            answers = None if model.answers is None else model.answers()
            if answers is not None:
                _post_process(folder, answers)
            commands.run("build", "--config", "leanserve.yaml", "--measure-seconds", str(self.measure_s))
            outcome = outcome.model_copy(update=_reported(folder))
            outcome = outcome.model_copy(update=_served(commands, brought, outcome.serving, answers))
        except Exception as error:
            outcome = outcome.model_copy(update={"said": _last_line(error)})
        return outcome.model_copy(update={"seconds": round(time.monotonic() - started, 1)})


@dataclass(frozen=True)
class Commands:
    """Runs leanserve in a folder, until a point in time (of `time.monotonic`)."""

    folder: Path
    deadline: float

    def run(self, *arguments: str) -> None:
        """A command, to its end.

        Raises:
            RuntimeError: it failed, or is not done in time.
        """
        command = [sys.executable, "-m", "leanserve", *arguments]
        with (self.folder / f"{arguments[0]}.log").open("w+", encoding="utf-8") as log:
            try:
                left = max(1.0, self.deadline - time.monotonic())
                done = subprocess.run(command, cwd=self.folder, stdout=log, stderr=log, timeout=left, check=False)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"{arguments[0]}: not done within the limit of a model") from None
            if done.returncode != 0:
                log.seek(0)
                raise RuntimeError(f"{arguments[0]}: {log.read().strip()}")

    @contextmanager
    def server(self) -> Iterator[str]:
        """A service of the config in the folder; its address."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "leanserve", "serve", "--config", "leanserve.yaml", "--port", str(port)]
        with (self.folder / "serve.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(command, cwd=self.folder, stderr=log, stdout=log)
            try:
                self._await_ready(process, port)
                yield f"127.0.0.1:{port}"
            finally:
                process.terminate()
                process.wait(30)

    def _await_ready(self, process: subprocess.Popen[bytes], port: int) -> None:
        while time.monotonic() < self.deadline and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as reply:
                if reply.status == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"serve: {(self.folder / 'serve.log').read_text(encoding='utf-8').strip()}")


def _reported(folder: Path) -> dict[str, Any]:
    """States and speeds of the variants, as the report has them."""
    from leanserve.context import AppContext

    with _inside(folder):
        reports = AppContext(Path("leanserve.yaml"), None).reports()
    base = reports[0].ancestry[0].quality.throughput
    serving = [item for item in reports if item.state == "serving"]
    fastest = max(item.quality.throughput for item in serving)
    return {
        "built": True,
        "serving": tuple(item.name for item in serving),
        "excluded": tuple(f"{item.name}: {item.reason}" for item in reports if item.state == "excluded"),
        "speed": round(fastest / base, 2),
    }


def _post_process(folder: Path, answers: Answers) -> None:
    """Write the steps into the config, and the files that they name."""
    for name, lines in answers.files().items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (folder / "leanserve.yaml").open("a", encoding="utf-8") as config:
        config.write(f"\npostprocess: {json.dumps(answers.steps)}\n")


def _served(commands: Commands, brought: Brought, variants: Sequence[str], answers: Answers | None) -> dict[str, Any]:
    """Errors of every variant's outputs over HTTP against the original's, and how many answers are the library's."""
    rows = _rows(commands.folder)
    expected = [brought.original(row) for row in rows]
    with commands.server() as address:
        errors = {name: _worst(address, name, rows, expected) for name in variants}
        equal = None if answers is None else _equal_answers(address, variants[0], brought, answers, rows[0])
    return {"variants": errors, "error": errors[variants[0]], "answers": equal}


def _equal_answers(
    address: str, variant: str, brought: Brought, answers: Answers, like: Mapping[str, Array]
) -> tuple[int, int]:
    """Of how many images the base's post-processed answers are those of the library, and of how many in all."""
    [name] = like
    images = answers.rows()
    equal = [
        answers.agree(_told(address, {name: image}, variant, postprocess=True), brought.original({name: image}))
        for image in images
    ]
    return sum(equal), len(images)


def _worst(
    address: str, variant: str, rows: Sequence[Mapping[str, Array]], expected: Sequence[Sequence[Array]]
) -> float:
    answers = (_asked(address, variant, row) for row in rows)
    pairs = (
        (one, other)
        for given, wanted in zip(answers, expected, strict=True)
        for one, other in zip(given, wanted, strict=True)
    )
    return max(_relative(one, other) for one, other in pairs)


def _relative(one: Array, other: Array) -> float:
    """The largest difference, relative to the largest value; of texts 0 where all are the same."""
    if one.shape != other.shape:
        return float("inf")
    if other.dtype.kind in "OU":
        texts = [item.decode() if isinstance(item, bytes) else item for item in one.ravel().tolist()]
        return 0.0 if texts == other.ravel().tolist() else float("inf")
    finite = np.isfinite(other)
    if not (np.isfinite(one) == finite).all():
        return float("inf")
    ours, theirs = np.asarray(one[finite], np.float64), np.asarray(other[finite], np.float64)
    change = float(np.abs(ours - theirs).max(initial=0.0))
    return change / max(float(np.abs(theirs).max(initial=0.0)), 1e-30) if change else 0.0


def _rows(folder: Path) -> list[dict[str, Array]]:
    """Rows that the model takes, by the names of its inputs."""
    from leanserve.context import AppContext

    with _inside(folder):
        base = AppContext(Path("leanserve.yaml"), None).base
        batches = base.data("gate", ROWS * base.unit).batches(ROWS)
        arrays = [
            tuple(array[index : index + 1] for array in batch.inputs)
            for batch in batches
            for index in range(len(batch.inputs[0]))
        ]
    return [dict(zip((item.name for item in base.spec.inputs), row, strict=True)) for row in arrays]


def _asked(address: str, variant: str, row: Mapping[str, Array]) -> list[Array]:
    """The outputs for one row, in their order."""
    return list(_told(address, row, variant).values())


def _told(address: str, row: Mapping[str, Array], variant: str, *, postprocess: bool = False) -> dict[str, Array]:
    """One row by the Open Inference Protocol, asked by somebody else's client; the answer's arrays by name."""
    import tritonclient.http as triton
    from tritonclient.utils import np_to_triton_dtype

    client = triton.InferenceServerClient(address, network_timeout=120.0, connection_timeout=120.0)
    try:
        name = json.loads(urllib.request.urlopen(f"http://{address}/v1/variants", timeout=60).read())["model"]
        known = client.get_model_metadata(name)
        inputs = []
        for item in known["inputs"]:
            array = row[item["name"]]
            given = triton.InferInput(item["name"], array.shape, np_to_triton_dtype(array.dtype))
            given.set_data_from_numpy(np.ascontiguousarray(array))
            inputs.append(given)
        wanted = {"parameters": {"postprocess": True}} if postprocess else {}
        answer = client.infer(name, inputs, model_version=variant, **wanted)
        given = answer.get_response()["outputs"] if postprocess else known["outputs"]
        return {item["name"]: np.asarray(answer.as_numpy(item["name"])) for item in given}
    finally:
        client.close()


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """With the folder as the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    first = lines[0].partition(":")[0]
    return lines[-1] if len(lines) == 1 else f"{first}: {lines[-1]}"


def stored(path: Path) -> Outcome | None:
    """An outcome from a file, if it is there."""
    return Outcome.model_validate(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
