"""What an examination says."""

import dataclasses
from typing import Literal

__all__ = ["NETWORK", "Finding", "Level", "kind_of_machine", "standing"]

Level = Literal["ok", "info", "warning", "problem"]
"""As it should be; worth knowing; may cost work; will cost work, or the run does not start."""

NETWORK = "allow the address of the service in the network policy and the firewall; without it only signals are heard"
"""What to do where a metadata service does not answer."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at, in a word that stays the same from release to release.
        level: How bad it is.
        what: What was found.
        fix: What to do about it; a warning and a problem have one, elsewhere it may be empty.

    Raises:
        ValueError: A warning or a problem without a fix.

    Example:
        >>> Finding("disk", "ok", "40.0 GB are free").fix
        ''
    """

    check: str
    level: Level
    what: str
    fix: str = ""

    def __post_init__(self) -> None:
        if self.level in ("warning", "problem") and not self.fix:
            raise ValueError(f"{self.check}: a {self.level} says what to do about it")


def kind_of_machine(*, spot: bool, said: str) -> Finding:
    """Whether anybody preempts this machine.

    Args:
        spot: Whether it is a spot machine.
        said: How its cloud puts it.
    """
    if spot:
        return Finding("machine", "ok", f"this is a spot machine ({said})")
    return Finding("machine", "info", f"this is not a spot machine ({said}): nobody preempts it")


def standing(who: str, what: str) -> Finding:
    """A notice that stands already."""
    text = f"a notice of {who} stands: {what}"
    return Finding("notice", "warning", text, "start nothing new here: the guard would save it, and leave when it must")
