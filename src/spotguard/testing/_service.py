"""A metadata service on loopback, in a thread: what all of the fakes have in common."""

import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Exchange", "Reply", "Request", "Service"]


class Request(NamedTuple):
    """What was asked."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes


class Reply(NamedTuple):
    """What is answered."""

    status: int
    text: str = ""
    headers: Mapping[str, str] = {}


class Exchange(NamedTuple):
    """A request that has been answered, and when: monotonic seconds."""

    request: Request
    reply: Reply
    at: float


class Service:
    """A server on loopback, in a thread of its own.

    Attributes:
        requests: All that have come, in order.
        exchanges: Those that have been answered, in the order of the answers; a long poll is answered late.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.exchanges: list[Exchange] = []
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._failing: deque[Reply] = deque()
        self._closed = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # head and body go in one packet

            def answer(self) -> None:
                parts = urllib.parse.urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                query = urllib.parse.parse_qs(parts.query)
                reply = fake._reply(Request(self.command, parts.path, query, headers, body))
                data = reply.text.encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = answer  # noqa: N815 - names that http.server wants

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A client that has hung up is not our trouble."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def endpoint(self) -> str:
        """Base of its URLs."""
        return f"http://{self.address}"

    def fail_next(self, status: int, times: int = 1, text: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Answer the next requests with this, whatever they ask for."""
        with self._lock:
            self._failing.extend(Reply(status, text, headers or {}) for _ in range(times))

    def wait_for(self, count: int, path: str = "", timeout: float = 10.0) -> None:
        """Wait until so many requests, whose path has that in it, have come in all.

        Raises:
            TimeoutError: They have not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: sum(path in one.path for one in self.requests) >= count, timeout):
                raise TimeoutError(f"{count} requests for {path!r} did not come within {timeout:g} s")

    def __enter__(self) -> "Self":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _reply(self, request: Request) -> Reply:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
            failing = self._failing.popleft() if self._failing else None
        reply = failing if failing is not None else self.answer(request)
        with self._lock:
            self.exchanges.append(Exchange(request, reply, time.monotonic()))
        return reply

    def answer(self, request: Request) -> Reply:
        """What this service answers."""
        raise NotImplementedError
