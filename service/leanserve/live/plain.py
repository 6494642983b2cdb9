"""Numbers as JSON knows them."""

from __future__ import annotations

import math
from typing import Any

from leanserve.contracts import Json


def plain(value: Any) -> Json:
    """The same value with what JSON has no word for, infinity and NaN, as `None`."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
