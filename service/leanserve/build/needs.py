"""Is everything there that the passes of a config need? Asked before any work: a build may run for hours till it asks.

What the machine must have is looked for at every start, for some of it is needed to load what was built long ago. What
the data must have is looked for only when something is to be built, and by `leanserve check`.
"""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Base, Split
from leanserve.errors import ConfigError, PassFailed
from leanserve.passes.base import Need, Pass

GPU_DEVICES = ("nvidia[0-9]*", "dxg")
"""Below /dev; `dxg` is that of Windows' Linux."""


def require_machine(config: ServiceConfig, compiler: str, devices: Path = Path("/dev")) -> None:
    """Check what the machine must have; `compiler` is the command that compiles C++, `devices` the folder of devices.

    Raises:
        PassFailed: a need of a pass is not met; the text names variant, pass, position, what is missing and a remedy.
    """
    _require(config, {"compiler": lambda: _compiler(compiler, "where it serves"), "gpu": lambda: _gpu(devices)})


def require_data(config: ServiceConfig, base: Base, compiler: str = "g++") -> None:
    """Check what building needs: what the base's data must have, and the command that compiles C++.

    Raises:
        PassFailed: as `require_machine`.
    """
    found: Mapping[Need, Callable[[], str | None]] = {
        "train": lambda: _rows(base, "train"),
        "labels": lambda: _rows(base, "train") or _labels(base),
        "calibration": lambda: _rows(base, "calibration"),
        "batches": lambda: _batches(base),
        "building_compiler": lambda: _compiler(compiler, "where it is built"),
    }
    _require(config, found)


def _require(config: ServiceConfig, missing: Mapping[Need, Callable[[], str | None]]) -> None:
    for where, pass_ in _passes(config):
        for need, look in missing.items():
            if need in pass_.needs and (reason := look()) is not None:
                raise PassFailed(f"{where} needs {reason}")


def _passes(config: ServiceConfig) -> Iterator[tuple[str, Pass]]:
    for variant in config.variants:
        for position, pass_ in enumerate(variant.passes, start=1):
            yield f"variant '{variant.name}', pass {position} ({pass_.kind})", pass_


def _rows(base: Base, split: Split) -> str | None:
    try:
        if len(base.data(split, base.unit)):
            return None
    except ConfigError:  # there are no files for the split
        base.data("gate", base.unit)  # but where no split can be made of the files, that says why
    return f"rows of the {split} split, and base '{base.name}' has none; give `data` more rows, or drop the pass"


def _labels(base: Base) -> str | None:
    first = next(base.data("train", base.unit).batches(base.unit))
    if first.labels is not None:
        return None
    remedy = "add them to `data`, or set the pass to do without"
    return f"labels, and the train split of base '{base.name}' has none; {remedy}"


def _batches(base: Base) -> str | None:
    if base.spec.rows == "any":
        return None
    return f"batches of any rows, and base.rows: {base.spec.rows} says that they share none; drop the pass"


def _compiler(command: str, where: str) -> str | None:
    if shutil.which(command) is None:
        remedy = "install one (Debian: apt-get install g++), or name yours in the environment variable CXX"
        return f"a C++ compiler {where}, and there is no '{command}'; {remedy}"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"Python's headers, and there is no {header}; install them (Debian: apt-get install python3-dev)"
    return None


def _gpu(devices: Path) -> str | None:
    if any(True for pattern in GPU_DEVICES for _ in devices.glob(pattern)):
        return None
    return "an NVIDIA GPU, and this machine shows none; choose `provider: cpu`, or serve where there is one"
