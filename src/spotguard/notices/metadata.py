"""What the metadata services of all clouds have in common: a small HTTP client, a loop that asks again, and what was told already.

Their rules are stricter than those of the web. No proxy may be used: Azure demands that, and AWS rejects what a proxy adds to a request
(``X-Forwarded-For``). No redirect is followed. Everything but an explicit notice is no news.
"""

import contextlib
import dataclasses
import datetime as dt
import email.utils
import http.client
import json
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from spotguard.errors import ConfigError
from spotguard.notices.base import PreemptionNotice

__all__ = [
    "Answer",
    "Clock",
    "Done",
    "Health",
    "MetadataClient",
    "Told",
    "http_time",
    "iso_time",
    "json_object",
    "poll",
    "unexpected",
]

logger = logging.getLogger(__name__)

BODY_LIMIT = 64 << 10  # bytes; no answer we know has a tenth of that
BACKOFF_S = (1.0, 30.0)  # the first wait after trouble, and the longest
_JITTER = 0.1
_random = random.Random()  # the global generator belongs to the training


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server said.

    Attributes:
        status: Such as 404.
        headers: By name in lower case.
        text: The body.

    Example:
        >>> Answer(404).text
        ''
    """

    status: int
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Clock:
    """The two clocks, for tests to replace.

    Example:
        >>> Clock(wall=lambda: 1000.0, monotonic=lambda: 7.0).deadline(1120.0)
        127.0
        >>> Clock(wall=lambda: 1000.0, monotonic=lambda: 7.0).deadline(900.0)
        7.0
    """

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic

    def deadline(self, timestamp: float) -> float:
        """The monotonic instant of a wall-clock time, now if it is past. Should the wall clock be set later on, it stays where it is."""
        return self.monotonic() + max(0.0, timestamp - self.wall())


class Done(Exception):  # noqa: N818 - no error: it happens
    """There is nothing to ask here, now or later."""


class MetadataClient:
    """HTTP without proxies, redirects, or patience; a connection for each request.

    Args:
        endpoint: Such as ``"http://169.254.169.254"``; a path in it goes in front of every other.
        argument: What to call it in an error message.
        connect_s: Patience for a connection, in seconds.
        read_s: Patience for each read, in seconds, unless a request says otherwise.

    Raises:
        ConfigError: The endpoint is no address.

    Example:
        >>> MetadataClient("http://127.0.0.1:1").get("/latest")
        Traceback (most recent call last):
        ConnectionRefusedError: [Errno 111] Connection refused
    """

    def __init__(
        self, endpoint: str, *, argument: str = "endpoint", connect_s: float = 1.0, read_s: float = 2.0
    ) -> None:
        try:
            url = urlsplit(endpoint)
            host, self._port = url.hostname, url.port
        except ValueError as error:
            raise ConfigError(f"{argument}={endpoint!r} is not an address: {error}") from error
        if url.scheme not in ("http", "https") or not host:
            raise ConfigError(f"{argument}={endpoint!r} is not an address; write it like 'http://169.254.169.254'")
        self._host, self._base = host, url.path.rstrip("/")
        self._context = ssl.create_default_context() if url.scheme == "https" else None
        self._connect_s, self._read_s = connect_s, read_s
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()

    def get(
        self,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        read_s: float | None = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """See `request`."""
        return self.request("GET", path, headers, read_s=read_s, stop=stop)

    def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        body: str | None = None,
        read_s: float | None = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """Ask, and take whatever status comes.

        Args:
            method: Such as ``"GET"``.
            path: With the query.
            headers: To send.
            body: To send.
            read_s: Patience for each read, in seconds.
            stop: Once it is set, `wake` ends the request at once.

        Raises:
            OSError: No answer came, or not all of it.
        """
        kind = http.client.HTTPConnection if self._context is None else self._secure
        connection = kind(self._host, self._port, timeout=self._connect_s)
        sock: socket.socket | None = None
        try:
            connection.connect()
            sock = connection.sock
            sock.settimeout(self._read_s if read_s is None else read_s)
            with self._lock:
                self._sockets.add(sock)
            if stop is not None and stop.is_set():  # after the line above: `wake` sees the socket, or we see the event
                raise ConnectionAbortedError("asked to stop")
            connection.request(method, self._base + path, body, dict(headers or {}))
            with connection.getresponse() as response:
                size = response.length
                data = response.read(BODY_LIMIT + 1)
                if len(data) > BODY_LIMIT:
                    raise OSError(f"the answer to {method} {_plain(path)} is longer than {BODY_LIMIT} bytes")
                if size is not None and len(data) < size:
                    raise ConnectionResetError(f"the answer to {method} {_plain(path)} ends too early")
                found = {name.lower(): value for name, value in response.getheaders()}
                return Answer(response.status, found, data.decode("utf-8", errors="replace"))
        except http.client.HTTPException as error:
            if isinstance(error, OSError):
                raise
            raise OSError(f"the answer to {method} {_plain(path)} is not HTTP: {error!r}") from error
        finally:
            if sock is not None:
                with self._lock:
                    self._sockets.discard(sock)
            connection.close()

    def wake(self) -> None:
        """End the requests that are under way, in whichever thread they wait."""
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):  # the other side was faster
                    sock.shutdown(socket.SHUT_RDWR)

    def _secure(self, host: str, port: int | None, *, timeout: float) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=self._context)


class Health:
    """Logs trouble once when it begins, and once when it is over.

    Args:
        what: Who is asked, as a person would say.

    Example:
        >>> health = Health("the oracle")
        >>> health.ill(OSError("asleep"))
        >>> health.ill(OSError("still asleep"))  # not logged
        >>> health.well()
    """

    def __init__(self, what: str) -> None:
        self._what, self._ill = what, False

    def ill(self, error: Exception) -> None:
        """It failed."""
        if not self._ill:
            self._ill = True
            # What is no OSError may be a bug of ours, and wants to be found.
            logger.warning(
                "%s gives no news (%s: %s); will go on asking",
                self._what,
                type(error).__name__,
                error,
                exc_info=None if isinstance(error, (OSError, ValueError)) else error,
            )

    def well(self) -> None:
        """It answered."""
        if self._ill:
            self._ill = False
            logger.info("%s answers again", self._what)


class Told:
    """What was told already: each notice once, unless it changes, and its withdrawal.

    Args:
        emit: Takes what is news.

    Example:
        >>> told = Told(lambda notice: print(notice.action, notice.detail))
        >>> make = lambda: PreemptionNotice(source="azure", kind="preemption", detail="Preempt", id="1")
        >>> for _ in range(3):
        ...     told.tell("1", "Scheduled", make)
        stop Preempt
        >>> told.withdraw("1")
        withdrawn Preempt
        >>> told.withdraw("1")
    """

    def __init__(self, emit: Callable[[PreemptionNotice], None]) -> None:
        self._emit = emit
        self._told: dict[str, tuple[object, PreemptionNotice]] = {}

    @property
    def ids(self) -> list[str]:
        """Of the notices that stand."""
        return list(self._told)

    def tell(self, notice_id: str, mark: object, make: Callable[[], PreemptionNotice]) -> None:
        """Tell a notice, if there is none of this id with this mark. It is made only then: its deadline is read off the clock."""
        known = self._told.get(notice_id)
        if known is None or known[0] != mark:
            notice = make()
            self._emit(notice)
            self._told[notice_id] = mark, notice

    def only(self, notice_id: str, mark: object, make: Callable[[], PreemptionNotice]) -> None:
        """Tell it as the only one that stands. The others go after it came: there is no instant without a notice."""
        self.tell(notice_id, mark, make)
        for other in self.ids:
            if other != notice_id:
                self.withdraw(other)

    def withdraw(self, notice_id: str) -> None:
        """Withdraw a notice, if it was told."""
        known = self._told.get(notice_id)
        if known is not None:
            self._emit(dataclasses.replace(known[1], action="withdrawn", deadline=None, received=time.monotonic()))
            del self._told[notice_id]

    def withdraw_all(self) -> None:
        """Nothing stands any more."""
        for notice_id in self.ids:
            self.withdraw(notice_id)

    def forget(self, notice_id: str) -> None:
        """It is over, and was not withdrawn."""
        self._told.pop(notice_id, None)


def poll(what: str, ask: Callable[[], float | None], stop: threading.Event, interval: float) -> None:
    """Ask until `stop` is set, with jitter, backing off while there is trouble.

    Args:
        what: Who is asked, for the log.
        ask: Returns how long to wait, in seconds, or None for `interval`; raises `Done` to end it. Whatever else it raises is no news.
        stop: Ends it.
        interval: Seconds between two questions.
    """
    health, tries = Health(what), 0
    while not stop.is_set():
        try:
            wait = ask()
            health.well()
            tries = 0
        except Done:
            return
        except Exception as error:  # noqa: BLE001 - whatever is wrong with an answer must not end the watch, nor the training
            if stop.is_set():
                return
            health.ill(error)
            first, longest = BACKOFF_S
            wait = min(longest, first * 2.0 ** min(tries, 30))
            tries += 1
        wait = interval if wait is None else wait
        if stop.wait(wait * _random.uniform(1 - _JITTER, 1 + _JITTER)):
            return


def unexpected(answer: Answer, path: str) -> OSError:
    """What to raise for a status that is no news."""
    return OSError(f"{_plain(path)} answered {answer.status} {http.client.responses.get(answer.status, '')}".rstrip())


def json_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: It is not.

    Example:
        >>> json_object('{"action": "stop"}')
        {'action': 'stop'}
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"not a JSON object: {text[:40]!r}")  # noqa: TRY004 - of the text, not of a caller
    return found


def iso_time(text: object) -> float:
    """Seconds since the epoch of a time such as ``2026-11-23T15:02:00Z``; without a zone it is UTC.

    Raises:
        ValueError: It is not a time.

    Example:
        >>> iso_time("1970-01-01T00:02:00Z"), iso_time("1970-01-01T01:02:00+01:00")
        (120.0, 120.0)
    """
    if not isinstance(text, str):
        raise ValueError(f"not a time: {text!r}")  # noqa: TRY004 - of the text, not of a caller
    text = text.strip()
    if text.endswith(("Z", "z")):  # which Python 3.10 cannot read
        text = text[:-1] + "+00:00"
    found = dt.datetime.fromisoformat(text)
    return (found if found.tzinfo is not None else found.replace(tzinfo=dt.timezone.utc)).timestamp()


def http_time(text: object) -> float:
    """Seconds since the epoch of a time such as ``Tue, 16 Mar 2021 00:58:46 GMT``; the day of the week may be missing.

    `time.strptime` would read the names of months in the language that the process has set.

    Raises:
        ValueError: It is not a time.

    Example:
        >>> http_time("Thu, 01 Jan 1970 00:02:00 GMT"), http_time("1 Jan 1970 00:02:00 GMT")
        (120.0, 120.0)
    """
    if not isinstance(text, str):
        raise ValueError(f"not a time: {text!r}")  # noqa: TRY004 - of the text, not of a caller
    try:
        found = email.utils.parsedate_to_datetime(text)
    except TypeError as error:  # Python 3.10 rejects some in this way
        raise ValueError(f"not a time: {text!r}") from error
    return (found if found.tzinfo is not None else found.replace(tzinfo=dt.timezone.utc)).timestamp()


def _plain(path: str) -> str:
    """Without the query, which may hold a secret."""
    return path.partition("?")[0]
