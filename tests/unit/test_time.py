"""Durations."""

import datetime as dt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotguard._time import format_seconds, parse_seconds, utc_now
from spotguard.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90.0),
        ("10m", 600.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        (" 2 H ", 7200.0),
        ("1.5h", 5400.0),
        ("250ms", 0.25),
        ("1d", 86400.0),
        ("1m500ms", 60.5),
        (30, 30.0),
        (0.5, 0.5),
        (dt.timedelta(minutes=2), 120.0),
    ],
)
def test_a_duration_is_read(text: Any, seconds: float) -> None:
    assert parse_seconds(text, argument="every") == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value",
    [0, 0.0, -1, "0s", "-5m", "", " ", "10", "ten", "10x", "10m later", "m10", "1,5h", "10 m!", float("inf"), float("nan"), True, None, [],
     dt.timedelta(0), dt.timedelta(-1)],
)  # fmt: skip
def test_what_is_no_duration_is_refused_by_the_name_of_its_argument(value: Any) -> None:
    with pytest.raises(ConfigError, match="grace"):
        parse_seconds(value, argument="grace")


@given(st.integers(1, 10**6), st.sampled_from(["ms", "s", "m", "h", "d"]))
def test_any_number_with_any_unit_is_read(number: int, unit: str) -> None:
    factor = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
    assert parse_seconds(f"{number}{unit}", argument="x") == pytest.approx(number * factor)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 ms"),
        (0.25, "250.0 ms"),
        (1, "1.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (7380, "2 h 3 min"),
    ],
)
def test_a_duration_is_shown_in_the_unit_a_person_would_use(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_wall_clock_times_know_their_zone() -> None:
    assert utc_now().utcoffset() == dt.timedelta(0)
