"""The section `limits`: what one client, and all clients together, may send. Every bound has a default that suits."""

from __future__ import annotations

from pydantic import Field

from leanserve.config.section import Section


class LimitsConfig(Section):
    """Bounds on what clients may send."""

    body_bytes: int = Field(16 * 2**20, ge=1, description="largest request body")
