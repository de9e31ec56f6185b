"""Runs the sources, each in its thread, and keeps the notices that stand."""

import logging
import math
import threading
import time
from collections.abc import Callable

from spotguard.notices.base import NoticeSource, PreemptionNotice, Wakeable

__all__ = ["NoticeWatcher", "Urgency"]

logger = logging.getLogger(__name__)

_SAME_S = 1.0  # deadlines of one notice that differ by less are the same: wall time is read anew with each answer

Urgency = tuple[int, float]
"""What comes first, and among those alike the earliest instant (monotonic seconds; infinity where nobody knows it)."""


def _by_deadline(notice: PreemptionNotice) -> Urgency:
    return notice.action != "stop", math.inf if notice.deadline is None else notice.deadline


class NoticeWatcher:
    """Keeps all notices that stand, in the order in which they matter.

    Args:
        on_notice: Called for each notice that is news, from the thread of its source; for one that is withdrawn, too.
        urgency: What matters first. By default a stop before a save, then the earliest deadline, then the first that came.

    Attributes:
        standing: Those that wait to be answered, the most urgent one first.
        notice: That one, or None. Reading it is all that a step pays.

    Example:
        >>> watcher = NoticeWatcher(lambda notice: None)
        >>> watcher.emit(PreemptionNotice(source="azure", kind="preemption", detail="Preempt", id="1"))
        >>> watcher.notice.detail
        'Preempt'
        >>> watcher.emit(PreemptionNotice(source="azure", kind="preemption", detail="withdrawn", id="1", action="withdrawn"))
        >>> watcher.notice is None
        True
    """

    def __init__(
        self,
        on_notice: Callable[[PreemptionNotice], None],
        *,
        urgency: Callable[[PreemptionNotice], Urgency] = _by_deadline,
    ) -> None:
        self.standing: tuple[PreemptionNotice, ...] = ()
        self.notice: PreemptionNotice | None = None
        self._on_notice, self._urgency = on_notice, urgency
        self._standing: dict[tuple[str, str], PreemptionNotice] = {}
        self._met: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._sources: list[NoticeSource] = []
        self._threads: list[threading.Thread] = []

    def watch(self, source: NoticeSource) -> None:
        """Begin to watch a source, until `close`."""
        self._sources.append(source)
        name = f"spotguard-{source.name}"
        self._threads.append(threading.Thread(target=self._watch, args=(source,), name=name, daemon=True))
        self._threads[-1].start()

    def close(self, timeout: float = 5.0) -> None:
        """Stop watching; waits up to `timeout` seconds for the sources."""
        until = time.monotonic() + timeout
        self._stop.set()
        for source in self._sources:
            if isinstance(source, Wakeable):
                source.wake()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))

    def emit(self, notice: PreemptionNotice) -> None:
        """Take a notice. Safe from any thread, never from a signal handler."""
        key = (notice.source, notice.id)
        with self._lock:
            standing = self._standing.get(key)
            if notice.action == "withdrawn":
                if standing is None:
                    return
                del self._standing[key]
                self._met.discard(key)
            elif standing is None or self._is_news(notice, standing):
                self._standing[key] = notice
                self._met.discard(key)
            else:
                return  # heard before
            self._choose()
        self._on_notice(notice)

    def settle(self, notice: PreemptionNotice) -> None:
        """It asked for a save, and that is made: it needs no more attention, and is no news when it is heard again."""
        with self._lock:
            self._met.add((notice.source, notice.id))
            self._choose()

    def _choose(self) -> None:
        waiting = [notice for key, notice in self._standing.items() if key not in self._met]
        self.standing = tuple(sorted(waiting, key=self._urgency))
        self.notice = self.standing[0] if self.standing else None

    def _is_news(self, notice: PreemptionNotice, standing: PreemptionNotice) -> bool:
        if notice.id:
            changed = notice.action != standing.action or notice.grace != standing.grace
            return changed or _apart(notice.deadline, standing.deadline)
        (rank, at), (known_rank, known_at) = (
            self._urgency(notice),
            self._urgency(standing),
        )  # without an id: the more urgent one
        return rank < known_rank or (rank == known_rank and at < known_at - _SAME_S)

    def _watch(self, source: NoticeSource) -> None:
        try:
            source.watch(self.emit, self._stop)
        except Exception:  # a broken source must not stop training; periodic saves are the guarantee
            logger.exception("notice source %r failed; notices from it will not be heard", source.name)


def _apart(one: float | None, other: float | None) -> bool:
    return one != other and (one is None or other is None or abs(one - other) > _SAME_S)
