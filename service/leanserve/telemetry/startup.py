"""What a service that starts is at: told by the thread that starts it, read by the loop that answers probes meanwhile.

What is told replaces what was known at once, so that no lock is needed. A build runs in a child process and tells by
lines of JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, Self

from leanserve.contracts import Json

Phase = Literal["opening", "building", "measuring", "loading", "warming"]
StartState = Literal["waiting", "building", "built", "loading", "warming", "warm", "excluded"]

SOON_S, LATER_S = 1.0, 5.0
"""After which time it is worth while to ask again: when variants are being loaded, and before."""


@dataclass(frozen=True, slots=True)
class BuildNews:
    """How far a build is: `done` of `total` artifacts, and a `share` of the one that `step` makes for a variant.

    Without a variant all of them are being timed side by side.
    """

    variant: str | None
    step: str
    done: int
    total: int
    share: float = 0.0

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Self:
        """What `to_line` wrote."""
        return cls(**json.loads(line))


class VariantStart(NamedTuple):
    """How far a variant is; if it is excluded, why."""

    state: StartState
    reason: str = ""


class _Now(NamedTuple):
    phase: Phase
    variant: str | None = None
    step: str | None = None
    done: int | None = None
    total: int | None = None


class Startup:
    """The start of a service: its phase, the state of every variant, and the share of the build that is done."""

    def __init__(self, variants: Iterable[str]) -> None:
        self.model: str | None = None
        """The name of the base, once it is known."""
        self.built = 0.0
        """Share of the build that is done, 0 to 1."""
        self.variants = dict.fromkeys(variants, VariantStart("waiting"))
        self._now = _Now("opening")
        self._started = time.monotonic()

    def building(self, news: BuildNews) -> None:
        """The build tells how far it is; variants are built in their order."""
        self.built = (news.done + news.share) / news.total
        reached = list(self.variants).index(news.variant) if news.variant in self.variants else len(self.variants)
        for place, name in enumerate(self.variants):
            state: StartState = "built" if place < reached else "building" if place == reached else "waiting"
            self.variants[name] = VariantStart(state)
        phase: Phase = "measuring" if news.variant is None else "building"
        self._now = _Now(phase, news.variant, news.step, news.done, news.total)

    def all_built(self) -> None:
        """Nothing is to be built, or nothing is left."""
        self.built = 1.0
        for name in self.variants:
            self.variants[name] = VariantStart("built")
        self._at("loading", None)

    def exclude(self, name: str, reason: str) -> None:
        """A variant failed its gate and does not serve."""
        self.variants[name] = VariantStart("excluded", reason)

    def enter(self, name: str, state: Literal["loading", "warming", "warm"]) -> None:
        """A variant is loaded, or run in the shapes that it will meet, or both are done."""
        self.variants[name] = VariantStart(state)
        self._at("warming" if state == "warming" else "loading", None if state == "warm" else name)

    @property
    def retry_after_s(self) -> float:
        """When to ask again."""
        return SOON_S if self._now.phase in {"loading", "warming"} else LATER_S

    def progress(self) -> dict[str, Json]:
        """Phase, variant and pass at work, how many of how many artifacts (then variants) are done, seconds so far."""
        now = self._now
        return {
            "phase": now.phase,
            "variant": now.variant,
            "pass": now.step,
            "done": now.done,
            "total": now.total,
            "seconds": round(time.monotonic() - self._started, 1),
        }

    def __str__(self) -> str:
        now, seconds = self._now, time.monotonic() - self._started
        words = {
            "opening": "opening the base",
            "building": f"building variant '{now.variant}' ({now.step})",
            "measuring": "timing all variants side by side",
            "loading": f"loading variant '{now.variant}'" if now.variant else "loading variants",
            "warming": f"warming up variant '{now.variant}'",
        }
        things = "artifacts" if now.phase in {"building", "measuring"} else "variants"
        share = "" if now.total is None else f", {now.done} of {now.total} {things} done"
        return f"the service is starting: {words[now.phase]}{share}, {seconds:.0f} s so far"

    def _at(self, phase: Phase, variant: str | None) -> None:
        states = [start.state for start in self.variants.values() if start.state != "excluded"]
        self._now = _Now(phase, variant, None, states.count("warm"), len(states))
