"""A question asked again and again: has anybody asked us to stop?"""

import logging
import threading
from collections.abc import Callable

from spotguard.notices.base import PreemptionNotice

__all__ = ["PollingSource"]

logger = logging.getLogger(__name__)


class PollingSource:
    """Emits one notice as soon as `asked` says yes, then rests.

    Args:
        name: Name of the source.
        asked: Returns what was asked for, or None. An OSError it raises is logged once and it is asked again later.
        interval: Seconds between two questions.

    Example:
        >>> heard = []
        >>> PollingSource("request", lambda: "a stop object", 0.01).watch(heard.append, threading.Event())
        >>> heard[0].detail
        'a stop object'
    """

    def __init__(self, name: str, asked: Callable[[], str | None], interval: float) -> None:
        self.name = name
        self._asked = asked
        self._interval = interval

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        """See `NoticeSource.watch`."""
        complained = False
        while True:
            try:
                detail = self._asked()
            except OSError as error:
                detail = None
                if not complained:
                    logger.warning("cannot look for a request to stop, will go on trying: %s", error)
                complained = True
            if detail is not None:
                emit(PreemptionNotice(source=self.name, kind="request", detail=detail))
                return
            if stop.wait(self._interval):
                return
