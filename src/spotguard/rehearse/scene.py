"""One start under rehearsal: what each message of its guard is answered, and which interruption begins where."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spotguard.rehearse.plan import Interruption
from spotguard.rehearse.process import Answer
from spotguard.rehearse.record import Message, Start
from spotguard.rehearse.recorder import Recorder
from spotguard.rehearse.report import HOPELESS, unlike
from spotguard.rehearse.scenario import Announce, Begin, Delivery, Withdraw
from spotguard.rehearse.site import Site

__all__ = ["Scene"]

_HOLD = 0.05  # seconds at a boundary for a SIGTERM to be heard by the guard; it takes a millisecond
_HOLDS = 20  # boundaries, on a machine that is busier than that


class Scene:
    """A `Director`.

    Args:
        recorder: Told everything.
        site: Where the metadata service is.
        began: When the run began, monotonic seconds.
        pending: The interruptions that are still to come, in order.
        welcome: The answer to the first message.
        like: The untouched run, which a fresh start has to begin like.
        on_step: Called at each boundary.
    """

    def __init__(
        self,
        recorder: Recorder,
        site: Site,
        began: float,
        *,
        pending: Sequence[Interruption] = (),
        welcome: Mapping[str, Any],
        like: Start | None = None,
        on_step: Callable[[int], None],
    ) -> None:
        self._recorder, self._site, self._began, self._pending = recorder, site, began, pending
        self._welcome, self._like, self._on_step = welcome, like, on_step
        self._holds = 0

    def decide(self, message: Message) -> Answer:
        """See `Director`."""
        recorder, now = self._recorder, time.monotonic() - self._began
        due = self._due()
        if due is not None and due.strikes(message):
            if message["at"] == "boundary":
                recorder.heard(message, now)
            recorder.strike(due, message, now)
            if due.scenario is not None:
                return Answer(deliveries=due.deliveries)
            self._holds = _HOLDS
            return Answer(None if due.kind == "SIGKILL" else {}, due.deliveries, hold=_HOLD)
        recorder.heard(message, now)
        if message["at"] == "hello":
            return Answer(self._welcome)
        if message["at"] == "fresh" and self._like is not None and HOPELESS & unlike(message["rng"], self._like):
            return Answer(None, _KILLED)  # the comparison would mean nothing: spare the time
        if message["at"] == "boundary":
            self._on_step(recorder.step)
            if self._holds:
                self._holds -= 1
                return Answer(hold=_HOLD)
        return Answer()

    def perform(self, act: Announce | Begin | Withdraw) -> None:
        """See `Director`."""
        self._site.perform(act)

    def delivered(self, delivery: Delivery, trouble: str) -> None:
        """See `Director`."""
        if self._recorder.strikes:
            self._recorder.delivered(delivery, trouble, time.monotonic() - self._began)

    def _due(self) -> Interruption | None:
        """What comes next; nothing while something is under way, or has told the process to go."""
        strikes = self._recorder.strikes
        if strikes and not (strikes[-1].interruption.goes_on and strikes[-1].complete):
            return None
        return self._pending[len(strikes)] if len(strikes) < len(self._pending) else None


_KILLED = Interruption("SIGKILL", 0).deliveries
