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
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spotguard._time import format_seconds
from spotguard.checkpoint import Manifest
from spotguard.checkpoint.layout import STOP, rank_name
from spotguard.errors import ConfigError, InexactResumeWarning, Preempted, SaveError, StoreAccessError
from spotguard.events import (
    AttemptClaimed,
    CandidateRejected,
    Event,
    EventBus,
    EventHook,
    FreshStart,
    InexactResume,
    NoticeReceived,
    Resumed,
    RunFinished,
    SaveFailed,
    SaveSkipped,
    SaveStarted,
    Stopped,
)
from spotguard.guard.event_log import EventLog
from spotguard.guard.gate import Gate, gated
from spotguard.guard.meter import Meter
from spotguard.notices import NoticeSource, NoticeWatcher, PollingSource, PreemptionNotice, SignalSource
from spotguard.pipeline.checkpoint import Checkpoint
from spotguard.pipeline.history import claim_attempt, open_run
from spotguard.pipeline.resolver import resolve
from spotguard.pipeline.writer import Writer
from spotguard.policies import Due, RetentionPolicy, SavePoint, SavePolicy, as_retention_policy, as_save_policy
from spotguard.settings import load_settings
from spotguard.state.compare import fingerprint
from spotguard.state.data import DataTracker
from spotguard.state.rng import capture_rng, is_generator, restore_rng
from spotguard.state.snapshot import HostBuffers, ShardImage, Snapshot
from spotguard.state.train_state import TrainState
from spotguard.stores import ObjectRef, open_store

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SpotGuard"]

logger = logging.getLogger(__name__)

_RANK = rank_name(0)
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
        settings = load_settings()
        if not isinstance(state, TrainState):
            raise ConfigError(
                f"state={type(state).__name__}(...): wrap it, as in TrainState(model=model, optimizer=optimizer)"
            )
        if not isinstance(uri, (str, os.PathLike)):
            uris = list(uri)
            if len(uris) != 1:
                raise ConfigError(
                    f"uri={uris!r}: this release writes to one place; several tiers are not supported yet"
                )
            uri = uris[0]
        self._store = open_store(uri)
        self._state = state
        self._policy = settings.choose("every", every, as_save_policy)
        self._retention = settings.choose("keep", keep, as_retention_policy)
        self._exit_code = int(settings.choose("exit_code", exit_code))
        if not 1 <= self._exit_code <= 255:
            raise ConfigError(
                f"exit_code={exit_code!r}: must be 1 to 255; 0 would tell the scheduler that the work is done"
            )
        for source in notices:
            if not isinstance(source, NoticeSource):
                raise ConfigError(f"notices=[{source!r}]: a notice source has a name and a method watch(emit, stop)")
        self._settings, self._sources, self._on_event = settings, tuple(notices), on_event
        self.step, self.epoch = 0, 0
        self._in_epoch = False
        self._driver: str | None = None
        self._finished = False
        self._finished_total = 0
        self._total = 0
        self._requested: dict[str, float] | None = None
        self._boundaries, self._saved_at = 0, -1
        self._alert = False
        self._due = Due()
        self._stall_s = 0.0
        self._payload: dict[str, Any] | None = None
        self._buffers = HostBuffers()
        self._tracker = DataTracker(tuple(member for member in state.members.values() if is_generator(member)))
        self._gate: Gate | None = None
        self._entered, self._used = False, False
        self._cleanup = contextlib.ExitStack()

    # -- the loop --------------------------------------------------------------------------------------------------------------

    def epochs(self, total: int) -> Iterator[int]:
        """Epoch numbers, from the restored one to ``total - 1``.

        The end of an epoch is a boundary, after the code behind the inner loop.
        """
        self._check_entered("epochs")
        if type(total) is not int or total < 1:
            raise ConfigError(f"epochs({total!r}): the number of epochs is a whole number of at least 1")
        return self._epochs(total)

    def batches(self, loader: Iterable[Any]) -> "_Batches":
        """Batches of a loader, from the restored position. Asking for the next one completes the step: a boundary.

        `enumerate` counts from 0 again after a resume; use `batch` or `step` where the number of the batch matters, for gradient
        accumulation say.
        """
        self._check_entered("batches")
        if not hasattr(loader, "__iter__"):
            raise ConfigError(
                f"batches({type(loader).__name__}): not something to iterate over; pass the DataLoader itself"
            )
        return _Batches(loader, self._batches)

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
        self._driver = "step_done"
        self.step += 1
        self._boundary()

    def save(self, *, metrics: Mapping[str, float] | None = None) -> None:
        """Ask for a checkpoint at the next boundary, with these metrics.

        Behind the inner loop, after a validation say, that is the end of the epoch: the checkpoint then holds what that code did.
        """
        self._check_entered("save")
        self._requested = {**(self._requested or {}), **{name: float(value) for name, value in (metrics or {}).items()}}
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

    # -- start and end ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Self":
        if self._used:
            raise ConfigError("this SpotGuard has been entered before; make a new one for each run of the loop")
        self._used = True
        _refuse_several_ranks()
        with self._cleanup:
            self._start()
            self._cleanup = self._cleanup.pop_all()
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._entered = False
        with self._cleanup:
            if kind is None:
                self._finish()
            else:
                # The loop may be anywhere inside a step: live state is not saved. A snapshot that is being written is whole.
                self._writer.drain()

    def _start(self) -> None:
        began = time.monotonic()
        self._signals = SignalSource(repeat_s=self._settings.repeat_s, on_record=self._raise_alert)
        self._signals.install()
        self._cleanup.callback(self._signals.restore)
        self._state.check()
        if self._settings.rehearsal:
            self._join_rehearsal(self._settings.rehearsal)
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
        hooks: list[EventHook] = [EventLog(self._store, claim.attempt)]
        self._bus = EventBus([*hooks, *([self._on_event] if self._on_event else [])])
        self._cleanup.callback(self._bus.close)
        self._publish(AttemptClaimed(attempt=claim.attempt, parent=claim.parent, uri=self._store.uri))
        resumed = self._resume(run.run_id, claim.attempt, began)
        self._writer = Writer(
            self._store,
            run_id=run.run_id,
            attempt=claim.attempt,
            retention=self._retention,
            publish=self._publish,
            resumed=resumed,
        )
        self._cleanup.callback(self._writer.close)
        polling = PollingSource("request", self._stop_requested, self._settings.poll_s)
        self._watcher = NoticeWatcher([self._signals, polling, *self._sources], self._on_notice)
        self._watcher.start()
        self._cleanup.callback(self._watcher.close)
        self._plan_next_save()

    def _resume(self, run_id: str, attempt: int, began: float) -> Manifest | None:
        with Meter("verifying and loading the checkpoint") as meter:
            resolution = resolve(self._store, run_id=run_id, load=True, progress=meter.advance)
        for candidate in resolution.rejected:
            _say(f"checkpoint {candidate.id} is passed over: {candidate.reason}")
            self._publish(CandidateRejected(checkpoint=candidate.id, reason=candidate.reason))
        checkpoint = resolution.require()
        if checkpoint is None or resolution.loaded is None:
            self._publish(FreshStart(attempt=attempt))
            _say(f"fresh start, no checkpoint in {self._store.uri} yet")
            if self._gate is not None:
                self._gate.ask("fresh", rng={name: fingerprint(value) for name, value in capture_rng().items()})
            return None
        self._payload = resolution.loaded
        local = self._local()
        self.step, self.epoch = local["progress"]["step"], local["progress"]["epoch"]
        self._finished, self._finished_total = checkpoint.manifest.finished, local["progress"]["total"]
        self._tracker.load(local["data"])
        inexact = self._apply()
        for what in inexact:
            warnings.warn(what, InexactResumeWarning, stacklevel=4)
            self._publish(InexactResume(what=what))
        seconds = time.monotonic() - began
        batch = checkpoint.manifest.batch
        self._publish(Resumed(checkpoint=checkpoint.id, step=self.step, epoch=self.epoch, batch=batch, seconds=seconds))
        _say(
            f"resumed from {checkpoint.id} in {format_seconds(seconds)}: step {self.step}, epoch {self.epoch}, batch {batch}"
            + (", finished" if self._finished else "")
        )
        if self._gate is not None:
            rejected = [f"checkpoint {candidate.id} was passed over: {candidate.reason}" for candidate in resolution.rejected]
            self._gate.ask("resumed", step=self.step, checkpoint=checkpoint.id, seconds=seconds, inexact=inexact, rejected=rejected)
        return checkpoint.manifest

    def _join_rehearsal(self, path: str) -> None:
        self._gate = Gate(path)
        self._cleanup.callback(self._gate.close)
        answer = self._gate.ask("hello", pid=os.getpid(), uri=self._store.uri)
        self._store = gated(open_store(answer["uri"]), self._gate)
        if answer.get("every"):
            self._policy = as_save_policy(int(answer["every"]))
        self._alert = True
        _say(f"this is a rehearsal: checkpoints go to {self._store.uri}")

    def _finish(self) -> None:
        if not (self._finished and self._boundaries == 0):
            self._finished = True
            if self._in_epoch:  # left by break: if more epochs are asked for later, they begin with the next one
                self.epoch, self._in_epoch = self.epoch + 1, False
                self._tracker.new_epoch()
            if self._boundaries or self._writer.last is None:
                self._save_and_wait("saving the finished run")
                if self._writer.error is not None:
                    raise SaveError(
                        f"the final checkpoint of the finished run could not be saved: {self._writer.error}. "
                        "The last committed one stands; mend the cause and start again to redo the rest"
                    ) from self._writer.error
        last = self.checkpoint
        self._publish(RunFinished(checkpoint=last.id if last else None, step=self.step))
        _say(f"finished at step {self.step}" + (f", checkpoint {last.id}" if last else ""))
        if self._gate is not None:
            self._gate.ask("finished", step=self.step, checkpoint=last.id if last else None)

    # -- boundaries ------------------------------------------------------------------------------------------------------------

    def _epochs(self, total: int) -> Iterator[int]:
        self._total = total
        if self._finished and total <= self._finished_total:
            _say(
                f"this run finished at step {self.step}; ask for more than {self._finished_total} epochs, or use another URI, to train on"
            )
            return
        self._finished = False
        while self.epoch < total:
            if not self._tracker.resuming:
                self._arrive()
            self._in_epoch = True
            yield self.epoch
            self.epoch, self._in_epoch = self.epoch + 1, False
            self._tracker.new_epoch()
            self._boundary()

    def _batches(self, loader: Any) -> Iterator[Any]:
        if self._driver == "step_done":
            raise ConfigError("batches(): guard.step_done() counts the steps already; remove one of the two")
        if self._finished:
            return
        by_steps = self._driver == "steps"
        tracker = self._tracker
        iterator = tracker.iterate(loader, step=self.step, restore=_rng_put_back() if by_steps else self._arrive)
        if iterator is None:
            return
        if by_steps:
            for batch in iterator:
                tracker.batch += 1
                yield batch
            tracker.end()
            return
        self._driver = "batches"
        try:
            for batch in iterator:
                yield batch
                tracker.batch += 1
                self.step += 1
                self._boundaries += 1
                if self._alert or self.step >= self._due.step or time.monotonic() >= self._due.time:
                    self._attend()
        except GeneratorExit:  # left by break
            self.step += 1
            raise
        finally:
            tracker.end()
            self._driver = None

    def _steps(self, total: int) -> Iterator[int]:
        self._total = total
        if self._finished and total <= self._finished_total:
            _say(
                f"this run finished at step {self.step}; ask for more than {self._finished_total} steps, or use another URI, to train on"
            )
            return
        self._finished = False
        self._driver = "steps"
        self._arrive()
        while self.step < total:
            yield self.step
            self.step += 1
            self._boundary()
        self._driver = None

    def _boundary(self) -> None:
        self._boundaries += 1
        if self._alert or self.step >= self._due.step or time.monotonic() >= self._due.time:
            self._attend()

    def _attend(self) -> None:
        """Something wants attention at this boundary: a notice, a save, a failure, or a rehearsal."""
        if self._gate is not None:
            self._gate.ask("boundary", step=self.step, epoch=self.epoch, batch=self._tracker.batch)
        else:
            self._alert = False
        if self._writer.fenced is not None:
            raise self._writer.fenced
        if (notice := self._watcher.notice or self._signals.recorded()) is not None:
            self._stop(notice)
        if self._writer.failures >= self._settings.max_failures:
            raise SaveError(
                f"{self._writer.failures} saves in a row failed, the last with: {self._writer.error}. Mend the cause and start again; "
                "SPOTGUARD_MAX_FAILURES sets how many are put up with"
            ) from self._writer.error
        if self._requested is not None:
            self._writer.drain()
            self._snapshot()
        elif self.step >= self._due.step or time.monotonic() >= self._due.time:
            if self._writer.busy:
                self._publish(SaveSkipped(step=self.step, reason="the save before is still being written"))
                self._plan_next_save()
            else:
                self._snapshot()

    def _stop(self, notice: PreemptionNotice) -> None:
        began = time.monotonic()
        _say(f"{notice.detail}: stopping at step {self.step}")
        self._save_and_wait("saving before the stop")
        if self._writer.error is not None:
            _say(f"the final save failed: {self._writer.error}")
        if notice.kind == "request" and self._writer.error is None:
            with contextlib.suppress(OSError):
                self._store.delete([ObjectRef(STOP)])
        last = self.checkpoint
        identity, seconds = last.id if last else None, time.monotonic() - began
        self._publish(Stopped(checkpoint=identity, step=self.step, reason=notice.detail, seconds=seconds))
        if self._gate is not None:
            self._gate.ask("stopped", step=self.step, checkpoint=identity, seconds=seconds, code=self._exit_code)
        preempted = Preempted(identity, reason=notice.detail, code=self._exit_code)
        _say(str(preempted))
        raise preempted

    # -- saving ----------------------------------------------------------------------------------------------------------------

    def _save_and_wait(self, title: str) -> None:
        self._writer.drain()
        if self._saved_at == self._boundaries and self._writer.error is None and not self._finished:
            return  # this very boundary is committed
        with Meter(title) as meter:
            self._snapshot(meter.advance)
            self._writer.drain()

    def _snapshot(self, progress: Callable[[int], None] | None = None) -> None:
        began = time.monotonic()
        metrics, self._requested = self._requested or {}, None
        trees = self._state.state_dicts()
        trees[_RANK] = {
            **self._state.local(),
            "data": self._tracker.state(),
            "progress": {"step": self.step, "epoch": self.epoch, "total": self._total},
        }
        images = (
            ShardImage(name, 0 if name == _RANK else None, self._buffers.capture(name, tree))
            for name, tree in trees.items()
        )
        snapshot = Snapshot(self.step, self.epoch, self._tracker.batch, self._finished, tuple(images))
        self._writer.submit(snapshot, metrics, progress)
        self._stall_s, self._saved_at = time.monotonic() - began, self._boundaries
        self._publish(SaveStarted(step=self.step, size=snapshot.size, stall_s=self._stall_s))
        if self._gate is not None:
            self._gate.ask("snapshot", step=self.step, stall=self._stall_s, size=snapshot.size)
        self._plan_next_save()

    def _plan_next_save(self) -> None:
        self._due = self._policy.next_due(SavePoint(self.step, time.monotonic(), self._stall_s, self._writer.write_s))

    # -- restoring -------------------------------------------------------------------------------------------------------------

    def _local(self) -> dict[str, Any]:
        assert self._payload is not None
        local: dict[str, Any] = self._payload[_RANK]
        return local

    def _apply(self) -> list[str]:
        assert self._payload is not None
        members = {name: tree for name, tree in self._payload.items() if name != _RANK}
        return self._state.load_members(members) + self._state.load_local(self._local())

    def _arrive(self) -> None:
        """The loop has come to the place of the checkpoint: whatever code ran on the way there, the state is now that of the checkpoint."""
        if self._payload is not None:
            self._apply()
            self._payload = None

    # -- what other threads and the signal handler call -----------------------------------------------------------------------------------------------

    def _raise_alert(self) -> None:
        self._alert = True

    def _publish(self, event: Event) -> None:
        if isinstance(event, SaveFailed):
            self._alert = True
        self._bus.publish(event)

    def _on_notice(self, notice: PreemptionNotice) -> None:
        self._alert = True
        self._publish(NoticeReceived(source=notice.source, kind=notice.kind, detail=notice.detail))

    def _stop_requested(self) -> str | None:
        return None if self._store.stat(STOP) is None else "a request to stop"

    def _check_entered(self, method: str) -> None:
        if not self._entered:
            raise ConfigError(f"guard.{method}() works inside 'with SpotGuard(...) as guard:' only")


class _Batches:
    """What `SpotGuard.batches` gives: to be iterated over, with the length of the loader, so that progress bars work."""

    def __init__(self, loader: Any, iterate: Callable[[Any], Iterator[Any]]) -> None:
        self._loader, self._iterate = loader, iterate

    def __iter__(self) -> Iterator[Any]:
        return self._iterate(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


def _rng_put_back() -> Callable[[], None]:
    """The generators as they are now, to be put back when the sampler has come to its place."""
    rng = capture_rng()
    return lambda: (restore_rng(rng), None)[1]


def _refuse_several_ranks() -> None:
    distributed = sys.modules.get("torch.distributed")
    size = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        size = max(size, distributed.get_world_size())
    if size > 1:
        raise ConfigError(
            f"{size} ranks: this release guards a single process; ranks that do not agree on a step would lose the run"
        )


def _say(text: str) -> None:
    """A line for the person who reads the job's log, and for logging."""
    logger.info("%s", text)
    print(f"spotguard: {text}", file=sys.stderr, flush=True)  # noqa: T201
