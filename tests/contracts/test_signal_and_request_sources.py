"""The contract of `NoticeSource` over signals, and over a question that is asked again and again."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from contracts.sources import SOON, Listen
from spotguard.notices import NoticeSource, PollingSource, SignalSource
from spotguard.testing import NoticeSourceContract


class TestPollingSource(NoticeSourceContract):
    """A request to stop is not taken back: once it is heard, nothing more is asked."""

    @pytest.fixture
    def answers(self) -> list[str | Exception]:
        """What is answered: the first one, which is used up if it is raised."""
        return []

    @pytest.fixture
    def asked(self, answers: list[str | Exception]) -> Callable[[], str | None]:
        def ask() -> str | None:
            first = answers[0] if answers else None
            if isinstance(first, Exception):
                raise answers.pop(0)  # type: ignore[misc]
            return first

        return ask

    @pytest.fixture
    def new_source(self, asked: Callable[[], str | None]) -> Callable[[], NoticeSource]:
        return lambda: PollingSource("request", asked, SOON)

    @pytest.fixture
    def announce(self, answers: list[str | Exception]) -> Callable[[], None]:
        return lambda: answers.append("a stop object")

    @pytest.fixture(params=[OSError, ValueError])
    def fail(self, answers: list[str | Exception], request: pytest.FixtureRequest) -> Callable[[], None]:
        return lambda: answers.extend([request.param("nobody knows"), request.param("still")])

    @pytest.fixture
    def withdraw(self) -> Callable[[], None]:
        pytest.skip("a request to stop is not taken back: once it is heard, nothing more is asked")

    @pytest.fixture
    def idle_source(self, asked: Callable[[], str | None]) -> NoticeSource:
        return PollingSource("request", asked, 60.0)


class TestSignalSource(NoticeSourceContract):
    """SIGUSR2 to this process. `fail` takes the wakeup descriptor away, as `asyncio.run` does."""

    @pytest.fixture
    def new_source(self) -> Iterator[Callable[[], NoticeSource]]:
        installed: list[SignalSource] = []

        def make() -> SignalSource:
            installed.append(SignalSource((signal.SIGUSR2,), repeat_s=60.0))
            installed[-1].install()
            return installed[-1]

        before = signal.signal(signal.SIGUSR2, lambda *_: None)
        yield make
        for source in reversed(installed):
            source.restore()
        signal.signal(signal.SIGUSR2, before)

    @pytest.fixture
    def announce(self) -> Callable[[], None]:
        return lambda: os.kill(os.getpid(), signal.SIGUSR2)

    @pytest.fixture
    def withdraw(self) -> Callable[[], None]:
        pytest.skip("a signal cannot be taken back")

    @pytest.fixture
    def fail(self) -> Callable[[], None]:
        def take() -> None:
            signal.set_wakeup_fd(-1)

        return take

    def test_it_may_be_watched_by_one_guard_after_another(self) -> None:  # type: ignore[override]
        pytest.skip("handlers are set for one guard, and put back behind it: each has a SignalSource of its own")


@pytest.mark.parametrize(("costs_s", "seldom"), [(0.0, False), (0.02, True)])
def test_a_look_that_costs_much_is_taken_seldom(listen: Listen, costs_s: float, seldom: bool) -> None:
    looks: list[float] = []

    def look() -> None:
        looks.append(time.monotonic())
        until = time.thread_time() + costs_s
        while time.thread_time() < until:
            pass

    listening = listen()
    listening.watcher.watch(PollingSource("request", look, 0.001))
    time.sleep(1.0)
    assert (len(looks) == 1) is seldom


def test_trouble_is_told_of_once_and_again_when_it_comes_again(
    listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[OSError | str | None] = [
        OSError("a"),
        OSError("b"),
        None,
        OSError("c"),
        OSError("d"),
        "a stop object",
    ]

    def ask() -> str | None:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    listen(PollingSource("request", ask, 0.001)).wait()
    told = [record.getMessage()[-3:] for record in caplog.records if "cannot look" in record.getMessage()]
    assert told == [": a", ": c"]
