"""numpy's files from strangers: `.npy` and `.npz` bodies, read without pickle and without believing their sizes.

numpy's own reader allocates what a header asks for before it looks whether the data is there, and inflates an archive
to whatever it grows to. Here the header is read first and must match the bytes that follow; archives are bound before
anything is inflated.
"""

from __future__ import annotations

from io import BytesIO
from math import prod
from zipfile import ZipFile

import numpy as np
from numpy.lib import format as npy

from leanserve.codecs.tensors import clip
from leanserve.contracts import Array
from leanserve.errors import BadInput, BodyTooLarge

LARGEST_ITEM = 8
"""Bytes of the largest numbers that are taken."""
MAX_AXES = 32
"""Of an array; numpy has no more than 64."""
MAX_DIRECTORY = 2**16
"""Bytes of an archive's list of members, of which each takes some 60; a model has a few inputs."""
_DIRECTORY_END = b"PK\x05\x06"
READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def array_in(body: bytes, max_elements: int) -> Array:
    """The array of a `.npy` file, as a view of the body.

    Raises:
        BadInput: it is damaged, or holds anything but numbers and texts.
        BodyTooLarge: more than `max_elements`.
    """
    stream = BytesIO(body)
    try:
        version = npy.read_magic(stream)
        shape, column_major, dtype = READERS[version](stream)
    except KeyError as error:
        raise BadInput(f"the body is a .npy file of version {error}, of which only 1.0 and 2.0 are read") from error
    except Exception as error:  # numpy parses the header as Python; hostile ones raise nearly anything
        raise BadInput(f"the body is not a .npy file: {str(error) or type(error).__name__}") from error
    if dtype.kind not in "biufU":
        raise BadInput(f"the body holds {dtype}, neither numbers nor texts of numpy's own kind (str)")
    if prod(shape) > max_elements:
        raise BodyTooLarge(f"the body holds {prod(shape)} elements; at most {max_elements} are taken")
    data = memoryview(body)[stream.tell() :]
    if len(shape) > MAX_AXES or min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != len(data):
        raise BadInput(
            f"the body has {len(data)} bytes of data, which {dtype} of shape {clip(list(shape))} does not take"
        )
    return np.frombuffer(data, dtype).reshape(shape, order="F" if column_major else "C")


def arrays_in(body: bytes, max_elements: int) -> dict[str, Array]:
    """The arrays of a `.npz` file by their names.

    Raises:
        BadInput: it is damaged, encrypted, or holds anything but numbers and texts.
        BodyTooLarge: more than `max_elements`.
    """
    inflated_size(body, max_elements)
    try:
        with ZipFile(BytesIO(body)) as archive:
            members = archive.infolist()
            # zipfile inflates no more than the sizes that it was told, which were just bound.
            contents = {member.filename: archive.read(member) for member in members}
    except MemoryError:
        raise
    except Exception as error:  # zipfile raises nearly anything on hostile bytes
        raise _no_archive(error) from error
    return {name.removesuffix(".npy"): array_in(content, max_elements) for name, content in contents.items()}


def inflated_size(body: bytes, max_elements: int) -> int:
    """Bytes of all members of a `.npz` file as its list of members has them, of which none is inflated.

    Raises:
        BadInput: it is damaged.
        BodyTooLarge: the list itself is too long, or more than `max_elements`.
    """
    end = body.rfind(_DIRECTORY_END)
    directory = int.from_bytes(body[end + 12 : end + 16], "little") if end >= 0 else 0
    if directory > MAX_DIRECTORY:
        raise BodyTooLarge(f"the body lists its members in {directory} bytes; at most {MAX_DIRECTORY} are taken")
    try:
        with ZipFile(BytesIO(body)) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # as in `arrays_in`
        raise _no_archive(error) from error
    if size > max_elements * LARGEST_ITEM:
        raise BodyTooLarge(f"the body inflates to {size} bytes, more than {max_elements} elements take")
    return size


def _no_archive(error: Exception) -> BadInput:
    return BadInput(f"the body is not a .npz file: {str(error) or type(error).__name__}")
