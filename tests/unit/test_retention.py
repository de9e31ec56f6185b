"""What to keep."""

import datetime as dt
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotguard.checkpoint import Manifest
from spotguard.errors import ConfigError
from spotguard.policies import (
    KeepAll,
    KeepBest,
    KeepNewest,
    KeepYoungerThan,
    RetentionPolicy,
    as_retention_policy,
    metrics_of,
)

NOW = dt.datetime(2026, 1, 31, tzinfo=dt.timezone.utc)


def manifests(*losses: float | None) -> list[Manifest]:
    """One a day, the last of today, at steps 1, 2, 3, ..."""
    return [
        Manifest(
            run_id="r",
            attempt=1,
            step=number,
            metrics={} if loss is None else {"loss": loss},
            created_at=NOW - dt.timedelta(days=len(losses) - number),
            shards=(),
        )
        for number, loss in enumerate(losses, start=1)
    ]


def kept(policy: RetentionPolicy, *losses: float | None) -> list[int]:
    return sorted(identity.step for identity in policy.keep(manifests(*losses), now=NOW))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (KeepAll(), [1, 2, 3, 4, 5]),
        (KeepNewest(2), [4, 5]),
        (KeepNewest(99), [1, 2, 3, 4, 5]),
        (KeepBest(2, "loss"), [1, 4]),
        (KeepBest(2, "loss", mode="max"), [2, 3]),
        (KeepBest(2, "accuracy"), []),
        (KeepYoungerThan("36h"), [4, 5]),
        (KeepYoungerThan(dt.timedelta(days=1)), [5]),
        (KeepBest(3, "loss") & KeepNewest(3), [4, 5]),
        (KeepBest(1, "loss") | KeepNewest(1), [4, 5]),
        (KeepBest(2, "loss") & KeepYoungerThan("90d") | KeepNewest(1), [1, 4, 5]),
        (KeepNewest(1) | KeepBest(2, "loss") & KeepNewest(2), [4, 5]),
        (KeepAll() & KeepNewest(2) & KeepBest(2, "loss"), [4]),
    ],
)
def test_a_policy_keeps(policy: RetentionPolicy, expected: list[int]) -> None:
    assert kept(policy, 0.3, 0.9, 0.5, 0.1, 0.4) == expected


def test_of_equals_the_newer_is_the_better() -> None:
    assert kept(KeepBest(1, "loss"), 0.5, 0.5, 0.5) == [3]
    assert kept(KeepBest(2, "loss", mode="max"), 0.5, 0.5, 0.5) == [2, 3]


def test_a_checkpoint_without_a_number_is_never_among_the_best() -> None:
    assert kept(KeepBest(3, "loss"), math.nan, 0.5, None) == [2]
    assert kept(KeepBest(1, "loss", mode="max"), math.nan, 0.5, None) == [2]


def test_infinite_metrics_have_their_place() -> None:
    assert kept(KeepBest(1, "loss"), math.inf, -math.inf, 0.0) == [2]
    assert kept(KeepBest(1, "loss", mode="max"), math.inf, -math.inf, 0.0) == [1]


@pytest.mark.parametrize("policy", [KeepAll(), KeepNewest(1), KeepBest(1, "loss"), KeepYoungerThan("1d")])
def test_of_nothing_nothing_is_kept(policy: RetentionPolicy) -> None:
    assert kept(policy) == []
    assert kept(policy & policy | policy) == []  # type: ignore[operator]


@given(st.lists(st.floats(allow_nan=True) | st.none(), max_size=12), st.integers(1, 12), st.integers(1, 12))
def test_and_keeps_what_both_keep_and_or_what_either_keeps(losses: list[float | None], best: int, newest: int) -> None:
    left, right = KeepBest(best, "loss"), KeepNewest(newest)
    assert set(kept(left & right, *losses)) == set(kept(left, *losses)) & set(kept(right, *losses))
    assert set(kept(left | right, *losses)) == set(kept(left, *losses)) | set(kept(right, *losses))


def test_a_policy_tells_by_which_metrics_it_goes() -> None:
    assert metrics_of(KeepBest(3, "loss") & KeepYoungerThan("1d") | KeepBest(2, "accuracy")) == {"loss", "accuracy"}
    assert metrics_of(KeepNewest(3)) == set()


def test_shorthand_is_accepted() -> None:
    assert as_retention_policy(3) == KeepNewest(3)
    assert as_retention_policy(KeepAll()) == KeepAll()


@pytest.mark.parametrize("keep", [0, -1, True, 2.0, "3", None, object()])
def test_what_is_no_policy_is_refused(keep: Any) -> None:
    with pytest.raises(ConfigError, match=r"keep|Keep"):
        as_retention_policy(keep)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: KeepNewest(0), "KeepNewest"),
        (lambda: KeepNewest(True), "KeepNewest"),
        (lambda: KeepBest(0, "loss"), "KeepBest"),
        (lambda: KeepBest(1, "loss", mode="lowest"), "mode"),
        (lambda: KeepYoungerThan("soon"), "age"),
        (lambda: KeepYoungerThan(0), "age"),
        (lambda: KeepNewest(1) | "two", "retention policy"),  # type: ignore[operator]
        (lambda: KeepNewest(1) & None, "retention policy"),  # type: ignore[operator]
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_when_it_is_made(make: Any, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        make()
