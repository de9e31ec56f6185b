"""What an examination says."""

import dataclasses
from typing import Literal

__all__ = ["Finding", "Level"]

Level = Literal["ok", "info", "warning", "problem"]
"""As it should be; worth knowing; may cost work; will cost work, or the run does not start."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at, in a word that stays the same from release to release.
        level: How bad it is.
        what: What was found.
        fix: What to do about it; empty where there is nothing to do.

    Example:
        >>> Finding("disk", "ok", "40.0 GB are free").fix
        ''
    """

    check: str
    level: Level
    what: str
    fix: str = ""
