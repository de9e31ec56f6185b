"""What to do with the seconds that are left: a pure function of measured times, so that it can be simulated, and read by all alike.

Seconds are what remains up to the deadline, with the reserve already taken off.
"""

import dataclasses
import enum
import math
from collections.abc import Iterable

__all__ = ["FinalPlan", "FinalSave", "SaveTimes", "p95", "plan_final_save", "time_left", "with_margin"]

_GROWTH = 1.25  # what a p95 of few measurements is taken times
_SLACK_S = 0.25  # to leave: events, the exit record
_WORTH = 3.0  # a window is trained through if it holds so many saves
_PLENTY_S = 30.0  # a window that is trained through though nothing is known of saves


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


def plan_final_save(
    left_s: float | None, times: SaveTimes, *, window: bool = False, saved: bool = False, firm: bool = True
) -> FinalPlan:
    """Choose the last save.

    A commit is atomic: one that comes too late does no harm. So one is tried wherever it may be done.

    Args:
        left_s: Seconds up to the deadline; None when nobody knows it, negative when it has passed and we are still here.
        times: Measured.
        window: Whether the time up to the deadline is ours to train in; not where somebody waits for us to go.
        saved: Whether a boundary after the notice is committed, or being written.
        firm: Whether somebody has named the deadline. Otherwise it is what is usual, and there may be more.

    Example:
        >>> plan_final_save(110.0, SaveTimes(save_s=8.0, step_s=0.5), window=True)
        FinalPlan(choice=<FinalSave.FRESH: 'fresh'>, train_s=99.25, save_first=True, reason='')
        >>> plan_final_save(6.0, SaveTimes(save_s=8.0, flush_s=2.0)).choice
        <FinalSave.FLUSH: 'flush'>
    """
    if left_s is None or left_s <= 0:
        return FinalPlan(FinalSave.FRESH)
    flush = with_margin(times.flush_s or 0.0)
    if times.save_s is None:
        return _plan_unmeasured(left_s, times, flush, window=window, saved=saved)
    save = with_margin(times.save_s)
    if flush + save <= left_s:
        spare = left_s - save - times.step_s
        if window and (saved or left_s >= _WORTH * save + flush) and spare > max(flush, times.step_s):
            return FinalPlan(FinalSave.FRESH, spare, save_first=not saved)
        return FinalPlan(FinalSave.FRESH)
    lacking = f"a save takes {flush + save:.1f} s, and {left_s:.1f} s are left"
    fast = times.fast_s is not None and flush + with_margin(times.fast_s) <= left_s
    if fast and times.fast_survives:
        return FinalPlan(FinalSave.FAST_TIER, reason=lacking)
    if not firm or (times.flush_s or 0.0) + times.save_s <= left_s:  # it may just be done
        return FinalPlan(FinalSave.FRESH, reason=lacking)
    if times.flush_s is not None:
        return FinalPlan(FinalSave.FLUSH, reason=lacking)
    return FinalPlan(FinalSave.FAST_TIER if fast else FinalSave.NONE, reason=lacking)


def _plan_unmeasured(left_s: float, times: SaveTimes, flush: float, *, window: bool, saved: bool) -> FinalPlan:
    """The first save of a long window tells how long saves take; the last one has to wait for it."""
    spare = left_s - times.step_s - (_PLENTY_S if times.flush_s is None else flush)
    if window and spare > times.step_s:
        return FinalPlan(FinalSave.FRESH, spare, save_first=not saved)
    return FinalPlan(FinalSave.FRESH)


def with_margin(seconds: float) -> float:
    """How long something is taken to last that has lasted so long."""
    return _GROWTH * seconds + _SLACK_S if seconds else 0.0


def time_left(expected_s: float | None, elapsed_s: float) -> float:
    """Seconds that something under way will still take: what is late already may be later yet.

    Args:
        expected_s: How long it takes as a rule; None where nobody knows: then as long again as it has taken.
        elapsed_s: How long it has taken so far.

    Example:
        >>> time_left(8.0, 2.0), time_left(8.0, 20.0), time_left(None, 3.0)
        (6.0, 5.0, 3.0)
    """
    return elapsed_s if expected_s is None else max(expected_s - elapsed_s, elapsed_s / 4)


def p95(samples: Iterable[float]) -> float | None:
    """The value that 95 of 100 samples do not exceed; of fewer than 20 the largest; of none, None.

    Example:
        >>> p95([1.0, 3.0, 2.0])
        3.0
    """
    ordered = sorted(samples)
    return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else None
