"""Making a checkpoint visible: shards first, each durable; the manifest last, create-only. Nothing else makes a checkpoint.

::

    for each shard:   same as in the last commit? name that object again : create, write and hash, fsync
    versions kept, and one of them named without? by its version now : create, write and hash
    is a later attempt claimed? -> FencedError
    create the manifest exclusively                            <- the checkpoint exists from here on
"""

import platform
import sys
from collections.abc import Callable, Mapping, MutableMapping

import spotguard
from spotguard._time import utc_now
from spotguard.checkpoint import CheckpointId, Digest, Manifest, ShardRecord
from spotguard.pipeline.fence import check_fence
from spotguard.pipeline.objects import Tally, create_object, retried
from spotguard.state.codec import check_readable
from spotguard.state.snapshot import ShardImage, Snapshot
from spotguard.stores import ObjectStore, Progress, VersionedStore

__all__ = ["commit"]


def commit(
    store: ObjectStore,
    snapshot: Snapshot,
    *,
    run_id: str,
    attempt: int,
    sequence: int = 0,
    previous: Manifest | None = None,
    parent: CheckpointId | None = None,
    reuse: bool = True,
    digests: MutableMapping[str, Digest] | None = None,
    metrics: Mapping[str, float] | None = None,
    deadline: float | None = None,
    progress: Progress | None = None,
    check: Callable[[], None] | None = None,
) -> tuple[Manifest, int]:
    """Write a snapshot as a checkpoint.

    Args:
        store: The run.
        snapshot: What to write.
        run_id: Identity of the run.
        attempt: Number that this process has claimed.
        sequence: Counts commits at one step.
        previous: The commit before this one in the same history, in this store.
        parent: The commit before this one in the same history, where that is not `previous` but in another store.
        reuse: Name its shards again where they have not changed; not where it was found damaged.
        digests: Of the shards that this process has written or compared last, by name; kept up to date. With them, that a shard has changed
            is seen at the first piece that has, and the rest of it is read once, when it is sent.
        metrics: Recorded for retention and for people.
        deadline: Instant (monotonic seconds) by which it must be done.
        progress: Called with the number of bytes done, for each piece.
        check: Called after each piece and before the manifest is written; what it raises ends it, and nothing is committed.

    Returns:
        The manifest, and the bytes that had to be written.

    Raises:
        FencedError: A later attempt has claimed the run; nothing was committed.
        StoreError: The store failed; nothing was committed.
        ConfigError: A member could not be read back; nothing was committed.
    """
    identity = CheckpointId(attempt, snapshot.step, sequence)
    known = {shard.name: shard for shard in previous.shards} if previous and reuse else {}
    digests = digests if digests is not None else {}
    shards, written = dict[str, ShardRecord](), list[ShardRecord]()

    def write(image: ShardImage) -> None:
        record, digests[image.name] = _write_shard(store, identity, image, deadline, progress, check)
        shards[image.name] = record
        written.append(record)

    for image in snapshot.shards:
        check_readable(image.name, image.data)
        old = known.get(image.name)
        if old is not None and _is_unchanged(image, old, digests):
            shards[image.name] = old
        else:
            write(image)
    if isinstance(store, VersionedStore) and (not written or any(record.version for record in written)):
        # Shards of a time before the bucket kept versions: whoever overwrites their keys would damage every checkpoint from here on.
        for image in [image for image in snapshot.shards if shards[image.name].version is None]:
            if (found := _pinned(store, shards[image.name])) is not None:
                shards[image.name] = found
            elif written:
                write(image)
    check_fence(store, attempt)
    manifest = Manifest(
        run_id=run_id,
        attempt=attempt,
        step=snapshot.step,
        sequence=sequence,
        epoch=snapshot.epoch,
        batch=snapshot.batch,
        finished=snapshot.finished,
        parent=str(parent or (previous.id if previous else "")) or None,
        metrics=dict(metrics or {}),
        libraries=_libraries(),
        created_at=utc_now(),
        shards=tuple(shards.values()),
    )
    if check is not None:
        check()
    # The time in it makes it ours alone: where the answer to a create gets lost, the retry knows it again.
    create_object(store, identity.manifest_key, manifest.to_bytes(), deadline=deadline)
    return manifest, sum(record.size for record in written)


def _is_unchanged(image: ShardImage, old: ShardRecord, digests: MutableMapping[str, Digest]) -> bool:
    if old.size != len(image.data):
        return False
    seen = digests.get(image.name)
    if seen is None or str(seen) != old.digest:
        seen = digests[image.name] = Digest()
        seen.update(image.data)
        return str(seen) == old.digest
    return seen.describes(image.data)


def _pinned(store: ObjectStore, shard: ShardRecord) -> ShardRecord | None:
    """A shard that was named by key alone, with its version; None where nothing proves that what is there is that shard."""
    info = retried(lambda: store.stat(shard.key))
    if info is None or info.version is None or (info.size, info.digest) != (shard.size, shard.digest):
        return None
    return shard.model_copy(update={"version": info.version})


def _write_shard(
    store: ObjectStore,
    identity: CheckpointId,
    image: ShardImage,
    deadline: float | None,
    progress: Progress | None,
    check: Callable[[], None] | None,
) -> tuple[ShardRecord, Digest]:
    key, tally = identity.shard_key(image.name), Tally(progress, check)

    def write() -> tuple[str | None, Digest]:
        tally.restart()
        digest = Digest()
        with store.create(key, deadline=deadline) as writer:
            writer.write(image.data, tally, digest)
        return writer.info.version if writer.info else None, digest

    version, digest = retried(write)
    record = ShardRecord(
        name=image.name, key=key, size=len(image.data), digest=str(digest), version=version, rank=image.rank
    )
    return record, digest


def _libraries() -> dict[str, str]:
    found = {"python": platform.python_version(), "spotguard": spotguard.__version__}
    for name in ("torch", "numpy"):
        if name in sys.modules:
            found[name] = str(sys.modules[name].__version__)
    return found
