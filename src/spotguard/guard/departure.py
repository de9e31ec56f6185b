"""From a notice to the end of the attempt: what is planned, what is trained on, and the save that is to be the last."""

import time
from collections.abc import Callable
from typing import Literal

from spotguard._time import format_seconds
from spotguard.errors import DeadlineExceededError
from spotguard.events import Event, FinalSavePlanned
from spotguard.guard.budget import Outlook
from spotguard.guard.console import say, say_after
from spotguard.guard.saver import Place, Saver
from spotguard.notices import PreemptionNotice
from spotguard.pipeline.writer import Writer
from spotguard.policies import FinalPlan, FinalSave, plan_final_save, with_margin

__all__ = ["Departure"]

_AGAIN_S = 1.0  # between two tries of the first save of a window, at the least
_LONG_S = 15.0  # of a last save, before somebody who waits for it is told how to leave without
_ROOM = 3.0  # a periodic save is made in a window that leaves so many times as long for training


class Departure:
    """Decides at each boundary after a notice, from what this run has measured.

    Args:
        saver: Takes snapshots.
        writer: Commits them.
        publish: Where events go.

    Attributes:
        reason: Why the last checkpoint is not of the last boundary; empty when it is.
    """

    def __init__(self, saver: Saver, writer: Writer, publish: Callable[[Event], None]) -> None:
        self._saver, self._writer, self._publish = saver, writer, publish
        self._seen: PreemptionNotice | None = None
        self._tried_at: float | None = None
        self.reason = ""

    def plan(self, notice: PreemptionNotice, outlook: Outlook, place: Place) -> FinalPlan:
        """What to do at this boundary; with seconds left to train, the saves of the window are already under way.

        Args:
            notice: The one that matters.
            outlook: What all of them come to.
            place: The boundary.
        """
        now, times = time.monotonic(), self._saver.times()
        if notice is not self._seen:
            self._seen, self._tried_at = notice, None
        saved = self._tried_at is not None and (self._writer.busy or self._writer.error is None)
        left = None if outlook.at is None else outlook.at - now
        plan = plan_final_save(left, times, window=outlook.window, saved=saved, firm=outlook.firm is not None)
        if not plan.train_s:
            self._publish(FinalSavePlanned(step=place.step, choice=plan.choice.value, reason=plan.reason, left_s=left))
        elif not self._writer.busy:
            self._save_in_window(plan, notice, outlook, place, save_s=times.save_s or 0.0)
        elif plan.save_first:  # at the next boundary, then
            self._writer.press()
        return plan

    def _save_in_window(
        self, plan: FinalPlan, notice: PreemptionNotice, outlook: Outlook, place: Place, *, save_s: float
    ) -> None:
        """The first save, until it has worked; then those that are due anyway, for a window may be long."""
        now = time.monotonic()
        if plan.save_first:
            if self._tried_at is None:
                train = format_seconds(plan.train_s)
                say(f"{notice.detail}: saving step {place.step}, then training on for about {train}")
            elif now < self._tried_at + max(_AGAIN_S, save_s):
                return
            self._tried_at = now
        elif not self._saver.is_due(place) or plan.train_s < _ROOM * with_margin(save_s):
            return
        self._saver.snapshot(place, deadline=outlook.firm, urgent=True)

    def execute(self, plan: FinalPlan, outlook: Outlook, place: Place) -> None:
        """Make the last save, or as much of it as there is time for."""
        last = self._writer.checkpoint
        left_with = f"checkpoint {last.id}, of step {last.step}" if last else "no checkpoint"
        with say_after(_LONG_S, f"the last save is taking its time; another signal leaves at once, with {left_with}"):
            self._execute(plan, outlook, place)

    def _execute(self, plan: FinalPlan, outlook: Outlook, place: Place) -> None:
        in_time = True
        if plan.choice is FinalSave.FLUSH:
            in_time = self._writer.drain(_left(outlook), upkeep=False)
            again = plan_final_save(_left(outlook), self._saver.times())
            if in_time and again.choice is not FinalSave.NONE:  # that was done sooner than could be expected
                plan = again
        if plan.reason:
            self.reason = f"{_CHOICES[plan.choice]}: {plan.reason}"
            say(self.reason)
        if plan.choice in (FinalSave.FRESH, FinalSave.FAST_TIER):
            tiers: Literal["all", "fastest"] = "all" if plan.choice is FinalSave.FRESH else "fastest"
            in_time = self._saver.save_and_wait("saving before the stop", place, tiers=tiers, deadline=outlook.firm)
            if in_time and plan.choice is FinalSave.FRESH and self._writer.error is None:
                self.reason = ""
        elif plan.choice is FinalSave.NONE:
            return
        if not in_time or isinstance(self._writer.error, DeadlineExceededError):
            self.reason = "the last save was not done by the deadline"
            say(self.reason)

    def last_call(self, outlook: Outlook) -> float | None:
        """The instant by which a boundary should have come, for a save to be made in time; None without a deadline."""
        if outlook.at is None:
            return None
        now, times = time.monotonic(), self._saver.times()
        # Where nothing is known of saves, half of the time is left for one.
        needed = (outlook.at - now) / 2 if times.save_s is None else with_margin(times.save_s)
        return max(outlook.at - needed, now + min(1.0, max(0.1, 2 * times.step_s)))


def _left(outlook: Outlook) -> float | None:
    return None if outlook.firm is None else max(0.0, outlook.firm - time.monotonic())


_CHOICES = {
    FinalSave.FRESH: "saving all the same",
    FinalSave.FLUSH: "only the save in flight is finished",
    FinalSave.FAST_TIER: "saving to the fastest tier alone",
    FinalSave.NONE: "nothing more is saved, the last checkpoint stands",
}
