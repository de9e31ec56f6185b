"""How long we have: from the notice, from what the user says, or from what is known of the platform, in this order."""

import dataclasses
from typing import NamedTuple

from spotguard.notices import PreemptionNotice
from spotguard.notices.platforms import Platform, reserve_of

__all__ = ["Budget", "Deadline"]


class Deadline(NamedTuple):
    """The instant by which everything has to be done.

    Attributes:
        at: Monotonic seconds; the reserve is taken off.
        firm: Somebody said so: nothing is begun that would end later. Otherwise it is what the platform usually leaves, which may be wrong
            in this place; the plan is made for it, and a save that takes longer is not cut off.
    """

    at: float
    firm: bool


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
        if ends:
            return Deadline(min(ends) - reserve_of(min(ends) - notice.received), firm=True)
        usual = notice.grace if notice.grace is not None else self.platform.grace_s
        if usual is None or not self._is_hurried(notice):
            return None
        return Deadline(notice.received + usual - reserve_of(usual), firm=False)

    @property
    def least(self) -> float | None:
        """The shortest time that a stop may leave us, in seconds, with the reserve taken off."""
        grace = self.grace_s if self.grace_s is not None else self.platform.grace_s
        return None if grace is None else grace - reserve_of(grace)

    @staticmethod
    def _is_hurried(notice: PreemptionNotice) -> bool:
        return notice.kind not in ("request",) and notice.detail != "SIGINT"
