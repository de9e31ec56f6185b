"""All ways to be told that the job has to go, behind one door: signals, the sources of notices, a request to stop."""

import logging
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from spotguard.guard.budget import Budget, Outlook
from spotguard.guard.options import Options
from spotguard.notices import NoticeWatcher, PollingSource, PreemptionNotice, SignalSource
from spotguard.notices.azure import Confirmable
from spotguard.pipeline.objects import outcomes

__all__ = ["Hearing"]

logger = logging.getLogger(__name__)


class Hearing:
    """Hears notices, and knows what those that stand come to.

    Args:
        options: What the user asked for.
        budget: How long a stop leaves us.
        on_notice: Called for each notice that is news, or withdrawn, from any thread.
        on_signal: Called from a signal handler, to set a flag and nothing else.
    """

    def __init__(
        self,
        options: Options,
        budget: Budget,
        *,
        on_notice: Callable[[PreemptionNotice], None],
        on_signal: Callable[[], None],
    ) -> None:
        self._options, self._budget, self._on_signal = options, budget, on_signal
        self._watcher = NoticeWatcher(on_notice, urgency=budget.urgency)
        self._signals: SignalSource | None = None

    def listen(self, previous: Mapping[int, Any] | None = None) -> None:
        """Hear signals, and the sources that the user named.

        Args:
            previous: Handlers to call after ours, in place of those that are found.
        """
        wanted = [signal.SIGTERM, signal.SIGINT, *(signal.Signals[name] for name in self._options.platform.signals)]
        signals = SignalSource(
            tuple(wanted), repeat_s=self._options.settings.repeat_s, on_record=self._on_signal, previous=previous
        )
        signals.install()
        self._signals = signals
        for source in (signals, *self._options.sources):
            self._watcher.watch(source)

    def look_for_request(self, asked: Callable[[], str | None], interval: float) -> None:
        """Ask again and again whether somebody wants us to stop."""
        self._watcher.watch(PollingSource("request", asked, interval))

    def heed(self, notice: PreemptionNotice) -> None:
        """Take a notice that came by another way."""
        self._watcher.emit(notice)

    def settle(self, notice: PreemptionNotice) -> None:
        """It asked for a save, and that is made."""
        self._watcher.settle(notice)

    def notice(self) -> PreemptionNotice | None:
        """The notice that matters now, or None."""
        recorded = self._signals.recorded() if self._signals is not None else None
        if recorded is not None:  # its thread may not have had its turn at the interpreter
            self._watcher.emit(recorded)
        return self._watcher.notice

    def outlook(self) -> Outlook:
        """What all notices that stand come to."""
        return self._budget.outlook(self._watcher.standing)

    def confirm(self, patience: float) -> None:
        """Tell the platforms that wait for it that they need not wait any longer; for so many seconds at the most."""
        answered = [
            (source, notice)
            for source in self._options.sources
            if isinstance(source, Confirmable)
            for notice in self._watcher.standing
            if notice.source == source.name and notice.action == "stop"
        ]
        until = time.monotonic() + patience
        for outcome in outcomes(lambda pair: pair[0].confirm(pair[1]), answered, until=until) if answered else []:
            if outcome.error is not None:
                logger.info("a stop could not be acknowledged: %s", outcome.error)

    def close(self, patience: float) -> None:
        """Stop asking; waits up to so many seconds for whoever is being asked."""
        self._watcher.close(patience)

    def restore_signals(self, *, hand_on: bool) -> PreemptionNotice | None:
        """Put the handlers back that were there before.

        Args:
            hand_on: No boundary will act on what has been heard: have it done by those handlers.

        Returns:
            The signal that would end the process by default; that is left to the caller.
        """
        signals, self._signals = self._signals, None
        if signals is None:
            return None
        signals.restore()
        return signals.hand_on() if hand_on else None
