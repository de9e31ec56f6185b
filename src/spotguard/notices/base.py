"""A notice, and the protocol for where notices come from."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

__all__ = ["Action", "NoticeSource", "PreemptionNotice", "Wakeable"]

Action = Literal["stop", "save", "withdrawn"]
"""What a notice asks for: save and leave; save and go on; forget an earlier notice with the same source and id."""


@dataclasses.dataclass(frozen=True)
class PreemptionNotice:
    """The warning that this process will be stopped, or should stop, or is at risk.

    Attributes:
        source: Name of the source it came from.
        kind: ``"signal"``, ``"request"``, ``"preemption"``, ``"maintenance"`` or ``"rebalance"``.
        detail: What a person should read, such as ``"SIGTERM"``.
        deadline: Instant (monotonic seconds) by which we must be gone; None when nobody said.
        received: When we heard of it, monotonic seconds.
        action: What it asks for.
        id: Tells notices of one source apart: the same one is heard again and again by polling, and may be withdrawn.
        grace: Seconds that the platform leaves from `received` on, where it says so by its rules and not by a timestamp; the guard makes
            a deadline of it. None where nobody knows.
        firm: Whether `deadline` is somebody's word, to be kept to. A guess is not, nor is what was over when we heard of it: it is planned
            for, and a save that takes longer is not cut off.

    Example:
        >>> PreemptionNotice(source="signal", kind="signal", detail="SIGTERM").deadline is None
        True
    """

    source: str
    kind: str
    detail: str
    deadline: float | None = None
    received: float = dataclasses.field(default_factory=time.monotonic)
    action: Action = "stop"
    id: str = ""
    grace: float | None = None
    firm: bool = True

    def withdrawn(self) -> "PreemptionNotice":
        """The notice that this one does not stand any more."""
        return dataclasses.replace(
            self,
            action="withdrawn",
            detail=f"{self.detail}: withdrawn",
            deadline=None,
            grace=None,
            received=time.monotonic(),
        )


@runtime_checkable
class NoticeSource(Protocol):
    """Something that can tell of a preemption. To add one, write this one method."""

    name: str

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        """Watch until `stop` is set, calling `emit` for each notice. Runs in a thread of its own.

        Whatever goes wrong on the way is no news: only a notice may end training.
        """
        ...


@runtime_checkable
class Wakeable(Protocol):
    """A source whose `watch` waits for something else than its stop event, and can be told to look at it now."""

    def wake(self) -> None:
        """Make `watch` look at its stop event. Called from another thread."""
        ...
