"""What our backends make of a GPU beside bare torch: rows per second and milliseconds, by engine, rows and lanes.

    python -m loadtest.benchmarks.gpu --device cuda:0 --out gpu.md

Two networks (a transformer encoder and a convolutional one) in torch and exported to ONNX, with random weights: speed
does not depend on them. All ways are measured in turns, so that clocks and heat meet all of them alike. `gpu.sh` runs
it together with the tests that need a GPU. `--tensorrt` takes minutes more, for its engines. `--device cpu` tries the
script itself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from leanserve.contracts import Arrays, Backend, ModelSpec, OnnxModel, Share, TensorSpec, TorchModel
from leanserve.errors import StartupError
from leanserve.hardware import cpu_name
from leanserve.runtime.cuda.driver import visible_gpus
from leanserve.runtime.formats import open_backend

ROWS = (1, 8, 32, 128)
LANES = (1, 2, 4)
ROUNDS = 5
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Network(NamedTuple):
    """A module and what it takes."""

    make: Callable[[], nn.Module]
    spec: ModelSpec


class Encoder(nn.Module):
    """Six layers of 12 heads over 128 vectors of 384."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layers(vectors.to(next(self.parameters()).dtype))
        return made.mean(1)


class Convolutional(nn.Module):
    """Sixteen residual blocks of 3x3 convolutions on an image of 128 x 128, which is halved three times."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 128, 256, 512)
        self.first = nn.Conv2d(3, widths[0], 7, 2, 3)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip((64, *widths), widths, strict=False))
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4)) for width in widths
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        value = self.first(image.to(self.first.weight.dtype)).relu()
        for down, blocks in zip(self.down, self.blocks, strict=True):
            value = down(value).relu()
            for block in blocks:  # type: ignore[attr-defined] # a list of modules is a list of lists here
                value = value + block(value).relu()
        made: torch.Tensor = value.mean((2, 3))
        return made


class Tiny(nn.Module):
    """To try the script: one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layer(vectors.to(self.layer.weight.dtype))
        return made


def _network(make: Callable[[], nn.Module], taken: tuple[int, ...], given: int) -> Network:
    return Network(make, ModelSpec((TensorSpec("x", "float32", taken),), (TensorSpec("y", "float32", (given,)),)))


NETWORKS = {
    "encoder": _network(Encoder, (128, 384), 384),
    "convolutional": _network(Convolutional, (3, 128, 128), 512),
    "tiny": _network(Tiny, (8,), 8),
}


class Measured(NamedTuple):
    """Of one way at one size: the median, the least and the largest rows per second, and the median milliseconds."""

    network: str
    way: str
    lanes: int
    rows: int
    rate: float
    least: float
    largest: float
    ms: float

    @property
    def line(self) -> str:
        """A row of the table."""
        rate = f"{self.rate:,.0f} ({self.least:,.0f}-{self.largest:,.0f})"
        return f"| {self.network} | {self.way} | {self.lanes} | {self.rows} | {rate} | {self.ms:.3f} |"


class Bare:
    """The library as one calls it without us: to the device, computed, back."""

    def __init__(self, module: nn.Module, device: str) -> None:
        self._module, self._device = module.eval().to(device), device

    def run(self, batch: Arrays) -> object:
        with torch.inference_mode():
            return self._module(*(torch.from_numpy(array).to(self._device) for array in batch)).float().cpu().numpy()


Run = Callable[[Arrays], object]


class Setup(NamedTuple):
    """What is measured: a network of `NETWORKS`, on what, and for how many seconds at a time."""

    name: str
    device: str
    providers: tuple[str, ...]
    seconds: float


def ways_of(setup: Setup, folder: Path, lanes: int) -> Iterator[tuple[str, Run]]:
    """What there is to measure; what this machine cannot do is left out, and told."""
    network, share = NETWORKS[setup.name], Share(1, (setup.device,), alone=True, callers=lanes)
    yield "bare torch f32", Bare(network.make(), setup.device).run
    yield from _opened("torch f32", partial(open_backend, TorchModel(network.make().eval(), network.spec), share))
    for name, dtype in NARROW.items():
        yield f"bare torch {name}", Bare(network.make().to(dtype), setup.device).run
        narrow = TorchModel(network.make().eval().to(dtype), network.spec)
        yield from _opened(f"torch {name}", partial(open_backend, narrow, share))
    graph = _exported(network, folder)
    for provider in setup.providers:
        model = OnnxModel(graph, network.spec, {"provider": provider})
        yield from _opened(f"onnxruntime {provider} f32", partial(open_backend, model, share))


def _opened(name: str, open_it: Callable[[], Backend]) -> Iterator[tuple[str, Run]]:
    try:
        backend = open_it()
    except StartupError as error:
        print(f"without {name}: {error}")
        return
    yield name, backend.run


def _exported(network: Network, folder: Path) -> Path:
    path = folder / "model.onnx"
    if not path.exists():
        example = tuple(torch.from_numpy(array) for array in network.spec.example(2))
        program = torch.onnx.export(
            network.make().eval(),
            example,
            dynamo=True,
            input_names=["x"],
            output_names=["y"],
            dynamic_shapes=({0: torch.export.Dim("rows")},),
        )
        assert program is not None
        program.save(path)
    return path


def seconds_together(run: Run, batch: Arrays, lanes: int, seconds: float) -> tuple[float, float]:
    """Batches per second of so many threads at once, and seconds per batch."""
    counts, started = [0] * lanes, time.perf_counter()

    def work(lane: int) -> None:
        while time.perf_counter() < started + seconds or not counts[lane]:
            run(batch)
            counts[lane] += 1

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - started
    return sum(counts) / took, took * lanes / sum(counts)


def measured(setup: Setup, end: float) -> Iterator[Measured]:
    """All ways of it, as far as the time goes, which is until `end` of `time.perf_counter`."""
    with tempfile.TemporaryDirectory() as folder:
        for lanes in LANES:
            ways = dict(ways_of(setup, Path(folder), lanes))
            if lanes > 1:
                ways = {way: run for way, run in ways.items() if not way.startswith("bare")}
            for rows in ROWS if lanes == 1 else ROWS[:3]:
                if time.perf_counter() > end:
                    print(f"no time left for {setup.name} with {lanes} lanes of {rows} rows")
                    continue
                yield from _in_turns(setup, ways, rows, lanes)


def _in_turns(setup: Setup, ways: Mapping[str, Run], rows: int, lanes: int) -> Iterator[Measured]:
    batch = NETWORKS[setup.name].spec.example(rows)
    for run in ways.values():
        for _ in range(3):
            run(batch)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, run in ways.items():
            found[way].append(seconds_together(run, batch, lanes, setup.seconds))
    for way, rounds in found.items():
        rates = [rate * rows for rate, _ in rounds]
        ms = statistics.median(taken for _, taken in rounds) * 1000
        yield Measured(setup.name, way, lanes, rows, statistics.median(rates), min(rates), max(rates), ms)


def check(name: str, device: str) -> str:
    """How far our answers on the device are from the bare library's on the CPU, in words."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    module, batch = network.make().eval(), network.spec.example(8)
    right = np.asarray(Bare(module, "cpu").run(batch))
    found = open_backend(TorchModel(module, network.spec), Share(1, (device,))).run(batch).outputs[0]
    worst = float(np.abs(found - right).max() / np.abs(right).max())
    return f"{name}: largest difference of torch f32 from the CPU {worst:.1e} of the largest output"


def report(device: str, lines: list[str], checks: list[str]) -> str:
    """The page."""
    cards = [gpu.name for gpu in visible_gpus()]
    where = f"{cards[int(device.partition(':')[2] or 0)]} beside {cpu_name()}" if device != "cpu" else cpu_name()
    head = "| network | way | lanes | rows | rows/s, median (range) | ms per batch |\n|---|---|---|---|---|---|"
    told = "\n".join(f"- {item}" for item in checks)
    return f"# {where}, torch {torch.__version__}\n\n{told}\n\n{head}\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["encoder", "convolutional"])
    parser.add_argument("--tensorrt", action="store_true", help="with onnxruntime's TensorRT provider, too")
    parser.add_argument("--seconds", type=float, default=0.15, help="of one turn")
    parser.add_argument("--limit", type=float, default=320.0, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"))
    asked = parser.parse_args()
    started = time.perf_counter()
    checks = [check(name, asked.device) for name in asked.networks]
    lines: list[str] = []
    providers = ("cpu",) if asked.device == "cpu" else ("cuda", *(["tensorrt"] if asked.tensorrt else []))
    for number, name in enumerate(asked.networks, start=1):
        setup = Setup(name, asked.device, providers, asked.seconds)
        for item in measured(setup, started + asked.limit * number / len(asked.networks)):
            lines.append(item.line)
            print(item.line, flush=True)
            asked.out.write_text(report(asked.device, lines, checks))


if __name__ == "__main__":
    main()
