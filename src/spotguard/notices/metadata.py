"""Asking a metadata service: plain HTTP to an address of the machine itself, which nothing may stand in front of.

No proxy is used, for a proxy would answer for another machine (Azure demands it, EC2 refuses requests that were forwarded); a redirect
is not followed. Whatever goes wrong is no news, and only a notice ends training.
"""

import contextlib
import logging
import math
import os
import random
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from spotguard.notices.wire import Answer, Connection, request_of

if TYPE_CHECKING:
    import ssl

__all__ = ["Answer", "MetadataClient", "Poller", "number_from"]

logger = logging.getLogger(__name__)

_CONNECT_S, _READ_S = 1.0, 2.0
_BACKOFF_S = 30.0


class MetadataClient:
    """Sends single requests to one service. `interrupt` ends the one under way, from any thread, and all that follow until `watching`.

    Args:
        base: Such as ``http://169.254.169.254``.
        timeout: Seconds for a connection, and again for an answer; by default 1 and 2.
        attempts: How often a request is sent that gets no answer.
        fallback: Host to ask where that of `base` has no address.

    Example:
        >>> MetadataClient("http://127.0.0.1:1").get("/latest")
        Traceback (most recent call last):
        ConnectionRefusedError: ...
    """

    def __init__(self, base: str, *, timeout: float | None = None, attempts: int = 1, fallback: str = "") -> None:
        parts = urllib.parse.urlsplit(base if "://" in base else f"http://{base}")
        self.base, self._path = base, parts.path.rstrip("/")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._secure else 80)
        self._named = parts.netloc.rpartition("@")[2]
        self._connect_s, self._read_s = timeout or _CONNECT_S, timeout or _READ_S
        self._attempts, self._fallback = attempts, fallback
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._busy: set[Connection] = set()
        self._idle: list[Connection] = []
        self._watching = self._interrupted = False

    def get(self, path: str, headers: Mapping[str, str] | None = None, *, read_s: float | None = None) -> Answer:
        """GET; raises OSError when there is no answer."""
        return self.ask("GET", path, headers, read_s=read_s)

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        body: bytes | None = None,
        read_s: float | None = None,
    ) -> Answer:
        """One request.

        Args:
            method: Of HTTP.
            path: Below the base, with the query.
            headers: Beside those that HTTP needs.
            body: To send.
            read_s: Seconds to wait for the answer.

        Raises:
            OSError: There is no answer.
        """
        request = request_of(method, f"{self._path}{path}", self._named, tuple((headers or {}).items()), body)
        for _ in range(self._attempts - 1):
            with contextlib.suppress(OSError):
                return self._send(request, read_s or self._read_s)
        return self._send(request, read_s or self._read_s)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it connections are kept from one request to the next; an interruption from before it is over."""
        with self._lock:
            self._watching, self._interrupted = True, False
        try:
            yield
        finally:
            with self._lock:
                self._watching = False
                while self._idle:
                    self._idle.pop().close()

    def interrupt(self) -> None:
        """End what is under way: a long poll would hold up the one who waits for its thread."""
        with self._lock:
            self._interrupted = True
            for connection in self._busy:
                connection.interrupt()

    def _send(self, request: bytes, patience: float) -> Answer:
        kept = self._kept()
        if kept is not None:
            try:
                return self._use(kept, request, patience)
            except ConnectionError:  # a server may hang up between two requests
                if kept.heard:
                    raise
        return self._use(self._connect(), request, patience)

    def _use(self, connection: Connection, request: bytes, patience: float) -> Answer:
        keep = False
        try:
            with self._lock:
                self._refuse_if_interrupted()
                self._busy.add(connection)
            answer = connection.ask(request, patience)
            keep = connection.reusable
            return answer
        finally:
            with self._lock:
                self._busy.discard(connection)
                if keep and self._watching and not self._interrupted:
                    self._idle.append(connection)
                else:
                    connection.close()

    def _refuse_if_interrupted(self) -> None:
        if self._interrupted:
            raise InterruptedError(f"{self.base} is not asked any more")

    def _kept(self) -> Connection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if not connection.gone:
                return connection
            connection.close()

    def _connect(self) -> Connection:
        self._refuse_if_interrupted()
        if self._secure and self._tls is None:
            import ssl

            self._tls = ssl.create_default_context()
        try:
            return Connection(self._host, self._port, timeout=self._connect_s, tls=self._tls)
        except socket.gaierror:
            if not self._fallback:
                raise
            self._host = self._fallback
            return Connection(self._host, self._port, timeout=self._connect_s, tls=self._tls)


class Poller:
    """Asks again and again until it is stopped: in intervals while all goes well, ever more seldom while it does not.

    Args:
        name: Of the source, for the log.
        interval: Seconds between two questions, give or take a tenth: machines that were started together should not ask together.
        longest: Seconds between two questions when none is answered; the first that is not is followed by another after one second.
    """

    def __init__(self, name: str, interval: float, *, longest: float = _BACKOFF_S) -> None:
        self.interval = interval
        self._name, self._longest = name, max(longest, interval)
        self._random = random.Random()  # of its own: the global one belongs to the training
        self._state = ""

    def run(self, ask: Callable[[], float | None], stop: threading.Event) -> None:
        """Call `ask` until it is stopped. It returns after how many seconds to be called again; None for the interval.

        What it raises is trouble: it is told of when it begins and when it is over, and the time between two questions doubles.
        """
        trouble = 0
        while not stop.is_set():
            try:
                wait = ask()
            except Exception as error:  # noqa: BLE001 - an answer that nobody has foreseen is no news either
                if not stop.is_set():
                    self.note(f"no answer: {type(error).__name__}: {error}")
                wait = min(self._longest, min(1.0, self.interval) * 2 ** min(trouble, 10))
                trouble += 1
            else:
                trouble = 0
                self.note("")
            wait = self.interval if wait is None else wait
            if stop.wait(wait * self._random.uniform(0.9, 1.1)):
                return

    def note(self, state: str) -> None:
        """Tell of a state when it is new."""
        kind = state.partition(":")[0]
        if kind != self._state:
            logger.info("%s: %s", self._name, state or "answers again")
            self._state = kind


def number_from(name: str, usual: float | None, *, least: float = 0.0) -> float | None:
    """A number that an environment variable may set; the usual one where it is not set, or makes no sense."""
    text = os.environ.get(name, "").strip()
    if not text:
        return usual
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if least <= found < math.inf and found > 0:
        return found
    logger.warning("environment variable %s=%r is ignored: a number of at least %g is meant", name, text, least)
    return usual
