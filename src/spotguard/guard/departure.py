"""From a notice to the end of the attempt: what is planned, what is trained on, and the save that is to be the last."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Literal

from spotguard._time import format_seconds, utc_now
from spotguard.checkpoint import ExitRecord
from spotguard.checkpoint.layout import EXIT
from spotguard.errors import SpotguardError
from spotguard.events import Event, FinalSavePlanned, GraceTooShort
from spotguard.guard.budget import Budget, Deadline
from spotguard.guard.console import say
from spotguard.guard.saver import Place, Saver
from spotguard.notices import PreemptionNotice
from spotguard.pipeline.objects import read_object, write_object
from spotguard.pipeline.writer import Writer
from spotguard.policies import FinalPlan, FinalSave, SaveTimes, plan_final_save
from spotguard.stores import ObjectStore

__all__ = ["Departure", "write_exit_record"]

logger = logging.getLogger(__name__)

_FROM_STEP = 20  # by then a step takes what it will take
_RECORD_S = 5.0  # patience for the exit record: it is a help, not the guarantee


class Departure:
    """Decides at each boundary after a notice, from what this run has measured.

    Args:
        budget: How long a stop leaves us.
        saver: Takes snapshots.
        writer: Commits them.
        publish: Where events go.

    Attributes:
        reason: Why the last checkpoint is not of the last boundary; empty when it is.
    """

    def __init__(self, budget: Budget, saver: Saver, writer: Writer, publish: Callable[[Event], None]) -> None:
        self._budget, self._saver, self._writer, self._publish = budget, saver, writer, publish
        self._seen: PreemptionNotice | None = None
        self._saved_first = False
        self._boundary_at, self._step_s = 0.0, 0.0
        self._warned = False
        self._arrived = threading.Event()
        self.reason = ""

    def plan(self, notice: PreemptionNotice, place: Place) -> FinalPlan:
        """What to do at this boundary; with seconds left to train, the first save of the window is already under way."""
        deadline, now = self._budget.deadline_of(notice), time.monotonic()
        self._arrived.set()
        if notice is not self._seen:
            self._seen, self._saved_first, self._step_s = notice, False, self._saver.step_s(place)
        else:  # the steps of the window are those that count now
            self._step_s = max(self._step_s, now - self._boundary_at)
        self._boundary_at = now
        left = None if deadline is None else deadline.at - now
        plan = plan_final_save(left, self._times(), window=notice.kind == "preemption", saved=self._saved_first)
        if plan.save_first and not self._writer.busy:
            say(f"{notice.detail}: saving step {place.step}, then training on for about {format_seconds(plan.train_s)}")
            firm = deadline.at if deadline is not None and deadline.firm else None
            self._saver.snapshot(place, deadline=firm, urgent=True)
            self._saved_first = True
        if not plan.train_s:
            self._publish(FinalSavePlanned(step=place.step, choice=plan.choice.value, reason=plan.reason, left_s=left))
        return plan

    def execute(self, plan: FinalPlan, notice: PreemptionNotice, place: Place) -> None:
        """Make the last save, or as much of it as there is time for."""
        deadline = self._budget.deadline_of(notice)
        firm = deadline.at if deadline is not None and deadline.firm else None
        choice = plan.choice
        if choice is FinalSave.NONE and firm is None:
            choice = FinalSave.FRESH  # what the platform usually leaves is not enough; here it may leave more
        if plan.reason:
            self.reason = f"{_CHOICES[choice]}: {plan.reason}"
            say(self.reason)
        if choice in (FinalSave.FRESH, FinalSave.FAST_TIER):
            tiers: Literal["all", "fastest"] = "all" if choice is FinalSave.FRESH else "fastest"
            in_time = self._saver.save_and_wait("saving before the stop", place, tiers=tiers, deadline=firm)
        else:
            in_time = choice is FinalSave.NONE or self._writer.drain(_left(firm), upkeep=False)
        if not in_time:
            self.reason = "the last save was not done by the deadline"
            say(self.reason)

    def stand_by(self, notice: PreemptionNotice, at_deadline: Callable[[], None]) -> None:
        """See to it that the last host snapshot is committed, if no boundary comes while there is time for that.

        Args:
            notice: It asks us to stop.
            at_deadline: Called, from another thread, when no boundary has come.
        """
        deadline = self._budget.deadline_of(notice)
        if deadline is not None and not self._arrived.is_set():
            wait = threading.Thread(
                target=self._wait, args=(deadline, at_deadline), name="spotguard-deadline", daemon=True
            )
            wait.start()

    def warn_if_too_short(self, place: Place) -> None:
        """Say once, while there is time to change something, that a save does not fit into the grace of the platform."""
        least, times = self._budget.least, self._times(place)
        if self._warned or place.step < _FROM_STEP or times.save_s is None:
            return
        self._warned = True
        if least is None or plan_final_save(least - times.step_s, times).choice is FinalSave.FRESH:
            return
        layer, grace = self._budget.platform.tightest, self._budget.grace_s
        who = f"grace={format_seconds(grace)}" if grace is not None else f"{layer.title if layer else 'the platform'}"
        needed = times.step_s + times.save_s
        self._publish(GraceTooShort(needed_s=needed, grace_s=least, who=who))
        say(
            f"WARNING: a final save takes about {format_seconds(needed)} from the signal, {who} leaves {format_seconds(least)} of it. "
            "Until that is changed, an interruption falls back to the last periodic checkpoint. "
            f"Remedies: {layer.lengthen + '; ' if layer is not None and grace is None else ''}"
            "a faster tier in front, SpotGuard(['/fast/run', 's3://...'], ...); saving more often, every=..."
        )

    def _times(self, place: Place | None = None) -> SaveTimes:
        return self._saver.times(self._step_s if place is None else self._saver.step_s(place))

    def _wait(self, deadline: Deadline, at_deadline: Callable[[], None]) -> None:
        needed = self._times().save_s or 0.0
        if self._arrived.wait(max(0.0, deadline.at - time.monotonic() - 1.5 * needed)):
            return
        try:
            at_deadline()
        except Exception:  # top of a thread
            logger.exception("the last host snapshot could not be committed")


_CHOICES = {
    FinalSave.FRESH: "saving all the same",
    FinalSave.FLUSH: "only the save in flight is finished",
    FinalSave.FAST_TIER: "saving to the fastest tier alone",
    FinalSave.NONE: "nothing more is saved, the last checkpoint stands",
}


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def write_exit_record(
    store: ObjectStore,
    *,
    attempt: int,
    state: Literal["preempted", "finished", "failed"],
    step: int,
    checkpoint: str | None = None,
    notice: str | None = None,
    detail: str = "",
    exit_code: int | None = None,
) -> None:
    """Leave word of how this attempt ended; for a few seconds at most, and without fail: the exit is more important.

    A later attempt may have come meanwhile: its word is not overwritten.
    """
    record = ExitRecord(
        attempt=attempt,
        state=state,
        step=step,
        checkpoint=checkpoint,
        notice=notice,
        detail=detail,
        exit_code=exit_code,
        host=socket.gethostname(),
        at=utc_now(),
    )

    def write() -> None:
        with contextlib.suppress(SpotguardError, OSError):
            if ExitRecord.from_bytes(read_object(store, EXIT), key=EXIT).attempt > attempt:
                return
        try:
            write_object(store, EXIT, record.to_bytes(), deadline=time.monotonic() + _RECORD_S)
        except (SpotguardError, OSError) as error:
            logger.warning("%s/%s could not be written: %s", store.uri, EXIT, error)

    thread = threading.Thread(target=write, name=f"spotguard-exit-{os.getpid()}", daemon=True)
    thread.start()
    thread.join(_RECORD_S)
