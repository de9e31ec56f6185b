"""How much is moved at once: in how many connections, in what parts, and how many bytes from one look at the clock to the next."""

import os
import time

__all__ = ["Stride", "Throughput"]

_LEAST, _FIRST, _MOST, _BRIEF_S = 64 << 10, 1 << 20, 8 << 20, 0.1
# Bytes a second of one connection. Of S3 itself one is expected to give 85e6 to 90e6:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance-design-patterns.html
_FAST = 200e6


class Throughput:
    """What transfers in one direction have found out about the network, for those that come.

    Args:
        connections: The most that are wanted at once.
        part_size: The least bytes of a part.

    Attributes:
        stride: Bytes with which a transfer begins, up to a megabyte: the network may have become slow since, and what is sent at once has
            to be through before it seems to stall.
        rate: Bytes a second that one connection has moved lately.

    Example:
        >>> throughput = Throughput(4, 32 << 20)
        >>> throughput.lanes
        4
        >>> [throughput.share_of(size << 20) >> 20 for size in (100, 600, 1 << 14)]
        [25, 75, 128]
    """

    def __init__(self, connections: int, part_size: int) -> None:
        self._connections, self._part_size = connections, part_size
        self.stride, self.rate = _LEAST, 0.0

    @property
    def lanes(self) -> int:
        """Connections to use at once. Where one is fast the processor is the limit: more of them than cores get in each other's way."""
        return min(self._connections, _cores()) if self.rate > _FAST else self._connections

    def share_of(self, size: int) -> int:
        """Bytes of a part where `size` bytes are to be moved: two for each connection, of equal size, within bounds.

        Each part costs 1 ms of Python and an answer to wait for, whatever its size; what has to be sent again after a failure is a part.
        """
        most = (8 if self.rate > _FAST else 4) * self._part_size
        wanted = min(most, max(self._part_size, -(-size // (2 * self.lanes))))
        return -(-size // max(1, -(-size // wanted)))


class Stride:
    """A number of bytes that grows while the network is fast.

    A slow connection is asked for little at once: a stride has to be done within the timeout, and a slow network is no stall. A fast one is
    asked for much, since each stride costs Python 20 µs and the lock of the interpreter.

    Args:
        throughput: What is known from transfers before; it is told of this one.

    Example:
        >>> stride = Stride(Throughput(4, 32 << 20))
        >>> stride.next(1 << 20), stride.next(1 << 20), stride.next(1000)
        (65536, 131072, 1000)
    """

    def __init__(self, throughput: Throughput) -> None:
        self._throughput, self._size, self._most = throughput, min(_FIRST, throughput.stride), _MOST
        self._since = self._began = 0.0  # the transfer, and the last stride
        self._asked = self._moved = 0

    def restart(self) -> None:
        """The transfer begins again. The system takes the first megabytes at once however slow the network is: it may have been that."""
        self._most = max(_LEAST, self._most // 8)
        self._size = self._throughput.stride = _LEAST
        self._began, self._moved = 0.0, 0

    def next(self, left: int) -> int:
        """Bytes of the next one, by how long the last one has taken; no more than are left."""
        now = time.monotonic()
        if self._began:
            self._moved += self._asked
            if self._moved >= _MOST:
                self._throughput.rate = self._moved / max(now - self._since, 1e-9)
            if now - self._began >= _BRIEF_S:
                self._size = max(_LEAST, self._size // 2)
            elif self._asked == self._size:  # a few bytes are brief on any network
                self._size = min(self._most, 2 * self._size)
            self._throughput.stride = self._size
        else:
            self._since = now
        self._began = now
        self._asked = min(left, self._size)
        return self._asked


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
