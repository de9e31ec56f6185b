"""The digest of a shard: CRC-64/NVME, written ``crc64nvme:<16 hex digits>``.

It finds every single-bit error and every burst up to 64 bits, and an arbitrary change with probability 1 - 2**-64. It is no
defence against somebody who forges it. It runs at memory speed, and S3 computes the same value over a whole object
("CRC64NVME" in the S3 documentation on checksums), so what is checked here can be checked there.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Digest", "digest_of"]

_CHUNK = 8 << 20


class Digest:
    """A running digest.

    Example:
        >>> digest = Digest()
        >>> digest.update(b"spot"), digest.update(b"guard")
        (None, None)
        >>> str(digest) == digest_of(b"spotguard")
        True
    """

    def __init__(self) -> None:
        from awscrt.checksums import crc64nvme  # 70 ms to import; `import spotguard` must not pay it

        self._function = crc64nvme
        self._value = 0

    def update(self, data: "Buffer") -> None:
        """Take in more bytes, in pieces, so that other threads get the interpreter in between."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            self._value = self._function(view[start : start + _CHUNK], self._value)

    def __str__(self) -> str:
        return f"crc64nvme:{self._value:016x}"


def digest_of(data: "Buffer") -> str:
    """Digest of bytes that are all there.

    Example:
        >>> digest_of(b"123456789")  # the check value of the CRC catalogue
        'crc64nvme:ae8b14860a799888'
    """
    digest = Digest()
    digest.update(data)
    return str(digest)
