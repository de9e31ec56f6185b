"""Bytes on their way to the server: read by boto3 for the signature, then sent from where they lie."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from spotguard.stores.base import Progress

__all__ = ["Body", "Piece", "send_as_it_is"]

# What is handed to the system at once: between two looks at the deadline, and what a connection has to take within its timeout. A slow
# one gets little, as a timeout must not be the fault of a slow network; a fast one much, as each costs Python 20 µs and the lock.
_LEAST, _MOST, _BRIEF_S = 1 << 20, 32 << 20, 0.1


class Piece(NamedTuple):
    """Some bytes, and who is told when they are on their way."""

    data: memoryview
    progress: Progress | None = None


class Body:
    """The body of one request, in pieces that are never copied.

    boto3 takes bytes or a file. Given a file it reads blocks of 16 KiB into Python, which costs ten times the sending; so it is given this
    as a file, for its checks and its signature, and `send_as_it_is` has it sent as memory instead.

    Args:
        pieces: The bytes, in order.
        check: Called between pieces; what it raises ends the request.
    """

    def __init__(self, pieces: Sequence[Piece], *, check: Callable[[], None] | None = None) -> None:
        self.pieces = tuple(pieces)
        self.size = sum(len(piece.data) for piece in self.pieces)
        self._check = check
        self._position = 0
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
        for data, _ in self.pieces:
            if start < len(data):
                found = data[start:] if size < 0 else data[start : start + size]
                self._position += len(found)
                return found
            start -= len(data)
        return memoryview(b"")

    def stream(self) -> Iterator[memoryview]:
        """The bytes from the start, for a connection to send."""
        while self._sent:
            told, count = self._sent.pop()
            told(-count)
        size = _LEAST
        for data, progress in self.pieces:
            start = 0
            while start < len(data):
                if self._check is not None:
                    self._check()
                stride = data[start : start + size]
                began = time.monotonic()
                yield stride  # when the connection asks for more, this much is with the system
                start += len(stride)
                if progress is not None:
                    self._sent.append((progress, len(stride)))
                    progress(len(stride))
                size = min(_MOST, 2 * size) if time.monotonic() - began < _BRIEF_S else max(_LEAST, size // 2)


def send_as_it_is(request: Any, **_: Any) -> None:
    """Hook for boto3's ``before-send``: the HTTP layer sends an iterable piece by piece, without a copy."""
    if isinstance(request.body, Body):
        request.body = request.body.stream()
