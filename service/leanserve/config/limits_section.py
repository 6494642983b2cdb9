"""The section `limits`: what one client, and all clients together, may send. Every bound has a default that suits."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from leanserve.config.section import Section
from leanserve.http.limits import HttpLimits


class LimitsConfig(Section):
    """Bounds on what clients may send."""

    body_bytes: int = Field(16 * 2**20, ge=1, le=2**31 - 1, description="largest request body")
    url_bytes: int = Field(8192, ge=64, description="longest URL")
    header_bytes: int = Field(65_536, ge=256, description="names and values of a request's headers, trailers included")
    headers: int = Field(100, ge=1, description="most headers of a request, trailers included")
    head_s: float = Field(30.0, gt=0, description="longest time from the first byte of a request to its last header")
    body_s: float = Field(300.0, gt=0, description="longest time for a body, and for the reading of a reply")
    keep_alive_s: float = Field(75.0, gt=0, description="how long a connection may be idle")
    connections: int = Field(10_000, ge=1, description="most connections; beyond it the longest idle ones are closed")
    buffered_bytes: int = Field(256 * 2**20, ge=1, description="most bytes of all unfinished requests together")
    unread_bytes: int = Field(2**30, ge=1, description="most bytes of all replies that clients have not read yet")
    image_pixels: int = Field(50_000_000, ge=1, description="most pixels of a request's images together")
    image_side: int = Field(16_384, ge=1, description="longest side of an image, in pixels")
    decode_mb: int = Field(512, ge=64, description="most memory, in MB, that decoding one body may take")

    @model_validator(mode="after")
    def _a_body_fits(self) -> Self:
        if self.buffered_bytes < self.body_bytes:
            told = f"buffered_bytes ({self.buffered_bytes}) is less than body_bytes ({self.body_bytes})"
            raise ValueError(f"{told}, so that a body of that size would never be taken")
        return self

    @property
    def http(self) -> HttpLimits:
        """What a connection over HTTP keeps."""
        return HttpLimits(**{name: getattr(self, name) for name in HttpLimits._fields})
