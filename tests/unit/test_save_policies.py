"""When to save."""

import datetime as dt
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotguard.errors import ConfigError
from spotguard.policies import AutoInterval, Due, EveryEpochs, EverySeconds, EverySteps, SavePoint, as_save_policy


@given(step=st.integers(0, 10**12), every=st.integers(1, 10**6))
def test_every_steps_is_due_at_the_next_multiple(step: int, every: int) -> None:
    due = EverySteps(every).next_due(SavePoint(step=step, time=0.0))
    assert step < due.step <= step + every
    assert due.step % every == 0
    assert due.time == math.inf


@given(time=st.floats(0, 1e9), seconds=st.floats(0.001, 1e6))
def test_every_seconds_is_due_so_long_after_the_last(time: float, seconds: float) -> None:
    assert EverySeconds(seconds).next_due(SavePoint(step=3, time=time)) == Due(time=time + seconds)


@given(epoch=st.integers(0, 10**6), every=st.integers(1, 10**3))
def test_every_epochs_is_due_at_the_end_of_the_next_multiple(epoch: int, every: int) -> None:
    due = EveryEpochs(every).next_due(SavePoint(step=3, time=0.0, epoch=epoch))
    assert epoch < due.epoch <= epoch + every
    assert due.epoch % every == 0
    assert (due.step, due.time) == (math.inf, math.inf)


@pytest.mark.parametrize(("written", "epochs"), [("1 epoch", 1), (" 2 epochs", 2), ("10epochs", 10)])
def test_epochs_may_be_written_as_people_write_them(written: str, epochs: int) -> None:
    assert as_save_policy(written) == EveryEpochs(epochs)


def test_epochs_and_steps_may_be_due_whichever_comes_first() -> None:
    policy = EverySteps(100) | EveryEpochs(1)
    assert policy.next_due(SavePoint(step=70, time=0.0, epoch=2)) == Due(step=100, epoch=3)


def test_of_several_policies_the_first_that_is_due_counts() -> None:
    policy = EverySteps(100) | EverySeconds(60) | EverySteps(30)
    assert policy.next_due(SavePoint(step=70, time=1000.0)) == Due(step=90, time=1060.0)


def test_the_automatic_interval_is_youngs() -> None:
    policy = AutoInterval(mtbf=7200.0)
    assert policy.next_due(SavePoint(step=0, time=10.0, stall_s=1.0)).time == pytest.approx(10 + math.sqrt(2 * 7200))


@pytest.mark.parametrize(
    ("stall", "write", "longest", "expected"),
    [
        (0.0, 0.0, 1800.0, 60.0),  # nothing measured yet
        (0.0, 0.0, 30.0, 30.0),
        (100.0, 0.0, 1e9, 4900.0),  # 2 % overhead
        (0.001, 500.0, 1800.0, 500.0),  # never faster than the writer
        (1000.0, 0.0, 1800.0, 1800.0),  # the longest wins
    ],
)
def test_the_automatic_interval_is_bounded(stall: float, write: float, longest: float, expected: float) -> None:
    policy = AutoInterval(mtbf=3600.0, longest=longest)
    assert policy.next_due(SavePoint(step=1, time=0.0, stall_s=stall, write_s=write)).time == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shorthand", "policy"),
    [
        (500, EverySteps(500)),
        ("500", EverySteps(500)),
        ("10m", EverySeconds(600.0)),
        (" 90 s ", EverySeconds(90.0)),
        (dt.timedelta(hours=1), EverySeconds(3600.0)),
        ("auto", AutoInterval()),
        (EverySteps(2), EverySteps(2)),
    ],
)
def test_shorthand_is_accepted(shorthand: Any, policy: Any) -> None:
    assert as_save_policy(shorthand) == policy


@pytest.mark.parametrize("policy", [EverySeconds("10m"), EverySeconds(dt.timedelta(minutes=10))])  # type: ignore[arg-type]
def test_a_duration_in_a_policy_may_be_written_as_people_write_it(policy: EverySeconds) -> None:
    assert policy.next_due(SavePoint(step=0, time=1.0)).time == 601.0


def test_the_durations_of_the_automatic_interval_may_be_written_as_people_write_them() -> None:
    policy = AutoInterval(mtbf="2h", longest="30m")  # type: ignore[arg-type]
    assert policy.next_due(SavePoint(step=0, time=0.0, stall_s=1.0)).time == pytest.approx(math.sqrt(2 * 7200))


@pytest.mark.parametrize(
    "every", [0, -1, True, 1.5, "0", "-5", "0s", "10 parsecs", "", None, [], object(), dt.timedelta(0)]
)
def test_what_is_no_policy_is_refused_by_the_name_of_the_argument(every: Any) -> None:
    with pytest.raises(ConfigError, match="every"):
        as_save_policy(every)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: EverySteps(0), "every"),
        (lambda: EverySteps(1.0), "every"),  # type: ignore[arg-type]
        (lambda: EverySeconds(0), "every"),
        (lambda: EverySeconds(math.nan), "every"),
        (lambda: AutoInterval(mtbf=0), "mtbf"),
        (lambda: AutoInterval(longest=math.inf), "longest"),
        (lambda: AutoInterval(overhead=0), "overhead"),
        (lambda: AutoInterval(overhead=1), "overhead"),
        (lambda: AutoInterval(overhead=math.nan), "overhead"),
        (lambda: EverySteps(1) | object(), "save policy"),  # type: ignore[operator]
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_when_it_is_made(make: Any, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        make()


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, "0 epochs"])
def test_a_number_of_epochs_that_makes_no_sense_is_refused(epochs: Any) -> None:
    with pytest.raises(ConfigError, match="epochs"):
        as_save_policy(epochs) if isinstance(epochs, str) else EveryEpochs(epochs)


def test_policies_compare_and_print_by_value() -> None:
    assert EverySteps(5) == EverySteps(5)
    assert EverySteps(5) != EverySteps(6)
    assert (
        repr(EverySteps(5) | EverySeconds(60)) == "_AnyOf(policies=(EverySteps(steps=5), EverySeconds(seconds=60.0)))"
    )
