"""What may change in the file of a service that runs, what may not, and what did, in words."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Final

from leanserve.config.schema import ServiceConfig
from leanserve.config.yaml import read_yaml
from leanserve.contracts import Json
from leanserve.errors import ConfigError

FIXED: Final[Mapping[str, str]] = {
    "base": "every variant is made of it",
    "data": "every variant was judged by it",
    "score": "every variant was judged by it",
    "seed": "it is in the key of every artifact",
    "device": "the lanes and all backends are on it",
    "threads": "the lanes have shared them out",
    "lanes": "every backend was opened for them",
    "pin": "the threads have their places",
    "cache": "what is served lies there",
    "postprocess": "answers look as it makes them",
    "sequences": "those that are open were promised their place",
    "cors": "web pages were told what they may",
    "watchdog": "it watches by it",
    "experiment.store": "the state of experiments lies there",
    "tls": "the ports listen with it",
    "limits.decode_mb": "the processes that decode were started with it",
}
"""Keys that a service has for life, and why."""


def refuse_fixed(path: Path, before: ServiceConfig, after: ServiceConfig) -> None:
    """See to it that the file at `path`, read as `after`, differs only in what may change.

    Raises:
        ConfigError: one line for each section that does not.
    """
    source = read_yaml(path)
    changed = [key for key in FIXED if attrgetter(key)(before) != attrgetter(key)(after)]
    if changed:
        lines = [f"{source.place(key.split('.'))}: {_fixed(key)}" for key in changed]
        raise ConfigError("\n".join(lines))


def _fixed(key: str) -> str:
    return f"'{key}' cannot change while the service runs ({FIXED[key]}); start it again"


def config_changes(before: ServiceConfig, after: ServiceConfig) -> list[str]:
    """What differs, as `key: before -> after`; of variants, by name. Of keys tells who reads them."""
    mine, others = (config.model_dump(mode="json", exclude={"auth"}) for config in (before, after))
    variants = [{item["name"]: item for item in dump.pop("variants")} for dump in (mine, others)]
    found = [_difference(key, mine[key], others[key]) for key in mine if mine[key] != others[key]]
    old, new = variants
    for name in dict.fromkeys((*old, *new)):
        if name not in new:
            found.append(f"variant '{name}' is removed")
        elif name not in old:
            found.append(f"variant '{name}' is new")
        elif old[name] != new[name]:
            changed = [
                _difference(key, old[name][key], new[name][key])
                for key in new[name]
                if old[name][key] != new[name][key]
            ]
            found.append(f"variant '{name}': {', '.join(changed)}")
    return found


def _difference(key: str, before: Json, after: Json) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [each for each in dict.fromkeys((*before, *after)) if before.get(each) != after.get(each)]
        return ", ".join(f"{key}.{each}: {_shown(before.get(each))} -> {_shown(after.get(each))}" for each in keys)
    return f"{key}: {_shown(before)} -> {_shown(after)}"


def _shown(value: Json) -> str:
    return "none" if value is None else str(value)
