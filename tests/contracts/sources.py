"""Services on loopback, their sources, and what is heard of them."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pytest

from spotguard.notices import AwsSource, AzureSource, GoogleSource, PreemptionNotice, UrlSource
from spotguard.testing._service import Service as Fake
from spotguard.testing.metadata import FakeAws, FakeAzure, FakeGoogle, Reply, Request
from spotguard.testing.notice_source import Listening, listening

if TYPE_CHECKING:
    from typing_extensions import Self

SOON = 0.02  # seconds between two questions

Listen = Callable[..., Listening]


class FakeUrl(Fake):
    """A scheduler of somebody's own."""

    notice: dict[str, Any] | None = None

    def answer(self, request: Request) -> Reply:
        return Reply(204) if self.notice is None else Reply(200, json.dumps(self.notice))


class Service:
    """A cloud, its source, and how it says that we have to go."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fake: Any = {"aws": FakeAws, "google": FakeGoogle, "azure": FakeAzure, "url": FakeUrl}[name]()
        if name == "azure":
            self.fake.limit = 10_000
        if name == "google":
            self.fake._second_s = 0.002  # a long poll of 60 s ends after 0.12

    def source(self, endpoint: str | None = None, interval: float = SOON) -> Any:
        where = endpoint or self.fake.endpoint
        if self.name == "aws":
            return AwsSource(where, interval)
        if self.name == "google":
            return GoogleSource(where, floor=interval)
        if self.name == "azure":
            return AzureSource(where, interval)
        return UrlSource(f"{where}/notice", interval)

    def announce(self, in_s: float | None = None) -> None:
        """A notice stands, of something that happens in so many seconds."""
        if self.name == "aws":
            self.fake.interrupt(in_s=120 if in_s is None else in_s)
        elif self.name == "google":
            self.fake.preempt()
        elif self.name == "azure":
            self.fake.schedule("Preempt", in_s=30 if in_s is None else in_s)
        else:
            self.fake.notice = {"action": "stop", "grace": f"{60 if in_s is None else in_s}s", "id": "7"}

    def take_back(self) -> None:
        if self.name == "url":
            self.fake.notice = None
        else:
            self.fake.clear()

    def settle(self, rounds: int = 3) -> None:
        """Let so many more questions be asked."""
        self.fake.wait_for(len(self.fake.requests) + rounds)


class Raw:
    """A server that answers every request with the same bytes, and then hangs up, or holds the line."""

    def __init__(self, text: bytes, *, hold: bool = False) -> None:
        self.accepted = 0
        self._text, self._hold = text, hold
        self._over = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        while not self._over.is_set():
            connection, _ = self._socket.accept()
            with connection, contextlib.suppress(OSError):
                self.accepted += 1
                if connection.recv(65536):
                    connection.sendall(self._text)
                    self._over.wait(10 if self._hold else 0)

    def __enter__(self) -> "Self":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        socket.create_connection(self._socket.getsockname()).close()  # it may wait for one
        self._thread.join(10)
        self._socket.close()


@contextlib.contextmanager
def also_at(fake: Any, host: str, port: int = 0) -> Iterator[str]:
    """Another address of the same fake."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

    with Server((host, port), fake._server.RequestHandlerClass) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"{f'[{host}]' if ':' in host else host}:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def left(notice: PreemptionNotice) -> float:
    """Seconds from the notice to its deadline."""
    assert notice.deadline is not None
    return notice.deadline - notice.received


@pytest.fixture
def listen() -> Iterator[Listen]:
    with listening() as start:
        yield start


@pytest.fixture(params=["aws", "google", "azure", "url"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    made = Service(request.param)
    with made.fake:
        yield made


@pytest.fixture
def aws() -> Iterator[FakeAws]:
    with FakeAws() as fake:
        yield fake


@pytest.fixture
def google() -> Iterator[FakeGoogle]:
    with FakeGoogle() as fake:
        yield fake


@pytest.fixture
def azure() -> Iterator[FakeAzure]:
    with FakeAzure(limit=10_000) as fake:
        yield fake
