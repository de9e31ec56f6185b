"""Bytes on their way to the server: read by boto3 for the signature, then sent from where they lie."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from spotguard.checkpoint import Digest
from spotguard.stores.base import Progress
from spotguard.stores.s3.throughput import Stride, Throughput

__all__ = ["Body", "Piece", "send_as_it_is"]


class Piece(NamedTuple):
    """Some bytes, who is told when they are on their way, and a digest with their place in it."""

    data: memoryview
    progress: Progress | None = None
    digest: Digest | None = None
    at: int = 0

    def cut(self, size: int) -> "tuple[Piece, Piece]":
        """The first `size` bytes, and the rest."""
        return self._replace(data=self.data[:size]), self._replace(data=self.data[size:], at=self.at + size)


class Body:
    """The body of one request, in pieces that are never copied.

    boto3 takes bytes or a file. Given a file it reads blocks of 16 KiB into Python, which costs ten times the sending; so it is given this
    as a file, for its checks and its signature, and `send_as_it_is` has it sent as memory instead.

    Args:
        pieces: The bytes, in order.
        throughput: Of the connection.
        check: Called between pieces; what it raises ends the request.
        hashes: Compute their CRC-64/NVME while they are sent. It is computed in any case where a digest wants it.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        throughput: Throughput,
        *,
        check: Callable[[], None] | None = None,
        hashes: bool = False,
    ) -> None:
        self.pieces = tuple(pieces)
        self.size = sum(len(piece.data) for piece in self.pieces)
        self._throughput, self._check = throughput, check
        self._hashes = hashes or any(piece.digest is not None for piece in self.pieces)
        self._seen: list[Digest] | None = None  # what was hashed, of each piece
        self._before = False  # that was done before anything was sent
        self._position = 0
        self._stride: Stride | None = None
        self._sent: list[tuple[Progress, int]] = []

    def __len__(self) -> int:
        return self.size

    def tell(self) -> int:
        """Position of the next `read`."""
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move the next `read`."""
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def read(self, size: int = -1) -> memoryview:
        """Up to `size` bytes, as they lie in memory: possibly fewer, none at the end."""
        start = self._position
        for piece in self.pieces:
            data = piece.data
            if start < len(data):
                found = data[start:] if size < 0 else data[start : start + size]
                self._position += len(found)
                return found
            start -= len(data)
        return memoryview(b"")

    def hash(self) -> int:
        """Their CRC, to be told to the server before the bytes: reads them once more."""
        self._seen, self._before = [Digest() for _ in self.pieces], True
        for seen, piece in zip(self._seen, self.pieces, strict=True):
            seen.update(piece.data)
        return self.crc

    def crc32c(self) -> int:
        """The other CRC, for a server that does not know ours."""
        from awscrt.checksums import crc32c

        value = 0
        for piece in self.pieces:
            value = crc32c(piece.data, value)
        return value

    @property
    def crc(self) -> int:
        """Of all bytes, once they have been sent or hashed."""
        assert self._seen is not None
        whole, at = Digest(), 0
        for seen, piece in zip(self._seen, self.pieces, strict=True):
            whole.join(seen, at)
            at += len(piece.data)
        return whole.value

    def tell_digests(self) -> None:
        """The bytes have arrived: every digest that waits for them takes them in."""
        for seen, piece in zip(self._seen or [], self.pieces, strict=bool(self._seen)):
            if piece.digest is not None:
                piece.digest.join(seen, piece.at)

    def stream(self) -> Iterator[memoryview]:
        """The bytes from the start, for a connection to send."""
        while self._sent:
            told, count = self._sent.pop()
            told(-count)
        if self._hashes and not self._before:
            self._seen = [Digest() for _ in self.pieces]
        if self._stride is None:
            self._stride = Stride(self._throughput)
        else:
            self._stride.restart()
        for number, piece in enumerate(self.pieces):
            seen = self._seen[number] if self._seen is not None and not self._before else None
            start = 0
            while start < len(piece.data):
                if self._check is not None:
                    self._check()
                data = piece.data[start : start + self._stride.next(len(piece.data) - start)]
                start += len(data)
                if seen is not None:
                    seen.update(data)
                yield data  # when the connection asks for more, this much is with the system
                if piece.progress is not None:
                    self._sent.append((piece.progress, len(data)))
                    piece.progress(len(data))


def send_as_it_is(request: Any, **_: Any) -> None:
    """Hook for boto3's ``before-send``: the HTTP layer sends an iterable piece by piece, without a copy."""
    if isinstance(request.body, Body):
        request.body = request.body.stream()
