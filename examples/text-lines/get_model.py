"""Fetches a real recogniser of text lines that comes as a package: a stand-in for your own recogniser.onnx.

pip download --no-deps rapidocr-onnxruntime && python get_model.py rapidocr_onnxruntime-*.whl
"""

from __future__ import annotations

import sys
from pathlib import Path
from zipfile import ZipFile

import onnx

MODEL = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"


def main(wheel: str) -> None:
    """Write `recogniser.onnx` and `characters.txt`, which is inside the former."""
    with ZipFile(wheel) as archive:
        Path("recogniser.onnx").write_bytes(archive.read(MODEL))
    notes = {item.key: item.value for item in onnx.load("recogniser.onnx").metadata_props}
    Path("characters.txt").write_text("\n".join(notes["character"].splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
