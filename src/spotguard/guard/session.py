"""The session: what every guarded loop shares, from the claim of an attempt to the exit status.

::

    listen()      hear signals and other notices
    open()        where the run is kept; claim the next attempt
    load()        resolve, verify, read                     <- the loop takes it back, in its own way and at its own time
    begin()       writer, save policy, requests to stop
    attend()      a boundary that wants attention: notice? -> save, leave. save due? -> snapshot, go on
    finish()      save as finished
    close()       put everything back

The loop says where it is and what there is to save; it decides nothing else.
"""

import contextlib
import logging
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, NoReturn

from spotguard._time import format_seconds
from spotguard.checkpoint import Manifest
from spotguard.checkpoint.layout import STOP
from spotguard.errors import (
    ConfigError,
    DeadlineExceededError,
    InexactResumeWarning,
    Preempted,
    SaveError,
    StoreAccessError,
)
from spotguard.events import (
    AttemptClaimed,
    CandidateRejected,
    Event,
    EventBus,
    EventHook,
    FreshStart,
    InexactResume,
    NoticeReceived,
    NoticeWithdrawn,
    Resumed,
    RunFinished,
    SaveFailed,
    Stopped,
    TierUnreachable,
)
from spotguard.guard.budget import Budget
from spotguard.guard.console import say
from spotguard.guard.departure import Departure, write_exit_record
from spotguard.guard.event_log import EventLog
from spotguard.guard.gate import Gate, join_rehearsal
from spotguard.guard.meter import Meter
from spotguard.guard.options import Options
from spotguard.guard.saver import Place, Saver
from spotguard.notices import NoticeWatcher, PollingSource, PreemptionNotice, SignalSource
from spotguard.pipeline.checkpoint import Checkpoint
from spotguard.pipeline.objects import outcomes
from spotguard.pipeline.tiers import Tiers
from spotguard.pipeline.writer import Writer
from spotguard.policies import FinalPlan, as_save_policy
from spotguard.state.compare import fingerprint
from spotguard.state.rng import capture_rng
from spotguard.stores import ObjectRef

__all__ = ["Loaded", "Session"]

logger = logging.getLogger(__name__)

_REQUEST_S = 5.0  # patience for the removal of a request to stop
_PATIENCE = 300.0  # seconds that an exception in the loop is held back for a snapshot that is being written
_open_runs: set[str] = set()


class Loaded(NamedTuple):
    """What there is to resume from.

    Attributes:
        checkpoint: The checkpoint, in the tier that it was read from.
        payload: The state of each member, verified, on the CPU.
        rejected: Newer checkpoints that were passed over, with reasons.
    """

    checkpoint: Checkpoint
    payload: dict[str, Any]
    rejected: list[str]

    @property
    def manifest(self) -> Manifest:
        """What it consists of."""
        return self.checkpoint.manifest


class Session:
    """One attempt at one run.

    Args:
        options: What the user asked for.
        on_event: Called with every event, in a thread of its own.
        trees: Everything that is saved, live, by shard name.
        place: Where the loop is.

    Attributes:
        alert: Something wants attention at the next boundary: `attend` has to be called there. True at first: buffers are prepared.
    """

    def __init__(
        self,
        options: Options,
        *,
        on_event: EventHook | None,
        trees: Callable[[], Mapping[str, Any]],
        place: Callable[[], Place],
    ) -> None:
        self._options, self._on_event, self._trees, self._place = options, on_event, trees, place
        self._tiers, self._policy = Tiers(options.stores), options.policy
        self.alert = True
        self._prepared = self._listening = False
        self._began = time.monotonic()
        self._gate: Gate | None = None
        self._preempted: Preempted | None = None
        self._cleanup = contextlib.ExitStack()
        self.signals: SignalSource | None = None
        self._cleanup.callback(self._restore_signals)
        self._bus = EventBus([on_event] if on_event else [])
        self._cleanup.callback(self._bus.close)
        self._watcher = NoticeWatcher(self._on_notice)
        self._cleanup.callback(self._watcher.close)
        self._budget = Budget(options.platform, options.grace_s)
        self._departure: Departure | None = None
        self._leaving = False
        self.writer: Writer | None = None

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest committed checkpoint of this run, or None."""
        return self.writer.checkpoint if self.writer is not None else None

    @property
    def uri(self) -> str:
        """Where the run is kept, for messages."""
        return self._tiers.uri

    @property
    def saver(self) -> Saver:
        """Takes the snapshots; there is one from `begin` on."""
        return self._saver

    def listen(self, previous: Mapping[int, Any] | None = None) -> None:
        """Hear signals, and the sources that the user named.

        Args:
            previous: Handlers to call after ours, in place of those that are found.
        """
        wanted = [signal.SIGTERM, signal.SIGINT, *(signal.Signals[name] for name in self._options.platform.signals)]
        self.signals = SignalSource(
            tuple(wanted), repeat_s=self._options.settings.repeat_s, on_record=self.raise_alert, previous=previous
        )
        self.signals.install()
        self._listening = True
        for source in (self.signals, *self._options.sources):
            self._watcher.watch(source)

    def open(self) -> None:
        """Take the run, and claim the next attempt at it.

        Raises:
            ConfigError: It cannot be written to, or another session of this process has it.
        """
        if self._options.settings.rehearsal:
            first = self._tiers.all[0].store  # a rehearsal keeps everything in one place of its own
            self._gate, store, every = join_rehearsal(self._options.settings.rehearsal, first)
            self._cleanup.callback(self._gate.close)
            self._tiers = Tiers([store])
            self._policy = self._policy if every is None else as_save_policy(every)
        for store in [tier.store for tier in self._tiers.all]:
            if store.uri in _open_runs:
                raise ConfigError(
                    f"uri={store.uri!r} is guarded by another SpotGuard of this process; give each run a URI of its own"
                )
            _open_runs.add(store.uri)
            self._cleanup.callback(_open_runs.discard, store.uri)
        try:
            self._run_id = self._tiers.open()
            claim, self._history = self._tiers.claim()
        except StoreAccessError as error:
            raise ConfigError(f"uri={self.uri!r} cannot be written to: {error}") from error
        self._attempt = claim.attempt
        self._home = self._tiers.home
        self._bus.add(EventLog(self._home, claim.attempt))
        self.publish(AttemptClaimed(attempt=claim.attempt, parent=claim.parent, uri=self._home.uri))
        for tier in self._tiers.unreachable:
            say(f"{tier.store.uri} cannot be reached, it is tried again at each save: {tier.error}")
            self.publish(TierUnreachable(tier=tier.store.uri, error=f"{type(tier.error).__name__}: {tier.error}"))

    def load(self) -> Loaded | None:
        """Resolve, verify and read what to resume from; None for a fresh start.

        Raises:
            NoUsableCheckpointError: There are checkpoints, and none is whole.
        """
        self._began = time.monotonic()
        with Meter("verifying and loading the checkpoint") as meter:
            resolution = self._tiers.resolve(self._history, self._run_id, meter.advance)
        what = "a copy of checkpoint" if self._tiers.several else "checkpoint"
        rejected = [f"{what} {item.id} is passed over: {item.reason}" for item in resolution.rejected]
        for candidate, line in zip(resolution.rejected, rejected, strict=True):
            say(line)
            self.publish(CandidateRejected(checkpoint=candidate.id, reason=candidate.reason))
        for candidate in resolution.deleted[:1]:
            say(f"checkpoint {candidate.id} {candidate.reason}")
        checkpoint = resolution.require()
        if checkpoint is not None and resolution.loaded is not None:
            return Loaded(checkpoint, resolution.loaded, rejected)
        self.publish(FreshStart(attempt=self._attempt))
        say(f"fresh start, no checkpoint in {self.uri} yet")
        if self._gate is not None:
            self._gate.ask("fresh", rng={name: fingerprint(value) for name, value in capture_rng().items()})
        return None

    def resumed(self, loaded: Loaded, inexact: list[str]) -> None:
        """The state has been taken back.

        Args:
            loaded: From which checkpoint.
            inexact: What did not come back bit for bit, in words.
        """
        for what in inexact:
            warnings.warn(what, InexactResumeWarning, stacklevel=5)
            self.publish(InexactResume(what=what))
        manifest, seconds = loaded.manifest, time.monotonic() - self._began
        identity, step = str(manifest.id), manifest.step
        if self._gate is not None:
            self._gate.ask(
                "resumed", step=step, checkpoint=identity, seconds=seconds, inexact=inexact, rejected=loaded.rejected
            )
        self.publish(
            Resumed(checkpoint=identity, step=step, epoch=manifest.epoch, batch=manifest.batch, seconds=seconds)
        )
        say(
            f"resumed from {identity} in {format_seconds(seconds)}: step {step}, epoch {manifest.epoch}, "
            f"batch {manifest.batch}"
            + (", finished" if manifest.finished else "")
            + (f", read from {loaded.checkpoint.store.uri}" if self._tiers.several else "")
        )

    def begin(self, resumed: Manifest | None) -> None:
        """From here on boundaries may come.

        Args:
            resumed: What was resumed from.

        Raises:
            Preempted: A notice came while we were getting ready: there is nothing to save.
        """
        self.writer = Writer(
            self._tiers,
            run_id=self._run_id,
            attempt=self._attempt,
            retention=self._options.retention,
            publish=self.publish,
            resumed=resumed,
        )
        self._cleanup.callback(self.writer.close, _PATIENCE)
        self._watcher.watch(PollingSource("request", self._stop_requested, self._options.settings.poll_s))
        self._saver = Saver(self.writer, self._policy, trees=self._trees, publish=self.publish, gate=self._gate)
        self._saver.plan(self._place())
        self._departure = Departure(self._budget, self._saver, self.writer, self.publish)
        if (notice := self.notice()) is not None and notice.action == "stop":
            self.leave(notice, self._began)

    def boundary(self) -> None:
        """A step boundary: attend if something wants attention, or a save is due."""
        if self.alert or self._saver.is_due(self._place()):
            self.attend()

    def attend(self) -> None:
        """Something wants attention at this boundary: a notice, a save, a failure, or a rehearsal.

        Raises:
            Preempted: The run has been saved and is to stop.
            FencedError: A later attempt has taken over.
            SaveError: Too many saves in a row have failed.
        """
        assert self.writer is not None, "begin() comes first"
        place = self._place()
        if self._gate is not None:
            self._gate.ask("boundary", step=place.step, epoch=place.epoch, batch=place.batch)
        else:
            self.alert = False
        if not self._prepared:  # by now the optimizer has its state
            self._prepared = True
            self._saver.prepare()
        if self.writer.fenced is not None:
            raise self.writer.fenced
        if (notice := self.notice()) is not None and self.answer(notice):
            return
        if self.writer.failures >= self._options.settings.max_failures:
            raise SaveError(
                f"{self.writer.failures} saves in a row failed, the last with: {self.writer.error}. Mend the cause and start again; "
                "SPOTGUARD_MAX_FAILURES sets how many are put up with"
            ) from self.writer.error
        if self._departure is not None:
            self._departure.warn_if_too_short(place)
        self._saver.attend(place)

    def answer(self, notice: PreemptionNotice) -> bool:
        """Do what a notice asks for, at this boundary or with the held snapshot of an earlier one.

        Returns:
            Whether that was all there is to do here, and training goes on until the last save has to begin.

        Raises:
            Preempted: The run has been saved and is to stop.
        """
        assert self.writer is not None, "begin() comes first"
        assert self._departure is not None, "begin() makes it"
        began = time.monotonic()
        place = self._saver.held or self._place()
        if notice.action == "save":
            say(f"{notice.detail}: saving step {place.step} and going on")
            self._saver.requested = self._saver.requested or {}
            self._watcher.settle(notice)
            self.alert = True
            return False
        plan = self._departure.plan(notice, place)
        if plan.train_s:
            self.alert = True
        else:
            self._stop(plan, notice, place, began)
        return True

    def _stop(self, plan: FinalPlan, notice: PreemptionNotice, place: Place, began: float) -> NoReturn:
        assert self.writer is not None, "begin() comes first"
        assert self._departure is not None, "begin() makes it"
        say(f"{notice.detail}: stopping at step {place.step}")
        self._leaving = True
        self._departure.execute(plan, notice, place)
        if self.writer.fenced is not None:
            raise self.writer.fenced  # to be started again would take the run away from whoever has it now
        if self.writer.error is not None and not isinstance(self.writer.error, DeadlineExceededError):
            say(f"the final save failed: {self.writer.error}")
        self.leave(notice, began)

    def leave(self, notice: PreemptionNotice, began: float) -> NoReturn:
        """End this attempt with what is committed."""
        last, step = self.checkpoint, (self._saver.held or self._place()).step
        identity, seconds, code = last.id if last else None, time.monotonic() - began, self._options.exit_code
        self._leaving = True
        self._record("preempted", step, notice=notice.detail)
        if self.writer is not None and self.writer.error is None:
            self._take_request_away()
        self.publish(Stopped(checkpoint=identity, step=step, reason=notice.detail, seconds=seconds))
        if self._gate is not None:
            self._gate.ask("stopped", step=step, checkpoint=identity, seconds=seconds, code=code)
        self._preempted = preempted = Preempted(identity, reason=notice.detail, code=code)
        say(str(preempted))
        raise preempted

    def finish(self, *, save: bool) -> None:
        """The loop has come to its end.

        Args:
            save: Whether anything has happened since the checkpoint that was resumed from.

        Raises:
            SaveError: It could not be saved.
        """
        place = self._place()
        if save:
            self._saver.save_finished(place)
        last = self.checkpoint
        self.publish(RunFinished(checkpoint=last.id if last else None, step=place.step))
        self._record("finished", place.step)
        self._take_request_away()
        say(f"finished at step {place.step}" + (f", checkpoint {last.id}" if last else ""))
        if self._gate is not None:
            self._gate.ask("finished", step=place.step, checkpoint=last.id if last else None)

    @property
    def stopped(self) -> Preempted | None:
        """The exception that ended this attempt, or None."""
        return self._preempted

    def close(self, *, drain: bool = False) -> None:
        """Put everything back as it was. May be called again.

        Args:
            drain: Let a snapshot that is being written be finished first: it is whole, whatever has become of the loop.
        """
        with self._cleanup:
            if drain and self.writer is not None:
                self.writer.drain(_PATIENCE)

    def abandon(self) -> None:
        """Forget everything without touching it: this is a forked child, the run is its parent's."""
        self._cleanup.pop_all()

    def notice(self) -> PreemptionNotice | None:
        """The notice that matters now, or None."""
        return self._watcher.notice or (self.signals.recorded() if self.signals is not None else None)

    def heed(self, notice: PreemptionNotice) -> None:
        """Take a notice that came by another way."""
        self._watcher.emit(notice)

    def raise_alert(self) -> None:
        """Have the next boundary attended to."""
        self.alert = True

    def publish(self, event: Event) -> None:
        """Tell what happened."""
        if isinstance(event, SaveFailed):
            self.alert = True
        self._bus.publish(event)

    def _restore_signals(self) -> None:
        if self.signals is not None and self._listening:
            self.signals.restore()

    def _on_notice(self, notice: PreemptionNotice) -> None:
        if notice.action == "withdrawn":
            say(f"{notice.source}: {notice.detail}; training goes on")
            self.publish(NoticeWithdrawn(source=notice.source, detail=notice.detail))
            return
        self.alert = True
        deadline = self._budget.deadline_of(notice)
        left = None if deadline is None else deadline.at - notice.received
        self.publish(
            NoticeReceived(
                source=notice.source, kind=notice.kind, detail=notice.detail, action=notice.action, left_s=left
            )
        )
        if self._departure is not None:
            self._departure.stand_by(notice, self._commit_held)

    def _commit_held(self) -> None:
        """No boundary has come while there was time for one."""
        committed = self._saver.commit_held()
        what = "the last snapshot in memory is committed" if committed else "the last checkpoint stands"
        say(f"no step boundary before the deadline: {what}")
        notice = self.notice()
        self._record(
            "preempted", self._place().step, notice=notice.detail if notice else None, detail="no step boundary came"
        )

    def failed(self, error: BaseException) -> None:
        """An exception ends this attempt; leave word of it."""
        if self._departure is not None and not self._leaving:
            self._leaving = True
            self._record("failed", self._place().step, detail=f"{type(error).__name__}: {error}"[:500])

    def _record(
        self,
        state: Literal["preempted", "finished", "failed"],
        step: int,
        *,
        notice: str | None = None,
        detail: str = "",
    ) -> None:
        last, reason = self.checkpoint, self._departure.reason if self._departure is not None else ""
        error = self.writer.error if self.writer is not None else None
        if error is not None and not (reason and isinstance(error, DeadlineExceededError)):
            reason = f"the final save failed: {error}"
        write_exit_record(
            self._home,
            attempt=self._attempt,
            state=state,
            step=step,
            checkpoint=last.id if last else None,
            notice=notice,
            detail=detail or reason,
            exit_code={"preempted": self._options.exit_code, "finished": 0}.get(state),
        )

    def _take_request_away(self) -> None:
        """A request to stop is met by any stop, and by the end of the run; the next start must not obey it."""
        (answer,) = outcomes(self._home.delete, [[ObjectRef(STOP)]], until=time.monotonic() + _REQUEST_S)
        if answer.error is not None:
            logger.warning(
                "%s/%s could not be removed: %s; the next start may obey it", self._home.uri, STOP, answer.error
            )

    def _stop_requested(self) -> str | None:
        return None if self._home.stat(STOP) is None else "a request to stop"
