"""Fetches a real detector that comes as a package, and names its classes: a stand-in for your own detector.onnx.

pip download --no-deps nudenet && python get_model.py nudenet-*.whl
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from zipfile import ZipFile


def main(wheel: str) -> None:
    """Write `detector.onnx` and `labels.txt`."""
    with ZipFile(wheel) as archive:
        Path("detector.onnx").write_bytes(archive.read("nudenet/320n.onnx"))
        source = archive.read("nudenet/nudenet.py").decode()
    labels = ast.literal_eval(re.search(r"__labels = (\[.*?\])", source, re.DOTALL)[1])
    Path("labels.txt").write_text("\n".join(labels) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
