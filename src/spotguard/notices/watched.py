"""Notices from elsewhere: a file that somebody makes, a URL that somebody answers."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from spotguard._time import parse_seconds
from spotguard.errors import ConfigError
from spotguard.notices.base import Action, PreemptionNotice
from spotguard.notices.metadata import MetadataClient, Poller, deadline_at, parse_json, parse_time

__all__ = ["FileSource", "UrlSource"]


class FileSource:
    """The file is there: stop. It is gone: the notice is withdrawn.

    Its content may be a JSON object with ``deadline`` (ISO 8601), ``grace`` (``"30s"``), ``action`` (``"stop"`` or ``"save"``) and
    ``detail``; any other content is not looked at.

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
        self._standing: tuple[PreemptionNotice, str] | None = None

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: Event) -> None:
        """See `NoticeSource.watch`."""
        self._poller.run(lambda: self._look(emit), stop)

    def _look(self, emit: Callable[[PreemptionNotice], None]) -> None:
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            if self._standing is not None:
                emit(self._standing[0].withdrawn())
                self._standing = None
            return
        if self._standing is None or self._standing[1] != text:
            notice = _told(self.name, str(self._path), parse_json(text) or {})
            self._standing = (notice, text)
            emit(notice)


class UrlSource:
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
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"UrlSource({url!r}): write an address such as 'http://scheduler.internal/notice'")
        self._url, self._headers = url, dict(headers or {})
        self._client, self._poller = MetadataClient(f"{parts.scheme}://{parts.netloc}"), Poller(self.name, interval)
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._standing: tuple[PreemptionNotice, str] | None = None

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: Event) -> None:
        """See `NoticeSource.watch`."""
        self._poller.run(lambda: self._ask(emit), stop)

    def wake(self) -> None:
        """See `Wakeable`."""
        self._client.interrupt()

    def _ask(self, emit: Callable[[PreemptionNotice], None]) -> None:
        answer = self._client.get(self._path, self._headers)
        fields = parse_json(answer.text) if answer.status == 200 else {}
        if answer.status not in (200, 204, 404) or fields is None or (fields and "action" not in fields):
            raise ConnectionError(f"{self._url}: status {answer.status}, and no notice as JSON")
        if fields.get("action") not in ("stop", "save"):
            if self._standing is not None:
                emit(self._standing[0].withdrawn())
                self._standing = None
        elif self._standing is None or self._standing[1] != answer.text:
            notice = _told(self.name, self._url, fields)
            if self._standing is not None and self._standing[0].id != notice.id:
                emit(self._standing[0].withdrawn())
            self._standing = (notice, answer.text)
            emit(notice)


def _told(source: str, where: str, fields: Mapping[str, Any]) -> PreemptionNotice:
    instant, grace = parse_time(fields.get("deadline")), None
    if isinstance(fields.get("grace"), (str, int, float)):
        try:
            grace = parse_seconds(fields["grace"], argument="grace")
        except ConfigError:
            grace = None  # a notice with a bad number is a notice all the same
    ends = [time.monotonic() + grace] if grace is not None else []
    ends += [deadline_at(instant)] if instant is not None else []
    action: Action = "save" if fields.get("action") == "save" else "stop"
    return PreemptionNotice(
        source=source,
        kind="preemption",
        detail=str(fields.get("detail") or where),
        id=str(fields.get("id") or where),
        action=action,
        deadline=min(ends, default=None),
    )
