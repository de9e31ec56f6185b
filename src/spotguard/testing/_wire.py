"""One connection of HTTP/1.1 as bytes that pass, for `spotguard.testing.proxy`."""

import contextlib
import select
import socket
import struct
from collections.abc import Callable, Iterator

PIECE = 1 << 16
_HEAD_LIMIT = 1 << 20
_LINGER = 2.0  # seconds for a client that has an answer and sends on


class AnsweredEarly(Exception):  # noqa: N818 - no error: it happens
    """The server has answered, or left, before it had the whole body."""


def hang_up() -> None:
    """End the connection in good order."""
    raise ConnectionError("the connection ends here")


class Head:
    """First line and headers of a request or an answer."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self.chunked = self.headers.get("transfer-encoding", "").lower().endswith("chunked")
        length = self.headers.get("content-length")
        self.size = None if self.chunked or length is None else int(length)
        connection = self.headers.get("connection", "").lower()
        self.goes_on = "keep-alive" in connection if "HTTP/1.0" in self.first else "close" not in connection

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.first.split(" ")[1])


class Wire:
    """A connection, and what was read from it too early."""

    def __init__(self, connection: socket.socket, piece: int, pause: Callable[[int], None]) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._piece, self._pause = connection, piece, pause
        self._buffer = b""

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def first_of(self, *others: "Wire") -> bool:
        """Wait until one of them has something to say, if only that it has ended; whether it is this one alone."""
        if self._buffer:
            return True
        poll = select.poll()
        for wire in (self, *others):
            poll.register(wire, select.POLLIN)
        return [descriptor for descriptor, _ in poll.poll()] == [self.fileno()]

    def head(self, *, peek: bool = False) -> Head | None:
        """The next head, kept for the next call as well if peeking; None at the end of the connection."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            more = self._socket.recv(PIECE)
            if not more or len(self._buffer) > _HEAD_LIMIT:
                return None
            self._buffer += more
        raw = self._buffer[: end + 4]
        if not peek:
            self._buffer = self._buffer[end + 4 :]
        return Head(raw)

    def body(self, head: Head, *, response: bool = False) -> Iterator[bytes]:
        """All bytes of a body as they are sent, chunk sizes included."""
        if head.chunked:
            yield from self._chunks()
        elif head.size is not None:
            yield from self._exactly(head.size)
        elif response:
            while piece := self._some(self._piece):
                yield piece

    def _chunks(self) -> Iterator[bytes]:
        size = -1
        while size:
            line = self._line()
            yield line
            size = int(line.split(b";")[0], 16)
            if size:
                yield from self._exactly(size + 2)
        while (trailer := self._line()) != b"\r\n":
            yield trailer
        yield trailer

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            more = self._socket.recv(PIECE)
            if not more or len(self._buffer) > _HEAD_LIMIT:
                hang_up()
            self._buffer += more
        line, self._buffer = self._buffer[: end + 2], self._buffer[end + 2 :]
        return line

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self._some(min(size, self._piece))
            if not piece:
                hang_up()
            size -= len(piece)
            yield piece

    def _some(self, most: int) -> bytes:
        if self._buffer:
            piece, self._buffer = self._buffer[:most], self._buffer[most:]
            return piece
        return self._socket.recv(most)

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self._socket.sendall(data)
        self._pause(len(data))

    def send_unless_answered(self, data: bytes, relay: Callable[[bytes], None]) -> None:
        """Send all of it, unless the other side has begun to speak; 100 Continue is relayed, it is no answer."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLOUT)
        view = memoryview(data)
        while view:
            ((_, event),) = poll.poll()
            if self._buffer or event & ~select.POLLOUT:
                head = self.head(peek=True)
                if head is None or head.status != 100:
                    raise AnsweredEarly
                self.head()
                relay(head.raw)
            else:
                view = view[self._socket.send(view) :]
        self._pause(len(data))

    def linger(self) -> None:
        """Let the other side read the answer before it learns that its request was not read to the end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(_LINGER)
            while self._socket.recv(PIECE):
                pass

    def end(self) -> None:
        """Say goodbye; wakes up whoever waits for this connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Leave without a goodbye."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self) -> None:
        """Give the connection up."""
        self.end()
        self._socket.close()
