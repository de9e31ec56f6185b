"""EC2: the notice is a line in the instance metadata, about two minutes ahead. No signal comes with it.

Endpoints, codes and intervals are those of the EC2 user guide ("Spot Instance interruption notices").
"""

import datetime as dt
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from spotguard.notices.answers import due_at, parse_json, parse_time
from spotguard.notices.base import PreemptionNotice
from spotguard.notices.imds import OFF_S, Imds
from spotguard.notices.metadata import Answer, Poller

__all__ = ["AwsSource"]

logger = logging.getLogger(__name__)

_LATER_S = 30.0  # before something of less weight is asked for again that gave no answer
_SELDOM = 6  # what has minutes of lead is asked every so many rounds
_LEAD_S = 120.0
_ACTION = "spot/instance-action"


class _RefusedError(OSError):
    """403: what was asked for may not be read, or the service is switched off."""


class _Item(NamedTuple):
    """Something to ask for."""

    path: str
    parse: Callable[[Answer], dict[str, PreemptionNotice]]
    rounds: int = 1


class AwsSource:
    """Polls the metadata service of an EC2 instance.

    Args:
        endpoint: Its base; by default ``AWS_EC2_METADATA_SERVICE_ENDPOINT``, else the address that EC2 has.
        interval: Seconds between two questions; AWS recommends 5.

    Example:
        >>> AwsSource("http://127.0.0.1:1338").name
        'aws'
    """

    name = "aws"

    def __init__(self, endpoint: str | None = None, interval: float = 5.0) -> None:
        self._imds = Imds(endpoint, self._warn_once)
        self._disabled = endpoint is None and os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
        self._poller = Poller(self.name, interval)
        self._warned: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._round = 0
        self._later: dict[str, float] = {}
        self._standing: dict[str, PreemptionNotice] = {}

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        """See `NoticeSource.watch`."""
        if self._disabled:
            return
        self._forget()
        with self._imds.client.watching():
            self._poller.run(lambda: self._ask(emit), stop)

    def wake(self) -> None:
        """See `Wakeable`."""
        self._imds.client.interrupt()

    def get(self, path: str) -> Answer:
        """One item of the metadata, such as ``instance-life-cycle``, with a token, or without one where only that works.

        Raises:
            OSError: No answer.
        """
        return self._imds.get(path)

    def _ask(self, emit: Callable[[PreemptionNotice], None]) -> float | None:
        try:
            self._look(_Item(_ACTION, self._action), emit)
        except _RefusedError:
            self._warn_once("the instance metadata service is switched off (403); notices of EC2 are not heard")
            self._imds.renew_next()
            return max(OFF_S, self._poller.interval)
        self._look_aside(emit)
        self._round += 1
        if any(notice.kind == "rebalance" for notice in self._standing.values()):
            return min(2.0, self._poller.interval)
        return None

    def _look_aside(self, emit: Callable[[PreemptionNotice], None]) -> None:
        """At what else there is: whatever becomes of it, the next look at the interruption notice is not put off."""
        items = (
            _Item("events/recommendations/rebalance", _rebalance),
            _Item("autoscaling/target-lifecycle-state", _lifecycle, _SELDOM),
            _Item("events/maintenance/scheduled", _maintenance, _SELDOM),
            _Item("spot/termination-time", self._termination, _SELDOM),
        )
        for item in items:
            if self._round % item.rounds or time.monotonic() < self._later.get(item.path, 0.0):
                continue
            try:
                self._look(item, emit)
            except InterruptedError:
                raise
            except Exception as error:  # noqa: BLE001 - as in `Poller`: no news
                if item.path not in self._later:
                    logger.info("%s: %s gives no answer: %s", self.name, item.path, error)
                pause = OFF_S if isinstance(error, _RefusedError) else _LATER_S
                self._later[item.path] = time.monotonic() + pause
            else:
                self._later.pop(item.path, None)

    def _look(self, item: _Item, emit: Callable[[PreemptionNotice], None]) -> None:
        answer = self.get(item.path)
        if answer.status == 403:
            raise _RefusedError(f"{item.path}: status 403")
        if answer.status not in (200, 404):
            raise ConnectionError(f"{item.path}: status {answer.status}")
        found = item.parse(answer) if answer.status == 200 else {}
        for notice_id, notice in found.items():
            if notice_id not in self._standing:
                self._standing[notice_id] = notice
                emit(notice)
        for gone in [one for one in self._standing if one.startswith(f"{item.path} ") and one not in found]:
            emit(self._standing.pop(gone).withdrawn())

    def _action(self, answer: Answer) -> dict[str, PreemptionNotice]:
        fields = parse_json(answer.text) or {}
        action, instant = str(fields.get("action") or "interruption"), parse_time(fields.get("time"))
        notice_id = f"{_ACTION} {answer.text}"
        if notice_id in self._standing:
            return {notice_id: self._standing[notice_id]}
        if instant is None:
            return self._interruption(notice_id, f"spot {action}, time unknown", time.monotonic() + _LEAD_S, firm=False)
        due = due_at(instant, answer)
        if due.stale:
            return self._passed_over(answer.text)
        if action == "hibernate":  # freezing begins with the notice
            return self._interruption(notice_id, "hibernates now", time.monotonic(), firm=False)
        return self._interruption(notice_id, f"spot {action} at {instant:%H:%M:%S} UTC", due.at, firm=due.firm)

    def _termination(self, answer: Answer) -> dict[str, PreemptionNotice]:
        """The notice as it was before there was `_ACTION`; it may hold something that is no time, which means nothing."""
        instant, notice_id = parse_time(answer.text), f"spot/termination-time {answer.text}"
        if notice_id in self._standing:
            return {notice_id: self._standing[notice_id]}
        if instant is None or any(one.startswith(_ACTION) for one in self._standing):
            return {}
        if self.get(_ACTION).status == 200:  # it has come since we looked, is heard in the next round, and says more
            return {}
        due = due_at(instant, answer)
        if due.stale:
            return self._passed_over(answer.text)
        return self._interruption(notice_id, f"spot terminate at {instant:%H:%M:%S} UTC", due.at, firm=due.firm)

    def _interruption(self, notice_id: str, detail: str, deadline: float, *, firm: bool) -> dict[str, PreemptionNotice]:
        return {notice_id: _notice(notice_id, detail, kind="preemption", deadline=deadline, firm=firm)}

    def _passed_over(self, text: str) -> dict[str, PreemptionNotice]:
        self._warn_once(f"a notice of long ago still stands, and is not heeded: {text}")
        return {}

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s: %s", self.name, text)


def _notice(notice_id: str, detail: str, **fields: object) -> PreemptionNotice:
    given = {"source": AwsSource.name, "id": notice_id, "detail": f"EC2: {detail}", **fields}
    return PreemptionNotice(**given)  # type: ignore[arg-type]


def _rebalance(answer: Answer) -> dict[str, PreemptionNotice]:
    notice_id = f"events/recommendations/rebalance {answer.text}"
    return {notice_id: _notice(notice_id, "rebalance recommendation", kind="rebalance", action="save")}


def _lifecycle(answer: Answer) -> dict[str, PreemptionNotice]:
    """Auto Scaling takes the instance out: nobody says when, and none of EC2's two minutes are promised, so none are trained through."""
    if answer.text != "Terminated":
        return {}
    notice_id = f"autoscaling/target-lifecycle-state {answer.text}"
    return {notice_id: _notice(notice_id, "Auto Scaling terminates this instance", kind="maintenance")}


def _maintenance(answer: Answer) -> dict[str, PreemptionNotice]:
    found: dict[str, PreemptionNotice] = {}
    for event in parse_json(answer.text, list) or []:
        if not isinstance(event, dict) or event.get("State") != "active":
            continue
        code, begin = str(event.get("Code")), str(event.get("NotBefore"))
        notice_id = f"events/maintenance/scheduled {event.get('EventId')} {begin}"
        try:
            instant = dt.datetime.strptime(begin, "%d %b %Y %H:%M:%S GMT").replace(tzinfo=dt.timezone.utc)
        except ValueError:
            due = None
        else:
            due = due_at(instant, answer)
        found[notice_id] = _notice(
            notice_id,
            f"{code} not before {begin}",
            kind="maintenance",
            action="save",
            deadline=None if due is None else due.at,
            firm=due is not None and due.firm,
        )
    return found
