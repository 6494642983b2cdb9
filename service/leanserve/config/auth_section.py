"""The config sections `auth:` and `tls:`: who may do what, and with which certificate the ports answer.

A key itself never stands in the file: only its sha256 does, or where the key is found when the service starts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StrictStr, model_validator

from leanserve.config.section import Name, Section

GrantedRole = Literal["predict", "read", "admin"]


def _sha256(value: str) -> str:
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        # What was written may be the key itself, so it is not repeated.
        raise ValueError("this is no sha256, which has 64 hexadecimal digits; `leanserve key NAME` prints one")
    return value


class KeyConfig(Section):
    """One key: where it comes from, and what it may do."""

    name: Name = Field(description="of whoever has it, for logs; never the key itself")
    roles: tuple[GrantedRole, ...] = Field(min_length=1, description="what it may do; none includes another")
    sha256: Annotated[StrictStr, AfterValidator(_sha256)] | None = Field(None, description="of the key, in hexadecimal")
    env: str | None = Field(None, min_length=1, description="environment variable that holds the key")
    file: Path | None = Field(None, description="file that holds the key and nothing else, such as a mounted secret")
    rate_per_s: float | None = Field(None, gt=0, le=1e9, description="most requests per second, on average; null: any")
    burst: int | None = Field(None, ge=1, description="most requests at once; by default those of one second")

    @model_validator(mode="after")
    def _comes_from_one_place(self) -> Self:
        if sum(source is not None for source in (self.sha256, self.env, self.file)) != 1:
            raise ValueError("a key has one of 'sha256', 'env' and 'file'; `leanserve key NAME` prints a sha256")
        if self.burst is not None and self.rate_per_s is None:
            raise ValueError("'burst' has no effect without 'rate_per_s'")
        return self

    @property
    def most_at_once(self) -> int:
        """Requests that may come at once, where there is a rate."""
        return self.burst or max(1, math.ceil(self.rate_per_s or 1))


class AuthConfig(Section):
    """Who may use the service: with keys, only those who have one."""

    keys: tuple[KeyConfig, ...] = Field((), description="none: whoever reaches the port may predict and read")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [key.name for key in self.keys]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"keys: the name '{twice}' is used twice; the log could not tell the two apart")
        return self


class TlsConfig(Section):
    """TLS for HTTP and gRPC. Paths are relative to the config file."""

    certificate: Path = Field(description="PEM: the certificate, then those between it and its authority")
    key: Path = Field(description="PEM: its private key, without a password")
    client_ca: Path | None = Field(None, description="PEM: clients must have a certificate of one of these authorities")
