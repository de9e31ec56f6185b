"""Says, while there is time to change something, that a save does not fit into the grace that a stop leaves."""

from collections.abc import Callable

from spotguard._time import format_seconds
from spotguard.events import Event, GraceTooShort
from spotguard.guard.budget import Budget
from spotguard.guard.console import say
from spotguard.guard.saver import Saver
from spotguard.pipeline.writer import Writer
from spotguard.policies import with_margin

__all__ = ["GraceCheck"]

_FROM_STEP = 20  # by then a step takes what it will take


class GraceCheck:
    """Compares after each commit what a save takes with what a stop leaves. Warns once.

    Args:
        budget: What a stop leaves.
        saver: Knows what a save takes.
        writer: Commits.
        publish: Where events go.
    """

    def __init__(self, budget: Budget, saver: Saver, writer: Writer, publish: Callable[[Event], None]) -> None:
        self._budget, self._saver, self._writer, self._publish = budget, saver, writer, publish
        self._measured = self._warned = False

    def measured(self) -> None:
        """Something has been committed. Safe from any thread."""
        self._measured = not self._warned

    def check(self, step: int) -> bool:
        """At a boundary. Returns whether there is something to check at the next one."""
        if not self._measured or step < _FROM_STEP or self._writer.busy:
            return self._measured
        self._measured = False
        least, times = self._budget.least, self._saver.times()
        if least is None or times.save_s is None or times.step_s + with_margin(times.save_s) <= least:
            return False
        self._warned = True
        layer, grace = self._budget.platform.tightest, self._budget.grace_s
        who = f"grace={format_seconds(grace)}" if grace is not None else f"{layer.title if layer else 'the platform'}"
        needed = times.step_s + times.save_s
        self._publish(GraceTooShort(needed_s=needed, grace_s=least, who=who))
        say(
            f"WARNING: a final save takes about {format_seconds(needed)} from the signal, {who} leaves {format_seconds(least)} of it. "
            "Until that is changed, an interruption may fall back to the last periodic checkpoint. "
            f"Remedies: {layer.lengthen + '; ' if layer is not None and grace is None else ''}"
            "a faster tier in front, SpotGuard(['/fast/run', 's3://...'], ...); saving more often, every=..."
        )
        return False
