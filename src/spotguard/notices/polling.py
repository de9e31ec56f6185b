"""A question asked again and again: has anybody asked us to stop?"""

import logging
import threading
import time
from collections.abc import Callable

from spotguard.notices.base import PreemptionNotice

__all__ = ["PollingSource"]

logger = logging.getLogger(__name__)

_SHARE = 2000.0  # a look may take this part of the time up to the next: 0.05 % of a core
_SELDOM_S = 10.0  # and yet there is one


class PollingSource:
    """Emits one notice as soon as `asked` says yes, then rests.

    Args:
        name: Name of the source.
        asked: Returns what was asked for, or None. What it raises is no news: it is logged when it begins, and asked again later.
        interval: Seconds between two questions; longer where the answer costs more than a two-thousandth of that in CPU time (a request to
            S3, some milliseconds), but no more than 10 for that.

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
            began = time.thread_time()
            try:
                detail = self._asked()
            except Exception as error:  # noqa: BLE001 - as in `Poller`: no news
                detail = None
                if not complained:
                    logger.warning("cannot look for a request to stop, will go on trying: %s", error)
                complained = True
            else:
                complained = False
            if detail is not None:
                emit(PreemptionNotice(source=self.name, kind="request", detail=detail, id=self.name))
                return
            costs = (time.thread_time() - began) * _SHARE
            if stop.wait(max(self._interval, min(costs, _SELDOM_S))):
                return
