"""Time as people write it, in seconds as code needs it."""

import datetime as dt
import re

from spotguard.errors import ConfigError

__all__ = ["format_seconds", "parse_seconds", "utc_now"]

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")


def parse_seconds(value: str | float | dt.timedelta, *, argument: str) -> float:
    """Turn ``"10m"``, ``"1h30m"``, a number of seconds or a `timedelta` into seconds.

    Args:
        value: The duration.
        argument: Name of the argument it came from, for the error message.

    Returns:
        Seconds, finite and above zero.

    Raises:
        ConfigError: It is not a duration, or not above zero.

    Example:
        >>> parse_seconds("1h30m", argument="every")
        5400.0
    """
    if isinstance(value, dt.timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        text = value.strip().lower()
        parts = _PART.findall(text)
        if not parts or _PART.sub("", text).strip():
            raise ConfigError(f"{argument}={value!r} is not a duration; write it like '90s', '10m' or '1h30m'")
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{argument}={value!r} is not a duration; write it like '90s', '10m' or a timedelta")
    else:
        seconds = float(value)
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{argument}={value!r} must be a finite time above zero")
    return seconds


def format_seconds(seconds: float) -> str:
    """Show a duration in the unit a person would use.

    Example:
        >>> format_seconds(0.0042), format_seconds(75), format_seconds(7380)
        ('4.2 ms', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def utc_now() -> dt.datetime:
    """Wall-clock time, for records only. Deadlines use `time.monotonic`."""
    return dt.datetime.now(dt.timezone.utc)
