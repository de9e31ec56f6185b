"""What the core tells the outside world, and the one door it goes through.

Events are frozen and plain: metrics, alerts, reports and the log in the store are all hooks on the `EventBus`. A hook runs in the
bus's own thread, so a slow or failing hook never delays a training step and never fails a save.
"""

import dataclasses
import datetime as dt
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable

from spotguard._time import utc_now

__all__ = [
    "AttemptClaimed",
    "CandidateRejected",
    "CheckpointCommitted",
    "Event",
    "EventBus",
    "EventHook",
    "FinalSavePlanned",
    "FreshStart",
    "GraceTooShort",
    "InexactResume",
    "NoticeReceived",
    "NoticeWithdrawn",
    "Resumed",
    "RunFinished",
    "SaveFailed",
    "SaveSkipped",
    "SaveStarted",
    "Stopped",
    "Swept",
    "TierFailed",
    "TierUnreachable",
]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        at: Wall-clock time, UTC.
    """

    at: dt.datetime = dataclasses.field(default_factory=utc_now)

    def to_json(self) -> str:
        """One line of JSON, with the kind of event under ``event``."""
        fields = dataclasses.asdict(self)
        fields["at"] = self.at.isoformat()
        if "metrics" in fields:  # JSON has no NaN and no infinity
            fields["metrics"] = {
                name: value if math.isfinite(value) else str(value) for name, value in fields["metrics"].items()
            }
        return json.dumps({"event": type(self).__name__, **fields}, default=str)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttemptClaimed(Event):
    """This process is now the one that may write to the run."""

    attempt: int
    parent: int | None
    uri: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateRejected(Event):
    """A checkpoint was found damaged and passed over."""

    checkpoint: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreshStart(Event):
    """The run has no checkpoint yet; training starts from zero."""

    attempt: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """State was restored. `seconds` covers resolve, verify, read and restore."""

    checkpoint: str
    step: int
    epoch: int
    batch: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class InexactResume(Event):
    """Something cannot be restored bit for bit."""

    what: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveStarted(Event):
    """A snapshot was taken. `stall_s` is the time the loop stood still for it."""

    step: int
    size: int
    stall_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveSkipped(Event):
    """A save was due and not made; the next one is tried in time."""

    step: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveFailed(Event):
    """A save failed; the last committed checkpoint stands. `in_a_row` counts failures since the last commit."""

    step: int
    error: str
    in_a_row: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointCommitted(Event):
    """A checkpoint became visible, in one tier. `written` is smaller than `size` where unchanged shards were named again.

    `tier` is the URI of the store; with several tiers there is one such event for each.
    """

    checkpoint: str
    step: int
    size: int
    written: int
    seconds: float
    metrics: dict[str, float]
    tier: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TierUnreachable(Event):
    """A tier could not be reached at the start. It is tried again at each save."""

    tier: str
    error: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TierFailed(Event):
    """A checkpoint was committed, but not to this tier. `in_a_row` counts since the last commit there."""

    tier: str
    step: int
    error: str
    in_a_row: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swept(Event):
    """Retention deleted what is no longer wanted, in one tier."""

    checkpoints: tuple[str, ...]
    objects: int
    size: int
    tier: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoticeReceived(Event):
    """A preemption notice, or a request to stop. `left_s` is the time up to its deadline, where it has one."""

    source: str
    kind: str
    detail: str
    action: str = "stop"
    left_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoticeWithdrawn(Event):
    """A notice does not stand any more; training goes on."""

    source: str
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinalSavePlanned(Event):
    """What the last save is to be: ``"fresh"``, ``"flush"``, ``"fast tier"`` or ``"none"``, with `left_s` seconds for it."""

    step: int
    choice: str
    reason: str
    left_s: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraceTooShort(Event):
    """A save takes longer than `who` leaves for it."""

    needed_s: float
    grace_s: float
    who: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The loop was left at a boundary because of a notice."""

    checkpoint: str | None
    step: int
    reason: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The loop came to its end."""

    checkpoint: str | None
    step: int


EventHook = Callable[[Event], None]


class EventBus:
    """Hands events to hooks, in order, from one thread of its own.

    Args:
        hooks: Called with each event. One that raises is logged and called again with the next event.
        capacity: Events that may wait; further ones are dropped and counted, for a full queue must not stop training.

    Example:
        >>> seen = []
        >>> bus = EventBus([seen.append])
        >>> bus.publish(FreshStart(attempt=1))
        >>> bus.close()
        >>> seen[0].attempt
        1
    """

    def __init__(self, hooks: Iterable[EventHook], *, capacity: int = 1024) -> None:
        self._hooks = tuple(hooks)
        self._queue: queue.Queue[Event | threading.Event | None] = queue.Queue(capacity)
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="spotguard-events", daemon=True)
        self._thread.start()

    def add(self, hook: EventHook) -> None:
        """Hand events to this hook too, from now on."""
        self._hooks = (*self._hooks, hook)

    def publish(self, event: Event) -> None:
        """Queue an event; never blocks, never raises."""
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self.dropped += 1

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until every event published so far has been handled; False when `timeout` seconds were not enough."""
        reached, deadline = threading.Event(), time.monotonic() + timeout
        try:
            self._queue.put(reached, timeout=timeout)
        except queue.Full:
            return False
        return reached.wait(max(0.0, deadline - time.monotonic()))

    def close(self, timeout: float = 5.0) -> None:
        """Handle what is queued and end the thread, within `timeout` seconds."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            logger.warning("event hooks did not keep up; %d events may be missing from logs", self._queue.qsize())
            return
        self._thread.join(timeout)
        if self.dropped:
            logger.warning("%d events were dropped because hooks did not keep up", self.dropped)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            for hook in self._hooks:
                try:
                    hook(item)
                except (Exception, SystemExit, KeyboardInterrupt):  # a hook may not end the thread of all hooks
                    logger.exception("event hook %r failed", hook)
