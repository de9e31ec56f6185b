"""Something to be done where no step boundary comes: by a thread of its own, as the loop is stuck."""

import logging
import threading
import time
from collections.abc import Callable

__all__ = ["StandBy"]

logger = logging.getLogger(__name__)


class StandBy:
    """Acts at an instant, unless that is put off or called off before.

    Args:
        act: What to do. It may be done again when another instant is set.

    Example:
        >>> acted = threading.Event()
        >>> stand_by = StandBy(acted.set)
        >>> stand_by.set(time.monotonic() + 0.01)
        >>> acted.wait(10)
        True
        >>> stand_by.cancel()
    """

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._at: float | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._over = False

    def set(self, at: float | None) -> None:
        """Act at this instant (monotonic seconds), and not at an earlier one that was set; None for never."""
        with self._changed:
            if self._over:
                return
            self._at = at
            if self._thread is None and at is not None:
                self._thread = threading.Thread(target=self._run, name="spotguard-stand-by", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def cancel(self) -> None:
        """Never act again. What is being done already is not waited for."""
        with self._changed:
            self._over, self._at = True, None
            self._changed.notify_all()

    def _run(self) -> None:
        while self._wait():
            try:
                self._act()
            except Exception:  # top of a thread
                logger.exception("what was to be done without a step boundary has failed")

    def _wait(self) -> bool:
        with self._changed:
            while not self._over:
                left = None if self._at is None else self._at - time.monotonic()
                if left is not None and left <= 0:
                    self._at = None
                    return True
                self._changed.wait(left)
        return False
