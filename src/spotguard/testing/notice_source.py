"""What every `NoticeSource` has to do, whatever it listens to. Join it by a subclass whose name begins with ``Test`` and two fixtures."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from spotguard.notices.base import NoticeSource, PreemptionNotice, Wakeable
from spotguard.notices.watcher import NoticeWatcher

__all__ = ["Listening", "NoticeSourceContract", "listening"]

_PATIENCE_S = 20.0  # until what should come is a failure
_END_S = 5.0  # that a guard waits for its sources at its end
_MOMENT_S = 0.2
_YEAR_S = 366 * 86400.0

Listen = Callable[..., "Listening"]


class NoticeSourceContract:
    """Join it with ``new_source`` and ``announce``, and with ``withdraw`` and ``fail`` if your source can hear of such a thing.

    What a source cannot do is said by a fixture, or a test, that calls `pytest.skip` with the reason.

    Attributes:
        patience: Seconds until what should come is a failure; a source that is slow to hear needs more.

    Example:
        >>> from spotguard.notices import PollingSource
        >>> class TestPollingSource(NoticeSourceContract):
        ...     @pytest.fixture
        ...     def asked(self):
        ...         return []
        ...
        ...     @pytest.fixture
        ...     def new_source(self, asked):
        ...         return lambda: PollingSource("mine", lambda: asked[0] if asked else None, 0.01)
        ...
        ...     @pytest.fixture
        ...     def announce(self, asked):
        ...         return lambda: asked.append("drained")
    """

    patience: float = _PATIENCE_S

    @pytest.fixture
    def new_source(self) -> Callable[[], NoticeSource]:
        """Call it for a source that looks often; all that it returns in a test listen to the same place. To be overridden."""
        raise NotImplementedError(
            "give the class that joins the contract a fixture 'new_source' that returns a function which makes a source"
        )

    @pytest.fixture
    def announce(self) -> Callable[[], None]:
        """Call it, and a notice stands from then on. To be overridden."""
        raise NotImplementedError(
            "give the class that joins the contract a fixture 'announce' that returns a function which has a notice stand"
        )

    @pytest.fixture
    def withdraw(self) -> Callable[[], None]:
        """Call it, and none stands any more. To be overridden where a notice can be taken back."""
        pytest.skip("no fixture 'withdraw': a notice of this source is never taken back")

    @pytest.fixture
    def fail(self) -> Callable[[], None]:
        """Call it, and the next looks meet trouble: errors, nonsense, silence. It is over by itself, or with what is announced next.

        To be overridden where something can go wrong.
        """
        pytest.skip("no fixture 'fail': nothing goes wrong with this source")

    @pytest.fixture
    def idle_source(self, new_source: Callable[[], NoticeSource]) -> NoticeSource:
        """One that waits for long: from one look to the next, as it does in earnest, or for an answer. By default it looks often."""
        return new_source()

    @pytest.fixture
    def settle(self) -> Callable[[], None]:
        """Call it to let a source look a few times. By default that takes a fifth of a second."""
        return lambda: time.sleep(_MOMENT_S)

    @pytest.fixture
    def listen(self) -> Iterator[Listen]:
        """Watch sources as a guard does. However a test goes, each has to end, and none may raise."""
        with listening(self.patience) as start:
            yield start

    # -- a notice ------------------------------------------------------------------------------------------------------------------

    def test_it_is_a_notice_source(self, new_source: Callable[[], NoticeSource]) -> None:
        """With a name."""
        source = new_source()
        assert isinstance(source, NoticeSource)
        assert isinstance(source.name, str)
        assert source.name

    def test_nothing_planned_is_no_notice(
        self, new_source: Callable[[], NoticeSource], settle: Callable[[], None], listen: Listen
    ) -> None:
        """However often it looks."""
        listener = listen(new_source())
        settle()
        assert listener.heard == []

    def test_a_notice_is_heard_once_however_often_it_is_told(
        self,
        new_source: Callable[[], NoticeSource],
        announce: Callable[[], None],
        settle: Callable[[], None],
        listen: Listen,
    ) -> None:
        """It stands, and is found by one look after another."""
        listener = listen(new_source())
        settle()
        announce()
        listener.wait()
        settle()
        settle()
        assert len(listener.heard) == 1

    def test_it_is_a_notice_of_this_source_with_an_id(
        self, new_source: Callable[[], NoticeSource], announce: Callable[[], None], listen: Listen
    ) -> None:
        """By which it is known when it is told again, or withdrawn; a deadline is monotonic seconds, not time of day."""
        source = new_source()
        listener = listen(source)
        announce()
        notice = listener.wait()
        assert isinstance(notice, PreemptionNotice)
        assert notice.source == source.name
        assert notice.id
        assert notice.detail
        assert notice.action in ("stop", "save")
        assert abs(notice.received - time.monotonic()) < _YEAR_S, "monotonic seconds are wanted"
        assert notice.deadline is None or abs(notice.deadline - notice.received) < _YEAR_S, (
            "monotonic seconds are wanted"
        )
        assert notice.grace is None or notice.grace >= 0
        assert listener.watcher.notice == notice

    def test_one_that_was_told_before_it_was_watched_is_heard(
        self, new_source: Callable[[], NoticeSource], announce: Callable[[], None], listen: Listen
    ) -> None:
        """The machine may know before the training has begun."""
        source = new_source()
        announce()
        listen(source).wait()

    # -- withdrawn -----------------------------------------------------------------------------------------------------------------

    def test_what_is_withdrawn_is_withdrawn(
        self,
        new_source: Callable[[], NoticeSource],
        announce: Callable[[], None],
        withdraw: Callable[[], None],
        listen: Listen,
    ) -> None:
        """By its id, and then nothing stands."""
        listener = listen(new_source())
        announce()
        first = listener.wait()
        withdraw()
        second = listener.wait(2)
        assert (second.action, second.source, second.id) == ("withdrawn", first.source, first.id)
        assert listener.watcher.notice is None

    def test_one_that_comes_after_a_withdrawn_one_is_heard(
        self,
        new_source: Callable[[], NoticeSource],
        announce: Callable[[], None],
        withdraw: Callable[[], None],
        listen: Listen,
    ) -> None:
        """The same one, too."""
        listener = listen(new_source())
        announce()
        listener.wait()
        withdraw()
        listener.wait(2)
        announce()
        assert listener.wait(3).action in ("stop", "save")

    # -- one guard after another ---------------------------------------------------------------------------------------------------

    def test_it_may_be_watched_by_one_guard_after_another(
        self, new_source: Callable[[], NoticeSource], announce: Callable[[], None], listen: Listen
    ) -> None:
        """What the first has heard is news to the second."""
        source = new_source()
        first = listen(source)
        announce()
        first.wait()
        first.close()
        second = listen(source)
        announce()
        second.wait()

    def test_the_second_guard_hears_that_a_notice_of_the_first_is_withdrawn(
        self,
        new_source: Callable[[], NoticeSource],
        announce: Callable[[], None],
        withdraw: Callable[[], None],
        listen: Listen,
    ) -> None:
        """And one that comes after it."""
        source = new_source()
        announce()
        first = listen(source)
        first.wait()
        first.close()
        second = listen(source)
        second.wait()
        withdraw()
        assert second.wait(2).action == "withdrawn"
        announce()
        assert second.wait(3).action in ("stop", "save")

    def test_what_is_withdrawn_between_two_guards_is_nothing_to_the_second(
        self,
        new_source: Callable[[], NoticeSource],
        announce: Callable[[], None],
        withdraw: Callable[[], None],
        settle: Callable[[], None],
        listen: Listen,
    ) -> None:
        """It has not heard of it."""
        source = new_source()
        announce()
        first = listen(source)
        first.wait()
        first.close()
        withdraw()
        second = listen(source)
        settle()
        assert second.heard == []
        announce()
        assert second.wait().action in ("stop", "save")

    # -- the end -------------------------------------------------------------------------------------------------------------------

    def test_it_ends_when_it_is_told_to(
        self, new_source: Callable[[], NoticeSource], settle: Callable[[], None], listen: Listen
    ) -> None:
        """Soon after `stop` is set and `wake` was called, if there is a `wake`; to be told twice does no harm."""
        source = new_source()
        listener = listen(source)
        settle()
        listener.close()
        if isinstance(source, Wakeable):
            source.wake()

    def test_it_ends_while_it_waits(self, idle_source: NoticeSource, listen: Listen) -> None:
        """Else it would hold up the exit of the process."""
        listener = listen(idle_source)
        time.sleep(_MOMENT_S)
        listener.close()
        assert listener.heard == []

    def test_it_ends_where_it_was_told_so_before_it_began(
        self, new_source: Callable[[], NoticeSource], listen: Listen
    ) -> None:
        """A guard that fails at its start."""
        listener = listen()
        listener.close()
        listener.watch(new_source())
        listener.close()

    # -- trouble -------------------------------------------------------------------------------------------------------------------

    def test_trouble_is_no_notice_and_one_after_it_is_heard(
        self,
        new_source: Callable[[], NoticeSource],
        announce: Callable[[], None],
        fail: Callable[[], None],
        settle: Callable[[], None],
        listen: Listen,
    ) -> None:
        """Only a notice ends training. Trouble at the start, and later."""
        fail()
        listener = listen(new_source())
        settle()
        assert listener.heard == []
        fail()
        settle()
        assert listener.heard == []
        announce()
        listener.wait()

    def test_trouble_takes_back_nothing_that_stands(
        self,
        new_source: Callable[[], NoticeSource],
        announce: Callable[[], None],
        fail: Callable[[], None],
        settle: Callable[[], None],
        listen: Listen,
    ) -> None:
        """No news is not that there is no notice any more."""
        listener = listen(new_source())
        announce()
        listener.wait()
        fail()
        settle()
        assert len(listener.heard) == 1
        assert listener.watcher.notice is not None

    # -- two at once ---------------------------------------------------------------------------------------------------------------

    def test_two_at_once_both_hear_it(
        self, new_source: Callable[[], NoticeSource], announce: Callable[[], None], listen: Listen
    ) -> None:
        """Of one place."""
        one, other = listen(new_source()), listen(new_source())
        announce()
        assert (one.wait().source, one.wait().id) == (other.wait().source, other.wait().id)

    def test_one_that_ends_takes_nothing_from_another(
        self,
        new_source: Callable[[], NoticeSource],
        announce: Callable[[], None],
        settle: Callable[[], None],
        listen: Listen,
    ) -> None:
        """Nothing that they share is closed."""
        one, other = listen(new_source()), listen(new_source())
        settle()
        one.close()
        announce()
        other.wait()
        assert one.heard == []


class Listening:
    """What a guard would hear of some sources.

    Args:
        sources: To watch, each in a thread.
        patience: Seconds until what should come is a failure.

    Attributes:
        heard: All that was news, in order.
        watcher: Knows what stands.
    """

    def __init__(self, *sources: NoticeSource, patience: float = _PATIENCE_S) -> None:
        self.heard: list[PreemptionNotice] = []
        self._patience = patience
        self._news = threading.Condition()
        self._watched: list[_Watched] = []
        self.watcher = NoticeWatcher(self._take)
        for source in sources:
            self.watch(source)

    def watch(self, source: NoticeSource) -> None:
        """One more."""
        self._watched.append(_Watched(source, self._news))
        self.watcher.watch(self._watched[-1])

    def wait(self, count: int = 1) -> PreemptionNotice:
        """The first notice, or another, as soon as there is one."""
        with self._news:
            self._news.wait_for(lambda: len(self.heard) >= count or self._raised(), self._patience)
            heard = list(self.heard)
        self._check()
        assert len(heard) >= count, f"within {self._patience:g} s only these were heard: {heard}"
        return heard[count - 1]

    def ends(self) -> bool:
        """Wait for all of them to end by themselves, and say whether they have."""
        with self._news:
            return self._news.wait_for(lambda: all(one.ended for one in self._watched), self._patience)

    def close(self) -> None:
        """Tell them to end, as a guard does; all have to."""
        self.watcher.close(min(_END_S, self._patience))
        with self._news:  # a thread has a few lines left after it
            self._news.wait_for(lambda: all(one.ended for one in self._watched), 0.1)
        late = [one.name for one in self._watched if not one.ended]
        assert late == [], "`watch` has not returned, though `stop` is set: it would hold up the exit of the process"
        self._check()

    def _take(self, notice: PreemptionNotice) -> None:
        with self._news:
            self.heard.append(notice)
            self._news.notify_all()

    def _raised(self) -> bool:
        return any(one.error is not None for one in self._watched)

    def _check(self) -> None:
        for one in self._watched:
            if one.error is not None:
                raise AssertionError(f"{one.name}: an exception came out of `watch`: {one.error!r}") from one.error


class _Watched:
    """A source, and what became of its `watch`."""

    def __init__(self, source: NoticeSource, news: threading.Condition) -> None:
        self.name = source.name
        self.ended = False
        self.error: BaseException | None = None
        self._source, self._news = source, news

    def watch(self, emit: Callable[[PreemptionNotice], None], stop: threading.Event) -> None:
        try:
            self._source.watch(emit, stop)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread of the test
            self.error = error
        finally:
            with self._news:
                self.ended = True
                self._news.notify_all()

    def wake(self) -> None:
        if isinstance(self._source, Wakeable):
            self._source.wake()


@contextlib.contextmanager
def listening(patience: float = _PATIENCE_S) -> Iterator[Listen]:
    """A function that watches sources as a guard does, for as long as the block lasts."""
    begun: list[Listening] = []

    def start(*sources: NoticeSource) -> Listening:
        begun.append(Listening(*sources, patience=patience))
        return begun[-1]

    try:
        yield start
    finally:
        for one in begun:
            one.watcher.close(min(_END_S, patience))
    for one in begun:
        one.close()
