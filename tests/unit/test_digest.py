"""The digest of shards."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotguard.checkpoint import Digest, digest_of


def by_the_book(data: bytes) -> str:
    """CRC-64/NVME bit by bit, from its parameters in the catalogue: reflected, polynomial ad93d23594c93659, all ones in and out."""
    polynomial = int(f"{0xAD93D23594C93659:064b}"[::-1], 2)
    value = (1 << 64) - 1
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (polynomial if value & 1 else 0)
    return f"crc64nvme:{value ^ (1 << 64) - 1:016x}"


@given(st.binary(max_size=200))
def test_the_digest_is_crc64_nvme(data: bytes) -> None:
    assert digest_of(data) == by_the_book(data)


@given(st.lists(st.binary(max_size=50), max_size=8))
def test_the_pieces_make_no_difference(pieces: list[bytes]) -> None:
    digest = Digest()
    for piece in pieces:
        digest.update(piece)
    assert str(digest) == digest_of(b"".join(pieces))


def test_any_buffer_is_taken_and_more_than_one_chunk() -> None:
    data = random.Random(0).randbytes((17 << 20) + 3)
    halves = Digest()
    halves.update(memoryview(data)[: 1 << 20])
    halves.update(bytearray(data[1 << 20 :]))
    assert str(halves) == digest_of(data)


@pytest.mark.parametrize("size", [1, 64, 4096])
def test_every_flipped_bit_changes_it(size: int) -> None:
    data = bytearray(random.Random(size).randbytes(size))
    right = digest_of(data)
    for position in range(size * 8):
        data[position // 8] ^= 1 << position % 8
        assert digest_of(data) != right
        data[position // 8] ^= 1 << position % 8
    assert digest_of(data) == right
