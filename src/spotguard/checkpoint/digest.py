"""The digest of a shard: CRC-64/NVME, written ``crc64nvme:<16 hex digits>``.

It finds every single-bit error and every burst up to 64 bits, and an arbitrary change with probability 1 - 2**-64. It is no
defence against somebody who forges it. It runs at memory speed, and S3 computes the same value over a whole object
("CRC64NVME" in the S3 documentation on checksums), so what is checked here can be checked there.

To read a gigabyte from memory takes ten times as long as the arithmetic. So bytes are hashed where they are read anyway: piece by piece
as they are sent or as they arrive, while the processor has them at hand, in whatever order. The values of pieces make that of the whole.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Digest", "digest_of"]

_CHUNK = 4 << 20  # between two chances for other threads
_PIECE = 8 << 20  # pieces grow up to here: what `describes` reads at the most before it finds a difference


class Digest:
    """The digest of bytes that come in pieces, one after the other or in any order and from any thread.

    Example:
        >>> digest = Digest()
        >>> digest.update(b"guard", at=4), digest.update(b"spot", at=0)
        (None, None)
        >>> str(digest) == digest_of(b"spotguard")
        True
    """

    def __init__(self) -> None:
        from awscrt.checksums import combine_crc64nvme, crc64nvme  # 70 ms to import; `import spotguard` must not pay it

        self._of, self._combine = crc64nvme, combine_crc64nvme
        self._pieces: dict[int, tuple[int, int]] = {}  # where a piece begins and its value, by where it ends
        self._next = 0

    def update(self, data: "Buffer", at: int | None = None) -> None:
        """Take in more bytes. No byte may come twice.

        Args:
            data: The bytes.
            at: Where they stand in the whole; None for behind those of the last call.
        """
        view = memoryview(data).cast("B")
        position = self._next if at is None else at
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            begin, value = self._pieces.get(position, (position, 0))
            if position - begin >= _PIECE:
                begin, value = position, 0
            if begin != position:
                del self._pieces[position]
            value = self._of(chunk, value)
            position += len(chunk)
            self._pieces[position] = begin, value
        self._next = position

    def join(self, other: "Digest", at: int) -> None:
        """Take in the bytes that another digest has seen, which stand at `at` in the whole."""
        for end, (begin, value) in other._pieces.items():  # noqa: SLF001 - of our own class
            self._pieces[at + end] = at + begin, value

    @property
    def value(self) -> int:
        """The CRC.

        Raises:
            AssertionError: Bytes in between have never come.
        """
        value = position = 0
        for end, (begin, part) in sorted(self._pieces.items()):
            assert begin == position, f"bytes {position} to {begin} are missing from this digest"
            value, position = self._combine(value, part, end - begin), end
        return value

    def describes(self, data: "Buffer") -> bool:
        """Whether these are the bytes it was made of: looked at piece by piece, up to the first that is another."""
        view = memoryview(data).cast("B")
        pieces = sorted(self._pieces.items())
        if (pieces[-1][0] if pieces else 0) != len(view):
            return False
        for end, (begin, value) in pieces:
            found = 0
            for start in range(begin, end, _CHUNK):
                found = self._of(view[start : min(end, start + _CHUNK)], found)
            if found != value:
                return False
        return True

    def __str__(self) -> str:
        return f"crc64nvme:{self.value:016x}"


def digest_of(data: "Buffer") -> str:
    """Digest of bytes that are all there.

    Example:
        >>> digest_of(b"123456789")  # the check value of the CRC catalogue
        'crc64nvme:ae8b14860a799888'
    """
    digest = Digest()
    digest.update(data)
    return str(digest)
