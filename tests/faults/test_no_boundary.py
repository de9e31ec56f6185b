"""A loop that does not come to a boundary in time: what can be done without it, and what is said of it."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from faults.notified import Breaks, Slow, Training, memory
from spotguard.checkpoint import ExitRecord
from spotguard.checkpoint.layout import EXIT
from spotguard.errors import ObjectNotFoundError
from spotguard.events import CheckpointCommitted, SaveFailed
from spotguard.guard.last_word import LastWord
from spotguard.pipeline.objects import read_object


def wait_for_word(training: Training, words: str = "no step boundary came") -> str:
    """From inside a step: until the exit record says something."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if words in training.exit.detail:
                return training.exit.detail
        except ObjectNotFoundError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"nobody has said {words!r}")


def stuck_with_a_failed_save(training: Training, store: Breaks, at: int, notice_in_s: float = 1.0) -> None:
    """A save fails at this step, and the loop is stuck in the next but one, when the network is back."""

    def break_down() -> None:
        store.broken = True
        training.guard.save()

    def be_stuck() -> None:
        training.wait_for(SaveFailed)
        store.broken, known = False, training.count(CheckpointCommitted)
        training.told.tell_in(notice_in_s, id="stuck")
        training.wait_for(CheckpointCommitted, known + 1)
        wait_for_word(training, f"of step {at + 1}, is committed")

    training.at_step |= {at: break_down, at + 2: be_stuck}


def test_the_last_host_snapshot_is_committed_where_that_has_failed_before() -> None:
    store = Breaks(memory())
    training = Training(store)
    training.at_step = {5: lambda: training.guard.save()}
    stuck_with_a_failed_save(training, store, at=10)
    assert training.run() == 143
    assert training.committed()[:2] == [6, 11]


def test_and_where_nothing_is_known_of_saves() -> None:
    store = Breaks(memory())
    training = Training(store)
    stuck_with_a_failed_save(training, store, at=10)
    assert training.run() == 143
    assert training.committed()[0] == 11


def test_and_where_a_notice_before_was_withdrawn() -> None:
    store = Breaks(memory())
    training = Training(store)
    training.at_step = {
        5: lambda: training.guard.save(),
        10: lambda: training.told.tell_in(300),
        20: lambda: training.told.tell(action="withdrawn"),
    }
    stuck_with_a_failed_save(training, store, at=30)
    assert training.run() == 143
    assert 31 in training.committed()


def test_and_in_the_middle_of_a_window() -> None:
    store = Breaks(memory())
    training = Training(store, every=50)

    def be_stuck() -> None:
        training.wait_for(SaveFailed)
        store.broken = False
        training.wait_for(CheckpointCommitted, 3)

    def break_down() -> None:
        store.broken = True

    training.at_step = {
        5: lambda: training.guard.save(),
        20: lambda: training.told.tell_in(4),
        40: break_down,
        102: be_stuck,
    }
    assert training.run(100_000) == 143
    first, noticed, stuck = training.committed()[:3]
    assert first == 6
    assert 20 < noticed < 30
    assert 50 <= stuck <= 102, "the periodic save of the window, which could not be written at its time"


def test_what_is_committed_already_is_said_to_be() -> None:
    training = Training()
    said: list[str] = []

    def be_stuck() -> None:
        training.told.tell_in(1)
        said.append(wait_for_word(training))
        assert (training.exit.state, training.exit.checkpoint) == ("preempted", "0001-0000000006")

    training.at_step = {5: lambda: training.guard.save(), 20: be_stuck}
    assert training.run() == 143
    assert said == ["no step boundary came: the last snapshot, of step 6, is committed already"]
    assert training.exit.detail == "", "it came after all, and all is well"


def test_what_is_still_being_written_is_said_to_be_and_then_that_it_is_committed() -> None:
    store = Slow(memory())
    training = Training(store)
    said: list[str] = []

    def save_slowly() -> None:
        store.seconds = 60
        training.guard.save()

    def be_stuck() -> None:
        training.told.tell_in(1)
        said.append(wait_for_word(training))
        store.go.set()
        said.append(wait_for_word(training, "is committed"))

    training.at_step = {5: lambda: training.guard.save(), 20: save_slowly, 22: be_stuck}
    assert training.run() == 143
    snapshot = "no step boundary came: the last snapshot, of step 21,"
    assert said == [f"{snapshot} is still being written", f"{snapshot} is committed"]


def test_before_the_first_snapshot_there_is_none_to_commit() -> None:
    training = Training()
    said: list[str] = []

    def be_stuck() -> None:
        training.told.tell_in(0.5)
        said.append(wait_for_word(training))

    training.at_step = {3: be_stuck}
    assert training.run() == 143
    assert said == ["no step boundary came: no snapshot has been taken since the start, and the last checkpoint stands"]


def test_a_run_that_has_come_to_its_end_is_not_said_to_be_stuck() -> None:
    training = Training()
    training.at_step = {5: lambda: training.guard.save(), 29: lambda: training.told.tell_in(0.5)}
    assert training.run(30) is None
    assert training.exit.state == "finished"
    time.sleep(1)  # the deadline passes, in a script that goes on
    assert training.exit.state == "finished"


def test_a_run_that_has_failed_is_not_said_to_be_stuck() -> None:
    training = Training()

    def fail() -> None:
        training.told.tell_in(0.5)
        raise ZeroDivisionError("by zero")

    training.at_step = {5: lambda: training.guard.save(), 29: fail}
    with pytest.raises(ZeroDivisionError):
        training.run(30)
    assert training.exit.state == "failed"
    time.sleep(1)
    assert (training.exit.state, training.exit.detail) == ("failed", "ZeroDivisionError: by zero")


def test_nothing_is_said_behind_a_final_word() -> None:
    store = memory()
    word = LastWord(store, 1)
    word.say("preempted", 10, final=False)
    word.say("finished", 20)
    word.say("preempted", 10, final=False)
    record = ExitRecord.from_bytes(read_object(store, EXIT), key=EXIT)
    assert (record.state, record.step) == ("finished", 20)


def test_a_word_that_hangs_does_not_come_last() -> None:
    class Hangs(Slow):
        @contextlib.contextmanager
        def create(self, key: str, **options: Any) -> Iterator[Any]:
            with self._store.create(key, **options) as writer:
                self.go.wait(self.seconds)
                yield writer

    store = Hangs(memory(), 60)
    word = LastWord(store, 1)
    word.say("preempted", 10, final=False, patience=0.1)
    word.say("finished", 20, patience=0.1)
    store.go.set()
    until = time.monotonic() + 60
    while not (store.stat(EXIT) and ExitRecord.from_bytes(read_object(store, EXIT), key=EXIT).step == 20):
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.2)
    assert ExitRecord.from_bytes(read_object(store, EXIT), key=EXIT).state == "finished"
