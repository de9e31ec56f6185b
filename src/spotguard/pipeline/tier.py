"""One of the stores that a run is kept in."""

import collections
import dataclasses

from spotguard.checkpoint import CheckpointId, Digest, Manifest
from spotguard.errors import StoreError
from spotguard.pipeline.sweeper import Known
from spotguard.stores import ObjectStore

__all__ = ["Tier"]


@dataclasses.dataclass(eq=False)
class Tier:
    """One of the stores.

    Attributes:
        store: Where it is.
        surviving: It outlives the machine.
        admitted: The identity of the run and the claim of this attempt are there.
        error: Why it cannot be reached; None while it can.
        known: What was read of it.
        last: The newest commit of this history there, whose shards may be named again.
        digests: Of the shards that were last written there or compared with what is there, by name.
        suspect: The last commit there was found damaged: nothing of it is named again.
        failures: Failed saves in a row.
        commits: Commits that are under way there.
        seconds: What the last commits took.
    """

    store: ObjectStore
    surviving: bool
    admitted: bool = False
    error: StoreError | None = None
    known: Known = dataclasses.field(default_factory=Known)
    last: Manifest | None = None
    digests: dict[str, Digest] = dataclasses.field(default_factory=dict, repr=False)
    suspect: bool = False
    failures: int = 0
    commits: int = 0
    seconds: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=100))

    def holds(self, identity: CheckpointId) -> bool:
        """Whether that checkpoint was committed there when it was last listed."""
        return self.known.history is not None and identity in self.known.history.refs
