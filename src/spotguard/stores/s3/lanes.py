"""A few jobs at a time, in threads that nobody has to wait for."""

import threading
import time
from collections import deque
from collections.abc import Callable

from spotguard.errors import DeadlineExceededError

__all__ = ["Lanes"]

_IDLE_S = 1.0  # before a thread that has nothing to do leaves


class Lanes:
    """Runs jobs in a few threads; the first error ends them all.

    A thread that is done with one job takes the next: the system has found by then where to run it, close to the other end of its
    connection where that is on this machine. The threads are daemons: where the time is up, a connection that hangs must not hold back
    the process.

    Args:
        count: How many jobs at a time; asked anew before each.
        deadline: Instant (monotonic seconds) by which all must be done.
        what: What is being done, for the message.

    Example:
        >>> done = []
        >>> lanes = Lanes(lambda: 2)
        >>> for number in range(3):
        ...     lanes.run(lambda number=number: done.append(number))
        >>> lanes.join()
        >>> sorted(done)
        [0, 1, 2]
    """

    def __init__(self, count: Callable[[], int], *, deadline: float | None = None, what: str = "") -> None:
        self._count, self._deadline, self._what = count, deadline, what
        self._changed = threading.Condition()
        self._jobs = deque[Callable[[], None]]()
        self._active = self._idle = 0  # jobs that are not done, and threads that wait for one
        self._over = False
        self._error: BaseException | None = None

    def run(self, job: Callable[[], None]) -> None:
        """Start a job as soon as there is room for it; raises what an earlier one has raised."""
        self._wait(lambda: self._active < self._count())
        with self._changed:
            self._active += 1
            self._over = False
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._changed.notify_all()
                return
        threading.Thread(target=self._lane, name="spotguard-s3", daemon=True).start()

    def join(self) -> None:
        """Wait for all; raises what the first of them has raised."""
        try:
            self._wait(lambda: self._active == 0)
        finally:
            self._end()

    def cancel(self, patience: float = 5.0) -> None:
        """Have every job end at its next `check`, and wait for that a little."""
        with self._changed:
            self._error = self._error or InterruptedError(f"{self._what} was given up")
            self._changed.wait_for(lambda: self._active == 0, patience)
        self._end()

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

    def _end(self) -> None:
        """Have the threads leave that have nothing to do."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _late(self) -> DeadlineExceededError:
        return DeadlineExceededError(f"{self._what} was not done by its deadline")

    def _lane(self) -> None:
        with self._changed:
            self._idle += 1
        while self._does_one():
            pass

    def _does_one(self) -> bool:
        """Do a job if there is one, and let go of it: it holds on to the memory that it moves."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._over, _IDLE_S)
            self._idle -= 1
            if not self._jobs:
                return False
            job = self._jobs.popleft()
        error: BaseException | None = None
        try:
            job()
        except BaseException as caught:  # noqa: BLE001 - raised again in the thread that waits
            error = caught
        with self._changed:
            self._active -= 1
            self._idle += 1
            self._error = self._error or error
            self._changed.notify_all()
        return True
