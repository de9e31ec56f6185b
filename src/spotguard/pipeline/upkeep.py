"""Retention behind the commits: one sweep at a time, in a thread of its own, that gives way to the next commit.

A sweep only needs the store, never the buffers of a snapshot, and a store may take its time over deletes. So no save waits for one: a sweep
that is told to give way deletes nothing more that it has not listed before, and a save that comes while a request of it is still under way
goes ahead. That is safe, as what it has listed cannot be of that save.
"""

import threading
from collections.abc import Callable, Sequence

from spotguard.pipeline.tier import Tier

__all__ = ["Upkeep"]


class Upkeep:
    """Runs sweeps.

    Args:
        sweep: Sweeps tiers, in order, as long as the function that it is given says so.
    """

    def __init__(self, sweep: Callable[[Sequence[Tier], Callable[[], bool]], None]) -> None:
        self._sweep = sweep
        self._thread: threading.Thread | None = None
        self._give_way = threading.Event()

    def start(self, tiers: Sequence[Tier]) -> None:
        """Begin a sweep, unless an earlier one is still at it."""
        if not tiers or not self.wait(0.0):
            return
        give_way = self._give_way = threading.Event()
        thread = threading.Thread(
            target=self._sweep, args=(tiers, lambda: not give_way.is_set()), name="spotguard-sweeper", daemon=True
        )
        self._thread = thread
        thread.start()

    def give_way(self, patience: float) -> None:
        """Have it end at its next request, and wait for that a little (seconds)."""
        self._give_way.set()
        self.wait(patience)

    def wait(self, timeout: float | None = None) -> bool:
        """Until nothing is swept; False when `timeout` seconds were not enough."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()
