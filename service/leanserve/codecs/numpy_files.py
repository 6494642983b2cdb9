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

from leanserve.contracts import Array
from leanserve.errors import BadInput, BodyTooLarge

LARGEST_ITEM = 8
"""Bytes of the largest numbers that are taken."""
READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def array_in(body: bytes, max_elements: int) -> Array:
    """The array of a `.npy` file, as a view of the body.

    Raises:
        BadInput: it is damaged, or holds anything but numbers.
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
    if dtype.kind not in "biuf":
        raise BadInput(f"the body holds {dtype}, not numbers")
    if prod(shape) > max_elements:
        raise BodyTooLarge(f"the body holds {prod(shape)} elements; at most {max_elements} are taken")
    data = memoryview(body)[stream.tell() :]
    if min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != len(data):
        raise BadInput(f"the body has {len(data)} bytes of data, which {dtype} of shape {list(shape)} does not take")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if column_major else "C")


def arrays_in(body: bytes, max_elements: int) -> dict[str, Array]:
    """The arrays of a `.npz` file by their names.

    Raises:
        BadInput: it is damaged, encrypted, or holds anything but numbers.
        BodyTooLarge: more than `max_elements`.
    """
    try:
        with ZipFile(BytesIO(body)) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            if size > max_elements * LARGEST_ITEM:
                raise BodyTooLarge(f"the body inflates to {size} bytes, more than {max_elements} elements take")
            # zipfile inflates no more than the sizes that it was told, which were just bound.
            contents = {member.filename: archive.read(member) for member in members}
    except (BodyTooLarge, MemoryError):
        raise
    except Exception as error:  # zipfile raises nearly anything on hostile bytes
        raise BadInput(f"the body is not a .npz file: {str(error) or type(error).__name__}") from error
    return {name.removesuffix(".npy"): array_in(content, max_elements) for name, content in contents.items()}
