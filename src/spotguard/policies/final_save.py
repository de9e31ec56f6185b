"""What to do with the seconds that are left: a pure function of measured times, so that it can be simulated, and read by all alike.

Seconds are what remains up to the deadline, with the reserve already taken off.
"""

import dataclasses
import enum
import math
from collections.abc import Iterable

__all__ = ["FinalPlan", "FinalSave", "SaveTimes", "p95", "plan_final_save"]

_GROWTH = 1.25  # what a p95 of few measurements is taken times
_SLACK_S = 0.25  # to leave: events, the exit record
_WORTH = 3.0  # a window is trained through if it holds so many saves


class FinalSave(enum.Enum):
    """Which checkpoint is to stand when the process ends."""

    FRESH = "fresh"
    """Of the boundary we are at."""
    FLUSH = "flush"
    """The one that is being written."""
    FAST_TIER = "fast tier"
    """Of the boundary we are at, in the fastest tier alone."""
    NONE = "none"
    """The last one that is committed: there is no time for another."""


@dataclasses.dataclass(frozen=True)
class SaveTimes:
    """What this run has measured, in seconds; 95 of 100 were no longer.

    Attributes:
        save_s: Capture, write, and commit in every tier; None before the first save.
        fast_s: The same for the fastest tier alone, where there are several; None otherwise.
        fast_survives: Whether that one outlives the machine.
        step_s: From one boundary to the next.
        flush_s: Until the save in flight is committed; None when none is.
    """

    save_s: float | None = None
    fast_s: float | None = None
    fast_survives: bool = False
    step_s: float = 0.0
    flush_s: float | None = None


@dataclasses.dataclass(frozen=True)
class FinalPlan:
    """What to do at this boundary.

    Attributes:
        choice: The save that is to be the last.
        train_s: Seconds of training before it has to begin; 0.0 for now.
        save_first: Commit this boundary too, while training goes on: what is trained after it is won if all goes well.
        reason: Why, for people.
    """

    choice: FinalSave
    train_s: float = 0.0
    save_first: bool = False
    reason: str = ""


def plan_final_save(left_s: float | None, times: SaveTimes, *, window: bool = False, saved: bool = False) -> FinalPlan:
    """Choose the last save.

    Args:
        left_s: Seconds up to the deadline; None when nobody knows it.
        times: Measured.
        window: Whether the time up to the deadline is ours to train in; not where somebody waits for us to go.
        saved: Whether a boundary after the notice is committed, or being written.

    Example:
        >>> plan_final_save(110.0, SaveTimes(save_s=8.0, step_s=0.5), window=True)
        FinalPlan(choice=<FinalSave.FRESH: 'fresh'>, train_s=99.25, save_first=True, reason='')
        >>> plan_final_save(6.0, SaveTimes(save_s=8.0, flush_s=2.0)).choice
        <FinalSave.FLUSH: 'flush'>
    """
    if left_s is None or times.save_s is None:
        return FinalPlan(FinalSave.FRESH)
    save, flush = _with_margin(times.save_s), _with_margin(times.flush_s or 0.0)
    if flush + save <= left_s:
        spare = left_s - save - times.step_s
        if window and (saved or left_s >= _WORTH * save + flush) and spare > max(flush, times.step_s):
            return FinalPlan(FinalSave.FRESH, spare, save_first=not saved)
        return FinalPlan(FinalSave.FRESH)
    lacking = f"a save takes {flush + save:.1f} s, and {max(0.0, left_s):.1f} s are left"
    fast = times.fast_s is not None and flush + _with_margin(times.fast_s) <= left_s
    if fast and times.fast_survives:
        return FinalPlan(FinalSave.FAST_TIER, reason=lacking)
    if times.flush_s is not None and flush <= left_s:
        return FinalPlan(FinalSave.FLUSH, reason=lacking)
    return FinalPlan(FinalSave.FAST_TIER if fast else FinalSave.NONE, reason=lacking)


def _with_margin(seconds: float) -> float:
    return _GROWTH * seconds + _SLACK_S if seconds else 0.0


def p95(samples: Iterable[float]) -> float | None:
    """The value that 95 of 100 samples do not exceed; of fewer than 20 the largest; of none, None.

    Example:
        >>> p95([1.0, 3.0, 2.0])
        3.0
    """
    ordered = sorted(samples)
    return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else None
