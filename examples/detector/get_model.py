"""Fetches a real detector that comes as a package, names its classes and cuts photos: a stand-in for your own of all.

pip download --no-deps nudenet && python get_model.py nudenet-*.whl
"""

from __future__ import annotations

import ast
import random
import re
import sys
from pathlib import Path
from zipfile import ZipFile

from matplotlib.cbook import get_sample_data
from PIL import Image, ImageEnhance, ImageOps

PHOTOS = 200


def main(wheel: str) -> None:
    """Write `detector.onnx`, `labels.txt` and the folder `photos`."""
    with ZipFile(wheel) as archive:
        Path("detector.onnx").write_bytes(archive.read("nudenet/320n.onnx"))
        source = archive.read("nudenet/nudenet.py").decode()
    labels = ast.literal_eval(re.search(r"__labels = (\[.*?\])", source, re.DOTALL)[1])
    Path("labels.txt").write_text("\n".join(labels) + "\n")
    Path("photos").mkdir(exist_ok=True)
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as portrait:
        for number in range(PHOTOS):
            cut(portrait, random.Random(number)).save(f"photos/{number:03}.jpg", quality=90)


def cut(photo: Image.Image, chance: random.Random) -> Image.Image:
    """A part of a photo, by chance mirrored, lighter or darker."""
    width, height = (round(side * chance.uniform(0.4, 1.0)) for side in photo.size)
    left, top = chance.randint(0, photo.width - width), chance.randint(0, photo.height - height)
    part = photo.crop((left, top, left + width, top + height))
    part = ImageOps.mirror(part) if chance.random() < 0.5 else part
    return ImageEnhance.Brightness(part).enhance(chance.uniform(0.6, 1.4))


if __name__ == "__main__":
    main(sys.argv[1])
