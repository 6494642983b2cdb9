"""Under which name a model is served that only has the name of its file."""

from __future__ import annotations

import re
from pathlib import Path

LONGEST = 63


def served_name(path: Path) -> str:
    """The file's name as far as it can stand in URLs, headers and metric labels."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:LONGEST] or "model"
