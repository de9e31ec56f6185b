"""When a save is due, and taking the snapshot: the part of the guard that stalls the loop, and nothing but that part."""

import collections
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from spotguard.checkpoint.layout import rank_name
from spotguard.errors import SaveError, TransientStoreError
from spotguard.events import Event, SaveSkipped, SaveStarted
from spotguard.guard.gate import Gate
from spotguard.guard.meter import Meter
from spotguard.guard.pace import Pace
from spotguard.pipeline.writer import Writer
from spotguard.policies import Due, SavePoint, SavePolicy, SaveTimes, p95, time_left
from spotguard.state.snapshot import HostBuffers, ShardImage, Snapshot

__all__ = ["RANK", "Place", "Saver"]

_AGAIN_S = 1.0  # between two tries of a last save that goes on failing

RANK = rank_name(0)
"""Name of the shard with what belongs to this rank."""


class Place(NamedTuple):
    """A boundary of the loop.

    Attributes:
        step: Step boundaries passed over all attempts.
        epoch: Epoch that goes on from here.
        batch: Batches of that epoch that are done.
        boundary: Counts the boundaries of this attempt, so that one is never committed twice.
    """

    step: int
    epoch: int
    batch: int
    boundary: int


class Saver:
    """Takes snapshots and hands them to the writer.

    Args:
        writer: Commits them.
        policy: Says when one is due.
        trees: Everything that is saved, live, by shard name.
        publish: Where events go.
        gate: The line to a rehearsal, or None.

    Attributes:
        due: When the next periodic save is due.
        pace: How long steps take; whoever drives the loop tells it of each boundary.
        requested: Metrics of a save that was asked for; None when none was.
        held: The place of a snapshot that is kept in memory, to be committed if a notice comes before the next boundary; None without.
    """

    def __init__(
        self,
        writer: Writer,
        policy: SavePolicy,
        *,
        trees: Callable[[], Mapping[str, Any]],
        publish: Callable[[Event], None],
        gate: Gate | None,
    ) -> None:
        self.due = Due()
        self.pace = Pace()
        self.requested: dict[str, float] | None = None
        self.held: Place | None = None
        self._writer, self._policy, self._trees, self._publish, self._gate = writer, policy, trees, publish, gate
        self._buffers = HostBuffers()
        self._stall_s = 0.0
        self._stalls: collections.deque[float] = collections.deque(maxlen=100)
        self._lock = (
            threading.RLock()
        )  # of the buffers: where the loop is stuck, another thread commits what is in them
        self._saved_at = -1
        self._snapshot: Snapshot | None = None  # the last one; its buffers are good until the next

    @property
    def stall_s(self) -> float:
        """How long the last save stopped the loop, in seconds."""
        return self._stall_s

    def plan(self, place: Place) -> None:
        """Ask the policy when the next save is due, seen from now."""
        self.due = self._policy.next_due(
            SavePoint(place.step, time.monotonic(), self._stall_s, self._writer.write_s, place.epoch)
        )

    def times(self) -> SaveTimes:
        """What a save and a step take, as measured."""
        writes, fast, stall = p95(self._writer.seconds), self._writer.fast_seconds, p95(self._stalls) or 0.0
        quickest = p95(fast[0]) if fast is not None else None
        elapsed = time.monotonic() - self._writer.started if self._writer.busy else None
        return SaveTimes(
            save_s=None if writes is None else stall + writes,
            fast_s=None if quickest is None else stall + quickest,
            fast_survives=fast is not None and fast[1],
            step_s=self.pace.step_s,
            flush_s=None if elapsed is None else time_left(writes, elapsed),
        )

    def is_due(self, place: Place) -> bool:
        """Whether a periodic save is due at this boundary."""
        due = self.due
        return place.step >= due.step or place.epoch >= due.epoch or time.monotonic() >= due.time

    def prepare(self) -> None:
        """Have buffers ready for the first save."""
        self._buffers.prepare(self._trees())

    def attend(self, place: Place) -> None:
        """Save if that was asked for, or is due and nothing is in flight."""
        if self.requested is not None:
            self._writer.drain(upkeep=False)
            self.snapshot(place)
        elif self.is_due(place):
            if self._writer.busy:
                self._publish(SaveSkipped(step=place.step, reason="the save before is still being written"))
                self.plan(place)
            else:
                self.snapshot(place)

    def hold(self, place: Place) -> None:
        """Keep a snapshot of this boundary in memory, where what comes next takes long and cannot be saved in its midst.

        Nothing is held while the buffers are being written out: what is in them is hardly older.
        """
        with self._lock:
            if self._saved_at == place.boundary:
                self.held = place
            elif not self._writer.busy:
                self._snapshot = self._capture(place)
                self.held = place

    def release(self) -> None:
        """The held snapshot is not needed any more."""
        self.held = None

    def save_and_wait(
        self,
        title: str,
        place: Place,
        *,
        finished: bool = False,
        tiers: Literal["all", "fastest"] = "all",
        deadline: float | None = None,
    ) -> bool:
        """Commit this very boundary, waiting for what is in flight first; the writer's `error` tells how it went.

        There is no later save to make up for a failed one, so it is tried once more; up to a deadline even again and again, where the store
        is only out of order for now.

        Returns:
            Whether that was done, well or badly, by the deadline (monotonic seconds), where there is one.
        """
        self._writer.hurry()
        if not self._drain(deadline):
            return False
        if self._saved_at == place.boundary and self._writer.error is None and not finished:
            return True
        metrics = self.requested
        for number in itertools.count(1):
            self.requested = metrics
            with Meter(title) as meter:
                self.snapshot(
                    place, finished=finished, progress=meter.advance, tiers=tiers, deadline=deadline, urgent=True
                )
                if not self._drain(deadline):
                    return False
            error = self._writer.error
            if error is None or self._writer.fenced is not None:
                break
            if number >= 2:
                lasting = not any(isinstance(one, TransientStoreError) for one in (error, error.__cause__))
                if deadline is None or lasting or time.monotonic() + _AGAIN_S > deadline:
                    break
                time.sleep(_AGAIN_S)
        return True

    def commit_held(self, deadline: float | None) -> str:
        """See to it that the last host snapshot is committed. Called where the loop is stuck, by another thread; it waits for nothing.

        The live state is not touched: it may be in the middle of a step.

        Returns:
            How that snapshot stands, in words; empty where it is being written.
        """
        if not self._lock.acquire(blocking=False):
            return "the loop is saving by itself"
        try:
            if self._writer.busy:
                return ""
            if self._writer.fenced is not None:
                return "a later attempt has taken over"
            if self._snapshot is None:
                return "no snapshot has been taken since the start, and the last checkpoint stands"
            if self._writer.error is None and (self.held is None or self.held.boundary == self._saved_at):
                return f"the last snapshot, of step {self._snapshot.step}, is committed already"
            self._writer.submit(self._snapshot, self.requested or {}, deadline=deadline, urgent=True)
            self._saved_at = self.held.boundary if self.held is not None else self._saved_at
            return ""
        finally:
            self._lock.release()

    def settled(self, timeout: float) -> str:
        """What has become of the snapshot that is being written, in words, after `timeout` seconds at the most."""
        done = self._writer.drain(timeout, upkeep=False)
        step = self._snapshot.step if self._snapshot is not None else 0
        if not done:
            return f"the last snapshot, of step {step}, is still being written"
        if self._writer.error is not None:
            return f"the last snapshot, of step {step}, could not be committed: {self._writer.error}"
        return f"the last snapshot, of step {step}, is committed"

    def _drain(self, deadline: float | None) -> bool:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return self._writer.drain(left, upkeep=deadline is None)

    def save_finished(self, place: Place) -> None:
        """Commit the end of the run.

        Raises:
            SaveError: It could not be saved.
            FencedError: A later attempt has taken over.
        """
        self.save_and_wait("saving the finished run", place, finished=True)
        if self._writer.fenced is not None:
            raise self._writer.fenced
        if self._writer.error is not None:
            raise SaveError(
                f"the final checkpoint of the finished run could not be saved: {self._writer.error}. "
                "The last committed one stands; mend the cause and start again to redo the rest"
            ) from self._writer.error

    def snapshot(
        self,
        place: Place,
        *,
        finished: bool = False,
        progress: Callable[[int], None] | None = None,
        tiers: Literal["all", "fastest"] = "all",
        deadline: float | None = None,
        urgent: bool = False,
    ) -> None:
        """Copy the state into the kept buffers, hand them to the writer, and let the loop go on."""
        began = time.monotonic()
        with self._lock:
            self._writer.drain(upkeep=False)  # of what another thread has committed meanwhile
            metrics, self.requested = self.requested or {}, None
            if self.held is None or self.held.boundary != place.boundary or self._snapshot is None or finished:
                self._snapshot = self._capture(place, finished=finished)
            snapshot = self._snapshot
            self._writer.submit(snapshot, metrics, progress, tiers=tiers, deadline=deadline, urgent=urgent)
        self._stall_s, self._saved_at = time.monotonic() - began, place.boundary
        self._stalls.append(self._stall_s)
        self._publish(SaveStarted(step=place.step, size=snapshot.size, stall_s=self._stall_s))
        if self._gate is not None:
            self._gate.ask("snapshot", step=place.step, stall=self._stall_s, size=snapshot.size)
        self.plan(place)

    def _capture(self, place: Place, *, finished: bool = False) -> Snapshot:
        self.held = None
        images = tuple(
            ShardImage(name, 0 if name == RANK else None, self._buffers.capture(name, tree))
            for name, tree in self._trees().items()
        )
        return Snapshot(place.step, place.epoch, place.batch, finished, images)
