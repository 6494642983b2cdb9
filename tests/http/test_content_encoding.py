"""Inflating within a bound: what is too large is never held, what is damaged is refused, and neither takes long."""

from __future__ import annotations

import gzip
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.errors import BadInput, BodyTooLarge
from leanserve.http.content_encoding import Encoding, compress, inflate, permits_gzip

BOTH: tuple[Encoding, ...] = ("gzip", "deflate")


@given(st.binary(max_size=300), st.sampled_from(BOTH))
def test_what_was_compressed_comes_back(body: bytes, encoding: Encoding) -> None:
    packed = compress(body, encoding)
    assert inflate(packed, encoding, len(body)) == body
    if body:
        with pytest.raises(BodyTooLarge, match=f"more than {len(body) - 1} bytes"):
            inflate(packed, encoding, len(body) - 1)


@given(st.binary(max_size=60), st.sampled_from(BOTH))
def test_nonsense_is_bad_input(body: bytes, encoding: Encoding) -> None:
    try:
        inflate(body, encoding, 1000)
    except (BadInput, BodyTooLarge):
        return
    assert encoding == "deflate"  # bare deflate has no check sum, so that some nonsense is valid


@pytest.mark.parametrize("encoding", BOTH)
def test_a_bomb_is_refused_without_being_held(encoding: Encoding) -> None:
    limit = 2**20
    bomb = compress(bytes(256 * limit), encoding)
    assert len(bomb) < 2 * limit
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            inflate(bomb, encoding, limit)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # What was inflated, once more while its pieces are joined, and the rest of the bomb.
    assert peak < 2.1 * limit + len(bomb)


def test_many_empty_members_cost_no_time() -> None:
    started = time.perf_counter()
    with pytest.raises(BadInput, match="follow the end"):
        inflate(gzip.compress(b"") * 100_000, "gzip", 2**20)
    assert time.perf_counter() - started < 1  # one by one they take 16 s


def test_a_wrong_checksum_is_seen() -> None:
    packed = bytearray(zlib.compress(b"tensor"))
    packed[-1] ^= 1
    with pytest.raises(BadInput, match="not valid deflate"):
        inflate(bytes(packed), "deflate", 100)


@pytest.mark.parametrize(
    ("accepted", "permitted"),
    [
        ("", False),
        ("gzip", True),
        ("GZIP;q=1.0", True),
        ("deflate, gzip;q=0.5", True),
        ("br, *;q=0.1", True),
        ("gzip;q=0", False),
        ("gzip;q=0.000, *", False),
        ("*;q=0", False),
        ("br, deflate", False),
        ("x" * 10_000_000, False),
    ],
)
def test_which_clients_permit_gzip(accepted: str, permitted: bool) -> None:  # noqa: FBT001
    assert permits_gzip(accepted) is permitted
