"""The background thread that commits snapshots: one in flight, never queued, never cancelled."""

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from spotguard.checkpoint import CheckpointId, Manifest
from spotguard.errors import CheckpointDamagedError, DeadlineExceededError, FencedError, StoreError
from spotguard.events import CheckpointCommitted, Event, SaveFailed, Swept, TierFailed
from spotguard.pipeline.checkpoint import Checkpoint, Progress
from spotguard.pipeline.commit import commit
from spotguard.pipeline.fence import ClaimGoneError
from spotguard.pipeline.objects import Outcome, outcomes
from spotguard.pipeline.sweeper import SweepPlan, missing_metrics, sweep
from spotguard.pipeline.tier import Tier
from spotguard.pipeline.tiers import Tiers
from spotguard.pipeline.upkeep import Upkeep
from spotguard.policies import RetentionPolicy
from spotguard.state.snapshot import Snapshot
from spotguard.stores import ObjectStore

__all__ = ["Writer"]

logger = logging.getLogger(__name__)

_YIELD_S = 2.0  # a store that works answers in a fraction of it
_LOOK_S = 0.1  # between two looks whether a save has become urgent while it waits
_LAG, _LAG_S = 5, 60.0  # how much longer than ever a tier may take before it is left behind, at the least in seconds


class _Job(NamedTuple):
    snapshot: Snapshot
    metrics: Mapping[str, float]
    progress: Progress | None
    tiers: tuple[Tier, ...]
    deadline: float | None
    urgent: bool


class Writer:
    """Commits snapshots of one attempt to every tier of the run, and runs retention after each commit.

    A save has worked when a tier that outlives the machine has it; a tier that fails beside that is told of by event, and tried again at
    the next save.

    Args:
        store: The run: its tiers, or the one store that it is in.
        run_id: Its identity.
        attempt: The number that this process has claimed.
        retention: What to keep.
        publish: Where events go.
        resumed: The manifest that this attempt resumed from.

    Attributes:
        checkpoint: The newest checkpoint of this history in a tier that outlives the machine, or None.
        failures: Failed saves since the last commit.
        error: The last failure, or None once a save has worked.
        fenced: A later attempt has taken over; no save will work any more.
        write_s: Seconds the last commit took.
        seconds: What the last commits took, in all tiers together.
        started: When the one in flight began, monotonic seconds.
    """

    def __init__(
        self,
        store: ObjectStore | Tiers,
        *,
        run_id: str,
        attempt: int,
        retention: RetentionPolicy,
        publish: Callable[[Event], None],
        resumed: Manifest | None = None,
    ) -> None:
        self._tiers = store if isinstance(store, Tiers) else Tiers.ready(store, resumed)
        self.checkpoint: Checkpoint | None = self._tiers.newest
        self.failures, self.write_s = 0, 0.0
        self.seconds: collections.deque[float] = collections.deque(maxlen=100)
        self.started = 0.0
        self.error: BaseException | None = None
        self.fenced: FencedError | None = None
        self._run_id, self._attempt, self._retention, self._publish = run_id, attempt, retention, publish
        self._used: CheckpointId | None = None
        self._parent = resumed.id if resumed is not None else None
        self._job: _Job | None = None
        self._wake, self._state = threading.Condition(), threading.RLock()
        self._upkeep, self._hurry, self._pressing = Upkeep(self._sweep), threading.Event(), threading.Event()
        self._closing = self._told = False
        self._thread = threading.Thread(target=self._run, name="spotguard-writer", daemon=True)
        self._thread.start()

    @property
    def last(self) -> Manifest | None:
        """What `checkpoint` consists of."""
        return self.checkpoint.manifest if self.checkpoint is not None else None

    @property
    def busy(self) -> bool:
        """Whether a commit is under way: the snapshot's buffers must not be touched."""
        return self._job is not None

    @property
    def fast_seconds(self) -> tuple[collections.deque[float], bool] | None:
        """What commits to the fastest tier took, and whether that one outlives the machine; None where there is only one."""
        fastest = self._tiers.all[0]
        return (fastest.seconds, fastest.surviving) if self._tiers.several else None

    def submit(
        self,
        snapshot: Snapshot,
        metrics: Mapping[str, float],
        progress: Progress | None = None,
        *,
        tiers: str = "all",
        deadline: float | None = None,
        urgent: bool = False,
    ) -> None:
        """Hand over a snapshot; only allowed while not `busy`.

        Args:
            snapshot: What to commit.
            metrics: Recorded with it.
            progress: Called with the number of bytes done, for each piece.
            tiers: ``"all"``, or only the ``"fastest"``: where time is short.
            deadline: Instant (monotonic seconds) after which no manifest of it is written.
            urgent: The sweep behind the last commit gives way; it may be made up for later. Else that is waited for, within reason.
        """
        with self._wake:
            assert self._job is None, "one save in flight"
            self._hurry.clear()
            self._pressing.clear()
            self._job, self.started = (
                _Job(snapshot, metrics, progress, self._tiers.select(tiers), deadline, urgent or deadline is not None),
                time.monotonic(),
            )
            self._wake.notify_all()

    def drain(self, timeout: float | None = None, *, upkeep: bool = True) -> bool:
        """Wait until nothing is in flight.

        Args:
            timeout: Seconds to wait.
            upkeep: Also for the sweep behind the last commit, which tells whether that can be read back.

        Returns:
            False when `timeout` was not enough.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._wake:
            if not self._wake.wait_for(lambda: self._job is None, timeout):
                return False
        return not upkeep or self._upkeep.wait(None if until is None else max(0.0, until - time.monotonic()))

    def press(self) -> None:
        """Another save is waiting for this one, which waits no longer for the sweep behind the one before."""
        self._pressing.set()

    def hurry(self) -> None:
        """The next save is the last one: where one tier that outlives the machine has this one, the others are left behind.

        What they are sending is never committed, whatever becomes of the buffers.
        """
        self._hurry.set()
        self.press()

    def close(self, timeout: float | None = None) -> None:
        """Finish what is in flight and end the thread; within `timeout` seconds, or leave them behind."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout)
        self._upkeep.wait(None if until is None else max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._job is not None or self._closing)
                if self._job is None:
                    return
                job = self._job
            sweepable: Sequence[Tier] = ()
            try:
                sweepable = self._commit(job)
            except Exception as error:  # noqa: BLE001 - top of the thread: told by event, raised in the loop after several
                self._failed(job.snapshot.step, error)
            finally:
                with self._wake:
                    self._upkeep.start([tier for tier in sweepable if not tier.commits])
                    self._job = None
                    self._wake.notify_all()

    def _commit(self, job: "_Job") -> Sequence[Tier]:
        """Commit to all tiers at once: none waits for another, and what does not answer until the deadline is left behind.

        Returns:
            The tiers to sweep.
        """
        snapshot, tiers, deadline, until = job.snapshot, job.tiers, job.deadline, time.monotonic() + _LAG_S
        while not (job.urgent or self._pressing.is_set() or self._upkeep.wait(_LOOK_S) or time.monotonic() > until):
            pass
        started = time.monotonic()
        patience = _YIELD_S if deadline is None else min(_YIELD_S, (deadline - started) / 4)
        if self._pressing.is_set():
            patience = min(patience, _LOOK_S)
        self._upkeep.give_way(max(0.0, patience))
        sequence = self._used.sequence + 1 if self._used and self._used.step == snapshot.step else 0
        self._used = CheckpointId(self._attempt, snapshot.step, sequence)
        if self._tiers.several:
            self._tiers.check_fences(self._attempt, patience=max(0.0, patience))

        left_behind = threading.Event()

        def check() -> None:
            if left_behind.is_set():
                raise DeadlineExceededError(
                    f"step {snapshot.step}: the others were done, and the next save could not wait"
                )

        def enough(found: Mapping[int, Outcome[None]]) -> bool:
            return self._hurry.is_set() and any(
                outcome.error is None and tiers[number].surviving for number, outcome in found.items()
            )

        def commit_to(tier: Tier) -> None:
            with self._at_work(tier) as alone:
                if tier.failures and tier.admitted and deadline is None and alone:
                    self._sweep([tier])  # what the failed save left behind may be what fills the disk
                until = deadline if deadline is not None else self._patience(tier)
                self._commit_to(tier, snapshot, sequence, job.metrics, job.progress, until, check)

        failed: dict[Tier, Exception] = {}
        answers = outcomes(commit_to, tiers, threads=len(tiers), until=deadline, enough=enough)
        left_behind.set()  # from here on the buffers may be written to
        for tier, error in zip(tiers, [answer.error for answer in answers], strict=True):
            if isinstance(error, FencedError) and not (self._tiers.several and isinstance(error, ClaimGoneError)):
                raise error
            if isinstance(error, Exception):
                failed[tier] = error
                tier.admitted = tier.admitted and not isinstance(error, ClaimGoneError)
            elif error is not None:
                raise error
        done = [tier for tier in tiers if tier not in failed]
        if not done or (any(tier.surviving for tier in tiers) and not any(tier.surviving for tier in done)):
            for tier in failed:
                tier.failures += 1
            self._failed(snapshot.step, _sum_up(failed))
            return done if deadline is None else ()
        with self._state:
            self.error = None
            self.failures = 0 if any(tier.surviving for tier in done) else self.failures
            self._parent = self._used
            self.write_s = time.monotonic() - started
            if len(tiers) == len(self._tiers.all):
                self.seconds.append(self.write_s)
        for tier, trouble in failed.items():
            self._tier_failed(tier, snapshot.step, trouble)
        return done if deadline is None else ()  # the next attempt has time for it

    @contextlib.contextmanager
    def _at_work(self, tier: Tier) -> Iterator[bool]:
        """Count the commits to a tier: one that was left behind may still be at it, and what it has written is not for us to sweep."""
        with self._state:
            tier.commits += 1
            alone = tier.commits == 1
        try:
            yield alone
        finally:
            with self._state:
                tier.commits -= 1

    def _patience(self, tier: Tier) -> float | None:
        """Instant after which a tier that takes far longer than it ever did holds up the others no more; it is told of, and asked again."""
        slowest = max(tier.seconds, default=None)
        if not self._tiers.several or slowest is None:
            return None
        return time.monotonic() + max(_LAG_S, _LAG * slowest) * float(2**tier.failures)

    def _commit_to(
        self,
        tier: Tier,
        snapshot: Snapshot,
        sequence: int,
        metrics: Mapping[str, float],
        progress: Progress | None,
        deadline: float | None,
        check: Callable[[], None],
    ) -> None:
        started = time.monotonic()
        self._tiers.admit(tier)
        manifest, written = commit(
            tier.store,
            snapshot,
            run_id=self._run_id,
            attempt=self._attempt,
            sequence=sequence,
            previous=tier.last,
            parent=self._parent,
            reuse=not tier.suspect,
            digests=tier.digests,
            metrics=metrics,
            deadline=deadline,
            progress=progress,
            check=check,
        )
        if tier.failures:
            logger.info("%s works again", tier.store.uri)
        tier.last, tier.suspect, tier.failures = manifest, False, 0
        tier.seconds.append(time.monotonic() - started)
        tier.known.manifests[manifest.id] = manifest
        with self._state:
            if tier.surviving and (
                self.last is None or self.last.id < manifest.id
            ):  # one that was left behind comes late
                self.checkpoint = Checkpoint(tier.store, manifest)
                self.failures, self.error = 0, None
        self._publish(
            CheckpointCommitted(
                checkpoint=str(manifest.id),
                step=manifest.step,
                size=manifest.size,
                written=written,
                seconds=time.monotonic() - started,
                metrics=dict(metrics),
                tier=tier.store.uri,
            )
        )

    def _sweep(self, tiers: Sequence[Tier], proceed: Callable[[], bool] = lambda: True) -> None:
        damaged: dict[Tier, CheckpointDamagedError] = {}
        for tier in tiers:
            try:
                plan = sweep(tier.store, self._retention, owner=self._attempt, known=tier.known, proceed=proceed)
            except CheckpointDamagedError as error:
                # What was just written cannot be read back: whatever the store said, that save has failed.
                tier.suspect, damaged[tier] = True, error
            except Exception as error:  # noqa: BLE001 - top of a thread; whatever it is, the commit stands
                logger.warning(
                    "retention could not delete old checkpoints in %s, will try again after the next save: %s",
                    tier.store.uri,
                    error,
                )
            else:
                self._tell_missing(tier, plan)
                if plan.drop or plan.objects or plan.hidden:
                    dropped = tuple(str(identity) for identity in plan.drop)
                    self._publish(
                        Swept(checkpoints=dropped, objects=len(plan.objects), size=plan.size, tier=tier.store.uri)
                    )
        for tier, proof in damaged.items():
            step = tier.last.step if tier.last else 0
            whole = [other for other in self._tiers.all if other.surviving and not other.suspect and not other.failures]
            newest = next((other for other in whole if other.last and other.last.step >= step), None)
            if tier.surviving and newest is None:
                tier.failures += 1
                self._failed(step, proof)
                continue
            if newest is not None and newest.last is not None:
                with self._state:
                    self.checkpoint = Checkpoint(newest.store, newest.last)
            self._tier_failed(tier, step, proof)

    def _tell_missing(self, tier: Tier, plan: SweepPlan) -> None:
        """A metric may be spelled wrong, or not be measured yet: said once, when something was deleted that might have been meant."""
        if plan.drop and not self._told and (what := missing_metrics(self._retention, tier.known.manifests.values())):
            self._told = True
            logger.warning(
                "%s, keep=%s: %s. What the rest of the policy does not keep is deleted",
                tier.store.uri,
                self._retention,
                what,
            )

    def _tier_failed(self, tier: Tier, step: int, error: Exception) -> None:
        tier.failures += 1
        if tier.failures == 1:
            logger.warning("%s has not got the checkpoint of step %d, the others have: %s", tier.store.uri, step, error)
        text = f"{type(error).__name__}: {error}"
        self._publish(TierFailed(tier=tier.store.uri, step=step, error=text, in_a_row=tier.failures))

    def _failed(self, step: int, error: Exception) -> None:
        with self._state:
            self.error = error
            if isinstance(error, FencedError):
                self.fenced = error
            self.failures += 1
        logger.error("save at step %d failed (%d in a row): %s", step, self.failures, error)
        logger.debug("where it failed", exc_info=error)
        self._publish(SaveFailed(step=step, error=f"{type(error).__name__}: {error}", in_a_row=self.failures))


def _sum_up(failed: Mapping[Tier, Exception]) -> Exception:
    """The error of the only tier, or of all those that outlive the machine."""
    errors = {tier: error for tier, error in failed.items() if tier.surviving} or failed
    if len(errors) == 1:
        return next(iter(errors.values()))
    whole = StoreError("; ".join(f"{tier.store.uri}: {error}" for tier, error in errors.items()))
    whole.__cause__ = next(iter(errors.values()))
    return whole
