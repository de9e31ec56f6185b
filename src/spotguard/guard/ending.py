"""The end of an attempt, of whichever kind: the word that is left of it, and who is told, within the time that there is."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from spotguard.checkpoint.layout import STOP
from spotguard.errors import DeadlineExceededError, Preempted
from spotguard.events import EventBus, RunFinished, Stopped
from spotguard.guard.console import say
from spotguard.guard.departure import Departure
from spotguard.guard.gate import Gate
from spotguard.guard.hearing import Hearing
from spotguard.guard.last_word import LastWord
from spotguard.guard.patience import Patience
from spotguard.guard.saver import Place, Saver
from spotguard.guard.stand_by import StandBy
from spotguard.notices import PreemptionNotice
from spotguard.notices.platforms import STOPPED
from spotguard.pipeline.objects import outcomes
from spotguard.pipeline.writer import Writer
from spotguard.stores import ObjectRef, ObjectStore

__all__ = ["ASK_S", "WRITE_S", "Ending"]

logger = logging.getLogger(__name__)

ASK_S = 5.0
"""Patience for what is only a help: the exit record, the removal of a request, the event log, the ends of threads."""
WRITE_S = 300.0
"""Patience for a snapshot that is being written."""


class Ending:
    """Sees an attempt to its end, where the loop comes to one and where it is stuck.

    Args:
        store: The run.
        attempt: This attempt.
        exit_code: Exit status after a stop.
        hearing: Knows the notices that stand.
        saver: Takes snapshots.
        writer: Commits them.
        patience: What there is time for.
        place: Where the loop is.
        bus: Takes events.
        gate: The line to a rehearsal, or None.

    Attributes:
        begun: Set when the end has begun, and there is no way back.
        departure: Plans the last save.
    """

    def __init__(
        self,
        store: ObjectStore,
        attempt: int,
        exit_code: int,
        *,
        hearing: Hearing,
        saver: Saver,
        writer: Writer,
        patience: Patience,
        place: Callable[[], Place],
        bus: EventBus,
        gate: Gate | None,
    ) -> None:
        self.begun = threading.Event()
        self.departure = Departure(saver, writer, bus.publish)
        self._store, self._exit_code, self._hearing, self._saver, self._writer = (
            store,
            exit_code,
            hearing,
            saver,
            writer,
        )
        self._patience, self._place, self._bus, self._gate = patience, place, bus, gate
        self._last_word, self._stand_by = LastWord(store, attempt), StandBy(self._no_boundary)

    def watch(self) -> None:
        """A notice has come or gone, or a boundary has passed: act without one if the next does not come in time."""
        self._stand_by.set(self.departure.last_call(self._hearing.outlook()))

    def begin(self) -> None:
        """The loop has come to an end, of whichever kind: nobody need act in its place."""
        self.begun.set()
        self._stand_by.cancel()

    def limit(self) -> None:
        """Wait for nothing beyond the deadline of what stands; a second where that is over."""
        self._patience.end_at(self._hearing.outlook().at)

    def leave(self, notice: PreemptionNotice, began: float, *, durable: bool) -> Preempted:
        """Stop with what is committed.

        Args:
            notice: Why.
            began: When the stop began, monotonic seconds.
            durable: Whether everything is committed that was trained, so that who takes the machine away need not wait.

        Returns:
            What to raise.
        """
        last, step = self._writer.checkpoint, (self._saver.held or self._place()).step
        identity, seconds, code = last.id if last else None, time.monotonic() - began, self._code(notice)
        self.begin()
        self.limit()
        self._say("preempted", step, notice=notice.detail, exit_code=code)
        if self._writer.error is None:
            self._take_request_away()
        self._bus.publish(Stopped(checkpoint=identity, step=step, reason=notice.detail, seconds=seconds))
        if self._gate is not None:
            self._gate.ask("stopped", step=step, checkpoint=identity, seconds=seconds, code=code)
        if durable:
            self._bus.flush(self._patience.of(ASK_S))  # behind it the machine may be gone at once
            self._hearing.confirm(self._patience.of(ASK_S))
        return Preempted(identity, reason=notice.detail, code=code)

    def finish(self) -> None:
        """The loop has come to its end, and that is committed."""
        last, step = self._writer.checkpoint, self._place().step
        self._bus.publish(RunFinished(checkpoint=last.id if last else None, step=step))
        self._say("finished", step, exit_code=0)
        self._take_request_away()
        say(f"finished at step {step}" + (f", checkpoint {last.id}" if last else ""))
        if self._gate is not None:
            self._gate.ask("finished", step=step, checkpoint=last.id if last else None)

    def fail(self, error: BaseException) -> None:
        """An exception ends the attempt, unless it had come to its end already."""
        if not self.begun.is_set():
            self.begin()
            self.limit()
            self._say("failed", self._place().step, detail=f"{type(error).__name__}: {error}"[:500])

    def _code(self, notice: PreemptionNotice) -> int:
        """Where 0 is the answer to a platform that stops us, it is none to anybody else: there it would say that the work is done."""
        return self._exit_code or (0 if notice.kind == "signal" else STOPPED)

    def _say(
        self,
        state: Literal["preempted", "finished", "failed"],
        step: int,
        *,
        notice: str | None = None,
        detail: str = "",
        exit_code: int | None = None,
        final: bool = True,
    ) -> None:
        """Leave word of it, for schedulers."""
        last, error, reason = self._writer.checkpoint, self._writer.error, self.departure.reason
        if error is not None and not (reason and isinstance(error, DeadlineExceededError)):
            reason = f"the final save failed: {error}"
        self._last_word.say(
            state,
            step,
            checkpoint=last.id if last else None,
            notice=notice,
            detail=detail or reason,
            exit_code=exit_code,
            final=final,
            patience=self._patience.of(ASK_S),
        )

    def _take_request_away(self) -> None:
        """A request to stop is met by any stop, and by the end of the run; the next start must not obey it."""
        until = time.monotonic() + self._patience.of(ASK_S)
        (answer,) = outcomes(self._store.delete, [[ObjectRef(STOP)]], until=until)
        if answer.error is not None:
            logger.warning(
                "%s/%s could not be removed: %s; the next start may obey it", self._store.uri, STOP, answer.error
            )

    def _no_boundary(self) -> None:
        """The loop is stuck, and this is another thread: see what can be done without it."""
        outlook, notice = self._hearing.outlook(), self._hearing.notice()
        if self.begun.is_set() or notice is None or outlook.at is None:
            return
        found = self._saver.commit_held(outlook.firm)
        for patience in (max(1.0, outlook.at - time.monotonic()), WRITE_S):
            what = found or self._saver.settled(patience)
            if self.begun.is_set():  # it was not stuck
                return
            say(f"no step boundary before the deadline: {what}")
            detail = f"no step boundary came: {what}"
            step, code = self._place().step, self._code(notice)
            self._say("preempted", step, notice=notice.detail, detail=detail, exit_code=code, final=False)
            if found or not self._writer.busy:
                return
