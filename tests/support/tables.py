"""What a table looks like on a wide terminal."""

from __future__ import annotations

import io

from rich.console import Console


def shown(renderable: object) -> str:
    file = io.StringIO()
    Console(file=file, width=160).print(renderable)
    return file.getvalue()
