"""One request to a metadata service, timed: no retry, and an answer whatever happens."""

import dataclasses
import datetime as dt
import email.utils
import time
from collections.abc import Mapping
from typing import NamedTuple

from spotguard.notices.metadata import MetadataClient
from spotguard.ops.doctor.findings import Finding

__all__ = ["Answer", "Asked", "ask", "skew"]


class Asked(NamedTuple):
    """What a metadata service was found to be like.

    Attributes:
        findings: To say.
        skew_s: How far its clock is ahead of ours; None where it has not said.
    """

    findings: list[Finding]
    skew_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: Of HTTP; 0 where nothing came back.
        seconds: How long it took.
        body: As text.
        headers: Names in lower case.
        trouble: Why nothing came back.
        timed_out: It took too long, which is another thing than to be refused.
        skew_s: How far the server's clock is ahead of ours, in seconds, to half a second; None where it has not said.
    """

    status: int
    seconds: float
    body: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trouble: str = ""
    timed_out: bool = False
    skew_s: float | None = None

    @property
    def ok(self) -> bool:
        """200, or 404: the service is there, and has nothing to tell."""
        return self.status in (200, 404)

    def __str__(self) -> str:
        return self.trouble or f"HTTP {self.status}"


def ask(base: str, path: str, headers: Mapping[str, str] | None = None, *, method: str = "GET") -> Answer:
    """Make one request.

    Args:
        base: Of the service, such as ``http://169.254.169.254``.
        path: Below it, with the query.
        headers: Of the request.
        method: Of the request.
    """
    began, clock = time.monotonic(), time.time()
    try:
        answer = MetadataClient(base).ask(method, path, headers)
    except TimeoutError:
        return Answer(0, time.monotonic() - began, trouble="no answer in time", timed_out=True)
    except (OSError, ValueError) as error:
        return Answer(0, time.monotonic() - began, trouble=f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - began
    told = skew(answer.headers, clock + seconds / 2)
    return Answer(answer.status, seconds, answer.text, answer.headers, skew_s=told)


def skew(headers: Mapping[str, str], now: float) -> float | None:
    """How far the ``Date`` of an answer is ahead of `now`, wall-clock seconds: it is cut to whole seconds, half of one is added.

    Example:
        >>> skew({"date": "Thu, 01 Jan 1970 00:01:40 GMT"}, 90.0)
        10.5
    """
    try:
        when = email.utils.parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError, TypeError):
        return None
    return when.replace(tzinfo=when.tzinfo or dt.timezone.utc).timestamp() + 0.5 - now
