"""The training loaders, followed and brought back to their place."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from spotguard.errors import StateMismatchError
from spotguard.state.data import DataTracker
from spotguard.state.workers import worker_init

__all__ = ["GuardedLoader", "TrainingData", "shield_workers", "starting_workers"]

_OURS = ("_guarded", "_data", "_tracker", "_exhausted", "_begun", "taken")


class GuardedLoader:
    """What Lightning iterates over in place of a loader of the user's; for everything else it is that loader.

    Lightning must not save and load the state of a stateful loader by itself, which it would do one batch too late where it fetches
    ahead: the position is ours to keep. So that part of the loader is hidden.

    Args:
        loader: The user's.
        tracker: Follows it.
        data: What it belongs to.
    """

    def __init__(self, loader: Any, tracker: DataTracker, data: "TrainingData") -> None:
        self._guarded, self._tracker, self._data = loader, tracker, data
        self._exhausted = self._begun = False
        self.taken = 0

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Code that asks whether this is a DataLoader means the user's."""
        return type(self._guarded)

    def __getattr__(self, name: str) -> Any:
        if name in ("state_dict", "load_state_dict") or name in _OURS:
            raise AttributeError(name)
        return getattr(self._guarded, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OURS:
            object.__setattr__(self, name, value)
        else:
            setattr(self._guarded, name, value)

    def __len__(self) -> int:
        return len(self._guarded)

    def __iter__(self) -> Iterator[Any]:
        tracker = self._tracker
        if (
            self._data.asleep
        ):  # on the way to the place of a checkpoint: whatever would be drawn here counts for nothing
            return iter(())
        if tracker.under_way and not tracker.resuming:
            if self._exhausted:  # the shorter of several loaders begins again within the epoch
                tracker.end()
            else:  # Lightning makes an iterator when it sets up the loader, and another one when the epoch begins
                tracker.new_epoch()
        batches = tracker.iterate(self._guarded, step=self._data.step(), restore=lambda: None)
        while batches is None:  # a pass that was complete at the checkpoint
            batches = tracker.iterate(self._guarded, step=self._data.step(), restore=lambda: None)
        self._exhausted, self._begun, self.taken = False, False, tracker.batch
        return self._follow(batches)

    def _follow(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            if self._data.fetches_ahead():
                self._tracker.behind = self._tracker.own_state()
            try:
                with starting_workers([] if self._begun else [self._guarded]):
                    batch = next(batches)
                self._begun = True
            except StopIteration:
                self._exhausted = True
                return
            self.taken += 1
            yield batch


class TrainingData:
    """Where in its training data a fit is: a tracker for each of its loaders.

    Args:
        step: Batches trained so far.
        fetched_ahead: Batches that Lightning has fetched and not trained yet; None where it never fetches ahead.

    Attributes:
        asleep: Loaders yield nothing, for the fit is on its way to the place of a checkpoint.
    """

    def __init__(self, step: Callable[[], int], fetched_ahead: Callable[[], int | None]) -> None:
        self.asleep = False
        self.step, self._fetched_ahead = step, fetched_ahead
        self._trackers: list[DataTracker] = []
        self._loaders: list[GuardedLoader] = []
        self._saved: list[Any] | None = None

    def fetches_ahead(self) -> bool:
        """Whether Lightning fetches a batch before it trains the one before, as it does for loaders without a length."""
        return self._fetched_ahead() is not None

    def guard(self, loaders: list[Any]) -> list[Any]:
        """Put a `GuardedLoader` in the place of each.

        Raises:
            StateMismatchError: The checkpoint was made with another number of loaders.
        """
        if not self._trackers:
            self._trackers = [DataTracker() for _ in loaders]
            if self._saved is not None:
                if len(self._saved) != len(loaders):
                    raise StateMismatchError(
                        f"the checkpoint was made with {len(self._saved)} training loaders, now there are {len(loaders)}. "
                        "Restore them, or start a new run under another URI"
                    )
                for tracker, saved in zip(self._trackers, self._saved, strict=True):
                    tracker.load(saved)
        plain = [loader.__dict__["_guarded"] if type(loader) is GuardedLoader else loader for loader in loaders]
        self._loaders = [
            GuardedLoader(loader, tracker, self) for loader, tracker in zip(plain, self._trackers, strict=True)
        ]
        return list(self._loaders)

    def load(self, saved: list[Any]) -> None:
        """Take what a checkpoint says; the loaders come to that place when they are iterated over."""
        self._saved, self.asleep = saved, True

    def new_epoch(self) -> None:
        """An epoch is over."""
        for tracker in self._trackers:
            tracker.new_epoch()

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers that want to know it the number of the epoch, as Lightning does at the head of one."""
        for loader in self._loaders:
            samplers = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
            for sampler in (*samplers, getattr(samplers[1], "sampler", None)):
                tell = getattr(sampler, "set_epoch", None)
                if callable(tell):
                    tell(epoch)

    def state(self) -> list[Any]:
        """Where every loader is, seen at a step boundary."""
        ahead = self._fetched_ahead() or 0
        for loader, tracker in zip(self._loaders, self._trackers, strict=False):
            if tracker.under_way:
                tracker.batch = loader.taken - ahead
        return [tracker.state() for tracker in self._trackers]


def shield_workers(loaders: list[Any]) -> None:
    """Have the workers of validation loaders, too, live through a signal to the process group."""
    for loader in loaders:
        if getattr(loader, "num_workers", 0) and not isinstance(loader.worker_init_fn, worker_init):
            loader.worker_init_fn = worker_init(loader.worker_init_fn)


@contextlib.contextmanager
def starting_workers(loaders: list[Any]) -> Iterator[None]:
    """Where workers may be started: they begin with signals held back, for until they are set up a signal to the group would end them.

    This process goes on hearing signals, in another thread.
    """
    if not any(getattr(loader, "num_workers", 0) for loader in loaders):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
