"""How slow the store is made: ``--slow-store``."""

import dataclasses
import re

from spotguard._time import format_seconds, parse_seconds
from spotguard.errors import ConfigError

__all__ = ["SlowStore"]

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*(kB|MB|GB)/s", re.IGNORECASE)
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9}


@dataclasses.dataclass(frozen=True)
class SlowStore:
    """A store that takes its time to write.

    Attributes:
        latency_s: Seconds for every object.
        bytes_per_s: For all objects together; None for as fast as it is.

    Example:
        >>> SlowStore.parse("10MB/s"), str(SlowStore.parse("2s"))
        (SlowStore(latency_s=0.0, bytes_per_s=10000000.0), '2.0 s for every object')
    """

    latency_s: float = 0.0
    bytes_per_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> "SlowStore":
        """Read what a user writes: a duration, or a rate.

        Raises:
            ConfigError: It is neither.
        """
        if (rate := _RATE.fullmatch(text.strip())) is not None and float(rate[1]) > 0:
            return cls(bytes_per_s=float(rate[1]) * _UNITS[rate[2].lower()])
        try:
            return cls(latency_s=parse_seconds(text, argument="--slow-store"))
        except ConfigError as error:
            raise ConfigError(
                f"--slow-store={text!r}: write a time for every object, such as 2s, or a rate, such as 10MB/s"
            ) from error

    @property
    def text(self) -> str:
        """As a user writes it."""
        return f"{self.latency_s:g}s" if self.bytes_per_s is None else f"{self.bytes_per_s / 1e6:g}MB/s"

    def __str__(self) -> str:
        if self.bytes_per_s is None:
            return f"{format_seconds(self.latency_s)} for every object"
        return f"{self.bytes_per_s / 1e6:g} MB/s"
