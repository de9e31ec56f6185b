"""Runs the sources, each in its thread, and keeps the one notice that matters."""

import logging
import math
import threading
from collections.abc import Callable

from spotguard.notices.base import NoticeSource, PreemptionNotice, Wakeable

__all__ = ["NoticeWatcher"]

logger = logging.getLogger(__name__)


class NoticeWatcher:
    """One slot for notices: the earliest deadline wins; without deadlines, the first.

    Args:
        on_notice: Called for each notice, from the thread of its source.

    Attributes:
        notice: The notice that matters now, or None. Reading it is all that a step pays.
    """

    def __init__(self, on_notice: Callable[[PreemptionNotice], None]) -> None:
        self.notice: PreemptionNotice | None = None
        self._on_notice = on_notice
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
        """Stop watching; waits up to `timeout` seconds for each source."""
        self._stop.set()
        for source in self._sources:
            if isinstance(source, Wakeable):
                source.wake()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout)

    def emit(self, notice: PreemptionNotice) -> None:
        """Take a notice. Safe from any thread, never from a signal handler."""
        with self._lock:
            if self.notice is None or _deadline(notice) < _deadline(self.notice):
                self.notice = notice
        self._on_notice(notice)

    def _watch(self, source: NoticeSource) -> None:
        try:
            source.watch(self.emit, self._stop)
        except Exception:  # a broken source must not stop training; periodic saves are the guarantee
            logger.exception("notice source %r failed; notices from it will not be heard", source.name)


def _deadline(notice: PreemptionNotice) -> float:
    return math.inf if notice.deadline is None else notice.deadline
