"""The background thread that commits snapshots: one in flight, never queued, never cancelled."""

import collections
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from spotguard.checkpoint import CheckpointId, Manifest
from spotguard.errors import CheckpointDamagedError, FencedError, SpotguardError, StoreError
from spotguard.events import CheckpointCommitted, Event, SaveFailed, Swept, TierFailed
from spotguard.pipeline.checkpoint import Checkpoint, Progress
from spotguard.pipeline.commit import ClaimGoneError, commit
from spotguard.pipeline.sweeper import sweep
from spotguard.pipeline.tier import Tier
from spotguard.pipeline.tiers import Tiers
from spotguard.policies import RetentionPolicy
from spotguard.state.snapshot import Snapshot
from spotguard.stores import ObjectStore

__all__ = ["Writer"]

logger = logging.getLogger(__name__)


class Writer:
    """Commits snapshots of one attempt to every tier of the run, the fastest first, and runs retention after each commit.

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
        self._job: tuple[Snapshot, Mapping[str, float], Progress | None, tuple[Tier, ...], float | None] | None = None
        self._wake = threading.Condition()
        self._closing = False
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
    ) -> None:
        """Hand over a snapshot; only allowed while not `busy`.

        Args:
            snapshot: What to commit.
            metrics: Recorded with it.
            progress: Called with the number of bytes done, for each piece.
            tiers: ``"all"``, or only the ``"fastest"``: where time is short.
            deadline: Instant (monotonic seconds) after which nothing of it may become visible.
        """
        with self._wake:
            assert self._job is None, "one save in flight"
            self._job, self.started = (
                (snapshot, metrics, progress, self._tiers.select(tiers), deadline),
                time.monotonic(),
            )
            self._wake.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until nothing is in flight; False when `timeout` seconds were not enough."""
        with self._wake:
            return self._wake.wait_for(lambda: self._job is None, timeout)

    def close(self, timeout: float | None = None) -> None:
        """Finish what is in flight and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._job is not None or self._closing)
                if self._job is None:
                    return
                job = self._job
            try:
                self._commit(*job)
            except Exception as error:  # noqa: BLE001 - top of the thread: told by event, raised in the loop after several
                self._failed(job[0].step, error)
            finally:
                with self._wake:
                    self._job = None
                    self._wake.notify_all()

    def _commit(
        self,
        snapshot: Snapshot,
        metrics: Mapping[str, float],
        progress: Progress | None,
        tiers: tuple[Tier, ...],
        deadline: float | None,
    ) -> None:
        started = time.monotonic()
        sequence = self._used.sequence + 1 if self._used and self._used.step == snapshot.step else 0
        self._used = CheckpointId(self._attempt, snapshot.step, sequence)
        if self._tiers.several:
            self._tiers.check_fences(self._attempt)
        failed: dict[Tier, Exception] = {}
        for tier in sorted(tiers, key=_is_in_trouble):  # the others do not wait for it
            if tier.failures and tier.admitted:
                self._sweep([tier])  # what the failed save left behind may be what fills the disk
            try:
                self._commit_to(tier, snapshot, sequence, metrics, progress, deadline)
            except Exception as error:
                if isinstance(error, FencedError) and not (self._tiers.several and isinstance(error, ClaimGoneError)):
                    raise
                failed[tier] = error
                tier.admitted = tier.admitted and not isinstance(error, ClaimGoneError)
        done = [tier for tier in tiers if tier not in failed]
        if not done or (any(tier.surviving for tier in tiers) and not any(tier.surviving for tier in done)):
            for tier in failed:
                tier.failures += 1
            self._sweep(done)
            raise _sum_up(failed)
        self.error = None
        self.failures = 0 if any(tier.surviving for tier in done) else self.failures
        self._parent = self._used
        self.write_s = time.monotonic() - started
        if len(tiers) == len(self._tiers.all):
            self.seconds.append(self.write_s)
        for tier, trouble in failed.items():
            self._tier_failed(tier, snapshot.step, trouble)
        if deadline is None:  # the next attempt has time for it
            self._sweep(done)

    def _commit_to(
        self,
        tier: Tier,
        snapshot: Snapshot,
        sequence: int,
        metrics: Mapping[str, float],
        progress: Progress | None,
        deadline: float | None,
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
        )
        if tier.failures:
            logger.info("%s works again", tier.store.uri)
        tier.last, tier.suspect, tier.failures = manifest, False, 0
        tier.seconds.append(time.monotonic() - started)
        tier.known.manifests[manifest.id] = manifest
        if tier.surviving and (self.last is None or self.last.id != manifest.id):
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

    def _sweep(self, tiers: Sequence[Tier]) -> None:
        damaged: dict[Tier, CheckpointDamagedError] = {}
        for tier in tiers:
            try:
                plan = sweep(tier.store, self._retention, owner=self._attempt, known=tier.known)
            except CheckpointDamagedError as error:
                # What was just written cannot be read back: whatever the store said, that save has failed.
                tier.suspect, damaged[tier] = True, error
            except (SpotguardError, OSError) as error:
                logger.warning(
                    "retention could not delete old checkpoints in %s, will try again after the next save: %s",
                    tier.store.uri,
                    error,
                )
            else:
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
                self.checkpoint = Checkpoint(newest.store, newest.last)
            self._tier_failed(tier, step, proof)

    def _tier_failed(self, tier: Tier, step: int, error: Exception) -> None:
        tier.failures += 1
        if tier.failures == 1:
            logger.warning("%s has not got the checkpoint of step %d, the others have: %s", tier.store.uri, step, error)
        text = f"{type(error).__name__}: {error}"
        self._publish(TierFailed(tier=tier.store.uri, step=step, error=text, in_a_row=tier.failures))

    def _failed(self, step: int, error: Exception) -> None:
        self.error = error
        if isinstance(error, FencedError):
            self.fenced = error
        self.failures += 1
        logger.error("save at step %d failed (%d in a row): %s", step, self.failures, error)
        logger.debug("where it failed", exc_info=error)
        self._publish(SaveFailed(step=step, error=f"{type(error).__name__}: {error}", in_a_row=self.failures))


def _is_in_trouble(tier: Tier) -> bool:
    return tier.failures > 0 or not tier.admitted


def _sum_up(failed: Mapping[Tier, Exception]) -> Exception:
    """The error of the only tier, or of all those that outlive the machine."""
    errors = {tier: error for tier, error in failed.items() if tier.surviving} or failed
    if len(errors) == 1:
        return next(iter(errors.values()))
    whole = StoreError("; ".join(f"{tier.store.uri}: {error}" for tier, error in errors.items()))
    whole.__cause__ = next(iter(errors.values()))
    return whole
