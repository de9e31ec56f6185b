"""How many bytes are handed to a connection, or taken from it, at once."""

import time

__all__ = ["Stride"]

_LEAST, _MOST, _BRIEF_S = 64 << 10, 8 << 20, 0.1


class Stride:
    """A number of bytes that grows while the network is fast.

    A slow connection is asked for little at once: a stride has to be done within the timeout, and a slow network is no stall. A fast one is
    asked for much, since each stride costs Python 20 µs and the lock of the interpreter.

    Example:
        >>> stride = Stride()
        >>> stride.next(), stride.next()
        (65536, 131072)
    """

    def __init__(self) -> None:
        self._size, self._most, self._began = _LEAST, _MOST, 0.0

    def restart(self) -> None:
        """The transfer begins again. The system takes the first megabytes at once however slow the network is: it may have been that."""
        self._most = max(_LEAST, self._most // 8)
        self._size, self._began = _LEAST, 0.0

    def next(self) -> int:
        """Bytes of the next one, by how long the last one has taken."""
        now = time.monotonic()
        if self._began:
            brief = now - self._began < _BRIEF_S
            self._size = min(self._most, 2 * self._size) if brief else max(_LEAST, self._size // 2)
        self._began = now
        return self._size
