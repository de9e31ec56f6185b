"""Retention by reachability: keep what the policy wants, and every object that a kept manifest names; delete the rest.

Order of deletion: manifests first, made durable, then objects that no manifest names any more. A crash in between leaves orphans, never a
manifest without its shards; the next sweep removes them. Nothing is deleted before the newest checkpoint has been read back and verified.
"""

import dataclasses
import datetime as dt
from collections.abc import Mapping, Sequence

from spotguard._time import utc_now
from spotguard.checkpoint import CheckpointId, Manifest
from spotguard.checkpoint.layout import CHECKPOINTS, EVENTS, RUN, attempt_of_key, parse_shard_key
from spotguard.errors import CheckpointDamagedError, FormatTooNewError
from spotguard.pipeline.checkpoint import Checkpoint, load_manifest
from spotguard.pipeline.history import History, read_history
from spotguard.pipeline.objects import retried
from spotguard.policies import RetentionPolicy
from spotguard.stores import ObjectInfo, ObjectRef, ObjectStore

__all__ = ["SweepPlan", "plan_sweep", "sweep"]


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What a sweep deletes.

    Attributes:
        drop: Checkpoints whose manifest goes.
        objects: Shards that no remaining manifest names.
        kept: Checkpoints that stay.
    """

    drop: tuple[CheckpointId, ...]
    objects: tuple[ObjectInfo, ...]
    kept: tuple[CheckpointId, ...]

    @property
    def size(self) -> int:
        """Bytes that become free."""
        return sum(info.size for info in self.objects)


def plan_sweep(
    history: History,
    manifests: Mapping[CheckpointId, Manifest],
    shards: Sequence[ObjectInfo],
    policy: RetentionPolicy,
    *,
    orphans_up_to: int,
    protect: frozenset[CheckpointId],
    now: dt.datetime,
) -> SweepPlan:
    """Decide what goes. Pure.

    Args:
        history: Claims and ids.
        manifests: Those that could be read. One that could not stays, and so does everything that it might name.
        shards: Every shard object in the store.
        policy: Asked twice: about the lineage, so that checkpoints left behind by a rollback do not crowd it out, and about all.
        orphans_up_to: Shards that no manifest names go only if they are of this attempt or an older one.
        protect: Stay in any case.
        now: For policies that go by age.
    """
    line = [manifests[item] for item in sorted(history.lineage) if item in manifests]
    everything = [manifests[item] for item in sorted(manifests)]
    unread = {item for item in history.manifests if item not in manifests}
    keep = policy.keep(line, now=now) | policy.keep(everything, now=now) | protect | unread
    drop = tuple(item for item in history.manifests if item not in keep)
    # An interrupted save has no manifest: a file beside the shards of a checkpoint that stays is somebody else's.
    named = {shard.key for item, manifest in manifests.items() if item in keep for shard in manifest.shards}
    dropped = {shard.key for item in drop for shard in manifests[item].shards}
    objects = []
    for info in shards:
        owner = parse_shard_key(info.key)
        if owner is None or info.key in named or owner in keep or any(owner <= item for item in unread):
            continue
        if info.key in dropped or owner.attempt <= orphans_up_to:
            objects.append(info)
    return SweepPlan(drop, tuple(objects), tuple(item for item in history.manifests if item in keep))


def sweep(
    store: ObjectStore,
    policy: RetentionPolicy,
    *,
    owner: int | None = None,
    dry_run: bool = False,
) -> SweepPlan:
    """Delete what the policy does not want, and what interrupted saves left behind.

    Args:
        store: The run.
        policy: What to keep.
        owner: The attempt of the caller, where the caller is the one process that may write to the run. Anybody else leaves the newest
            attempt's unnamed shards alone: they may belong to a save that is under way.
        dry_run: Only say what would go.

    Raises:
        CheckpointDamagedError: The newest checkpoint does not verify. Then nothing has been deleted.
    """
    history = read_history(store)
    limit = history.newest_attempt - 1 if owner is None else owner
    manifests: dict[CheckpointId, Manifest] = {}
    for identity in history.manifests:
        try:
            manifests[identity] = load_manifest(store, identity)
        except (CheckpointDamagedError, FormatTooNewError):
            continue
    line = history.lineage
    shards = retried(lambda: list(store.list(CHECKPOINTS)))
    safe = frozenset(line[:1])  # until a newer one is committed, that is the one resumed from
    plan = plan_sweep(history, manifests, shards, policy, orphans_up_to=limit, protect=safe, now=utc_now())
    if plan.drop and line:
        try:
            Checkpoint(store, load_manifest(store, line[0])).verify()
        except CheckpointDamagedError as error:
            raise CheckpointDamagedError(
                f"nothing is deleted, for the newest checkpoint is damaged: {error}. "
                "The next start falls back to an older one and goes on from there; 'spotguard rollback' does so without a start"
            ) from error
    if dry_run:
        return plan
    if read_history(store).newest_attempt != history.newest_attempt:
        # Somebody has started, or rolled back, while the newest was read back: what they continue may be what was to go.
        return SweepPlan((), (), history.manifests)
    store.delete(ObjectRef(identity.manifest_key) for identity in plan.drop)
    store.delete(info.ref for info in plan.objects)
    store.discard_partials(lambda key: _is_stale(key, limit))
    return plan


def _is_stale(key: str, limit: int) -> bool:
    """Whether a partial object is nobody's any more. The event log of the running attempt is written beside its commits."""
    if key == RUN:
        return True  # there is a run record, or there would be nothing to sweep: whoever is still at it comes too late
    attempt = attempt_of_key(key)
    return attempt is not None and (attempt < limit or (attempt == limit and not key.startswith(EVENTS)))
