"""What is made of the seconds between a notice and the end: real time, a store that takes as long as it is told to."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from spotguard import CheckpointStore, NoticeSource, Preempted, PreemptionNotice, SpotGuard, TrainState
from spotguard.checkpoint import ExitRecord
from spotguard.checkpoint.layout import CHECKPOINTS, EXIT, MANIFESTS
from spotguard.errors import TransientStoreError
from spotguard.events import CheckpointCommitted, Event, FinalSavePlanned, GraceTooShort, NoticeWithdrawn, SaveFailed
from spotguard.guard.departure import write_exit_record
from spotguard.pipeline.objects import read_object
from spotguard.stores import MemoryObjectStore, ObjectStore

_numbers = itertools.count()


class Told:
    """A source that says what the test tells it."""

    def __init__(self, name: str = "told") -> None:
        self.name = name
        self._emit: Callable[[PreemptionNotice], None] | None = None
        self.heard = threading.Event()

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        self._emit = emit
        self.heard.set()
        stop.wait()

    def tell(self, **fields: Any) -> None:
        assert self.heard.wait(10)
        assert self._emit is not None
        self._emit(
            PreemptionNotice(**{"source": self.name, "kind": "preemption", "detail": "told", "id": "1"} | fields)
        )

    def tell_in(self, seconds: float, **fields: Any) -> None:
        now = time.monotonic()
        self.tell(deadline=now + seconds, received=now, **fields)


class Slow:
    """A store whose shards take `seconds` to be written, or until it is let go."""

    def __init__(self, store: ObjectStore, seconds: float = 0.0) -> None:
        self._store, self.seconds = store, seconds
        self.go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[Any]:
        with self._store.create(key, exclusive=exclusive, deadline=deadline) as writer:
            yield writer
            if key.startswith(CHECKPOINTS) and "rank" in key:
                self.go.wait(self.seconds)


class Training:
    """A loop of short steps under a guard."""

    def __init__(self, *tiers: ObjectStore, every: Any = "1h", **options: Any) -> None:
        self.told, self.events = Told(), list[Event]()
        self.model = torch.nn.Linear(4, 2)
        self.stores = tiers or (MemoryObjectStore(f"memory://deadlines-{next(_numbers)}"),)
        self.guard = SpotGuard(
            list(self.stores) if len(self.stores) > 1 else self.stores[0],
            TrainState(model=self.model),
            every=every,
            notices=[self.told],
            on_event=self.events.append,
            **options,
        )
        self.at_step: dict[int, Callable[[], None]] = {}

    def run(self, steps: int = 1000, step_s: float = 0.005) -> int | None:
        """The exit status; None if the loop came to its end."""
        try:
            with self.guard:
                for step in self.guard.steps(steps):
                    self.at_step.get(step, lambda: None)()
                    with torch.no_grad():
                        self.model.weight += 0.01
                    time.sleep(step_s)
        except Preempted as left:
            self.left_at = time.monotonic()
            return int(left.code or 0)
        return None

    def committed(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, CheckpointCommitted)]

    def choices(self) -> list[str]:
        return [event.choice for event in self.events if isinstance(event, FinalSavePlanned)]

    @property
    def exit(self) -> ExitRecord:
        return ExitRecord.from_bytes(read_object(self.stores[-1], EXIT), key=EXIT)


def memory() -> MemoryObjectStore:
    return MemoryObjectStore(f"memory://deadlines-{next(_numbers)}")


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


def test_a_loop_that_is_stuck_has_its_last_host_snapshot_committed() -> None:
    store = memory()
    broken = threading.Event()

    class Breaks(Slow):
        @contextlib.contextmanager
        def create(self, key: str, **options: Any) -> Iterator[Any]:
            if broken.is_set() and key.startswith(CHECKPOINTS):
                raise TransientStoreError("the network is away")
            with self._store.create(key, **options) as writer:
                yield writer

    training = Training(Breaks(store))

    def break_down() -> None:
        broken.set()
        training.guard.save()

    def be_stuck() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and not any(isinstance(event, SaveFailed) for event in training.events):
            time.sleep(0.02)
        broken.clear()
        training.told.tell_in(1.0)
        while time.monotonic() < until and len(training.committed()) < 2:
            time.sleep(0.02)

    training.at_step = {5: lambda: training.guard.save(), 10: break_down, 12: be_stuck}
    assert training.run() == 143
    assert training.committed()[:2] == [6, 11], "the snapshot of step 11, which could not be written at its time"


def test_a_grace_that_a_save_does_not_fit_into_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    store = Slow(memory(), 0.4)
    training = Training(store, every=15, grace="0.3s")
    assert training.run(80, step_s=0.02) is None
    (event,) = [event for event in training.events if isinstance(event, GraceTooShort)]
    assert event.needed_s > 0.4 > event.grace_s
    assert capsys.readouterr().err.count("WARNING: a final save takes about") == 1


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
    write_exit_record(training.stores[0], attempt=2, state="finished", step=30)
    write_exit_record(training.stores[0], attempt=1, state="preempted", step=10)
    assert training.exit.attempt == 2
