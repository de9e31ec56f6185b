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
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from spotguard._time import format_seconds
from spotguard.checkpoint import Manifest
from spotguard.checkpoint.layout import STOP
from spotguard.errors import (
    ConfigError,
    DeadlineExceededError,
    InexactResumeWarning,
    NoUsableCheckpointError,
    Preempted,
    SaveError,
    StoreAccessError,
)
from spotguard.events import (
    AttemptClaimed,
    CandidateRejected,
    CheckpointCommitted,
    Event,
    EventBus,
    EventHook,
    FreshStart,
    InexactResume,
    NoticeReceived,
    NoticeWithdrawn,
    Resumed,
    SaveFailed,
    TierUnreachable,
)
from spotguard.guard.budget import Budget, Outlook
from spotguard.guard.console import say
from spotguard.guard.ending import ASK_S, WRITE_S, Ending
from spotguard.guard.event_log import EventLog
from spotguard.guard.gate import Gate, join_rehearsal
from spotguard.guard.grace_check import GraceCheck
from spotguard.guard.hearing import Hearing
from spotguard.guard.last_word import LastWord
from spotguard.guard.meter import Meter
from spotguard.guard.options import Options
from spotguard.guard.patience import Patience
from spotguard.guard.saver import Place, Saver
from spotguard.notices import PreemptionNotice
from spotguard.pipeline.checkpoint import Checkpoint
from spotguard.pipeline.tiers import Tiers
from spotguard.pipeline.writer import Writer
from spotguard.policies import FinalPlan, as_save_policy
from spotguard.state.compare import fingerprint
from spotguard.state.rng import capture_rng

__all__ = ["Loaded", "Session"]

logger = logging.getLogger(__name__)

_LOOK_S, _LOOK_FAR_S = 1.0, 5.0  # between two looks for a request to stop: on this machine, and across a network
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
        self._prepared = False
        self._began = time.monotonic()
        self._gate: Gate | None = None
        self._preempted: Preempted | None = None
        self._budget, self._patience = Budget(options.platform, options.grace_s), Patience()
        self._hearing = Hearing(options, self._budget, on_notice=self._on_notice, on_signal=self.raise_alert)
        self._bus = EventBus([on_event] if on_event else [])
        self._cleanup = contextlib.ExitStack()
        self._cleanup.callback(self._restore_signals)
        self._cleanup.callback(lambda: self._bus.close(self._patience.of(ASK_S)))
        self._cleanup.callback(lambda: self._hearing.close(self._patience.of(ASK_S)))
        self._grace_check: GraceCheck | None = None
        self._ending: Ending | None = None
        self._attempt = 0
        self._finished = False
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
        self._hearing.listen(previous)

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
            FencedError: A later attempt has taken over.
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
        try:
            checkpoint = resolution.require()
        except NoUsableCheckpointError:
            self._tiers.check_fences(self._attempt)  # a later start may have swept them away meanwhile
            raise
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
        self._cleanup.callback(self._close_writer)
        near = "://" not in self._home.uri or self._home.uri.startswith(("file://", "memory://"))
        poll_s = self._options.settings.poll_s or (_LOOK_S if near else _LOOK_FAR_S)
        self._hearing.look_for_request(self._stop_requested, poll_s)
        self._saver = Saver(self.writer, self._policy, trees=self._trees, publish=self.publish, gate=self._gate)
        self._saver.plan(self._place())
        self._ending = Ending(
            self._home,
            self._attempt,
            self._options.exit_code,
            hearing=self._hearing,
            saver=self._saver,
            writer=self.writer,
            patience=self._patience,
            place=self._place,
            bus=self._bus,
            gate=self._gate,
        )
        self._grace_check = GraceCheck(self._budget, self._saver, self.writer, self.publish)
        self.turn_back()

    def turn_back(self) -> None:
        """Leave, if there is a notice; nothing has been trained yet. One that leaves time to train is not left for.

        Raises:
            Preempted: There is one.
        """
        notice = self.notice()
        if notice is not None and notice.action == "stop" and not self._hearing.outlook().window:
            self.leave(notice, self._began)
        elif self._ending is not None:
            self._ending.watch()

    def boundary(self) -> None:
        """A step boundary: attend if something wants attention, or a save is due."""
        self._saver.pace.boundary(time.monotonic())
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
        assert self._grace_check is not None, "begin() makes it"
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
            self._saver.pace.resume()
            return
        if self.writer.failures >= self._options.settings.max_failures:
            raise SaveError(
                f"{self.writer.failures} saves in a row failed, the last with: {self.writer.error}. Mend the cause and start again; "
                "SPOTGUARD_MAX_FAILURES sets how many are put up with"
            ) from self.writer.error
        if self._grace_check.check(place.step):
            self.alert = True
        self._saver.attend(place)
        self._saver.pace.resume()

    def answer(self, notice: PreemptionNotice) -> bool:
        """Do what a notice asks for, at this boundary or with the held snapshot of an earlier one.

        Returns:
            Whether that was all there is to do here, and training goes on until the last save has to begin.

        Raises:
            Preempted: The run has been saved and is to stop.
        """
        assert self.writer is not None, "begin() comes first"
        assert self._ending is not None, "begin() makes it"
        began = time.monotonic()
        place = self._saver.held or self._place()
        if notice.action == "save":
            self.alert = True
            if not self.writer.busy:  # else at a later boundary: a hint is no reason to have the loop wait
                say(f"{notice.detail}: saving step {place.step} and going on")
                self._saver.requested = self._saver.requested or {}
                self._hearing.settle(notice)
            return False
        outlook = self._hearing.outlook()
        plan = self._ending.departure.plan(notice, outlook, place)
        if plan.train_s:
            self._ending.watch()
            self.alert = True
        else:
            self._stop(plan, outlook, notice, place, began)
        return True

    def _stop(
        self, plan: FinalPlan, outlook: Outlook, notice: PreemptionNotice, place: Place, began: float
    ) -> NoReturn:
        assert self.writer is not None, "begin() comes first"
        assert self._ending is not None, "begin() makes it"
        say(f"{notice.detail}: stopping at step {place.step}")
        departure = self._ending.departure
        self._ending.begin()
        departure.execute(plan, outlook, place)
        if self.writer.fenced is not None:
            raise self.writer.fenced  # to be started again would take the run away from whoever has it now
        if self.writer.error is not None and not isinstance(self.writer.error, DeadlineExceededError):
            say(f"the final save failed: {self.writer.error}")
        self.leave(notice, began, durable=self.writer.error is None and not departure.reason)

    def leave(self, notice: PreemptionNotice, began: float, *, durable: bool = False) -> NoReturn:
        """End this attempt with what is committed; see `Ending.leave`."""
        assert self._ending is not None, "begin() makes it"
        self._preempted = preempted = self._ending.leave(notice, began, durable=durable)
        say(str(preempted))
        raise preempted

    def finish(self, *, save: bool) -> None:
        """The loop has come to its end.

        Args:
            save: Whether anything has happened since the checkpoint that was resumed from.

        Raises:
            SaveError: It could not be saved.
        """
        assert self._ending is not None, "begin() makes it"
        self._ending.begin()
        if save:
            self._saver.save_finished(self._place())
        self._ending.finish()
        self._finished = True

    @property
    def stopped(self) -> Preempted | None:
        """The exception that ended this attempt, or None."""
        return self._preempted

    def close(self, *, drain: bool = False) -> None:
        """Put everything back as it was. May be called again.

        Args:
            drain: Let a snapshot that is being written be finished first: it is whole, whatever has become of the loop.
        """
        if self._ending is not None:
            self._ending.begin()
            self._ending.limit()
        with self._cleanup:
            if drain and self.writer is not None:
                self.writer.drain(self._patience.of(WRITE_S), upkeep=not self._patience.is_short)

    def _restore_signals(self) -> None:
        late = self._hearing.restore_signals(hand_on=self._finished)
        if late is not None:  # it came after the last boundary
            checkpoint = self.checkpoint
            late_stop = Preempted(
                checkpoint.id if checkpoint else None, reason=late.detail, code=self._options.exit_code
            )
            say(str(late_stop))
            raise late_stop

    def _close_writer(self) -> None:
        if self.writer is not None:
            self.writer.close(self._patience.of(WRITE_S))

    def abandon(self) -> None:
        """Forget everything without touching it: this is a forked child, the run is its parent's."""
        self._cleanup.pop_all()

    def notice(self) -> PreemptionNotice | None:
        """The notice that matters now, or None."""
        return self._hearing.notice()

    def heed(self, notice: PreemptionNotice) -> None:
        """Take a notice that came by another way."""
        self._hearing.heed(notice)

    def raise_alert(self) -> None:
        """Have the next boundary attended to."""
        self.alert = True

    def publish(self, event: Event) -> None:
        """Tell what happened."""
        if isinstance(event, CheckpointCommitted) and self._grace_check is not None:
            self._grace_check.measured()
        if isinstance(event, (CheckpointCommitted, SaveFailed)):
            self.alert = True
        self._bus.publish(event)

    def _on_notice(self, notice: PreemptionNotice) -> None:
        if self._ending is not None:
            self._ending.watch()
        if notice.action == "withdrawn":
            goes_on = "another one stands" if self._hearing.outlook().stop else "training goes on"
            say(f"{notice.source}: {notice.detail}; {goes_on}")
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

    def failed(self, error: BaseException) -> None:
        """An exception ends this attempt; leave word of it."""
        if self._ending is not None:
            self._ending.fail(error)
        elif self._attempt:  # between its claim and its beginning; where the loop is, nobody can say
            detail = f"{type(error).__name__}: {error}"[:500]
            LastWord(self._home, self._attempt).say("failed", 0, detail=detail)

    def _stop_requested(self) -> str | None:
        return None if self._home.stat(STOP) is None else "a request to stop"
