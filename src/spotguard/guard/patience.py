"""How long may be waited for something on the way out: once a deadline is over, hardly at all."""

import time

__all__ = ["Patience"]

_MORE_S = 1.0  # for all that there is to do together, where the deadline is over
_LEAST_S = 0.1  # for each, so that what answers at once is done in any case


class Patience:
    """Shares the time up to a deadline, or one second where that is over, among all that is waited for.

    Example:
        >>> patience = Patience()
        >>> patience.of(300.0)
        300.0
        >>> patience.end_at(time.monotonic())
        >>> 0.9 < patience.of(300.0) <= 1.0
        True
    """

    def __init__(self) -> None:
        self._until: float | None = None

    @property
    def is_short(self) -> bool:
        """Whether there is an end."""
        return self._until is not None

    def end_at(self, deadline: float | None) -> None:
        """From now on nothing is waited for beyond this instant (monotonic seconds), or the first that was set; None for none."""
        if self._until is None and deadline is not None:
            self._until = max(deadline, time.monotonic() + _MORE_S)

    def of(self, seconds: float) -> float:
        """What may be waited for something that would otherwise be waited for so many seconds."""
        return seconds if self._until is None else min(seconds, max(_LEAST_S, self._until - time.monotonic()))
