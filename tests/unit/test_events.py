"""The event bus: in order, never in the way of the one who publishes."""

import json
import logging
import threading

import pytest

from spotguard import events
from spotguard.events import CheckpointCommitted, Event, EventBus, FreshStart, Swept


def numbers(seen: list[Event]) -> list[int]:
    return [event.attempt for event in seen if isinstance(event, FreshStart)]


def test_every_hook_gets_every_event_in_order_from_one_other_thread() -> None:
    first: list[Event] = []
    second: list[Event] = []
    threads = set()

    def hook(event: Event) -> None:
        threads.add(threading.current_thread().name)
        second.append(event)

    bus = EventBus([first.append, hook])
    for number in range(100):
        bus.publish(FreshStart(attempt=number))
    bus.close()
    assert numbers(first) == numbers(second) == list(range(100))
    assert threads == {"spotguard-events"}


def test_a_hook_that_fails_is_logged_and_called_again_and_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Event] = []
    calls = []

    def broken(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("broken hook")

    bus = EventBus([broken, seen.append])
    with caplog.at_level(logging.ERROR, logger="spotguard.events"):
        for number in range(3):
            bus.publish(FreshStart(attempt=number))
        bus.close()
    assert len(calls) == 3
    assert numbers(seen) == [0, 1, 2]
    assert sum("broken hook" in (record.exc_text or "") for record in caplog.records) == 3


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_hook_that_wants_to_exit_ends_no_thread_of_ours(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Event] = []

    def leaving(event: Event) -> None:
        raise kind

    bus = EventBus([leaving, seen.append])
    bus.publish(FreshStart(attempt=1))
    bus.publish(FreshStart(attempt=2))
    bus.close()
    assert numbers(seen) == [1, 2]
    assert len(caplog.records) == 2


def test_a_slow_hook_delays_nobody_and_what_overflows_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    working, go = threading.Event(), threading.Event()
    seen: list[Event] = []

    def slow(event: Event) -> None:
        working.set()
        go.wait(30)
        seen.append(event)

    bus = EventBus([slow], capacity=4)
    bus.publish(FreshStart(attempt=0))
    assert working.wait(30)
    for number in range(1, 11):  # four of these may wait
        bus.publish(FreshStart(attempt=number))
    assert bus.dropped == 6
    go.set()
    bus.close()
    assert numbers(seen) == [0, 1, 2, 3, 4]
    assert "6 events were dropped" in caplog.text


def test_flush_waits_for_what_was_published_before_it() -> None:
    go = threading.Event()
    seen: list[Event] = []

    def slow(event: Event) -> None:
        go.wait(30)
        seen.append(event)

    bus = EventBus([slow])
    bus.publish(FreshStart(attempt=1))
    assert not bus.flush(timeout=0.01)
    go.set()
    assert bus.flush(timeout=30)
    assert numbers(seen) == [1]
    bus.close()


def test_close_ends_the_thread_and_may_be_called_again() -> None:
    bus = EventBus([])
    bus.close()
    bus.close()
    bus.publish(FreshStart(attempt=1))  # late, and no error


def test_close_does_not_wait_for_ever_for_a_hook_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    working, go = threading.Event(), threading.Event()

    def hanging(event: Event) -> None:
        working.set()
        go.wait(30)

    bus = EventBus([hanging], capacity=1)
    bus.publish(FreshStart(attempt=0))
    assert working.wait(30)
    bus.publish(FreshStart(attempt=1))
    bus.close(timeout=0.01)
    assert "did not keep up" in caplog.text
    go.set()
    bus.close()


def test_an_event_is_one_line_of_json_with_its_kind_and_time() -> None:
    event = CheckpointCommitted(
        checkpoint="0001-0000000002", step=2, size=10, written=5, seconds=0.1, metrics={"loss": 0.5}
    )
    line = event.to_json()
    assert "\n" not in line
    fields = json.loads(line)
    assert fields["event"] == "CheckpointCommitted"
    assert fields["at"] == event.at.isoformat()
    assert fields["metrics"] == {"loss": 0.5}
    assert json.loads(Swept(checkpoints=("a", "b"), objects=2, size=1).to_json())["checkpoints"] == ["a", "b"]


def test_every_event_is_frozen_and_named() -> None:
    kinds = [value for value in vars(events).values() if isinstance(value, type) and issubclass(value, Event)]
    assert {kind.__name__ for kind in kinds} <= set(events.__all__)
    with pytest.raises(AttributeError):
        FreshStart(attempt=1).attempt = 2  # type: ignore[misc]
