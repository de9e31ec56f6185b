"""Notices from elsewhere: a file that somebody makes, a URL that somebody answers."""

import logging
import os
import stat
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

from spotguard._time import parse_seconds
from spotguard.errors import ConfigError
from spotguard.notices.answers import due_at, parse_json, parse_time
from spotguard.notices.base import Action, PreemptionNotice
from spotguard.notices.metadata import Answer, MetadataClient, Poller

__all__ = ["FileSource", "UrlSource"]

logger = logging.getLogger(__name__)

_LONGEST = 64 << 10  # bytes of a file that are looked at
_SETTLED_S = 0.5  # a file that is empty, or breaks off, may be in the middle of being written
_TICK_S = 2.0  # two writes within so much may leave the same time of modification, on some file systems


class _Told:
    """One notice at a time, in words of somebody's own."""

    def _forget(self) -> None:
        self._standing: PreemptionNotice | None = None
        self._text: str | None = None  # that was looked at last

    def _tell(self, notice: PreemptionNotice | None, emit: Callable[[PreemptionNotice], None]) -> None:
        """That is what stands now."""
        before, self._standing = self._standing, notice
        if before is not None and (notice is None or notice.id != before.id):
            emit(before.withdrawn())
        if notice is not None:
            emit(notice)


class FileSource(_Told):
    """The file is there: stop. It is gone: the notice is withdrawn.

    Its content may be a JSON object with ``deadline`` (ISO 8601), ``grace`` (``"30s"``), ``action`` (``"stop"`` or ``"save"``) and
    ``detail``; any other content is not looked at. One that is empty, or the beginning of an object, is given a moment to be completed.

    Args:
        path: Of the file.
        interval: Seconds between two looks.

    Example:
        >>> FileSource("/run/preempted").name
        'file'
    """

    name = "file"

    def __init__(self, path: str | Path, interval: float = 1.0) -> None:
        self._path, self._poller = Path(path), Poller(self.name, interval)
        self._name = str(self._path)
        self._forget()

    def _forget(self) -> None:
        super()._forget()
        self._seen: tuple[int, ...] | None = None
        self._doubted: float | None = None

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: Event) -> None:
        """See `NoticeSource.watch`."""
        self._forget()
        self._poller.run(lambda: self._look(emit), stop)

    def _look(self, emit: Callable[[PreemptionNotice], None]) -> None:
        try:
            found = os.stat(self._name)  # noqa: PTH116 - a `Path` costs as much again
        except (FileNotFoundError, NotADirectoryError):
            self._tell(None, emit)
            self._forget()
            return
        state = (found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size, found.st_mode)
        if state == self._seen:
            return
        text = self._read() if stat.S_ISREG(found.st_mode) else "-"  # a pipe would be waited for
        fields = parse_json(text)
        if fields is None and text.strip()[:1] in ("", "{") and not self._is_settled():
            return
        self._doubted = None
        self._seen = state if abs(time.time() - found.st_mtime) > _TICK_S else None
        if text == self._text:
            return
        self._text = text
        self._tell(_told(self.name, str(self._path), fields or {}), emit)

    def _read(self) -> str:
        handle = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            return file.read(_LONGEST).decode(errors="replace")

    def _is_settled(self) -> bool:
        """Whether it has been like that at an earlier look, long enough ago."""
        now = time.monotonic()
        self._doubted = now if self._doubted is None else self._doubted
        return now - self._doubted >= _SETTLED_S


class UrlSource(_Told):
    """A URL of your own: 200 with a JSON object is a notice, 204 and 404 are none.

    The object has ``action`` (``"stop"``, ``"save"`` or ``"none"``), and may have ``detail``, ``deadline`` (ISO 8601), ``grace``
    (``"30s"``) and ``id``. Anything else is trouble, and no news.

    Args:
        url: To ask.
        interval: Seconds between two requests.
        headers: To send.

    Example:
        >>> UrlSource("http://scheduler.internal/jobs/17/notice").name
        'url'
    """

    name = "url"

    def __init__(self, url: str, interval: float = 5.0, headers: Mapping[str, str] | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"UrlSource({url!r}): write an address such as 'http://scheduler.internal/notice'")
        self._url, self._headers = url, dict(headers or {})
        self._client, self._poller = MetadataClient(f"{parts.scheme}://{parts.netloc}"), Poller(self.name, interval)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._path = urllib.parse.quote(path, safe="%/?:@!$&'()*+,;=~[]")
        self._forget()

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: Event) -> None:
        """See `NoticeSource.watch`."""
        self._forget()
        with self._client.watching():
            self._poller.run(lambda: self._ask(emit), stop)

    def wake(self) -> None:
        """See `Wakeable`."""
        self._client.interrupt()

    def _ask(self, emit: Callable[[PreemptionNotice], None]) -> None:
        answer = self._client.get(self._path, self._headers)
        fields = parse_json(answer.text) if answer.status == 200 else {}
        if answer.status not in (200, 204, 404) or fields is None or (fields and "action" not in fields):
            raise ConnectionError(f"{self._url}: status {answer.status}, and no notice as JSON")
        asked = fields.get("action") in ("stop", "save")
        text = answer.text if asked else None
        if text != self._text:
            self._tell(_told(self.name, self._url, fields, answer) if asked else None, emit)
            self._text = text


def _told(source: str, where: str, fields: Mapping[str, Any], answer: Answer | None = None) -> PreemptionNotice | None:
    """What is asked for; None, and a warning, where it was to be done long ago."""
    instant, grace = parse_time(fields.get("deadline")), None
    if isinstance(fields.get("grace"), (str, int, float)):
        try:
            grace = parse_seconds(fields["grace"], argument="grace")
        except ConfigError:
            grace = None  # a notice with a bad number is a notice all the same
    due = due_at(instant, answer) if instant is not None else None
    if due is not None and due.stale:
        logger.warning("%s: a notice of long ago still stands, and is not heeded: %s", source, instant)
        return None
    ends = [time.monotonic() + grace] if grace is not None else []
    ends += [due.at] if due is not None else []
    action: Action = "save" if fields.get("action") == "save" else "stop"
    return PreemptionNotice(
        source=source,
        kind="preemption",
        detail=str(fields.get("detail") or where),
        id=str(fields.get("id") or where),
        action=action,
        deadline=min(ends, default=None),
        firm=due is None or due.firm,
    )
