"""Handlers that were there before: called, and put back on every way out. Real signals, to this very process."""

import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spotguard import Preempted, SpotGuard, TrainState
from spotguard.errors import ConfigError
from spotguard.events import Event, NoticeReceived
from spotguard.pipeline.checkpoint_store import CheckpointStore


def guarded(uri: Any, **options: Any) -> SpotGuard:
    return SpotGuard(uri, TrainState(model=torch.nn.Linear(2, 2)), **{"every": 10**9, **options})


class Previous:
    """A handler of the user's, for both signals."""

    def __init__(self) -> None:
        self.called: list[int] = []

    def __call__(self, number: int, frame: object) -> None:
        self.called.append(number)


@pytest.fixture
def previous() -> Iterator[Previous]:
    handler = Previous()
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    yield handler
    for number, old in before.items():
        assert signal.getsignal(number) is handler
        signal.signal(number, old)


def loop_until_stopped(guard: SpotGuard, number: signal.Signals = signal.SIGTERM) -> None:
    with guard:
        for step in guard.steps(10**9):
            if step == 3:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_previous_handlers_are_called_and_put_back_when_the_loop_is_stopped(
    previous: Previous, tmp_path: Path, number: signal.Signals
) -> None:
    with pytest.raises(Preempted) as caught:
        loop_until_stopped(guarded(tmp_path), number)
    assert previous.called == [number]
    assert caught.value.code == 143
    checkpoint = CheckpointStore(tmp_path).latest()
    assert checkpoint is not None
    assert caught.value.checkpoint == checkpoint.id
    os.kill(os.getpid(), number)
    assert previous.called == [number, number]


def test_they_are_put_back_at_the_end_of_the_loop(previous: Previous, tmp_path: Path) -> None:
    with guarded(tmp_path) as guard:
        assert signal.getsignal(signal.SIGTERM) is not previous
        for _ in guard.steps(3):
            pass
    assert previous.called == []


def test_they_are_put_back_after_an_exception_in_the_loop(previous: Previous, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), guarded(tmp_path) as guard:
        for _ in guard.steps(3):
            raise ZeroDivisionError


class Unsaveable:
    def state_dict(self) -> Any:
        return {"f": lambda: None}

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    "make",
    [
        lambda path: SpotGuard(path, TrainState(bad=Unsaveable())),
        lambda path: guarded(path / "file" / "run"),
        lambda _: guarded("/proc/no-such-thing"),
    ],
    ids=["a member that cannot be saved", "a path under a file", "a place where nothing can be made"],
)
def test_they_are_put_back_when_the_guard_cannot_start(
    previous: Previous, tmp_path: Path, make: Callable[[Path], SpotGuard]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError):
        make(tmp_path).__enter__()
    os.kill(os.getpid(), signal.SIGTERM)
    assert previous.called == [signal.SIGTERM]


def test_a_handler_that_is_set_inside_the_block_is_left_alone(tmp_path: Path) -> None:
    before, mine = signal.getsignal(signal.SIGTERM), Previous()
    with guarded(tmp_path):
        signal.signal(signal.SIGTERM, mine)
    assert signal.signal(signal.SIGTERM, before) is mine


def test_the_default_interrupt_does_not_tear_a_step(tmp_path: Path) -> None:
    with pytest.raises(Preempted):  # and not KeyboardInterrupt
        loop_until_stopped(guarded(tmp_path), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def wakeup() -> Iterator[socket.socket]:
    """The reading end of somebody else's wakeup descriptor, as asyncio has one."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno())
    yield reader
    assert signal.set_wakeup_fd(before) == writer.fileno()
    reader.close()
    writer.close()


def test_a_wakeup_descriptor_of_somebody_else_still_hears_and_is_put_back(
    wakeup: socket.socket, tmp_path: Path
) -> None:
    with pytest.raises(Preempted):
        loop_until_stopped(guarded(tmp_path))
    assert wakeup.recv(100) == bytes([signal.SIGTERM])


def test_signals_that_are_not_ours_are_handed_on(wakeup: socket.socket, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR1, Previous())
    with guarded(tmp_path):
        os.kill(os.getpid(), signal.SIGUSR1)
        ready, _, _ = select.select([wakeup], [], [], 30)
        assert ready
    signal.signal(signal.SIGUSR1, before)
    assert wakeup.recv(100) == bytes([signal.SIGUSR1])


def test_a_wakeup_descriptor_that_was_closed_meanwhile_is_no_trouble(tmp_path: Path) -> None:
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    with guarded(tmp_path) as guard:
        reader.close()
        writer.close()
        for _ in guard.steps(3):
            pass
    assert signal.set_wakeup_fd(-1) == -1


def test_a_wakeup_descriptor_that_is_taken_from_us_costs_no_notice(tmp_path: Path) -> None:
    heard: list[Event] = []
    with pytest.raises(Preempted), guarded(tmp_path, on_event=heard.append) as guard:
        ours = signal.set_wakeup_fd(-1)
        for step in guard.steps(10**9):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    assert ours != -1
    assert [event.detail for event in heard if isinstance(event, NoticeReceived)] == ["SIGTERM"]


def test_an_exception_in_the_loop_commits_nothing_new(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), guarded(tmp_path, every=2) as guard:
        for step in guard.steps(100):
            if step == 5:
                raise ZeroDivisionError
    checkpoint = CheckpointStore(tmp_path).latest()
    assert checkpoint is not None
    assert checkpoint.step in (2, 4)  # 4, or 2 where the save at 4 found the one at 2 still under way


def test_an_exception_before_the_first_save_commits_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), guarded(tmp_path) as guard:
        for step in guard.steps(100):
            if step == 5:
                raise KeyboardInterrupt
    assert CheckpointStore(tmp_path).latest() is None


def test_a_guard_that_is_refused_leaves_the_one_that_runs_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(Preempted), guarded(tmp_path) as guard:
        with pytest.raises(ConfigError, match="another SpotGuard"):
            guarded(tmp_path).__enter__()
        for step in guard.steps(10**9):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
