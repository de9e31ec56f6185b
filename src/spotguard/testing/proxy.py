"""A proxy in front of an object store that makes trouble on demand: what networks and services do, at the request you choose.

::

    with FaultProxy("http://127.0.0.1:8333") as proxy:
        proxy.plan = matching(LostResponse(), method="PUT", path_contains="/manifests/", times=1)
        ...  # a client whose endpoint is proxy.uri

Bytes pass as they are, so signatures stay valid: what the client signs is the name of the proxy, which the server is told unchanged.
Only `Flip` and `DropHeader` spoil what was signed: they show what a server does that compares no signatures.
"""

import contextlib
import dataclasses
import random
import select
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from spotguard.errors import ConfigError
from spotguard.testing._wire import PIECE, AnsweredEarly, Head, Wire, hang_up

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Call",
    "DropHeader",
    "Fault",
    "FaultProxy",
    "Flip",
    "Latency",
    "LostResponse",
    "Plan",
    "Request",
    "Reset",
    "Stall",
    "Status",
    "Truncate",
    "each",
    "matching",
    "nth",
]

Direction = Literal["request", "response"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One request on its way to the server.

    Attributes:
        number: Counts the requests, from 1, in the order they came.
        method: ``"PUT"`` and so on.
        path: As it was sent, percent signs and all, without the query.
        query: What stands behind the question mark.
        headers: By name in lower case.
        size: Bytes of the body; None if the client did not say.
    """

    number: int
    method: str
    path: str
    query: str
    headers: Mapping[str, str] = dataclasses.field(hash=False)
    size: int | None

    def __str__(self) -> str:
        return f"request {self.number}, {self.method} {self.path}{'?' * bool(self.query)}{self.query}"


@dataclasses.dataclass(frozen=True)
class Latency:
    """The request waits before it goes on."""

    seconds: float


@dataclasses.dataclass(frozen=True)
class Reset:
    """Both connections are reset after so many bytes of a body, or at its end if it is shorter."""

    after_bytes: int = 0
    direction: Direction = "request"


@dataclasses.dataclass(frozen=True)
class Status:
    """The proxy answers itself, and the server never hears of the request.

    Attributes:
        code: Such as 503.
        error: Code of an S3 error, such as ``"SlowDown"``, ``"InternalError"``, ``"ExpiredToken"``.
        headers: More headers, as pairs.
    """

    code: int
    error: str = "InternalError"
    headers: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Truncate:
    """The body of the response ends after so many bytes, and the connection with it."""

    at: int


@dataclasses.dataclass(frozen=True)
class Flip:
    """The lowest bit of one byte of a body is turned over; nothing happens where the body is shorter."""

    offset: int
    direction: Direction = "request"


@dataclasses.dataclass(frozen=True)
class DropHeader:
    """The server never hears of a header of the request, as if it did not know it; nothing happens where there is none.

    Attributes:
        name: In any case; one that ends in ``*`` stands for all that begin so, such as ``"x-amz-checksum-*"``.
    """

    name: str


@dataclasses.dataclass(frozen=True)
class LostResponse:
    """The server does it and answers; the client's connection is closed without a word."""


@dataclasses.dataclass(frozen=True)
class Stall:
    """After so many bytes of a body nothing more is taken or sent, until the proxy closes."""

    after_bytes: int = 0
    direction: Direction = "request"


@dataclasses.dataclass(frozen=True)
class Call:
    """Something of yours happens, such as the death of the client, and the request goes on.

    Attributes:
        function: Called with the request.
        when: ``"before"`` anything is forwarded, when the head and ``"half"`` of the body were, or ``"after"`` the server has
            answered and before the client hears of it.
    """

    function: Callable[[Request], object]
    when: Literal["before", "half", "after"] = "before"


Fault = Latency | Reset | Status | Truncate | Flip | DropHeader | LostResponse | Stall | Call
Plan = Callable[[Request], Fault | None]


def nth(number: int, fault: Fault) -> Plan:
    """A plan with one fault, at this request of those that it sees, from 1."""
    return matching(fault, skip=number - 1, times=1)


def each(probability: float, faults: Sequence[Fault], seed: int = 0) -> Plan:
    """A plan that gives every request one of the faults, or mostly none, the same ones for the same seed."""
    rng = random.Random(seed)
    return lambda request: rng.choice(faults) if rng.random() < probability else None  # noqa: ARG005 - a plan is told


def matching(
    fault: Fault,
    *,
    method: str | None = None,
    path_contains: str = "",
    query_contains: str = "",
    skip: int = 0,
    times: int | None = None,
) -> Plan:
    """A plan with a fault for the requests that fit.

    Args:
        fault: What happens to them.
        method: Such as ``"PUT"``; None fits all.
        path_contains: Part of the path, such as ``"/manifests/"``.
        query_contains: Part of the query, such as ``"uploadId="``.
        skip: So many that fit pass first.
        times: So many are hit then; None for all.
    """
    seen = 0

    def plan(request: Request) -> Fault | None:
        nonlocal seen
        fits = method in (None, request.method) and path_contains in request.path and query_contains in request.query
        seen += fits
        return fault if fits and seen > skip and (times is None or seen <= skip + times) else None

    return plan


class FaultProxy:
    """A reverse proxy on loopback for HTTP/1.1, to be used as a context; see the module.

    Args:
        upstream: Where the server is, such as ``"http://127.0.0.1:8333"``.
        plan: Called with each request, one at a time; what it returns happens to the request.
        bandwidth: Bytes per second in each direction of each connection; None for as fast as it goes.

    Attributes:
        uri: What the client takes for the server.
        plan: May be changed at any time.
        bandwidth: May be changed too, where there was one at the start.
        requests: All requests so far.
        faulted: What the plan did, and to which requests.

    Raises:
        ConfigError: ``upstream`` is not an address of the form ``http://host:port``.

    Example:
        >>> import http.client
        >>> with FaultProxy("http://127.0.0.1:8333", plan=nth(1, Status(503, "SlowDown"))) as proxy:
        ...     client = http.client.HTTPConnection("127.0.0.1", proxy.port)
        ...     client.request("GET", "/bucket/key?versionId=1")
        ...     print(client.getresponse().status)
        ...     client.close()
        503
        >>> [str(request) for request in proxy.requests]
        ['request 1, GET /bucket/key?versionId=1']
    """

    def __init__(self, upstream: str, *, plan: Plan | None = None, bandwidth: float | None = None) -> None:
        parts = urlsplit(upstream)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise ConfigError(f"upstream={upstream!r}: write an address like 'http://127.0.0.1:8333'")
        self._upstream = (parts.hostname, parts.port or 80)
        self.plan = plan
        self.bandwidth = bandwidth
        self.requests: list[Request] = []
        self.faulted: list[tuple[Request, Fault]] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._failed: Exception | None = None
        self._wires: set[Wire] = set()
        self._threads: set[threading.Thread] = set()
        self._wake, self._woken = socket.socketpair()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        if bandwidth is not None:  # on a slow link a byte that is taken has arrived
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        self.port: int = self._listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._accepting = threading.Thread(target=self._accept, name="spotguard-proxy", daemon=True)
        self._accepting.start()

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None and self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """Close all connections and wait for the threads. What a plan or a `Call` raised is raised by the end of the context."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._wake.send(b"!")
        self._accepting.join()
        with self._lock:
            for wire in self._wires:
                wire.end()
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        for end in (self._wake, self._woken, self._listener):
            end.close()

    def _accept(self) -> None:
        poll = select.poll()
        for end in (self._listener, self._woken):
            poll.register(end, select.POLLIN)
        while True:
            poll.poll()
            if self._closed.is_set():
                return
            with contextlib.suppress(OSError):  # whoever has left again is not our trouble
                client, _ = self._listener.accept()
                self._start(Wire(client, self._piece, self._pause))

    def _start(self, client: "Wire") -> None:
        thread = threading.Thread(target=self._serve, args=(client,), name="spotguard-proxy-connection", daemon=True)
        with self._lock:
            self._wires.add(client)
            self._threads.add(thread)
        thread.start()

    @property
    def _piece(self) -> int:
        return PIECE if self.bandwidth is None else max(1, min(PIECE, int(self.bandwidth / 20)))

    def _pause(self, sent: int) -> None:
        if self.bandwidth is not None:
            self._closed.wait(sent / self.bandwidth)

    def _connect(self) -> Wire:
        upstream = Wire(socket.create_connection(self._upstream), self._piece, self._pause)
        with self._lock:
            self._wires.add(upstream)
            if self._closed.is_set():
                upstream.end()
        return upstream

    def _serve(self, client: Wire) -> None:
        """One connection, from the first request to the last."""
        wires = [client]
        try:
            while client.first_of(*wires[1:]) and (head := client.head()):
                if not self._exchange(wires, head):
                    client.linger()
                    break
        except _ResetNow:
            for wire in wires:
                wire.reset()
        except OSError:  # either side has gone: so does the other
            pass
        except Exception as error:  # noqa: BLE001 - of the plan; raised by the end of the context
            self._failed = self._failed or error
        finally:
            for wire in wires:
                wire.close()
            with self._lock:
                self._wires.difference_update(wires)
                self._threads.discard(threading.current_thread())

    def _exchange(self, wires: list[Wire], head: Head) -> bool:
        """One request and its answer; whether the connection may be used again."""
        client = wires[0]
        request, fault = self._receive(head)
        if isinstance(fault, Latency):
            self._closed.wait(fault.seconds)
        if isinstance(fault, Call) and fault.when == "before":
            fault.function(request)
        expects = request.headers.get("expect", "").lower() == "100-continue"
        if isinstance(fault, Status):
            if not expects:
                for _ in client.body(head):
                    pass
            client.send(_error(request, fault))
            return head.goes_on and not expects
        if len(wires) == 1:
            wires.append(self._connect())
        upstream = wires[1]
        upstream.send(_without(head.raw, fault.name) if isinstance(fault, DropHeader) else head.raw)
        whole = self._forward(client, upstream, request, head, fault, expects=expects)
        return self._answer(client, upstream, request, fault) and whole and head.goes_on

    def _receive(self, head: "Head") -> tuple[Request, Fault | None]:
        method, target, *_ = head.first.split(" ")
        path, _, query = target.partition("?")
        with self._lock:
            number = len(self.requests) + 1
            request = Request(number, method, path, query, MappingProxyType(head.headers), head.size)
            self.requests.append(request)
            fault = self.plan(request) if self.plan is not None else None
            if fault is not None:
                self.faulted.append((request, fault))
        return request, fault

    def _forward(
        self, client: "Wire", upstream: "Wire", request: Request, head: "Head", fault: Fault | None, *, expects: bool
    ) -> bool:
        """The body of a request; False if the server answered before it had all of it."""
        if expects and not client.first_of(upstream):  # the server speaks, before a client that waits no longer
            answer = upstream.head(peek=True)
            if answer is None or answer.status != 100:
                return False
            upstream.head()
            client.send(answer.raw)
        try:
            for piece in self._harmed(client.body(head), request, fault, "request"):
                upstream.send_unless_answered(piece, client.send)
        except AnsweredEarly:
            return False
        return True

    def _answer(self, client: "Wire", upstream: "Wire", request: Request, fault: Fault | None) -> bool:
        """The answer of the server; whether the connection may be used again."""
        while True:
            head = upstream.head()
            if head is None:
                raise ConnectionError("the server has closed the connection")
            if head.status >= 200:
                break
            client.send(head.raw)  # 100 Continue and its like
        bodiless = request.method == "HEAD" or head.status in (204, 304)
        pieces = iter(()) if bodiless else upstream.body(head, response=True)
        if isinstance(fault, LostResponse):
            for _ in pieces:
                pass
            return False
        if isinstance(fault, Call) and fault.when == "after":
            fault.function(request)
        client.send(head.raw)
        for piece in self._harmed(pieces, request, fault, "response"):
            client.send(piece)
        return head.goes_on and (bodiless or head.chunked or head.size is not None)

    def _harmed(
        self, pieces: Iterator[bytes], request: Request, fault: Fault | None, direction: Direction
    ) -> Iterator[bytes]:
        """A body, with the fault in it."""
        if isinstance(fault, (Reset, Stall)) and fault.direction == direction:
            return _with(pieces, fault.after_bytes, self._reset if isinstance(fault, Reset) else self._stall)
        if isinstance(fault, Truncate) and direction == "response":
            return _with(pieces, fault.at, hang_up)
        if isinstance(fault, Call) and fault.when == "half" and direction == "request":
            return _with(pieces, (request.size or 0) // 2, lambda: fault.function(request))
        if isinstance(fault, Flip) and fault.direction == direction:
            return _flipped(pieces, fault.offset)
        return pieces

    def _reset(self) -> None:
        raise _ResetNow

    def _stall(self) -> None:
        self._closed.wait()
        hang_up()


class _ResetNow(Exception):  # noqa: N818 - no error: it is wanted
    """Both connections end with a reset."""


def _with(pieces: Iterator[bytes], mark: int, action: Callable[[], object]) -> Iterator[bytes]:
    """The same bytes; the action comes when so many of them have been sent, or at their end."""
    seen = 0
    while seen < mark and (piece := next(pieces, b"")):
        before = piece[: mark - seen]
        seen += len(before)
        yield before
        if rest := piece[len(before) :]:
            action()
            yield rest
            yield from pieces
            return
    action()
    yield from pieces


def _flipped(pieces: Iterator[bytes], offset: int) -> Iterator[bytes]:
    seen = 0
    for piece in pieces:
        at = offset - seen
        seen += len(piece)
        yield piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :] if 0 <= at < len(piece) else piece


def _without(raw: bytes, name: str) -> bytes:
    """The head of a request, less a header."""
    wanted = name.lower().encode("latin-1")

    def fits(line: bytes) -> bool:
        found = line.partition(b":")[0].strip().lower()
        return found.startswith(wanted[:-1]) if wanted.endswith(b"*") else found == wanted

    first, *lines = raw.split(b"\r\n")  # the last two are empty: the end of the head
    return b"\r\n".join([first, *(line for line in lines if not line or not fits(line))])


def _error(request: Request, fault: Status) -> bytes:
    """An answer as S3 gives it."""
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{fault.error}</Code>'
        f"<Message>a fault of the test proxy</Message><Resource>{request.path}</Resource></Error>"
    ).encode()
    headers = [*fault.headers, ("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    head = f"HTTP/1.1 {fault.code} {fault.error}\r\n{lines}\r\n".encode()
    return head if request.method == "HEAD" else head + body
