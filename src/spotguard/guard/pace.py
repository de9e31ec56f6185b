"""How long the steps of a loop take."""

import collections
import itertools
import time

from spotguard.policies import p95

__all__ = ["Pace"]


class Pace:
    """Measures from boundary to boundary, over the last hundred steps or so. What is done at a boundary is no part of a step.

    Attributes:
        boundary: To be called with the instant (monotonic seconds) at which a step is over. All that an ordinary step pays.

    Example:
        >>> pace = Pace()
        >>> for instant in (10.0, 10.5, 11.5):
        ...     pace.boundary(instant)
        >>> pace.step_s
        1.0
    """

    def __init__(self) -> None:
        # Of ends; negative ones are of beginnings.
        self._instants: collections.deque[float] = collections.deque(maxlen=128)
        self.boundary = self._instants.append

    def resume(self) -> None:
        """What there was to do at the boundary is done."""
        self._instants.append(-time.monotonic())

    @property
    def step_s(self) -> float:
        """Seconds that 95 of 100 steps do not exceed; 0.0 before the first."""
        pairs = itertools.pairwise(tuple(self._instants))
        return p95(end - abs(begin) for begin, end in pairs if end > 0) or 0.0
