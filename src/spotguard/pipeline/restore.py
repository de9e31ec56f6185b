"""Bringing back a checkpoint whose manifest was deleted, from a store that keeps what is deleted."""

import dataclasses

from spotguard.checkpoint import CheckpointId, Manifest
from spotguard.checkpoint.layout import MANIFESTS, parse_manifest_key
from spotguard.errors import CheckpointDamagedError, CheckpointNotFoundError, ConfigError
from spotguard.pipeline.checkpoint import Checkpoint, Progress, load_manifest
from spotguard.pipeline.objects import retried
from spotguard.stores import ObjectStore, VersionedStore

__all__ = ["DeletedCheckpoint", "deleted_checkpoints", "restore_checkpoint"]


@dataclasses.dataclass(frozen=True)
class DeletedCheckpoint:
    """A checkpoint whose manifest has been deleted and is still kept by the store.

    Attributes:
        id: Its id.
        manifest: What it consisted of; None where that cannot be read.
        missing: What stands in the way of bringing it back, in words; empty if nothing does.
    """

    id: str
    manifest: Manifest | None
    missing: str


def deleted_checkpoints(store: ObjectStore) -> list[DeletedCheckpoint]:
    """Every checkpoint that has been deleted and whose manifest is still kept, oldest first.

    Raises:
        ConfigError: The store does not keep what is deleted.
    """
    versioned = _versioned(store)
    found = []
    for info in retried(lambda: list(versioned.deleted(MANIFESTS))):
        if (identity := parse_manifest_key(info.key)) is not None:
            try:
                manifest = _read(store, identity, info.version)
            except CheckpointDamagedError as error:
                found.append(DeletedCheckpoint(str(identity), None, str(error)))
            else:
                found.append(DeletedCheckpoint(str(identity), manifest, _missing(store, manifest)))
    return found


def restore_checkpoint(store: ObjectStore, identity: CheckpointId, progress: Progress | None = None) -> Checkpoint:
    """Verify every shard of a deleted checkpoint, then make its manifest visible again.

    Raises:
        CheckpointNotFoundError: It has not been deleted, or is not kept any more.
        CheckpointDamagedError: A shard is gone or damaged; nothing has been changed.
        ConfigError: The store does not keep what is deleted.
    """
    versioned = _versioned(store)
    kept = {info.key: info for info in retried(lambda: list(versioned.deleted(identity.manifest_key)))}
    if identity.manifest_key not in kept:
        raise CheckpointNotFoundError(
            f"{store.uri}: no deleted checkpoint {identity} is kept; 'spotguard ls --deleted {store.uri}' shows those that are"
        )
    checkpoint = Checkpoint(store, _read(store, identity, kept[identity.manifest_key].version))
    checkpoint.verify(progress)
    retried(lambda: versioned.undelete(identity.manifest_key))
    return Checkpoint(store, load_manifest(store, identity))


def _versioned(store: ObjectStore) -> VersionedStore:
    if not isinstance(store, VersionedStore):
        raise ConfigError(f"{store.uri} does not keep what is deleted: that takes a bucket with versions")
    return store


def _read(store: ObjectStore, identity: CheckpointId, version: str | None) -> Manifest:
    def read() -> bytes:
        with store.open(identity.manifest_key, version=version) as reader:
            return reader.read()

    manifest = Manifest.from_bytes(retried(read), key=f"{store.uri}/{identity.manifest_key}")
    if manifest.id != identity:
        raise CheckpointDamagedError(f"{store.uri}/{identity.manifest_key} is the manifest of {manifest.id}")
    return manifest


def _missing(store: ObjectStore, manifest: Manifest) -> str:
    for shard in manifest.shards:
        info = retried(lambda shard=shard: store.stat(shard.key, version=shard.version))  # type: ignore[misc]
        if info is None or info.size != shard.size:
            return f"{store.uri}/{shard.key} is gone" if info is None else f"{store.uri}/{shard.key} has another size"
    return ""
