"""Jobs in a few threads."""

import threading
import time
import weakref
from collections.abc import Callable

import pytest

from spotguard.errors import DeadlineExceededError
from spotguard.stores.s3.lanes import Lanes


def lanes(count: int = 2) -> Lanes:
    return Lanes(lambda: count, what="the work")


def test_one_thread_does_job_after_job() -> None:
    found: list[int] = []
    several = lanes(2)
    for _ in range(20):
        several.run(lambda: found.append(threading.get_ident()))
    several.join()
    assert len(found) == 20
    assert len(set(found)) <= 2


def test_no_more_jobs_run_at_once_than_are_wanted_at_that_moment() -> None:
    wanted, running, most, lock = [4], [0], [0, 0], threading.Lock()
    several = Lanes(lambda: wanted[0])

    def job(round_: int) -> None:
        with lock:
            running[0] += 1
            most[round_] = max(most[round_], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1

    for round_, count in enumerate((4, 2)):
        wanted[0] = count
        for _ in range(8):
            several.run(lambda round_=round_: job(round_))  # type: ignore[misc]
        several.join()
    assert most == [4, 2]


def test_threads_leave_when_all_is_done_and_come_again_for_more() -> None:
    before = threading.active_count()
    several, done = lanes(), list[int]()
    for round_ in range(3):
        several.run(lambda round_=round_: done.append(round_))  # type: ignore[misc]
        several.join()
    assert done == [0, 1, 2]
    until(lambda: threading.active_count() == before)


def test_threads_leave_where_nobody_says_that_all_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotguard.stores.s3.lanes._IDLE_S", 0.05)
    before, several, done = threading.active_count(), lanes(), list[int]()
    several.run(lambda: done.append(1))
    until(lambda: done == [1] and threading.active_count() == before)
    several.run(lambda: done.append(2))
    several.join()
    assert done == [1, 2]


def test_a_thread_that_waits_for_work_holds_on_to_nothing() -> None:
    class Memory:
        pass

    memory = Memory()
    gone = weakref.ref(memory)
    several = lanes()
    several.run(lambda memory=memory: None)  # type: ignore[misc]
    del memory
    until(lambda: gone() is None)
    several.join()


def test_the_first_error_ends_all_and_its_threads_leave() -> None:
    before, several, ended = threading.active_count(), lanes(), list[str]()

    def long() -> None:
        try:
            while True:
                several.check()
                time.sleep(0.01)
        except InterruptedError as error:
            ended.append(str(error))

    def broken() -> None:
        raise ValueError("broken")

    several.run(long)
    several.run(broken)
    with pytest.raises(ValueError, match="broken"):
        several.join()
    several.cancel()
    assert ended == ["the work was given up: broken"]
    until(lambda: threading.active_count() == before)


def test_who_waits_for_a_job_that_hangs_waits_no_longer_than_the_deadline() -> None:
    release = threading.Event()
    several = Lanes(lambda: 1, deadline=time.monotonic() + 0.1, what="the work")
    several.run(release.wait)  # type: ignore[arg-type]
    with pytest.raises(DeadlineExceededError, match="the work was not done by its deadline"):
        several.run(release.wait)  # type: ignore[arg-type]
    with pytest.raises(DeadlineExceededError):
        several.join()
    release.set()


def until(true: Callable[[], bool]) -> None:
    """Wait for something that other threads bring about."""
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
