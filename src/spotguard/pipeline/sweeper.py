"""Retention by reachability: keep what the policy wants, and every object that a kept manifest names; delete the rest.

Order of deletion: manifests first, made durable, then objects that no manifest names any more. A crash in between leaves orphans, never a
manifest without its shards; the next sweep removes them. Claims are looked for again before each of the two. Nothing is deleted before the
newest checkpoint has been verified: by the digests that the store itself has computed, else by reading it back.

Claims, manifests and versions of shards never change: a process that sweeps again and again reads them once.
"""

import dataclasses
import datetime as dt
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from spotguard._time import utc_now
from spotguard.checkpoint import CheckpointId, Manifest
from spotguard.checkpoint.layout import CHECKPOINTS, EVENTS, RUN, attempt_of_key, parse_shard_key
from spotguard.errors import CheckpointDamagedError, FormatTooNewError
from spotguard.pipeline.checkpoint import ask_store, fetch_shard, load_manifest
from spotguard.pipeline.history import History, lineage, list_claims, read_history
from spotguard.pipeline.objects import retried, together
from spotguard.pipeline.restore import deleted_manifests
from spotguard.policies import RetentionPolicy, metrics_of
from spotguard.stores import ObjectInfo, ObjectRef, ObjectStore, VersionedStore

__all__ = ["Known", "SweepPlan", "missing_metrics", "plan_sweep", "sweep"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Known:
    """What one process knows of one store of a run, and need not read again.

    Attributes:
        history: Its last listing.
        manifests: Those that were read intact, or written.
        verified: Key and version of shards that were read and were whole; only where there are versions, which nothing can write over.
        deleted: Manifests that somebody else deleted and the store keeps, None for one that cannot be read; None before it was asked.
    """

    history: History | None = None
    manifests: dict[CheckpointId, Manifest] = dataclasses.field(default_factory=dict)
    verified: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    deleted: dict[CheckpointId, Manifest | None] | None = None

    def note_whole(self, manifest: Manifest) -> None:
        """Every shard of this checkpoint has been read, and was whole."""
        self.manifests[manifest.id] = manifest
        self.verified |= {(shard.key, shard.version) for shard in manifest.shards if shard.version is not None}

    def look(self, store: ObjectStore) -> History:
        """List the store, and read the claims that are new."""
        before = self.history.manifests if self.history is not None else ()
        self.history = read_history(store, known=self.history)
        if not set(before) <= set(self.history.manifests):
            self.deleted = None  # somebody deletes
        return self.history

    def forget(self, dropped: Sequence[CheckpointId]) -> None:
        """We have deleted these manifests."""
        if self.history is not None:
            left = tuple(identity for identity in self.history.manifests if identity not in dropped)
            self.history = dataclasses.replace(self.history, manifests=left)

    def read_deleted(self, store: ObjectStore, *, anew: bool) -> Mapping[CheckpointId, Manifest | None]:
        """Checkpoints that `restore` can bring back. The store is asked once, and again where there is a reason (`anew`)."""
        if not isinstance(store, VersionedStore):
            return {}
        if self.deleted is None or anew:
            found = deleted_manifests(store)
            self.deleted = {key: value if isinstance(value, Manifest) else None for key, value in found.items()}
        return self.deleted

    def read_manifests(self, store: ObjectStore, history: History) -> dict[CheckpointId, Manifest]:
        """Every manifest that is intact and of a format that is known."""

        def read(identity: CheckpointId) -> Manifest | None:
            try:
                return load_manifest(store, identity)
            except (CheckpointDamagedError, FormatTooNewError):
                return None

        missing = [identity for identity in history.manifests if identity not in self.manifests]
        found = {manifest.id: manifest for manifest in together(read, missing) if manifest is not None}
        known = {identity: self.manifests[identity] for identity in history.manifests if identity in self.manifests}
        self.manifests = known | found
        return dict(self.manifests)


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What a sweep deletes.

    Attributes:
        drop: Checkpoints whose manifest goes.
        objects: Shards that no remaining manifest names.
        kept: Checkpoints that stay.
        hidden: Versions of shards that a dropped manifest names and a listing does not show: somebody has deleted them, and the store
            keeps them, and charges for them, all the same.
        aside: Shards that no remaining manifest names, but one that somebody has deleted and can bring back. They are deleted without a
            version: out of sight, and kept by the store as long as that manifest.
    """

    drop: tuple[CheckpointId, ...]
    objects: tuple[ObjectInfo, ...]
    kept: tuple[CheckpointId, ...]
    hidden: tuple[ObjectRef, ...] = ()
    aside: tuple[ObjectRef, ...] = ()

    @property
    def size(self) -> int:
        """Bytes that become free."""
        return sum(info.size for info in self.objects)


def missing_metrics(policy: RetentionPolicy, manifests: Iterable[Manifest]) -> str:
    """Metrics that a policy goes by and no checkpoint has, though they have others: in words, empty where there are none."""
    had = {name for manifest in manifests for name in manifest.metrics}
    missing = metrics_of(policy) - had
    if not had or not missing:
        return ""
    return f"no checkpoint has the metric {', '.join(map(repr, sorted(missing)))}; they have {', '.join(map(repr, sorted(had)))}"


def plan_sweep(
    history: History,
    manifests: Mapping[CheckpointId, Manifest],
    shards: Sequence[ObjectInfo],
    policy: RetentionPolicy,
    *,
    orphans_up_to: int,
    protect: frozenset[CheckpointId],
    now: dt.datetime,
    deleted: Mapping[CheckpointId, Manifest | None] = MappingProxyType({}),
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
        deleted: Manifests that somebody has deleted and can bring back; None for one that cannot be read, which may name any older shard.
    """
    line = [manifests[item] for item in sorted(history.lineage) if item in manifests]
    everything = [manifests[item] for item in sorted(manifests)]
    unread = {item for item in history.manifests if item not in manifests}
    keep = policy.keep(line, now=now) | policy.keep(everything, now=now) | protect | unread
    drop = tuple(item for item in history.manifests if item not in keep)
    # An interrupted save has no manifest: a file beside the shards of a checkpoint that stays is somebody else's.
    named = {shard.key for item, manifest in manifests.items() if item in keep for shard in manifest.shards}
    dropped = {shard.key: shard.version for item in drop for shard in manifests[item].shards}

    def stays(key: str) -> bool:
        owner = parse_shard_key(key)
        return owner is None or key in named or owner in keep or any(owner <= item for item in unread)

    objects = [
        info
        for info in shards
        if not stays(info.key) and (info.key in dropped or (attempt_of_key(info.key) or 0) <= orphans_up_to)
    ]
    restorable = {shard.key for manifest in deleted.values() if manifest for shard in manifest.shards}
    unknown = [item for item, manifest in deleted.items() if manifest is None]

    def comes_back(key: str) -> bool:
        owner = parse_shard_key(key)
        return key in restorable or (owner is not None and any(owner <= item for item in unknown))

    shown = {info.ref for info in objects}
    gone = [ObjectRef(key, version) for key, version in dropped.items() if version is not None and not stays(key)]
    return SweepPlan(
        drop,
        tuple(info for info in objects if not comes_back(info.key)),
        tuple(item for item in history.manifests if item in keep),
        tuple(ref for ref in gone if ref not in shown and not comes_back(ref.key)),
        tuple(ObjectRef(info.key) for info in objects if comes_back(info.key)),
    )


def sweep(
    store: ObjectStore,
    policy: RetentionPolicy,
    *,
    owner: int | None = None,
    dry_run: bool = False,
    known: Known | None = None,
    proceed: Callable[[], bool] = lambda: True,
) -> SweepPlan:
    """Delete what the policy does not want, and what interrupted saves left behind.

    Args:
        store: The run.
        policy: What to keep.
        owner: The attempt of the caller, where the caller is the one process that may write to the run. Anybody else leaves the unnamed
            shards of the last attempt that has committed, and of later ones, alone: they may belong to a save that is under way.
        dry_run: Only say what would go.
        known: What the caller has read before; added to.
        proceed: Asked before anything is deleted, once everything was listed: False where a save has begun since.

    Raises:
        CheckpointDamagedError: The newest checkpoint does not verify. Then nothing has been deleted.
    """
    known = known or Known()
    history = known.look(store)
    nothing = SweepPlan((), (), history.manifests)
    if (attempt := history.undecided) is not None:
        logger.warning(
            "%s: attempt %d is rolling back, or died of it: nothing is deleted before the next commit",
            store.uri,
            attempt,
        )
        return nothing
    settled = history.tip - 1 if history.manifests else 0  # a later attempt may be past its last look at the claims
    limit = settled if owner is None else owner
    manifests = known.read_manifests(store, history)
    line = history.lineage
    shards = retried(lambda: list(store.list(CHECKPOINTS)))
    # Until a newer one is committed, that is the one resumed from: by the next start, and by one that is under way now.
    safe = frozenset([*line[:1], *lineage(history.claims, history.manifests, history.newest_attempt)[:1]])
    make = functools.partial(
        plan_sweep, history, manifests, shards, policy, orphans_up_to=limit, protect=safe, now=utc_now()
    )
    plan = make()
    listed = [*(info.ref for info in shards), *history.refs.values()]
    if (plan.objects or plan.hidden) and any(ref.version is not None for ref in listed):  # else nothing goes for good
        ours = {shard.key for item in plan.drop for shard in manifests[item].shards}
        plan = make(deleted=known.read_deleted(store, anew=any(info.key not in ours for info in plan.objects)))
    if plan.drop and line:
        try:
            _verify(store, line[0], known)
        except CheckpointDamagedError as error:
            if not dry_run and _is_overtaken(store, history):
                return nothing  # it was not damaged, but swept by whoever has started since
            raise CheckpointDamagedError(
                f"nothing is deleted, for the newest checkpoint is damaged: {error}. "
                "The next start falls back to an older one and goes on from there; 'spotguard rollback' does so without a start"
            ) from error
    if dry_run:
        return plan
    anything = plan.drop or plan.objects or plan.hidden or plan.aside
    if not proceed() or (anything and _is_overtaken(store, history)):
        # Somebody has started, or rolls back, while the newest was read back: what they continue may be what was to go. Or a save of our
        # own has begun, and its shards, which no manifest names yet, may have been listed.
        return nothing
    if plan.drop:
        store.delete([history.refs.get(identity, ObjectRef(identity.manifest_key)) for identity in plan.drop])
        known.forget(plan.drop)
        if _is_overtaken(store, history):
            # A rollback that has found its manifest before we deleted it commits these shards again; see `rollback`.
            return SweepPlan(plan.drop, (), plan.kept)
    if plan.objects or plan.hidden or plan.aside:
        store.delete([*(info.ref for info in plan.objects), *plan.hidden, *plan.aside])
    store.discard_partials(lambda key: proceed() and _is_stale(key, limit))
    return plan


def _is_overtaken(store: ObjectStore, history: History) -> bool:
    """Whether somebody has claimed an attempt since."""
    return max(list_claims(store), default=0) > history.newest_attempt


def _verify(store: ObjectStore, identity: CheckpointId, known: Known) -> None:
    """Make sure that a checkpoint is whole: by the store's own digests where it has any, else by reading it."""
    manifest = load_manifest(store, identity)
    answers = together(lambda shard: ask_store(store, shard), manifest.shards)
    for shard, proven in answers:
        if not proven and (shard.key, shard.version) not in known.verified:
            fetch_shard(store, shard, keep=False)
    known.note_whole(manifest.model_copy(update={"shards": tuple(shard for shard, _ in answers)}))


def _is_stale(key: str, limit: int) -> bool:
    """Whether a partial object is nobody's any more. The event log of the running attempt is written beside its commits."""
    if key == RUN:
        return True  # there is a run record, or there would be nothing to sweep: whoever is still at it comes too late
    attempt = attempt_of_key(key)
    return attempt is not None and (attempt < limit or (attempt == limit and not key.startswith(EVENTS)))
