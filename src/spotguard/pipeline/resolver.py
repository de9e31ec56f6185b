"""Choosing what to resume from, and saying why."""

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from spotguard.checkpoint import CheckpointId, ShardRecord
from spotguard.checkpoint.layout import MANIFESTS, claim_key, parse_manifest_key
from spotguard.errors import CheckpointDamagedError, ConfigError, NoUsableCheckpointError, StoreError
from spotguard.pipeline.checkpoint import Checkpoint, load_manifest
from spotguard.pipeline.history import History, read_history
from spotguard.stores import ObjectStore, VersionedStore

__all__ = ["Candidate", "Place", "Resolution", "resolve", "resolve_among"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One checkpoint that was looked at.

    Attributes:
        id: Its id.
        verdict: ``"chosen"``, ``"rejected"``, ``"older"`` (not looked at: a newer one was chosen), ``"off lineage"``, or ``"deleted"``
            (it would have been looked at first, and can be brought back).
        reason: Why.
        tier: The store whose copy was looked at; empty where none was.
    """

    id: str
    verdict: str
    reason: str
    tier: str = ""


class Place(NamedTuple):
    """A store of the run.

    Attributes:
        store: Where.
        holds: Checkpoints that are committed there.
    """

    store: ObjectStore
    holds: Collection[CheckpointId]


@dataclasses.dataclass(frozen=True)
class Resolution:
    """The outcome: what to resume from, and every candidate, newest first.

    Attributes:
        checkpoint: The newest one that is committed and verified; None in a new run.
        candidates: All of them, with reasons.
        damaged: Claims that could not be read, or that continue what is not there, with reasons.
        loaded: What `load` of the checkpoint gave, where loading was asked for.
    """

    checkpoint: Checkpoint | None
    candidates: tuple[Candidate, ...]
    damaged: tuple[str, ...] = ()
    loaded: dict[str, Any] | None = dataclasses.field(default=None, repr=False)

    @property
    def rejected(self) -> list[Candidate]:
        """The damaged ones."""
        return [candidate for candidate in self.candidates if candidate.verdict == "rejected"]

    @property
    def deleted(self) -> list[Candidate]:
        """Those that somebody has deleted and can bring back."""
        return [candidate for candidate in self.candidates if candidate.verdict == "deleted"]

    def require(self) -> Checkpoint | None:
        """The checkpoint; None only where there never was one.

        Raises:
            NoUsableCheckpointError: There were candidates and all were rejected. Training must not start from zero in silence.
        """
        if self.checkpoint is None and (self.rejected or self.damaged):
            told = [*self.deleted, *self.rejected]
            reasons = [f"  {candidate.id}: {candidate.reason}" for candidate in told] + [
                f"  {text}" for text in self.damaged
            ]
            raise NoUsableCheckpointError(
                "this run has checkpoints or claims, and none can be resumed from:\n" + "\n".join(reasons) + "\n"
                "Bring the damaged objects back, 'spotguard rollback' to a whole checkpoint, or start a new run under another URI"
            )
        return self.checkpoint


def resolve(
    store: ObjectStore,
    *,
    run_id: str | None = None,
    load: bool = False,
    history: History | None = None,
    progress: Callable[[int], None] | None = None,
    explain: bool = False,
) -> Resolution:
    """Walk the lineage from its newest checkpoint and take the first whose every byte is what was committed.

    Args:
        store: The run.
        run_id: Identity that manifests must carry, where it is known.
        load: Also read the state, in the same pass over the bytes.
        history: A listing, where the caller has one.
        progress: Called with the number of bytes done, for each piece.
        explain: Also ask for what was deleted and can be brought back.

    Raises:
        FormatTooNewError: A later release wrote the newest one. That is no damage, so nothing older is taken in its place.
        StoreError: The store could not be read, even after retries. That is no damage either.
    """
    history = history or read_history(store)
    places = [Place(store, history.manifests)]
    return resolve_among(places, history, run_id=run_id, load=load, progress=progress, explain=explain)


def resolve_among(
    places: Sequence[Place],
    history: History,
    *,
    run_id: str | None = None,
    load: bool = False,
    progress: Callable[[int], None] | None = None,
    take: Callable[[Checkpoint, ShardRecord, memoryview], None] | None = None,
    explain: bool = False,
) -> Resolution:
    """As `resolve`, for a run that stands in several stores: a copy in another one comes before an older checkpoint.

    Args:
        places: The stores, the one to read from first.
        history: What they tell together.
        run_id: Identity of the run, if known.
        load: Also keep what was read.
        progress: Called with the number of bytes done, for each piece.
        take: Called with each shard that is read to be kept, verified.
        explain: Also ask for what was deleted and can be brought back.

    Raises:
        FormatTooNewError: A later release wrote the newest one. That is no damage, so nothing older is taken in its place.
        StoreError: A store could not be read, even after retries, and no other one has that checkpoint whole.
    """
    line = history.lineage
    candidates: list[Candidate] = []
    chosen: Checkpoint | None = None
    loaded: dict[str, Any] | None = None
    for identity in line:
        if chosen is not None:
            candidates.append(Candidate(str(identity), "older", f"{chosen.id} is newer and whole"))
            continue
        trouble: StoreError | None = None
        for store in [place.store for place in places if identity in place.holds]:
            try:
                checkpoint = Checkpoint(store, load_manifest(store, identity, run_id=run_id))
                taking = None if take is None else functools.partial(take, checkpoint)
                checkpoint, state = checkpoint.read(progress, keep=load, take=taking)
            except CheckpointDamagedError as error:
                candidates.append(Candidate(str(identity), "rejected", str(error), store.uri))
            except StoreError as error:  # no proof of anything; perhaps another store has it
                if trouble is None:
                    trouble = error
                if len(places) > 1:
                    logger.warning("checkpoint %s cannot be read from %s: %s", identity, store.uri, error)
            else:
                chosen, loaded = checkpoint, state if load else None
                reason = "newest of the lineage that is committed and verified"
                reason += f", read from {store.uri}" if len(places) > 1 else ""
                candidates.append(Candidate(str(identity), "chosen", reason, store.uri))
                break
        if chosen is None and trouble is not None:
            raise trouble
    if explain:
        candidates[:0] = _deleted(places, history, chosen)
    candidates += _off_lineage(history, set(line))
    damaged = [*history.damaged.values(), *([] if line else _emptied(places, history))]
    return Resolution(chosen, tuple(candidates), tuple(damaged), loaded)


def _emptied(places: Sequence[Place], history: History) -> list[str]:
    """Proof that a history without checkpoints once had one: claims that continue it. No sweep of ours deletes the last."""
    where = " and ".join(place.store.uri for place in places)
    return [
        f"{where}/{claim_key(claim.attempt)} continues a checkpoint of step {claim.parent_max_step}, "
        "and the store has none of that history"
        for claim in history.claims.values()
        if claim.parent_max_step
    ]


def _deleted(places: Sequence[Place], history: History, chosen: Checkpoint | None) -> list[Candidate]:
    """What would come before the one that was chosen, had nobody deleted it. Only to tell: where a store will not say, nothing is told."""
    kept: dict[CheckpointId, ObjectStore] = {}
    for store in [place.store for place in places]:
        if isinstance(store, VersionedStore):
            with contextlib.suppress(StoreError, ConfigError):  # one that never kept versions says so
                found = [parse_manifest_key(info.key) for info in store.deleted(MANIFESTS)]
                kept |= {item: store for item in found if item is not None and item not in history.manifests}
    if not kept:
        return []
    whole = dataclasses.replace(history, manifests=tuple(sorted({*history.manifests, *kept})))
    before = itertools.takewhile(lambda item: chosen is None or item != chosen.manifest.id, whole.lineage)
    return [
        Candidate(
            str(item),
            "deleted",
            f"was deleted, and is still kept: 'spotguard restore {kept[item].uri} {item}' brings it back",
            kept[item].uri,
        )
        for item in before
        if item in kept
    ]


def _off_lineage(history: History, line: set[CheckpointId]) -> list[Candidate]:
    reason = "not in the history of the newest attempt: rolled back, or committed after another attempt had taken over"
    return [Candidate(str(item), "off lineage", reason) for item in reversed(history.manifests) if item not in line]
