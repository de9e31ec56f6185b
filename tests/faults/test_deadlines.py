"""What is made of the seconds between a notice and the end: real time, a store that takes as long as it is told to."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable

import pytest

from faults.notified import Breaks, Slow, Told, Training, in_turn, memory
from spotguard import CheckpointStore, NoticeSource, PreemptionNotice
from spotguard.checkpoint.layout import MANIFESTS
from spotguard.events import GraceTooShort, NoticeWithdrawn, SaveFailed, SaveStarted
from spotguard.guard.last_word import LastWord
from spotguard.notices import AzureSource
from spotguard.stores import ObjectRef
from spotguard.testing.metadata import FakeAzure


def test_the_source_of_these_tests_is_a_notice_source() -> None:
    assert isinstance(Told(), NoticeSource)


def test_a_window_is_trained_through_between_a_first_save_and_a_last_one() -> None:
    training = Training()
    training.at_step = {5: lambda: training.guard.save(), 20: lambda: training.told.tell_in(4)}
    began = time.monotonic()
    assert training.run(100_000) == 143
    first, second, last = training.committed()
    assert first == 6
    assert 20 <= second <= 25, "the boundary after the notice"
    assert last == training.guard.step > second + 100, "the window was used"
    assert training.left_at < began + 5
    assert training.choices() == ["fresh"]
    assert (training.exit.state, training.exit.step, training.exit.notice) == ("preempted", last, "told")
    assert training.exit.checkpoint == training.guard.checkpoint.id  # type: ignore[union-attr]
    assert training.exit.exit_code == 143


def test_a_signal_is_no_window_somebody_waits_for_us_to_go() -> None:
    training = Training(grace="1h")
    training.at_step = {
        5: lambda: training.guard.save(),
        20: lambda: training.told.tell(kind="signal", detail="SIGTERM"),
    }
    assert training.run(100_000) == 143
    assert training.guard.step <= 25


def test_a_notice_that_is_withdrawn_in_its_window_costs_one_save_and_nothing_else() -> None:
    training = Training()
    training.at_step = {
        5: lambda: training.guard.save(),
        20: lambda: training.told.tell_in(60),
        60: lambda: training.told.tell(action="withdrawn", detail="the event is gone"),
    }
    assert training.run(100) is None
    assert [event.detail for event in training.events if isinstance(event, NoticeWithdrawn)] == ["the event is gone"]
    assert training.exit.state == "finished"
    assert len(training.committed()) == 3  # asked for, at the notice, at the end


@pytest.mark.parametrize("kind", ["rebalance", "maintenance"])
def test_a_hint_of_risk_is_a_save_and_training_goes_on(kind: str) -> None:
    training = Training()

    def hint() -> None:
        training.told.tell(kind=kind, action="save", detail="rebalance recommendation")

    training.at_step = {10: hint, 30: hint, 50: hint}  # a poller hears it again and again
    assert training.run(100) is None
    hinted, finished = training.committed()
    assert 10 <= hinted <= 12
    assert finished == 100


def test_where_a_save_does_not_fit_the_last_checkpoint_stands_and_the_reason_is_left_behind() -> None:
    store = Slow(memory(), 1.0)
    training = Training(store)
    training.at_step = {
        5: lambda: training.guard.save(),
        8: lambda: time.sleep(1.5),
        20: lambda: training.told.tell_in(1.0),
    }
    assert training.run() == 143
    assert training.choices() == ["none"]
    assert training.committed() == [6]
    assert training.left_at < time.monotonic()
    assert "a save takes" in training.exit.detail
    assert training.exit.checkpoint == CheckpointStore(store).latest().id  # type: ignore[union-attr]


def test_what_is_in_flight_is_finished_where_a_new_save_does_not_fit() -> None:
    store = Slow(memory(), 0.8)
    training = Training(store)
    training.at_step = {
        5: lambda: training.guard.save(),
        8: lambda: time.sleep(1.2),
        20: lambda: training.guard.save(),
        40: lambda: training.told.tell_in(1.6),
    }
    assert training.run() == 143
    assert training.choices() == ["flush"]
    assert training.committed() == [6, 21]
    assert "a save takes" in training.exit.detail


def test_what_was_in_flight_and_is_done_sooner_than_expected_leaves_time_for_another() -> None:
    store = Slow(memory(), 1.0)
    training = Training(store)

    def notice() -> None:
        store.seconds = 0.2
        training.guard.save()

    training.at_step = {
        5: lambda: training.guard.save(),
        8: lambda: time.sleep(1.5),
        20: notice,
        22: lambda: training.told.tell_in(2.0),
    }
    assert training.run() == 143
    assert training.choices() == ["flush"]
    assert training.committed() == [6, 21, training.guard.step]
    assert training.exit.detail == ""


def test_the_fast_tier_alone_takes_the_last_save_where_the_slow_one_would_not_be_done() -> None:
    fast, slow = memory(), Slow(memory(), 1.0)
    training = Training(fast, slow)
    training.at_step = {
        5: lambda: training.guard.save(),
        8: lambda: time.sleep(1.5),
        20: lambda: training.told.tell_in(1.2),
    }
    assert training.run() == 143
    assert training.choices() == ["fast tier"]
    assert CheckpointStore(fast).latest().step == training.guard.step  # type: ignore[union-attr]
    assert CheckpointStore(slow).latest().step == 6  # type: ignore[union-attr]


def test_nothing_becomes_visible_after_a_firm_deadline() -> None:
    store = Slow(memory())
    training = Training(store)

    def stall() -> None:
        store.seconds = 3.0  # nobody could know

    training.at_step = {5: lambda: training.guard.save(), 19: stall, 20: lambda: training.told.tell_in(1.0)}
    assert training.run() == 143
    assert training.exit.detail == "the last save was not done by the deadline"
    stood = [info.key for info in store.list(MANIFESTS)]
    store.go.set()
    time.sleep(0.5)  # the writer goes on to what would have been its commit
    assert [info.key for info in store.list(MANIFESTS)] == stood
    assert training.committed() == [6]


def test_what_the_platform_usually_leaves_is_no_reason_to_give_up_a_save() -> None:
    store = Slow(memory(), 0.5)
    training = Training(store)
    training.at_step = {
        5: lambda: training.guard.save(),
        8: lambda: time.sleep(0.8),
        20: lambda: training.told.tell(grace=0.3),
    }
    assert training.run() == 143
    assert training.committed() == [6, training.guard.step]


@pytest.mark.parametrize("seconds", [0.0, -60.0], ids=["now", "a minute ago"])
def test_a_deadline_that_has_passed_when_we_hear_of_it_is_no_reason_to_give_up_a_save(seconds: float) -> None:
    store = Slow(memory(), 0.5)
    training = Training(store)
    training.at_step = {
        5: lambda: training.guard.save(),
        8: lambda: time.sleep(0.8),
        20: lambda: training.told.tell_in(seconds),
    }
    assert training.run() == 143
    assert training.committed() == [6, 21]
    assert training.choices() == ["fresh"]
    assert training.exit.detail == ""


def test_a_deadline_that_passes_in_a_long_step_is_no_reason_either() -> None:
    training = Training(Slow(memory(), 0.2))
    training.at_step = {
        5: lambda: training.guard.save(),
        8: lambda: time.sleep(0.4),
        20: in_turn(lambda: training.told.tell_in(0.3), lambda: time.sleep(0.6)),
    }
    assert training.run() == 143
    assert training.committed() == [6, 21]


def test_the_first_save_of_a_window_is_tried_again_when_it_has_failed() -> None:
    store = Breaks(memory())
    training = Training(store)

    def notice() -> None:
        store.broken = True
        training.told.tell_in(6)

    def mend() -> None:
        training.wait_for(SaveFailed)
        store.broken = False

    training.at_step = {5: lambda: training.guard.save(), 20: notice, 60: mend}
    assert training.run(100_000) == 143
    first, again, last = training.committed()
    assert first == 6
    assert 60 < again < last - 100, "early in the window, not at its end"


def test_a_last_save_that_goes_on_failing_is_made_again_while_there_is_time() -> None:
    store = Breaks(memory())
    training = Training(store, grace="30s")

    def leave() -> None:
        store.broken = True
        training.on_event = lambda event: setattr(store, "broken", training.count(SaveFailed) < 3)
        os.kill(os.getpid(), signal.SIGTERM)

    training.at_step = {5: lambda: training.guard.save(), 20: leave}
    assert training.run(100_000) == 143
    assert training.committed() == [6, 21]
    assert training.count(SaveFailed) == 3
    assert training.exit.detail == ""


def test_a_store_that_goes_on_failing_is_not_tried_at_every_step() -> None:
    store = Breaks(memory())
    training = Training(store)

    def notice() -> None:
        store.broken = True
        training.told.tell_in(3)

    training.at_step = {5: lambda: training.guard.save(), 20: notice}
    assert training.run(100_000) == 143
    assert training.guard.step > 100
    assert training.count(SaveStarted) <= 8
    assert (training.exit.state, training.exit.checkpoint) == ("preempted", "0001-0000000006")
    assert training.exit.detail, "says why"


def test_where_a_save_is_in_flight_the_first_one_of_the_window_is_made_when_that_is_done() -> None:
    store = Slow(memory())
    training = Training(store)

    def save_slowly() -> None:
        store.seconds = 60
        training.guard.save()

    def let_go() -> None:
        store.seconds = 0
        store.go.set()

    training.at_step = {
        5: lambda: training.guard.save(),
        20: save_slowly,
        30: lambda: training.told.tell_in(4),
        90: let_go,
    }
    assert training.run(100_000) == 143
    _, in_flight, first, last = training.committed()
    assert in_flight == 21
    assert 90 <= first <= 95
    assert last == training.guard.step > first + 50


class SlowToDelete(Slow):
    """A store that takes its time over the deletes of retention, or over that of a request to stop."""

    def __init__(self, *, request: bool = False) -> None:
        super().__init__(memory(), 0.0)
        self._request = request

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        refs = list(refs)
        if ("stop" in [ref.key for ref in refs]) == self._request:
            self.go.wait(60)
        self._store.delete(refs)


def test_a_save_that_waits_for_the_deletes_behind_the_last_one_waits_no_longer_when_a_notice_comes() -> None:
    store = SlowToDelete()
    training = Training(store, every=10, keep=1)
    training.at_step = {41: lambda: training.told.tell_in(2.5)}
    assert training.run(100_000) == 143
    store.go.set()
    assert training.committed()[:3] == [10, 20, 30]
    assert training.committed()[-1] == training.guard.step
    assert training.exit.detail == ""


def test_a_long_window_has_its_periodic_saves_too() -> None:
    training = Training(every=50)
    training.at_step = {5: lambda: training.guard.save(), 20: lambda: training.told.tell_in(4)}
    assert training.run(100_000) == 143
    assert len(training.committed()) > 5


@pytest.mark.parametrize("what", ["deletes", "a request"])
def test_what_hangs_behind_the_last_save_does_not_hold_the_exit_back_beyond_the_deadline(what: str) -> None:
    store = SlowToDelete(request=what == "a request")
    training = Training(store, every=10, keep=1, grace="3s")
    until: list[float] = []

    def leave() -> None:
        until.append(time.monotonic() + 3)
        os.kill(os.getpid(), signal.SIGTERM)

    training.at_step = {25: leave}
    assert training.run(100_000) == 143
    assert training.left_at < until[0] + 2, "it would have waited for ever"
    assert training.exit.state == "preempted"
    store.go.set()


def test_after_a_deadline_that_was_missed_nothing_is_waited_for() -> None:
    store = SlowToDelete()
    training = Training(store, every=10, keep=1)
    until: list[float] = []

    def leave() -> None:
        store.seconds = 60
        until.append(time.monotonic() + 1)
        training.told.tell_in(1)

    training.at_step = {25: leave}
    assert training.run(100_000) == 143
    assert training.left_at < until[0] + 2
    store.go.set()


def test_a_grace_that_a_save_does_not_fit_into_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    store = Slow(memory(), 0.4)
    training = Training(store, every=15, grace="0.3s")
    assert training.run(80, step_s=0.02) is None
    (event,) = [event for event in training.events if isinstance(event, GraceTooShort)]
    assert event.needed_s > 0.4 > event.grace_s
    assert capsys.readouterr().err.count("WARNING: a final save takes about") == 1


def test_it_is_said_after_the_first_save_though_no_other_is_due() -> None:
    training = Training(Slow(memory(), 0.4), grace="0.3s")
    training.at_step = {25: lambda: training.guard.save()}
    assert training.run(200) is None
    assert training.count(GraceTooShort) == 1


def test_it_is_said_when_saves_have_become_longer() -> None:
    store = Slow(memory())
    training = Training(store, grace="0.6s", every=25)

    def slow_down() -> None:
        assert training.count(GraceTooShort) == 0, "the first ones did fit"
        store.seconds = 0.8

    training.at_step = {60: slow_down}
    assert training.run(250, step_s=0.01) is None
    assert training.count(GraceTooShort) == 1


class Asked:
    """Azure, and what stood in the run when it was told not to wait."""

    def __init__(self, azure: FakeAzure, *, acknowledge: bool = True) -> None:
        self.azure, self.before = azure, list[object]()
        self.training: Training | None = None
        azure.limit = 10_000
        self._source = AzureSource(azure.endpoint, 0.02, acknowledge=acknowledge)
        self.name = self._source.name

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        self._source.watch(emit, stop)

    def wake(self) -> None:
        self._source.wake()

    def confirm(self, notice: PreemptionNotice) -> None:
        assert self.training is not None
        self.before = [self.training.exit.state, self.training.committed()[-1]]
        self._source.confirm(notice)


@pytest.mark.parametrize("acknowledge", [True, False])
def test_azure_is_told_not_to_wait_when_the_last_save_is_durable_if_that_was_asked_for(*, acknowledge: bool) -> None:
    with FakeAzure() as azure:
        source = Asked(azure, acknowledge=acknowledge)
        training = source.training = Training(notices=[source])
        events: list[str] = []
        training.at_step = {20: lambda: events.append(azure.schedule("Preempt", in_s=4))}
        assert training.run(100_000) == 143
        assert azure.approved == (events if acknowledge else [])
        assert source.before == ["preempted", training.guard.step], "the record and the commit came first"


def test_azure_is_not_told_so_when_the_last_save_has_failed() -> None:
    store = Breaks(memory())
    with FakeAzure() as azure:
        source = Asked(azure)
        training = source.training = Training(store, notices=[source])
        training.at_step = {
            5: lambda: training.guard.save(),
            20: in_turn(lambda: setattr(store, "broken", True), lambda: azure.schedule("Preempt", in_s=3)),
        }
        assert training.run(100_000) == 143
        assert azure.approved == []


class Deaf(Told):
    """A source that never comes back from being told."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def confirm(self, notice: PreemptionNotice) -> None:
        self.go.wait(60)


def test_a_platform_that_does_not_answer_does_not_hold_the_exit_back() -> None:
    source = Deaf()
    training = Training(notices=[source])
    until: list[float] = []
    training.at_step = {
        20: in_turn(lambda: until.append(time.monotonic() + 2), lambda: source.tell_in(2)),
    }
    assert training.run(100_000) == 143
    source.go.set()
    assert training.left_at < until[0] + 2


def test_an_exception_in_the_loop_is_a_failed_attempt() -> None:
    training = Training()

    def fail() -> None:
        raise ZeroDivisionError("by zero")

    training.at_step = {5: lambda: training.guard.save(), 20: fail}
    with pytest.raises(ZeroDivisionError):
        training.run()
    assert (training.exit.state, training.exit.detail) == ("failed", "ZeroDivisionError: by zero")
    assert training.exit.checkpoint == training.guard.checkpoint.id  # type: ignore[union-attr]


def test_the_word_of_a_later_attempt_is_not_overwritten() -> None:
    training = Training()
    LastWord(training.stores[0], 2).say("finished", 30)
    LastWord(training.stores[0], 1).say("preempted", 10)
    assert training.exit.attempt == 2
