"""Fetches a real recogniser of text lines that comes as a package, and renders lines: a stand-in for your own of both.

pip download --no-deps rapidocr-onnxruntime && python get_model.py rapidocr_onnxruntime-*.whl
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from pydoc_data.topics import topics
from zipfile import ZipFile

import onnx
from PIL import Image, ImageDraw, ImageFont

LINES = 400
MODEL = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"


def main(wheel: str) -> None:
    """Write `recogniser.onnx`, `characters.txt`, which is inside the former, and the folder `lines`."""
    with ZipFile(wheel) as archive:
        Path("recogniser.onnx").write_bytes(archive.read(MODEL))
    notes = {item.key: item.value for item in onnx.load("recogniser.onnx").metadata_props}
    Path("characters.txt").write_text("\n".join(notes["character"].splitlines()) + "\n", encoding="utf-8")
    Path("lines").mkdir(exist_ok=True)
    for number, text in enumerate(texts(LINES)):
        rendered(text, 24 + number % 17).save(f"lines/{number:03}.png")


def texts(count: int) -> list[str]:
    """Pieces of what Python's own manual says, of two to seven words."""
    words = " ".join(topics.values()).split()
    chance = random.Random(0)
    starts = (chance.randrange(len(words) - 7) for _ in range(count))
    return [" ".join(words[start : start + chance.randint(2, 7)]) for start in starts]


def rendered(text: str, size: int) -> Image.Image:
    """A line of text, black on white."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = map(round, font.getbbox(text))
    image = Image.new("RGB", (right - left + 12, bottom - top + 12), "white")
    ImageDraw.Draw(image).text((6 - left, 6 - top), text, "black", font)
    return image


if __name__ == "__main__":
    main(sys.argv[1])
