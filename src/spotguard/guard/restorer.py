"""From a resolution to the state as it was, applied when the loop has come back to the place of the checkpoint."""

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from spotguard.checkpoint import Manifest
from spotguard.errors import InexactResumeWarning, StateMismatchError
from spotguard.events import CandidateRejected, Event, FreshStart, InexactResume
from spotguard.guard.console import say
from spotguard.guard.gate import Gate
from spotguard.guard.meter import Meter
from spotguard.guard.saver import RANK
from spotguard.pipeline.resolver import resolve
from spotguard.state.compare import fingerprint
from spotguard.state.rng import capture_rng
from spotguard.state.train_state import TrainState
from spotguard.stores import ObjectStore

__all__ = ["Restored", "Restorer"]


class Restored(NamedTuple):
    """What a checkpoint said of the loop.

    Attributes:
        manifest: Its manifest.
        step: Step boundaries passed.
        epoch: Epoch that goes on.
        total: Epochs or steps that the loop was to run for.
        data: Where it was in its data.
    """

    manifest: Manifest
    step: int
    epoch: int
    total: int
    data: dict[str, Any]


class Restorer:
    """Holds what was loaded until the loop has come to the place it belongs to.

    It is applied twice: at the start, so that code before the loop sees the restored model, and once more on arrival, because that code,
    and the head of the epoch, may have changed something or drawn random numbers.

    Args:
        state: What to restore.
        publish: Where events go.
        gate: The line to a rehearsal, or None.
    """

    def __init__(self, state: TrainState, publish: Callable[[Event], None], gate: Gate | None) -> None:
        self._state, self._publish, self._gate = state, publish, gate
        self._payload: dict[str, Any] | None = None

    def restore(self, store: ObjectStore, run_id: str, attempt: int) -> Restored | None:
        """Resolve, verify, load and apply; None for a fresh start.

        Raises:
            NoUsableCheckpointError: There are checkpoints, and none is whole.
            StateMismatchError: The state does not fit.
        """
        began = time.monotonic()
        with Meter("verifying and loading the checkpoint") as meter:
            resolution = resolve(store, run_id=run_id, load=True, progress=meter.advance)
        passed_over = [f"checkpoint {item.id} is passed over: {item.reason}" for item in resolution.rejected]
        for candidate, line in zip(resolution.rejected, passed_over, strict=True):
            say(line)
            self._publish(CandidateRejected(checkpoint=candidate.id, reason=candidate.reason))
        checkpoint = resolution.require()
        if checkpoint is None or resolution.loaded is None:
            self._publish(FreshStart(attempt=attempt))
            say(f"fresh start, no checkpoint in {store.uri} yet")
            if self._gate is not None:
                self._gate.ask("fresh", rng={name: fingerprint(value) for name, value in capture_rng().items()})
            return None
        if RANK not in resolution.loaded:
            raise StateMismatchError(
                f"checkpoint {checkpoint.id} was saved by CheckpointStore.save(), which knows nothing of a loop to go on with. "
                "Load its members yourself, and give SpotGuard a new URI"
            )
        self._payload = resolution.loaded
        local = self._payload[RANK]
        # A copy: optimizers take over the very tensors they are given, and code on the way to the place must not change the original.
        inexact = self._apply(copy.deepcopy(self._payload))
        for what in inexact:
            warnings.warn(what, InexactResumeWarning, stacklevel=5)
            self._publish(InexactResume(what=what))
        if self._gate is not None:
            step = local["progress"]["step"]
            took = time.monotonic() - began
            self._gate.ask(
                "resumed", step=step, checkpoint=checkpoint.id, seconds=took, inexact=inexact, rejected=passed_over
            )
        progress = local["progress"]
        return Restored(checkpoint.manifest, progress["step"], progress["epoch"], progress["total"], local["data"])

    def arrive(self) -> None:
        """The loop has come to the place of the checkpoint: whatever ran on the way, the state is now that of the checkpoint."""
        if self._payload is not None:
            self._apply(self._payload, compare=False)
            self._payload = None

    def forget(self) -> None:
        """The loop keeps its own counters; there is no place to arrive at."""
        self._payload = None

    def _apply(self, payload: dict[str, Any], *, compare: bool = True) -> list[str]:
        members = {name: tree for name, tree in payload.items() if name != RANK}
        return self._state.load_members(members, compare=compare) + self._state.load_local(payload[RANK])
