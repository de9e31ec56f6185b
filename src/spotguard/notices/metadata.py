"""Asking a metadata service: plain HTTP to an address of the machine itself, which nothing may stand in front of.

No proxy is used, for a proxy would answer for another machine (Azure demands it, EC2 refuses requests that were forwarded); a redirect
is not followed. Whatever goes wrong is no news, and only a notice ends training.
"""

import contextlib
import datetime as dt
import http.client
import json
import logging
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["Answer", "MetadataClient", "Poller", "deadline_at", "parse_json", "parse_time"]

logger = logging.getLogger(__name__)

_LONGEST = 64 << 10  # bytes of an answer
_CONNECT_S, _READ_S = 1.0, 2.0
_BACKOFF_S = 30.0


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


class MetadataClient:
    """Sends single requests to one service. `interrupt` ends the one under way, from any thread, and all that follow.

    Args:
        base: Such as ``http://169.254.169.254``.

    Example:
        >>> MetadataClient("http://127.0.0.1:1").get("/latest")
        Traceback (most recent call last):
        ConnectionRefusedError: ...
    """

    def __init__(self, base: str) -> None:
        parts = urllib.parse.urlsplit(base if "://" in base else f"http://{base}")
        self.base, self._path = base, parts.path.rstrip("/")
        self._host, self._port = parts.hostname or "", parts.port
        self._secure = parts.scheme == "https"
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()
        self._interrupted = threading.Event()

    def get(self, path: str, headers: Mapping[str, str] | None = None, *, read_s: float = _READ_S) -> Answer:
        """GET; raises OSError when there is no answer."""
        return self.ask("GET", path, headers, read_s=read_s)

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        body: bytes | None = None,
        read_s: float = _READ_S,
    ) -> Answer:
        """One request, on a connection of its own.

        Args:
            method: Of HTTP.
            path: Below the base, with the query.
            headers: Beside those that HTTP needs.
            body: To send.
            read_s: Seconds to wait for the answer.

        Raises:
            OSError: There is no answer.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_CONNECT_S)
        with self._lock:
            if self._interrupted.is_set():
                raise InterruptedError(f"{self.base} is not asked any more")
            self._open.add(connection)
        try:
            connection.connect()
            with self._lock:  # an interruption either finds the socket, or is found here
                if self._interrupted.is_set() or connection.sock is None:
                    raise InterruptedError(f"{self.base} is not asked any more")
                connection.sock.settimeout(read_s)
            connection.request(method, f"{self._path}{path}", body=body, headers=dict(headers or {}))
            answer = connection.getresponse()
            text = answer.read(_LONGEST).decode(errors="replace").strip()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, text)
        except http.client.HTTPException as error:
            raise ConnectionError(f"{self.base}: no HTTP: {error!r}") from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def interrupt(self) -> None:
        """End what is under way: a long poll would hold up the one who waits for its thread."""
        with self._lock:
            self._interrupted.set()
            for connection in self._open:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)


class Poller:
    """Asks again and again until it is stopped: in intervals while all goes well, ever more seldom while it does not.

    Args:
        name: Of the source, for the log.
        interval: Seconds between two questions, give or take a tenth: machines that were started together should not ask together.
        longest: Seconds between two questions when none is answered.
    """

    def __init__(self, name: str, interval: float, *, longest: float = _BACKOFF_S) -> None:
        self.interval = interval
        self._name, self._longest = name, max(longest, interval)
        self._random = random.Random()  # of its own: the global one belongs to the training
        self._state = ""

    def run(self, ask: Callable[[], float | None], stop: threading.Event) -> None:
        """Call `ask` until it is stopped. It returns after how many seconds to be called again; None for the interval.

        What it raises is trouble: it is told of when it begins and when it is over, and the time between two questions doubles. A
        StopIteration ends it all.
        """
        trouble = 0
        while not stop.is_set():
            wait: float | None = None
            try:
                wait = ask()
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 - an answer that nobody has foreseen is no news either
                trouble += 1
                if not stop.is_set():
                    self.note(f"no answer: {type(error).__name__}: {error}")
                wait = min(self._longest, max(self.interval, min(1.0, self.interval * 4)) * 2 ** min(trouble - 1, 10))
            else:
                trouble = 0
                self.note("")
            if wait is None:
                wait = self.interval * self._random.uniform(0.9, 1.1)
            if stop.wait(wait):
                return

    def note(self, state: str) -> None:
        """Tell of a state when it is new."""
        kind = state.partition(":")[0]
        if kind != self._state:
            logger.info("%s: %s", self._name, state or "answers again")
            self._state = kind


def parse_json(text: str, kind: type[Any] = dict) -> Any:
    """Parsed, if it is JSON of that kind; None otherwise."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, kind) else None


def parse_time(text: object) -> dt.datetime | None:
    """A time in ISO 8601 such as ``2026-11-23T15:02:00Z``; None if it is not one.

    Example:
        >>> parse_time("2026-11-23T15:02:00Z").minute, parse_time("soon")
        (2, None)
    """
    if not isinstance(text, str):
        return None
    try:
        found = dt.datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=dt.timezone.utc)


def deadline_at(instant: dt.datetime) -> float:
    """A wall-clock time as an instant of the monotonic clock; one that is past is now. What the wall clock does later changes nothing."""
    return time.monotonic() + max(0.0, instant.timestamp() - time.time())
