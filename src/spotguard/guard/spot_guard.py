"""The guard around a plain PyTorch loop.

::

    with SpotGuard(uri, state) as guard:        claim the next attempt; resolve, verify, restore; hear signals
        for epoch in guard.epochs(10):
            for x, y in guard.batches(loader):  (from the restored position)
                ...                             the step
                                                boundary: notice? -> save, leave. save due? -> snapshot, go on
                                                boundary at the end of the epoch, after the code behind the inner loop
                                                end: save as finished; put handlers back
"""

import datetime as dt
import os
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from spotguard.checkpoint import as_metrics
from spotguard.errors import ConfigError
from spotguard.events import EventHook
from spotguard.guard.batches import Batches, length_of
from spotguard.guard.console import say
from spotguard.guard.options import Notices, RunPlaces, read_options, refuse_several_ranks
from spotguard.guard.restorer import Restorer
from spotguard.guard.saver import RANK, Place
from spotguard.guard.session import Session
from spotguard.pipeline.checkpoint import Checkpoint
from spotguard.policies import RetentionPolicy, SavePolicy
from spotguard.state.data import DataTracker
from spotguard.state.rng import is_generator
from spotguard.state.train_state import TrainState

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SpotGuard"]


class SpotGuard:
    """Makes a training loop survive whatever kills the process, and go on bit for bit.

    Args:
        uri: Where the run is kept: a path, a URI or a store, or a list of these, fastest first: tiers. The same at every start.
        state: What is saved.
        every: When to save: ``"10m"``, ``500`` steps, ``"auto"``, or a policy such as ``EverySteps(500) | EverySeconds(600)``.
            Default: ``SPOTGUARD_EVERY``, else ``"10m"``.
        keep: What to keep: a number of newest checkpoints, or a policy. Default: ``SPOTGUARD_KEEP``, else 3.
        notices: ``"auto"``, the default, asks the metadata service of the cloud we are on; ``"none"`` does not; or a list of sources, in
            which ``"auto"`` may stand too. SIGTERM, SIGINT and the ``stop`` object are always heard.
        grace: How long the platform leaves us after a signal, such as ``"30s"``. Default: ``SPOTGUARD_GRACE``, else what is known of the
            platform.
        exit_code: Exit status after a stop. Default: ``SPOTGUARD_EXIT_CODE``, else 143, and 0 after a SIGTERM of SageMaker.
        on_event: Called with every event, in a thread of its own.

    Attributes:
        step: Step boundaries passed, over all attempts.
        epoch: The epoch under way, from 0.

    Raises:
        ConfigError: An argument is wrong, or the state does not fit the checkpoint; the message says what to do.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> data = torch.utils.data.TensorDataset(torch.ones(8, 2), torch.ones(8, 1))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
        >>> with SpotGuard("memory://doc-guard", TrainState(model=model, optimizer=optimizer)) as guard:
        ...     for epoch in guard.epochs(2):
        ...         for x, y in guard.batches(loader):
        ...             optimizer.zero_grad()
        ...             torch.nn.functional.mse_loss(model(x), y).backward()
        ...             _ = optimizer.step()
        >>> guard.step, guard.checkpoint.id
        (4, '0001-0000000004')
    """

    def __init__(
        self,
        uri: RunPlaces,
        state: TrainState,
        *,
        every: SavePolicy | int | str | dt.timedelta | None = None,
        keep: RetentionPolicy | int | None = None,
        notices: Notices | None = None,
        grace: str | float | dt.timedelta | None = None,
        exit_code: int | None = None,
        on_event: EventHook | None = None,
    ) -> None:
        self._options = read_options(uri, every=every, keep=keep, notices=notices, exit_code=exit_code, grace=grace)
        if not isinstance(state, TrainState):
            raise ConfigError(
                f"state={type(state).__name__}(...): wrap it, as in TrainState(model=model, optimizer=optimizer)"
            )
        self._state, self._on_event = state, on_event
        self._restorer = Restorer(state)
        self._tracker = DataTracker(tuple(member for member in state.members.values() if is_generator(member)))
        self._session: Session | None = None
        self.step, self.epoch = 0, 0
        self._in_epoch = False
        self._driver: str | None = None
        self._by_epochs = False
        self._pass: weakref.ref[Generator[Any, None, None]] | None = None
        self._finished = False
        self._finished_total = 0
        self._total = 0
        self._boundaries = 0
        self._entered = False

    def epochs(self, total: int) -> Iterator[int]:
        """Epoch numbers, from the restored one to ``total - 1``.

        The end of an epoch is a boundary, after the code behind the inner loop.
        """
        self._check_entered("epochs")
        if type(total) is not int or total < 1:
            raise ConfigError(f"epochs({total!r}): the number of epochs is a whole number of at least 1")
        return self._epochs(total)

    def batches(self, loader: Iterable[Any]) -> Batches:
        """Batches of a loader, from the restored position. Asking for the next one completes the step: a boundary.

        `enumerate` counts from 0 again after a resume; use `batch` or `step` where the number of the batch matters, for gradient
        accumulation say.
        """
        self._check_entered("batches")
        if not hasattr(loader, "__iter__"):
            raise ConfigError(
                f"batches({type(loader).__name__}): not something to iterate over; pass the DataLoader itself"
            )
        return Batches(loader, self._begin_pass)

    def steps(self, total: int) -> Iterator[int]:
        """Step numbers, from the restored one to ``total - 1``, for loops that count steps. Asking for the next one is a boundary."""
        self._check_entered("steps")
        if type(total) is not int or total < 1:
            raise ConfigError(f"steps({total!r}): the number of steps is a whole number of at least 1")
        return self._steps(total)

    def step_done(self) -> None:
        """A boundary, for loops that own their counters: start these from `step`. Call it at the very end of each step."""
        self._check_entered("step_done")
        if self._driver not in (None, "step_done"):
            raise ConfigError(f"step_done(): guard.{self._driver}() counts the steps already; remove one of the two")
        if self._by_epochs:
            raise ConfigError(
                "step_done(): a resume inside guard.epochs() would begin the epoch again; use guard.batches(loader) there"
            )
        self._driver, self._finished = "step_done", False
        self._restorer.forget()
        self.step += 1
        self._boundary()

    def save(self, *, metrics: Mapping[str, float] | None = None) -> None:
        """Ask for a checkpoint at the next boundary, with these metrics.

        Behind the inner loop, after a validation say, that is the end of the epoch: the checkpoint then holds what that code did.
        """
        saver = self._check_entered("save").saver
        saver.requested = {**(saver.requested or {}), **as_metrics(metrics)}
        self._check_entered("save").raise_alert()

    @property
    def batch(self) -> int:
        """Number of the batch under way within its pass over the loader, from 0."""
        return self._tracker.batch - (1 if self._driver == "steps" else 0)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest committed checkpoint of this run, or None."""
        return self._session.checkpoint if self._session is not None else None

    def __enter__(self) -> "Self":
        if self._session is not None:
            raise ConfigError("this SpotGuard has been entered before; make a new one for each run of the loop")
        self._pid = os.getpid()
        refuse_several_ranks()
        self._session = Session(self._options, on_event=self._on_event, trees=self._trees, place=self._place)
        try:
            self._start(self._session)
        except BaseException as error:
            self._session.failed(error)
            self._session.close()
            raise
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self._session is not None, "entered"
        self._entered = False
        if os.getpid() != self._pid:
            self._session.abandon()  # a forked child leaves by the same door, without the threads
            return
        try:
            if kind is None and self._session.stopped is not None:
                raise self._session.stopped  # an `except` in the block took it; the run is stopped all the same, not finished
            if kind is None:
                self._finish(self._session)
            elif error is not None and self._session.stopped is None:
                self._session.failed(error)
        finally:
            # In an exception the loop may be anywhere inside a step: live state is not saved.
            self._session.close(drain=kind is not None)

    def _start(self, session: Session) -> None:
        session.listen()  # from here on: reading a checkpoint can take minutes
        self._state.check()
        session.open()
        loaded = session.load()
        if loaded is not None:
            restored = self._restorer.restore(loaded)
            self.step, self.epoch, self._finished_total = restored.step, restored.epoch, restored.total
            self._finished = loaded.manifest.finished
            self._tracker.load(restored.data)
            session.resumed(loaded, restored.inexact)
        session.begin(loaded.manifest if loaded is not None else None)

    def _finish(self, session: Session) -> None:
        self._close_pass()
        save = False
        if not (self._finished and self._boundaries == 0):
            if self._in_epoch:  # left by break: if more epochs are asked for later, they begin with the next one
                self.epoch, self._in_epoch = self.epoch + 1, False
                self._tracker.new_epoch()
            save = bool(self._boundaries) or session.checkpoint is None
        session.finish(save=save)

    def _epochs(self, total: int) -> Iterator[int]:
        if self._is_finished(total, "epochs"):
            return
        self._by_epochs = True
        while self.epoch < total:
            if not self._tracker.resuming:
                self._restorer.arrive()
            self._in_epoch = True
            yield self.epoch
            self._close_pass()
            self.epoch, self._in_epoch = self.epoch + 1, False
            self._tracker.new_epoch()
            self._boundary(last=self.epoch >= total)

    def _begin_pass(self, loader: Any) -> Iterator[Any]:
        itself: list[weakref.ref[Generator[Any, None, None]]] = []
        begun = self._batches(loader, itself)
        itself.append(weakref.ref(begun))  # weak: one that is left by break ends at once, if nobody else holds it
        return begun

    def _batches(
        self, loader: Any, itself: "list[weakref.ref[Generator[Any, None, None]]]"
    ) -> Generator[Any, None, None]:
        if self._driver == "step_done":
            raise ConfigError("batches(): guard.step_done() counts the steps already; remove one of the two")
        if type(loader).__name__ == "_FabricDataLoader":
            raise ConfigError(
                "batches(): this loader was set up by Fabric; use SpotGuard from spotguard.fabric, which follows the loader inside"
            )
        if self._finished:
            self._is_finished(self._finished_total, "epochs or steps")
            return
        by_steps = self._driver == "steps"
        session, tracker = self._check_entered("batches"), self._tracker
        saver = session.saver
        restore = (lambda: None) if by_steps else self._restorer.arrive
        iterator = tracker.iterate(loader, step=self.step, restore=restore, seek=by_steps)
        if iterator is None:
            return
        if by_steps:
            try:
                for batch in iterator:
                    tracker.batch += 1
                    yield batch
            finally:
                tracker.end()
            return
        self._driver, self._pass = "batches", itself[0]
        # Behind the last batch comes code that belongs to the epoch and may use what the loop left behind (`loss`). A start from a
        # checkpoint taken before it would run it without these. So the last boundary of a pass is the end of the epoch.
        last, passed = length_of(loader), saver.pace.boundary
        try:
            if not self._in_epoch and tracker.batch == 0 and self._boundaries:  # without epochs: put off till now
                session.boundary()
            for batch in iterator:
                yield batch
                tracker.batch += 1
                self.step += 1
                self._boundaries += 1
                due, now = saver.due, time.monotonic()
                passed(now)
                if (session.alert or self.step >= due.step or now >= due.time) and tracker.batch != last:
                    session.attend()
        except GeneratorExit:  # left by break
            self.step += 1
            self._boundaries += 1
            raise
        finally:
            tracker.end()
            self._driver = None

    def _close_pass(self) -> None:
        """A pass that was left by break is over, even where the loop still holds its iterator."""
        if self._pass is not None and (begun := self._pass()) is not None:
            begun.close()
        self._pass = None

    def _steps(self, total: int) -> Iterator[int]:
        if self._is_finished(total, "steps"):
            return
        if self._driver is not None:
            raise ConfigError(f"steps(): guard.{self._driver}() counts the steps already; remove one of the two")
        self._driver = "steps"
        self._restorer.arrive()
        try:
            while self.step < total:
                yield self.step
                self.step += 1
                self._boundary(last=self.step >= total)
        except GeneratorExit:  # left by break
            self.step += 1
            self._boundaries += 1
            raise
        finally:
            self._driver = None

    def _is_finished(self, total: int, unit: str) -> bool:
        self._total = total
        self._finished = self._finished and total <= self._finished_total
        if self._finished:
            say(
                f"this run finished at step {self.step}; to train on, ask for more than {self._finished_total} {unit}, "
                "or use another URI"
            )
        return self._finished

    def _boundary(self, *, last: bool = False) -> None:
        """A boundary; the `last` one of a loop is left to the end of the run, which saves it as finished."""
        self._boundaries += 1
        if not last:
            self._check_entered("boundary").boundary()

    def _place(self) -> Place:
        return Place(self.step, self.epoch, self._tracker.batch, self._boundaries)

    def _trees(self) -> dict[str, Any]:
        """Everything that is saved, live."""
        progress = {"step": self.step, "epoch": self.epoch, "total": self._total}
        return {
            **self._state.state_dicts(),
            RANK: {**self._state.local(), "data": self._tracker.state(), "progress": progress},
        }

    def _check_entered(self, method: str) -> Session:
        if not self._entered or self._session is None:
            raise ConfigError(f"guard.{method}() works inside 'with SpotGuard(...) as guard:' only")
        return self._session
