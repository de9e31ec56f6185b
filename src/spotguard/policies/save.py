"""When to save. A policy is asked once after each save, never per step: the answer is the next step or instant that is due."""

import dataclasses
import datetime as dt
import math
import re
from typing import NamedTuple, Protocol

from spotguard._time import parse_seconds
from spotguard.errors import ConfigError

__all__ = [
    "AutoInterval",
    "Due",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "SavePoint",
    "SavePolicy",
    "as_save_policy",
]


class SavePoint(NamedTuple):
    """What a policy knows when it is asked.

    Attributes:
        step: Step of the last save, or of the start.
        time: When that was, seconds on the monotonic clock.
        stall_s: How long the last save stopped the loop; 0.0 before the first.
        write_s: How long the last save took to become durable; 0.0 before the first.
        epoch: Epochs completed.
    """

    step: int
    time: float
    stall_s: float = 0.0
    write_s: float = 0.0
    epoch: int = 0


class Due(NamedTuple):
    """The next save: at this step, at this instant (monotonic seconds), or when so many epochs are done, whichever comes first."""

    step: float = math.inf
    time: float = math.inf
    epoch: float = math.inf


class SavePolicy(Protocol):
    """Says when the next save is due."""

    def next_due(self, last: SavePoint) -> Due:
        """The next save, seen from the last one."""
        ...


class _Either:
    def __or__(self: SavePolicy, other: SavePolicy) -> "_AnyOf":
        return _AnyOf((self, as_save_policy(other)))


@dataclasses.dataclass(frozen=True)
class _AnyOf(_Either):
    policies: tuple[SavePolicy, ...]

    def next_due(self, last: SavePoint) -> Due:
        dues = [policy.next_due(last) for policy in self.policies]
        return Due(min(due.step for due in dues), min(due.time for due in dues), min(due.epoch for due in dues))


@dataclasses.dataclass(frozen=True)
class EverySteps(_Either):
    """Save every so many steps, counted from step 0, so that the steps are the same in every attempt.

    Example:
        >>> EverySteps(500).next_due(SavePoint(step=620, time=0.0)).step
        1000
    """

    steps: int

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigError(f"every={self.steps!r}: a number of steps must be a whole number of at least 1")

    def next_due(self, last: SavePoint) -> Due:
        """The next multiple of `steps`."""
        return Due(step=(last.step // self.steps + 1) * self.steps)


@dataclasses.dataclass(frozen=True)
class EveryEpochs(_Either):
    """Save at the end of every so many epochs, behind the code that belongs to the epoch.

    Example:
        >>> EveryEpochs(2).next_due(SavePoint(step=620, time=0.0, epoch=3)).epoch
        4
    """

    epochs: int

    def __post_init__(self) -> None:
        if type(self.epochs) is not int or self.epochs < 1:
            raise ConfigError(f"EveryEpochs({self.epochs!r}): a number of epochs must be a whole number of at least 1")

    def next_due(self, last: SavePoint) -> Due:
        """The end of the next epoch whose number is a multiple of `epochs`."""
        return Due(epoch=(last.epoch // self.epochs + 1) * self.epochs)


@dataclasses.dataclass(frozen=True)
class EverySeconds(_Either):
    """Save when so many seconds have passed since the last save.

    Example:
        >>> EverySeconds(600.0).next_due(SavePoint(step=7, time=1000.0)).time
        1600.0
        >>> EverySteps(100) | EverySeconds(60)  # whichever comes first
        _AnyOf(policies=(EverySteps(steps=100), EverySeconds(seconds=60.0)))
    """

    seconds: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", parse_seconds(self.seconds, argument="every"))

    def next_due(self, last: SavePoint) -> Due:
        """`seconds` after the last save."""
        return Due(time=last.time + self.seconds)


@dataclasses.dataclass(frozen=True)
class AutoInterval(_Either):
    """Save as often as pays, from the measured stall: Young's interval, ``sqrt(2 * stall * mtbf)``.

    Source: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974. The interval is kept
    between what bounds the overhead and the time to write a checkpoint on one side, and `longest` on the other.

    Args:
        mtbf: Mean time in seconds between interruptions that come without a usable notice.
        overhead: Largest share of the time that may go into stalls.
        longest: Never wait longer than this many seconds.

    Example:
        >>> policy = AutoInterval(mtbf=4 * 3600.0)
        >>> round(policy.next_due(SavePoint(step=9, time=0.0, stall_s=0.5, write_s=20.0)).time)
        120
    """

    mtbf: float = 4 * 3600.0
    overhead: float = 0.02
    longest: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("mtbf", "longest"):
            object.__setattr__(self, name, parse_seconds(getattr(self, name), argument=f"AutoInterval({name})"))
        if not 0 < self.overhead < 1:
            raise ConfigError(f"AutoInterval(overhead={self.overhead!r}) must be a share between 0 and 1, such as 0.02")

    def next_due(self, last: SavePoint) -> Due:
        """Young's interval after the last save; one minute after the start, when nothing has been measured."""
        if last.stall_s <= 0:
            return Due(time=last.time + min(60.0, self.longest))
        floor = max(last.stall_s * (1 - self.overhead) / self.overhead, last.write_s)
        return Due(time=last.time + min(max(math.sqrt(2 * last.stall_s * self.mtbf), floor), self.longest))


def as_save_policy(every: "SavePolicy | int | float | str | dt.timedelta") -> SavePolicy:
    """Accept the shorthand: ``500`` is steps, ``"10m"`` or a timedelta is time, ``"1 epoch"`` is epochs, ``"auto"`` is `AutoInterval`.

    Raises:
        ConfigError: None of these.

    Example:
        >>> as_save_policy(500), as_save_policy("10m")
        (EverySteps(steps=500), EverySeconds(seconds=600.0))
    """
    if isinstance(every, (bool, float)):
        raise ConfigError(
            f"every={every!r}: write steps as a whole number (every=500) and time with its unit (every='10m')"
        )
    if isinstance(every, int):
        return EverySteps(every)
    if isinstance(every, str):
        text = every.strip()
        if text == "auto":
            return AutoInterval()
        if epochs := re.fullmatch(r"(\d+)\s*epochs?", text):
            return EveryEpochs(int(epochs[1]))
        return (
            EverySteps(int(text))
            if text.lstrip("-").isdecimal()
            else EverySeconds(parse_seconds(text, argument="every"))
        )
    if isinstance(every, dt.timedelta):
        return EverySeconds(parse_seconds(every, argument="every"))
    if callable(getattr(every, "next_due", None)):
        return every
    raise ConfigError(
        f"every={every!r} is not a save policy; write every=500, every='10m' or EverySteps(500) | EverySeconds(60)"
    )
