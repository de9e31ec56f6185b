"""Azure: Scheduled Events, a list that is asked for once a second.

Request rules, events and least times are those of "Azure Metadata Service: Scheduled Events for Linux VMs". The list may hold events of
other VMs of the same set; an event that disappears before it has begun was cancelled.
"""

import datetime as dt
import email.utils
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from spotguard.notices.answers import due_at, parse_json
from spotguard.notices.base import PreemptionNotice
from spotguard.notices.metadata import Answer, MetadataClient, Poller

__all__ = ["AzureSource", "Confirmable"]

logger = logging.getLogger(__name__)

_HEADERS = {"Metadata": "true"}
_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_FIRST_S = 150.0  # the first request switches the service on, which may take two minutes
_STOPS = {"Preempt": "preemption", "Terminate": "preemption", "Reboot": "maintenance", "Redeploy": "maintenance"}


@runtime_checkable
class Confirmable(Protocol):
    """A source that can be told that we are done, so that the platform need not wait for the deadline."""

    def confirm(self, notice: PreemptionNotice) -> None:
        """The last save is durable. Never raises."""
        ...


class AzureSource:
    """Polls Scheduled Events for those of this VM.

    Args:
        endpoint: Of the metadata service; by default ``SPOTGUARD_AZURE_ENDPOINT``, else the address that Azure has.
        interval: Seconds between two requests; Azure recommends 1, and refuses more than 5 a second from one VM.
        acknowledge: Tell Azure when the last save is durable, so that the event begins at once; only where it is about this VM alone.

    Example:
        >>> AzureSource("http://127.0.0.1:8080").name
        'azure'
    """

    name = "azure"

    def __init__(self, endpoint: str | None = None, interval: float = 1.0, *, acknowledge: bool = False) -> None:
        where = endpoint or os.environ.get("SPOTGUARD_AZURE_ENDPOINT") or "http://169.254.169.254"
        self._client = MetadataClient(where)
        self._poller = Poller(self.name, interval)
        self._acknowledge = acknowledge
        self._forget()

    def _forget(self) -> None:
        self._own: str | None = None
        self._answered = False
        self._seen: str | None = None
        self._standing: dict[str, tuple[PreemptionNotice, dict[str, Any]]] = {}

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        """See `NoticeSource.watch`."""
        self._forget()
        with self._client.watching():
            self._poller.run(lambda: self._ask(emit), stop)

    def wake(self) -> None:
        """See `Wakeable`."""
        self._client.interrupt()

    def get(self, path: str, *, read_s: float | None = None) -> Answer:
        """One resource of the service, such as ``/metadata/versions``.

        Raises:
            OSError: No answer.
        """
        return self._client.get(path, _HEADERS, read_s=read_s)

    def confirm(self, notice: PreemptionNotice) -> None:
        """See `Confirmable`."""
        standing = self._standing.get(notice.id)
        if not self._acknowledge or standing is None or len(standing[1].get("Resources", [])) != 1:
            return
        body = json.dumps({"StartRequests": [{"EventId": notice.id}]}).encode()
        try:
            answer = self._client.ask("POST", _EVENTS, {**_HEADERS, "Content-Type": "application/json"}, body=body)
        except OSError as error:
            logger.info("azure: the event could not be acknowledged: %s", error)
        else:
            if answer.status != 200:
                logger.info("azure: the event could not be acknowledged: status %s", answer.status)

    def _ask(self, emit: Callable[[PreemptionNotice], None]) -> float | None:
        if self._own is None:
            self._own = self._name()
        answer = self.get(_EVENTS, read_s=None if self._answered else _FIRST_S)
        if answer.status != 200:  # 410: in the middle of a move, for up to 70 s; 429: too often
            raise ConnectionError(f"events: status {answer.status}")
        if answer.text == self._seen:
            return None
        document = parse_json(answer.text)
        events = document.get("Events") if document is not None else None
        if document is None or not isinstance(events, list):
            raise ConnectionError("events: not the JSON that was asked for")
        self._answered = True
        found, certain = self._own_events(events), True
        if events and not found:  # is our name what we take it for?
            try:
                self._own = self._name()
            except InterruptedError:
                raise
            except OSError:
                certain = False  # the list is looked at again with the next request, changed or not
            found = self._own_events(events)
        for event_id, event in found.items():
            notice = _notice(event_id, event, answer)
            before = self._standing.get(event_id)
            self._standing[event_id] = (notice, event)
            if before is None or _moved(before[1], event):
                emit(notice)
        for event_id in [one for one in self._standing if one not in found]:
            notice, event = self._standing.pop(event_id)
            if event.get("EventStatus") != "Started":  # one that has begun is over
                emit(notice.withdrawn())
        if certain:  # and all of it has been told
            self._seen = answer.text
        return None

    def _name(self) -> str:
        answer = self.get(_NAME)
        if answer.status != 200 or not answer.text:
            raise ConnectionError(f"name of this VM: status {answer.status}")
        return answer.text.casefold()

    def _own_events(self, events: list[Any]) -> dict[str, dict[str, Any]]:
        found = {}
        for event in events:
            resources = event.get("Resources") if isinstance(event, dict) else None
            if isinstance(resources, list) and self._own in [str(one).casefold() for one in resources]:
                found[str(event.get("EventId"))] = event
        return found


def _moved(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return any(before.get(name) != after.get(name) for name in ("EventStatus", "NotBefore", "EventType"))


def _notice(event_id: str, event: dict[str, Any], answer: Answer) -> PreemptionNotice:
    kind, begin = str(event.get("EventType")), str(event.get("NotBefore") or "")
    try:
        instant = email.utils.parsedate_to_datetime(begin)
        if instant.tzinfo is None:
            instant = instant.replace(tzinfo=dt.timezone.utc)
    except (TypeError, ValueError):  # it has started, or nobody knows when it will
        deadline, firm = time.monotonic(), False
    else:
        due = due_at(instant, answer)  # never stale: Azure takes an event that is over out of the list
        deadline, firm = due.at, due.firm
    stops = _STOPS.get(kind)
    return PreemptionNotice(
        source=AzureSource.name,
        kind=stops or "maintenance",
        detail=f"Azure: {kind} {'not before ' + begin if begin else 'now'}",
        id=event_id,
        action="stop" if stops else "save",
        deadline=deadline,
        firm=firm,
    )
