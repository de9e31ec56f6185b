"""From a checkpoint to the state as it was, applied when the loop has come back to its place."""

import copy
from typing import Any, NamedTuple

from spotguard.errors import StateMismatchError
from spotguard.guard.saver import RANK
from spotguard.guard.session import Loaded
from spotguard.state.train_state import TrainState

__all__ = ["Restored", "Restorer"]


class Restored(NamedTuple):
    """What a checkpoint said of the loop.

    Attributes:
        step: Step boundaries passed.
        epoch: Epoch that goes on.
        total: Epochs or steps that the loop was to run for.
        data: Where it was in its data.
        inexact: What did not come back bit for bit, in words.
    """

    step: int
    epoch: int
    total: int
    data: dict[str, Any]
    inexact: list[str]


class Restorer:
    """Holds what was loaded until the loop has come to the place it belongs to.

    It is applied twice: at the start, so that code before the loop sees the restored model, and once more on arrival, because that code,
    and the head of the epoch, may have changed something or drawn random numbers.

    Args:
        state: What to restore.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._payload: dict[str, Any] | None = None

    def restore(self, loaded: Loaded) -> Restored:
        """Apply it for the first time.

        Raises:
            StateMismatchError: The state does not fit.
        """
        self._payload = loaded.payload
        if RANK not in self._payload:
            raise StateMismatchError(
                f"checkpoint {loaded.manifest.id} was saved by CheckpointStore.save(), which knows nothing of a loop to go on with. "
                "Load its members yourself, and give SpotGuard a new URI"
            )
        local = self._payload[RANK]
        # A copy: optimizers take over the very tensors they are given, and code on the way to the place must not change the original.
        inexact = self._apply(copy.deepcopy(self._payload))
        progress = local["progress"]
        return Restored(progress["step"], progress["epoch"], progress["total"], local["data"], inexact)

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
