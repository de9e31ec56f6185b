"""A few jobs at a time, in threads that nobody has to wait for."""

import threading
import time
from collections.abc import Callable

from spotguard.errors import DeadlineExceededError

__all__ = ["Lanes"]


class Lanes:
    """Runs jobs in up to `count` threads; the first error ends them all.

    The threads are daemons: where the time is up, a connection that hangs must not hold back the process.

    Args:
        count: Jobs at a time.
        deadline: Instant (monotonic seconds) by which all must be done.
        what: What is being done, for the message.

    Example:
        >>> done = []
        >>> lanes = Lanes(2)
        >>> for number in range(3):
        ...     lanes.run(lambda number=number: done.append(number))
        >>> lanes.join()
        >>> sorted(done)
        [0, 1, 2]
    """

    def __init__(self, count: int, *, deadline: float | None = None, what: str = "") -> None:
        self._count, self._deadline, self._what = count, deadline, what
        self._changed = threading.Condition()
        self._active = 0
        self._error: BaseException | None = None

    def run(self, job: Callable[[], None]) -> None:
        """Start a job as soon as there is room for it; raises what an earlier one has raised."""
        self._wait(lambda: self._active < self._count)
        with self._changed:
            self._active += 1
        threading.Thread(target=self._lane, args=(job,), name="spotguard-s3", daemon=True).start()

    def join(self) -> None:
        """Wait for all; raises what the first of them has raised."""
        self._wait(lambda: self._active == 0)
        if self._error is not None:
            raise self._error

    def cancel(self, patience: float = 5.0) -> None:
        """Have every job end at its next `check`, and wait for that a little."""
        with self._changed:
            self._error = self._error or InterruptedError(f"{self._what} was given up")
            self._changed.wait_for(lambda: self._active == 0, patience)

    def check(self) -> None:
        """For the jobs: raise if there is no point in going on."""
        if self._error is not None:
            raise InterruptedError(f"{self._what} was given up: {self._error}")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise self._late()

    def _wait(self, ready: Callable[[], bool]) -> None:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        with self._changed:
            if not self._changed.wait_for(lambda: self._error is not None or ready(), left):
                raise self._late()
            if self._error is not None:
                raise self._error

    def _late(self) -> DeadlineExceededError:
        return DeadlineExceededError(f"{self._what} was not done by its deadline")

    def _lane(self, job: Callable[[], None]) -> None:
        error: BaseException | None = None
        try:
            job()
        except BaseException as caught:  # noqa: BLE001 - raised again in the thread that waits
            error = caught
        with self._changed:
            self._active -= 1
            self._error = self._error or error
            self._changed.notify_all()
