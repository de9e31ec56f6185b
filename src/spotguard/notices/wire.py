"""HTTP/1.1 over one connection, as much of it as a metadata service needs.

The client of the standard library takes several times as long over an answer of a few bytes, and these are asked for every second as long
as training runs.
"""

import functools
import re
import select
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import ssl

__all__ = ["Answer", "Connection", "request_of"]

_LONGEST = 64 << 10  # bytes of an answer, and of its head
_HEAD_ENDS = re.compile(rb"\r?\n\r?\n")


class Answer(NamedTuple):
    """What came back.

    Attributes:
        status: Of HTTP.
        headers: Names in small letters.
        text: The body, without white space around it.
    """

    status: int
    headers: Mapping[str, str]
    text: str


@functools.lru_cache(64)  # the same few are sent for hours
def request_of(method: str, target: str, host: str, headers: tuple[tuple[str, str], ...], body: bytes | None) -> bytes:
    """A request, as it is sent.

    Raises:
        ValueError: A line break in it would make two lines of one.
    """
    fields = {"Host": host, "Accept-Encoding": "identity", **dict(headers)}
    if body is not None:
        fields["Content-Length"] = str(len(body))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    if any(mark in line for line in lines for mark in "\r\n\0") or " " in target:
        raise ValueError(f"{method} {target!r}: no such request can be sent")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


class Connection:
    """One connection, for one request after another.

    Args:
        host: Name or address.
        port: Of TCP.
        timeout: Seconds to wait for the connection.
        tls: Encrypts it; None for plain HTTP.

    Attributes:
        heard: Something has come back for the last request.
        reusable: The last answer was whole, and the server keeps the connection.

    Raises:
        OSError: There is none.
    """

    def __init__(self, host: str, port: int, *, timeout: float, tls: "ssl.SSLContext | None" = None) -> None:
        self._socket = socket.create_connection((host, port), timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            plain = self._socket
            try:
                self._socket = tls.wrap_socket(plain, server_hostname=host)
            except BaseException:
                plain.close()
                raise
        self._waiter = select.poll()
        self._waiter.register(self._socket, select.POLLIN)
        self._read = b""  # and not used yet
        self._until = 0.0
        self.heard = self.reusable = False

    @property
    def gone(self) -> bool:
        """The server has closed it, or says something that nobody asked for."""
        return bool(self._waiter.poll(0))

    def ask(self, request: bytes, timeout: float) -> Answer:
        """Send one request and read the answer.

        Args:
            request: See `request_of`.
            timeout: Seconds for all of it.

        Raises:
            OSError: No answer, or none that is HTTP.
        """
        self._until, self.heard, self.reusable = time.monotonic() + timeout, False, False
        self._socket.settimeout(timeout)
        self._socket.sendall(request)
        version, status, headers = self._head()
        while 100 <= status < 200:
            version, status, headers = self._head()
        body, whole = (b"", True) if status in (204, 304) or request.startswith(b"HEAD ") else self._body(headers)
        kept = version != "HTTP/1.0" and "close" not in headers.get("connection", "").lower()
        self.reusable = whole and kept and not self._read
        return Answer(status, headers, body.decode(errors="replace").strip())

    def interrupt(self) -> None:
        """End what is under way, from another thread."""
        try:
            # Of TLS too: its own would take the session away from the reader.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        except OSError:  # closed already
            return

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _head(self) -> tuple[str, int, dict[str, str]]:
        while (end := _HEAD_ENDS.search(self._read)) is None:
            if len(self._read) > _LONGEST or not self._more():
                raise ConnectionError(f"no HTTP: {self._read[:60]!r}" if self._read else "hung up without an answer")
        head, self._read = self._read[: end.start()].decode("latin-1"), self._read[end.end() :]
        first, *lines = head.splitlines()
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise ConnectionError(f"no HTTP: {first[:60]!r}")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return version, int(rest[:3]), headers

    def _body(self, headers: Mapping[str, str]) -> tuple[bytes, bool]:
        """The body, cut off where it is too long, and whether nothing of it is left in the connection."""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return self._chunks()
        if (length := headers.get("content-length", "")).isdecimal():
            return self._exactly(min(int(length), _LONGEST)), int(length) <= _LONGEST
        while len(self._read) < _LONGEST and self._more():
            pass
        return self._read[:_LONGEST], False

    def _chunks(self) -> tuple[bytes, bool]:
        body = b""
        while len(body) <= _LONGEST:
            try:
                size = int(self._line().partition(b";")[0], 16)
            except ValueError as error:
                raise ConnectionError("no HTTP: a chunk without a length") from error
            if size <= 0:
                while self._line():  # trailers
                    pass
                return body, True
            body += self._exactly(min(size, _LONGEST))
            if size > _LONGEST:
                break
            self._line()
        return body[:_LONGEST], False

    def _line(self) -> bytes:
        while b"\n" not in self._read:
            if len(self._read) > _LONGEST or not self._more():
                raise ConnectionError("hung up in the middle of an answer")
        line, _, self._read = self._read.partition(b"\n")
        return line.rstrip(b"\r")

    def _exactly(self, size: int) -> bytes:
        while len(self._read) < size:
            if not self._more():
                raise ConnectionError("hung up in the middle of an answer")
        found, self._read = self._read[:size], self._read[size:]
        return found

    def _more(self) -> bool:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        found = self._socket.recv(_LONGEST)
        self._read += found
        self.heard = self.heard or bool(found)
        return bool(found)
