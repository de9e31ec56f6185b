"""The background thread that commits snapshots: one in flight, never queued, never cancelled."""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from spotguard.checkpoint import CheckpointId, Manifest
from spotguard.errors import CheckpointDamagedError, FencedError, SpotguardError
from spotguard.events import CheckpointCommitted, Event, SaveFailed, Swept
from spotguard.pipeline.commit import commit
from spotguard.pipeline.sweeper import sweep
from spotguard.policies import RetentionPolicy
from spotguard.state.snapshot import Snapshot
from spotguard.stores import ObjectStore

__all__ = ["Writer"]

logger = logging.getLogger(__name__)


class Writer:
    """Commits snapshots of one attempt, and runs retention after each commit.

    Args:
        store: The run.
        run_id: Its identity.
        attempt: The number that this process has claimed.
        retention: What to keep.
        publish: Where events go.
        resumed: The manifest that this attempt resumed from.

    Attributes:
        last: The newest commit of this history, or None.
        failures: Failed saves since the last commit.
        error: The last failure, or None once a save has worked.
        fenced: A later attempt has taken over; no save will work any more.
        write_s: Seconds the last commit took.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        run_id: str,
        attempt: int,
        retention: RetentionPolicy,
        publish: Callable[[Event], None],
        resumed: Manifest | None = None,
    ) -> None:
        self.store, self.last = store, resumed
        self.failures, self.write_s = 0, 0.0
        self.error: BaseException | None = None
        self.fenced: FencedError | None = None
        self._run_id, self._attempt, self._retention, self._publish = run_id, attempt, retention, publish
        self._used: CheckpointId | None = None
        self._damaged: CheckpointId | None = None  # the last commit, if it could not be read back as it was written
        self._job: tuple[Snapshot, Mapping[str, float], Callable[[int], None] | None] | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="spotguard-writer", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a commit is under way: the snapshot's buffers must not be touched."""
        return self._job is not None

    def submit(
        self, snapshot: Snapshot, metrics: Mapping[str, float], progress: Callable[[int], None] | None = None
    ) -> None:
        """Hand over a snapshot; only allowed while not `busy`."""
        with self._wake:
            assert self._job is None, "one save in flight"
            self._job = (snapshot, metrics, progress)
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

    def _commit(self, snapshot: Snapshot, metrics: Mapping[str, float], progress: Callable[[int], None] | None) -> None:
        if self.error is not None:
            self._sweep()  # what the failed save left behind may be what fills the disk
        started = time.monotonic()
        sequence = self._used.sequence + 1 if self._used and self._used.step == snapshot.step else 0
        self._used = CheckpointId(self._attempt, snapshot.step, sequence)
        manifest, written = commit(
            self.store,
            snapshot,
            run_id=self._run_id,
            attempt=self._attempt,
            sequence=sequence,
            previous=self.last,
            reuse=self.last is None or self.last.id != self._damaged,
            metrics=metrics,
            progress=progress,
        )
        self.last, self.failures, self.error = manifest, 0, None
        self.write_s = time.monotonic() - started
        self._publish(
            CheckpointCommitted(
                checkpoint=str(manifest.id),
                step=manifest.step,
                size=manifest.size,
                written=written,
                seconds=self.write_s,
                metrics=dict(metrics),
            )
        )
        self._sweep()

    def _sweep(self) -> None:
        try:
            plan = sweep(self.store, self._retention, owner=self._attempt)
        except CheckpointDamagedError as error:
            # What was just written cannot be read back: whatever the store said, that save has failed.
            self._damaged = self.last.id if self.last else None
            self._failed(self.last.step if self.last else 0, error)
        except (SpotguardError, OSError) as error:
            logger.warning("retention could not delete old checkpoints, will try again after the next save: %s", error)
        else:
            if plan.drop or plan.objects:
                dropped = tuple(str(identity) for identity in plan.drop)
                self._publish(Swept(checkpoints=dropped, objects=len(plan.objects), size=plan.size))

    def _failed(self, step: int, error: Exception) -> None:
        self.error = error
        if isinstance(error, FencedError):
            self.fenced = error
        self.failures += 1
        logger.error("save at step %d failed (%d in a row): %s", step, self.failures, error)
        logger.debug("where it failed", exc_info=error)
        self._publish(SaveFailed(step=step, error=f"{type(error).__name__}: {error}", in_a_row=self.failures))
