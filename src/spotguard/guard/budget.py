"""How long we have: from the notice, from what the user says, or from what is known of the platform, in this order."""

import dataclasses
import math
import time
from collections.abc import Iterable
from typing import NamedTuple

from spotguard.notices import PreemptionNotice
from spotguard.notices.platforms import Platform, reserve_of

__all__ = ["Budget", "Deadline", "Outlook"]


class Deadline(NamedTuple):
    """The instant by which everything has to be done.

    Attributes:
        at: Monotonic seconds; the reserve is taken off.
        firm: Somebody said so: nothing becomes visible later. Otherwise it is what the platform usually leaves, which may be wrong
            in this place; the plan is made for it, and a save that takes longer is not cut off.
    """

    at: float
    firm: bool


class Outlook(NamedTuple):
    """What all the notices that stand come to.

    Attributes:
        at: Instant (monotonic seconds) that the last save is planned for: the earliest; None where nobody knows, or is in a hurry.
        firm: Instant after which nothing becomes visible; None where nobody has named one, or it has passed and we are still here.
        window: Whether the time up to then is ours to train in: not where somebody waits for us to go.
        stop: Whether any of them asks us to go.
    """

    at: float | None = None
    firm: float | None = None
    window: bool = False
    stop: bool = False


@dataclasses.dataclass(frozen=True)
class Budget:
    """What is known before any notice comes.

    Attributes:
        platform: Where we are.
        grace_s: What the user says we have, in seconds.

    Example:
        >>> notice = PreemptionNotice(source="signal", kind="signal", detail="SIGTERM", received=1000.0)
        >>> Budget(Platform()).deadline_of(notice) is None
        True
        >>> Budget(Platform(), grace_s=30.0).deadline_of(notice)
        Deadline(at=1025.0, firm=True)
    """

    platform: Platform
    grace_s: float | None = None

    def deadline_of(self, notice: PreemptionNotice) -> Deadline | None:
        """When we must be done; None where nobody knows, or nobody is in a hurry."""
        if notice.action != "stop":
            return None
        ends = [notice.deadline] if notice.deadline is not None else []
        if self.grace_s is not None and self._is_hurried(notice):
            ends.append(notice.received + self.grace_s)
        # It had passed when we heard of it: we may go at any moment, and we may not.
        if ends and min(ends) <= notice.received:
            return Deadline(min(ends), firm=False)
        if ends:
            firm = notice.firm or min(ends) != notice.deadline  # then it is the user's word
            return Deadline(min(ends) - reserve_of(min(ends) - notice.received), firm)
        usual = self.platform.signal_s if notice.kind == "signal" else self.platform.grace_s
        usual = notice.grace if notice.grace is not None else usual
        if usual is None or not self._is_hurried(notice):
            return None
        return Deadline(notice.received + usual - reserve_of(usual), firm=False)

    def outlook(self, standing: Iterable[PreemptionNotice]) -> Outlook:
        """What notices come to together. One of them that is withdrawn leaves the others as they are."""
        stops = [notice for notice in standing if notice.action == "stop"]
        deadlines = [deadline for notice in stops if (deadline := self.deadline_of(notice)) is not None]
        now = time.monotonic()
        return Outlook(
            at=min((deadline.at for deadline in deadlines), default=None),
            firm=min((deadline.at for deadline in deadlines if deadline.firm and deadline.at > now), default=None),
            window=bool(stops) and all(map(_opens_window, stops)),
            stop=bool(stops),
        )

    def urgency(self, notice: PreemptionNotice) -> tuple[int, float]:
        """Order of notices: a stop that somebody waits for, any other stop, a save; then by deadline."""
        deadline = self.deadline_of(notice)
        rank = 2 if notice.action != "stop" else 1 if _opens_window(notice) else 0
        return rank, math.inf if deadline is None else deadline.at

    @property
    def least(self) -> float | None:
        """The shortest time that a stop may leave us, in seconds, with the reserve taken off."""
        grace = self.grace_s if self.grace_s is not None else self.platform.grace_s
        return None if grace is None else grace - reserve_of(grace)

    @staticmethod
    def _is_hurried(notice: PreemptionNotice) -> bool:
        return notice.kind not in ("request",) and notice.detail != "SIGINT"


def _opens_window(notice: PreemptionNotice) -> bool:
    """Whether it leaves a time of its own, and nobody waits for us to go before that is over."""
    return (notice.deadline is not None or notice.grace is not None) and notice.kind not in ("signal", "request")
