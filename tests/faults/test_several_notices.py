"""Several notices at once: the earliest deadline counts, who waits for us is not kept waiting, and each is withdrawn by itself."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from faults.notified import Slow, Told, Training, in_turn, memory
from spotguard import PreemptionNotice
from spotguard.events import NoticeReceived, NoticeWithdrawn
from spotguard.stores import ObjectStore
from spotguard.stores.base import ObjectInfo


def interrupt(_: ObjectStore) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate(_: ObjectStore) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def request(store: ObjectStore) -> None:
    with store.create("stop"):
        pass


@pytest.mark.parametrize(
    ("ask", "said"),
    [(terminate, "SIGTERM"), (interrupt, "SIGINT"), (request, "a request to stop")],
    ids=["SIGTERM", "Ctrl-C", "spotguard stop"],
)
def test_an_open_window_is_closed_by(
    ask: Callable[[ObjectStore], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOTGUARD_POLL_S", "0.01")
    training = Training()

    def close() -> None:
        ask(training.stores[0])
        training.wait_for(NoticeReceived, 2)

    training.at_step = {
        5: lambda: training.guard.save(),
        20: lambda: training.told.tell_in(300),
        60: close,
    }
    assert training.run(100_000) == 143
    assert training.guard.step == 61
    assert (training.exit.notice, training.exit.step) == (said, 61)
    assert training.committed()[-1] == 61


def test_a_window_that_opens_behind_a_signal_does_not_keep_us() -> None:
    training = Training(grace="1h")

    def both() -> None:
        terminate(training.stores[0])
        training.told.tell_in(300)

    training.at_step = {20: both}
    assert training.run(100_000) == 143
    assert training.guard.step == 21


def test_the_earliest_deadline_of_all_counts() -> None:
    training = Training()
    until: list[float] = []

    def sooner() -> None:
        until.append(time.monotonic() + 3)
        training.told.tell_in(3, id="2", detail="sooner")

    training.at_step = {5: lambda: training.guard.save(), 20: lambda: training.told.tell_in(300), 60: sooner}
    assert training.run(100_000) == 143
    assert training.guard.step > 100, "both leave time to train"
    assert training.left_at < until[0] + 2
    assert training.exit.notice == "sooner"


@pytest.mark.parametrize("gone", ["1", "2"], ids=["the later one", "the earlier one"])
def test_of_two_notices_one_is_withdrawn_and_the_other_stands(gone: str) -> None:
    training = Training()

    def withdraw() -> None:
        training.told.tell(id=gone, action="withdrawn", detail="gone")

    training.at_step = {
        5: lambda: training.guard.save(),
        20: in_turn(
            lambda: training.told.tell_in(8, id="1", detail="one"),
            lambda: training.told.tell_in(4, id="2", detail="two"),
        ),
        60: withdraw,
    }
    assert training.run(100_000) == 143
    assert training.exit.notice == {"1": "two", "2": "one"}[gone]
    assert training.count(NoticeWithdrawn) == 1


def test_when_all_are_withdrawn_the_run_comes_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    training = Training()
    training.at_step = {
        20: in_turn(lambda: training.told.tell_in(300, id="1"), lambda: training.told.tell_in(200, id="2")),
        40: lambda: training.told.tell(id="2", action="withdrawn", detail="gone"),
        60: lambda: training.told.tell(id="1", action="withdrawn", detail="gone"),
    }
    assert training.run(100) is None
    said = capsys.readouterr().err
    assert said.index("gone; another one stands") < said.index("gone; training goes on")
    assert training.exit.state == "finished"


@pytest.mark.parametrize("kind", ["preemption", "maintenance"])
def test_a_stop_with_a_time_of_its_own_is_a_window_whatever_its_kind(kind: str) -> None:
    training = Training()
    training.at_step = {
        5: lambda: training.guard.save(),
        20: lambda: training.told.tell_in(3, kind=kind, detail="Azure: Reboot"),
    }
    assert training.run(100_000) == 143
    assert training.guard.step > 100


def test_a_stop_that_names_no_time_is_obeyed_at_once() -> None:
    training = Training(grace="1h")
    training.at_step = {
        20: lambda: training.told.tell(kind="preemption", detail="Auto Scaling terminates this instance")
    }
    assert training.run(100_000) == 143
    assert training.guard.step == 21


def test_a_notice_without_an_id_that_is_heard_again_and_again_is_one() -> None:
    training = Training()

    def many() -> None:
        for _ in range(50):
            training.told.tell_in(300, id="")
        training.threads = [thread.name for thread in threading.enumerate()]  # type: ignore[attr-defined]

    training.at_step = {
        5: lambda: training.guard.save(),
        20: many,
        40: lambda: training.told.tell(id="", action="withdrawn"),
    }
    assert training.run(60) is None
    assert training.count(NoticeReceived) == 1
    assert training.threads.count("spotguard-stand-by") == 1  # type: ignore[attr-defined]


def test_a_hint_of_risk_does_not_have_the_loop_wait_for_a_save_in_flight() -> None:
    store = Slow(memory(), 60)
    training = Training(store)
    training.at_step = {
        5: lambda: training.guard.save(),
        10: lambda: training.told.tell(kind="rebalance", action="save"),
        60: in_turn(store.go.set, training.wait_for_commit),
        80: lambda: training.wait_for_commit(2),
    }
    assert training.run(100) is None
    first, hinted, finished = training.committed()
    assert (first, finished) == (6, 100)
    assert 60 < hinted <= 80, "once the save before was done"


class Already(Told):
    """One that has told of a notice before anything is read from the store."""

    def __init__(self, in_s: float | None) -> None:
        super().__init__()
        self._in_s, self.told = in_s, threading.Event()

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        deadline = None if self._in_s is None else time.monotonic() + self._in_s
        emit(PreemptionNotice(source=self.name, kind="preemption", detail="told", id="1", deadline=deadline))
        self.told.set()
        super().watch(emit, stop)


class Waits(Slow):
    def __init__(self, store: ObjectStore, told: threading.Event) -> None:
        super().__init__(store)
        self._told = told

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        assert self._told.wait(60)
        return self._store.list(prefix)


def test_a_notice_that_stands_at_the_start_and_leaves_time_is_trained_with() -> None:
    source = Already(3600)
    training = Training(Waits(memory(), source.told), notices=[source])
    training.at_step = {60: lambda: source.tell(action="withdrawn", detail="gone")}
    assert training.run(100) is None
    first, finished = training.committed()
    assert first <= 60, "nothing is known of saves yet: the first one of the window tells"
    assert finished == 100


def test_a_notice_that_stands_at_the_start_and_leaves_none_is_obeyed_before_the_first_step() -> None:
    source = Already(None)
    training = Training(Waits(memory(), source.told), notices=[source])
    assert training.run(100) == 143
    assert training.guard.step == 0
    assert training.exit.notice == "told"
