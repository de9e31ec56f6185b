"""Jitter that leaves the training's random numbers alone.

How often a request has to be tried again differs from run to run. Whatever draws its jitter from Python's global generator moves the
position of a generator that the training uses too, and that a resume has to restore bit for bit.
"""

import random
from types import ModuleType

import tenacity

__all__ = ["FullJitter", "draw_apart"]

_own = random.SystemRandom()  # has no state to move


class FullJitter(tenacity.wait.wait_base):
    """Wait between zero and a bound that doubles with every try: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.

    Args:
        first: The bound after the first try, in seconds.
        longest: The bound that is never passed, in seconds.

    Example:
        >>> before, tries = random.getstate(), iter([OSError, OSError])
        >>> def fails_twice():
        ...     for error in tries:
        ...         raise error
        ...     return "done"
        >>> tenacity.Retrying(wait=FullJitter(0.001, longest=0.002), sleep=lambda _: None)(fails_twice)
        'done'
        >>> random.getstate() == before
        True
    """

    def __init__(self, first: float, *, longest: float) -> None:
        self._first, self._longest = first, longest

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        return _own.uniform(0.0, min(self._longest, self._first * 2.0 ** min(30, retry_state.attempt_number - 1)))


def draw_apart(module: ModuleType) -> None:
    """Have somebody else's module, which draws jitter by ``random.random()`` and its like, draw it from a generator of its own."""
    if getattr(module, "random", None) is random:
        module.random = _own  # type: ignore[attr-defined]
