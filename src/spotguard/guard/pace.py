"""How long the steps of a loop take."""

import collections
import time

from spotguard.policies import p95

__all__ = ["Pace"]


class Pace:
    """Measures from boundary to boundary, over the last 100 steps. What is done at a boundary is no part of a step.

    Example:
        >>> pace = Pace()
        >>> for instant in (10.0, 10.5, 11.5):
        ...     pace.boundary(instant)
        >>> pace.step_s
        1.0
    """

    def __init__(self) -> None:
        self._took: collections.deque[float] = collections.deque(maxlen=100)
        self._since: float | None = None

    def boundary(self, now: float) -> None:
        """A step is over, at this instant (monotonic seconds). All that an ordinary step pays."""
        if self._since is not None:
            self._took.append(now - self._since)
        self._since = now

    def resume(self) -> None:
        """What there was to do at the boundary is done."""
        self._since = time.monotonic()

    @property
    def step_s(self) -> float:
        """Seconds that 95 of 100 steps do not exceed; 0.0 before the first."""
        return p95(self._took) or 0.0
