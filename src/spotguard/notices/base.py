"""A notice, and the protocol for where notices come from."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

__all__ = ["NoticeSource", "PreemptionNotice", "Wakeable"]


@dataclasses.dataclass(frozen=True)
class PreemptionNotice:
    """The warning that this process will be stopped, or should stop.

    Attributes:
        source: Name of the source it came from.
        kind: ``"signal"`` or ``"request"``.
        detail: What a person should read, such as ``"SIGTERM"``.
        deadline: Instant (monotonic seconds) by which we must be gone; None when nobody said.
        received: When we heard of it, monotonic seconds.

    Example:
        >>> PreemptionNotice(source="signal", kind="signal", detail="SIGTERM").deadline is None
        True
    """

    source: str
    kind: str
    detail: str
    deadline: float | None = None
    received: float = dataclasses.field(default_factory=time.monotonic)


@runtime_checkable
class NoticeSource(Protocol):
    """Something that can tell of a preemption. To add one, write this one method."""

    name: str

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        """Watch until `stop` is set, calling `emit` for each notice. Runs in a thread of its own."""
        ...


@runtime_checkable
class Wakeable(Protocol):
    """A source whose `watch` waits for something else than its stop event, and can be told to look at it now."""

    def wake(self) -> None:
        """Make `watch` look at its stop event. Called from another thread."""
        ...
