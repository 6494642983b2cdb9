"""What everyone who sees an answer must know of the base (`untrained`, `synthetic data`), where clients look for it.

A reply is easily taken for more than it is once it has left the service, so each carries the warning in a header, and
the model's configuration names it among its parameters, a place that clients of the protocol leave alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from leanserve.contracts import Json

HEADER = b"x-caveats"


def caveat_headers(caveats: Sequence[str]) -> tuple[tuple[bytes, bytes], ...]:
    """The header of every reply with an answer; none without caveats."""
    text = " ".join(", ".join(caveats).split())  # a line break would end the header
    return ((HEADER, text.encode("ascii", "backslashreplace")),) if text else ()


def caveat_parameters(caveats: Sequence[str]) -> dict[str, Json]:
    """The entry of the model's configuration, as Triton writes parameters; none without caveats."""
    return {"parameters": {"caveats": {"string_value": ", ".join(caveats)}}} if caveats else {}
