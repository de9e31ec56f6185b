"""What stands in an answer: JSON, times of day, and what the clock of whoever gives it shows."""

import datetime as dt
import email.utils
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from spotguard.notices.wire import Answer

__all__ = ["Due", "due_at", "parse_json", "parse_time", "server_time"]

_STALE_S = 600.0  # what was due that long ago, while we are still here, was not done


class Due(NamedTuple):
    """When something is due.

    Attributes:
        at: Monotonic seconds; what is past is due now.
        firm: It lies ahead. What was over when we heard of it tells nothing of the time that is left.
        stale: It was to happen long ago, and has not.
    """

    at: float
    firm: bool
    stale: bool


def due_at(instant: dt.datetime, answer: Answer | None = None) -> Due:
    """A wall-clock time as an instant of the monotonic clock. What the wall clock does later changes nothing.

    Args:
        instant: By the clock of whoever named it.
        answer: In which it stood: it shows what that clock says, and ours may be minutes off.

    Example:
        >>> answer = Answer(200, {"date": "Mon, 18 Sep 2017 08:20:00 GMT"}, "")
        >>> due = due_at(parse_time("2017-09-18T08:22:00Z"), answer)
        >>> 119 < due.at - time.monotonic() < 120, due.firm, due.stale
        (True, True, False)
    """
    now = server_time(answer.headers) if answer is not None else None
    left = instant.timestamp() - (time.time() if now is None else now)
    return Due(time.monotonic() + max(0.0, left), left > 0, left < -_STALE_S)


def server_time(headers: Mapping[str, str]) -> float | None:
    """What the clock of the server shows, in seconds since 1970: its ``Date`` is cut to whole seconds, half of one is added.

    Example:
        >>> server_time({"date": "Thu, 01 Jan 1970 00:01:40 GMT"})
        100.5
    """
    try:
        when = email.utils.parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError, TypeError):
        return None
    return when.replace(tzinfo=when.tzinfo or dt.timezone.utc).timestamp() + 0.5


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
