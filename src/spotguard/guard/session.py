"""The guard: a session around a plain PyTorch loop.

::

    with SpotGuard(uri, state) as guard:        claim the next attempt; resolve, verify, restore; hear signals
        for epoch in guard.epochs(10):
            for x, y in guard.batches(loader):  (from the restored position)
                ...                             the step
                                                boundary: notice? -> save, leave. save due? -> snapshot, go on
                                                boundary at the end of the epoch, after the code behind the inner loop
                                                end: save as finished; put handlers back
"""

import contextlib
import datetime as dt
import logging
import os
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from spotguard._time import format_seconds
from spotguard.checkpoint import Manifest
from spotguard.checkpoint.layout import STOP
from spotguard.errors import ConfigError, Preempted, SaveError, StoreAccessError
from spotguard.events import (
    AttemptClaimed,
    Event,
    EventBus,
    EventHook,
    NoticeReceived,
    Resumed,
    RunFinished,
    SaveFailed,
    Stopped,
)
from spotguard.guard.batches import Batches, length_of, rng_put_back
from spotguard.guard.console import say
from spotguard.guard.event_log import EventLog
from spotguard.guard.gate import Gate, join_rehearsal
from spotguard.guard.options import read_options, refuse_several_ranks
from spotguard.guard.restorer import Restorer
from spotguard.guard.saver import RANK, Place, Saver
from spotguard.notices import NoticeSource, NoticeWatcher, PollingSource, PreemptionNotice, SignalSource
from spotguard.pipeline.checkpoint import Checkpoint
from spotguard.pipeline.history import claim_attempt, open_run
from spotguard.pipeline.writer import Writer
from spotguard.policies import RetentionPolicy, SavePolicy, as_save_policy
from spotguard.state.data import DataTracker
from spotguard.state.rng import is_generator
from spotguard.state.train_state import TrainState
from spotguard.stores import ObjectRef

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SpotGuard"]

logger = logging.getLogger(__name__)

_PATIENCE = 300.0  # seconds that an exception in the loop is held back for a snapshot that is being written
_open_runs: set[str] = set()


class SpotGuard:
    """Makes a training loop survive whatever kills the process, and go on bit for bit.

    Args:
        uri: Where the run is kept: a path, ``file:///path`` or ``memory://name``. The same one at every start.
        state: What is saved.
        every: When to save: ``"10m"``, ``500`` steps, ``"auto"``, or a policy such as ``EverySteps(500) | EverySeconds(600)``.
            Default: ``SPOTGUARD_EVERY``, else ``"10m"``.
        keep: What to keep: a number of newest checkpoints, or a policy. Default: ``SPOTGUARD_KEEP``, else 3.
        notices: Further sources of notices; SIGTERM, SIGINT and the ``stop`` object are always heard.
        exit_code: Exit status after a stop. Default: ``SPOTGUARD_EXIT_CODE``, else 143.
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
        uri: "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]",
        state: TrainState,
        *,
        every: SavePolicy | int | str | dt.timedelta | None = None,
        keep: RetentionPolicy | int | None = None,
        notices: Sequence[NoticeSource] = (),
        exit_code: int | None = None,
        on_event: EventHook | None = None,
    ) -> None:
        self._options = read_options(uri, state, every=every, keep=keep, notices=notices, exit_code=exit_code)
        self._store, self._policy = self._options.store, self._options.policy
        self._on_event = on_event
        self.step, self.epoch = 0, 0
        self._in_epoch = False
        self._driver: str | None = None
        self._preempted: Preempted | None = None
        self._by_epochs = False
        self._pass: weakref.ref[Generator[Any, None, None]] | None = None
        self._finished = False
        self._finished_total = 0
        self._total = 0
        self._boundaries = 0
        self._alert = True  # the first boundary wants attention: buffers are prepared there
        self._tracker = DataTracker(tuple(member for member in state.members.values() if is_generator(member)))
        self._gate: Gate | None = None
        self._entered, self._used = False, False
        self._cleanup = contextlib.ExitStack()

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
        self._check_entered("save")
        try:
            asked = {str(name): float(value) for name, value in dict(metrics or {}).items()}
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"save(metrics={metrics!r}): write names and numbers, as in {{'val_loss': 0.3}}"
            ) from error
        self._saver.requested = {**(self._saver.requested or {}), **asked}
        self._alert = True

    @property
    def batch(self) -> int:
        """Number of the batch under way within its pass over the loader, from 0."""
        return self._tracker.batch - (1 if self._driver == "steps" else 0)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest committed checkpoint of this run, or None."""
        last = self._writer.last if hasattr(self, "_writer") else None  # there is none before the start
        return Checkpoint(self._store, last) if last else None

    def __enter__(self) -> "Self":
        if self._used:
            raise ConfigError("this SpotGuard has been entered before; make a new one for each run of the loop")
        self._used, self._pid = True, os.getpid()
        refuse_several_ranks()
        with self._cleanup:
            self._start()
            self._cleanup = self._cleanup.pop_all()
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._entered = False
        if os.getpid() != self._pid:
            self._cleanup.pop_all()  # a forked child leaves by the same door, without the threads: the run is its parent's
            return
        with self._cleanup:
            if kind is None and self._preempted:
                raise self._preempted  # an `except` in the block took it; the run is stopped all the same, not finished
            if kind is None:
                self._finish()
            else:
                # The loop may be anywhere inside a step: live state is not saved. A snapshot that is being written is whole.
                self._writer.drain(_PATIENCE)

    def _start(self) -> None:
        began = time.monotonic()
        self._signals = SignalSource(repeat_s=self._options.settings.repeat_s, on_record=self._raise_alert)
        self._signals.install()
        self._cleanup.callback(self._signals.restore)
        self._bus = EventBus([self._on_event] if self._on_event else [])
        self._cleanup.callback(self._bus.close)
        self._watcher = NoticeWatcher(self._on_notice)
        self._cleanup.callback(self._watcher.close)
        for source in (self._signals, *self._options.sources):
            self._watcher.watch(source)  # from here on: reading a checkpoint can take minutes
        self._options.state.check()
        if self._options.settings.rehearsal:
            self._gate, self._store, every = join_rehearsal(self._options.settings.rehearsal, self._store)
            self._cleanup.callback(self._gate.close)
            self._policy = self._policy if every is None else as_save_policy(every)
        if self._store.uri in _open_runs:
            raise ConfigError(
                f"uri={self._store.uri!r} is guarded by another SpotGuard of this process; give each run a URI of its own"
            )
        _open_runs.add(self._store.uri)
        self._cleanup.callback(_open_runs.discard, self._store.uri)
        try:
            run = open_run(self._store)
            claim = claim_attempt(self._store)
        except StoreAccessError as error:
            raise ConfigError(f"uri={self._store.uri!r} cannot be written to: {error}") from error
        self._bus.add(EventLog(self._store, claim.attempt))
        self._publish(AttemptClaimed(attempt=claim.attempt, parent=claim.parent, uri=self._store.uri))
        resumed = self._resume(run.run_id, claim.attempt, began)
        self._writer = Writer(
            self._store,
            run_id=run.run_id,
            attempt=claim.attempt,
            retention=self._options.retention,
            publish=self._publish,
            resumed=resumed,
        )
        self._cleanup.callback(self._writer.close, _PATIENCE)
        self._watcher.watch(PollingSource("request", self._stop_requested, self._options.settings.poll_s))
        self._saver = Saver(self._writer, self._policy, trees=self._trees, publish=self._publish, gate=self._gate)
        self._saver.plan(self.step)
        if (notice := self._notice()) is not None:  # it came while we were getting ready: there is nothing to save
            self._leave(notice, began)

    def _resume(self, run_id: str, attempt: int, began: float) -> Manifest | None:
        self._restorer = Restorer(self._options.state, self._publish, self._gate)
        restored = self._restorer.restore(self._store, run_id, attempt)
        if restored is None:
            return None
        manifest, self.step, self.epoch, self._finished_total, data = restored
        self._finished = manifest.finished
        self._tracker.load(data)
        identity, batch, seconds = str(manifest.id), manifest.batch, time.monotonic() - began
        self._publish(Resumed(checkpoint=identity, step=self.step, epoch=self.epoch, batch=batch, seconds=seconds))
        say(
            f"resumed from {identity} in {format_seconds(seconds)}: step {self.step}, epoch {self.epoch}, batch {batch}"
            + (", finished" if self._finished else "")
        )
        return manifest

    def _finish(self) -> None:
        self._close_pass()
        if not (self._finished and self._boundaries == 0):
            if self._in_epoch:  # left by break: if more epochs are asked for later, they begin with the next one
                self.epoch, self._in_epoch = self.epoch + 1, False
                self._tracker.new_epoch()
            if self._boundaries or self._writer.last is None:
                self._saver.save_finished(self._place())
        self._take_request_away()
        last = self.checkpoint
        self._publish(RunFinished(checkpoint=last.id if last else None, step=self.step))
        say(f"finished at step {self.step}" + (f", checkpoint {last.id}" if last else ""))
        if self._gate is not None:
            self._gate.ask("finished", step=self.step, checkpoint=last.id if last else None)

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
        if self._finished:
            self._is_finished(self._finished_total, "epochs or steps")
            return
        by_steps = self._driver == "steps"
        tracker, saver = self._tracker, self._saver
        iterator = tracker.iterate(
            loader,
            step=self.step,
            restore=rng_put_back() if by_steps else self._restorer.arrive,
            seek=by_steps,
        )
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
        last = length_of(loader)
        try:
            if not self._in_epoch and tracker.batch == 0 and self._boundaries:  # without epochs: put off till now
                self._check_boundary()
            for batch in iterator:
                yield batch
                tracker.batch += 1
                self.step += 1
                self._boundaries += 1
                due = saver.due
                if (self._alert or self.step >= due.step or time.monotonic() >= due.time) and tracker.batch != last:
                    self._attend()
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
            self._check_boundary()

    def _check_boundary(self) -> None:
        due = self._saver.due
        if self._alert or self.step >= due.step or time.monotonic() >= due.time:
            self._attend()

    def _attend(self) -> None:
        """Something wants attention at this boundary: a notice, a save, a failure, or a rehearsal."""
        if self._gate is not None:
            self._gate.ask("boundary", step=self.step, epoch=self.epoch, batch=self._tracker.batch)
        else:
            self._alert = False
        if self._boundaries == 1:  # by now the optimizer has its state
            self._saver.prepare()
        if self._writer.fenced is not None:
            raise self._writer.fenced
        if (notice := self._notice()) is not None:
            self._stop(notice)
        if self._writer.failures >= self._options.settings.max_failures:
            raise SaveError(
                f"{self._writer.failures} saves in a row failed, the last with: {self._writer.error}. Mend the cause and start again; "
                "SPOTGUARD_MAX_FAILURES sets how many are put up with"
            ) from self._writer.error
        self._saver.attend(self._place())

    def _stop(self, notice: PreemptionNotice) -> None:
        began = time.monotonic()
        say(f"{notice.detail}: stopping at step {self.step}")
        self._saver.save_and_wait("saving before the stop", self._place())
        if self._writer.fenced is not None:
            raise self._writer.fenced  # to be started again would take the run away from whoever has it now
        if self._writer.error is not None:
            say(f"the final save failed: {self._writer.error}")
        self._leave(notice, began)

    def _leave(self, notice: PreemptionNotice, began: float) -> NoReturn:
        if self._writer.error is None:
            self._take_request_away()
        last = self.checkpoint
        identity, seconds = last.id if last else None, time.monotonic() - began
        self._publish(Stopped(checkpoint=identity, step=self.step, reason=notice.detail, seconds=seconds))
        if self._gate is not None:
            self._gate.ask(
                "stopped", step=self.step, checkpoint=identity, seconds=seconds, code=self._options.exit_code
            )
        self._preempted = preempted = Preempted(identity, reason=notice.detail, code=self._options.exit_code)
        say(str(preempted))
        raise preempted

    def _place(self) -> Place:
        return Place(self.step, self.epoch, self._tracker.batch, self._boundaries)

    def _trees(self) -> dict[str, Any]:
        """Everything that is saved, live."""
        progress = {"step": self.step, "epoch": self.epoch, "total": self._total}
        return {
            **self._options.state.state_dicts(),
            RANK: {**self._options.state.local(), "data": self._tracker.state(), "progress": progress},
        }

    def _raise_alert(self) -> None:
        self._alert = True

    def _publish(self, event: Event) -> None:
        if isinstance(event, SaveFailed):
            self._alert = True
        self._bus.publish(event)

    def _on_notice(self, notice: PreemptionNotice) -> None:
        self._alert = True
        self._publish(NoticeReceived(source=notice.source, kind=notice.kind, detail=notice.detail))

    def _take_request_away(self) -> None:
        """A request to stop is met by any stop, and by the end of the run; the next start must not obey it."""
        with contextlib.suppress(OSError):
            self._store.delete([ObjectRef(STOP)])

    def _notice(self) -> PreemptionNotice | None:
        return self._watcher.notice or self._signals.recorded()

    def _stop_requested(self) -> str | None:
        return None if self._store.stat(STOP) is None else "a request to stop"

    def _check_entered(self, method: str) -> None:
        if not self._entered:
            raise ConfigError(f"guard.{method}() works inside 'with SpotGuard(...) as guard:' only")
