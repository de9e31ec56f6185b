"""Bringing back a checkpoint whose manifest was deleted, from a store that keeps what is deleted."""

import dataclasses

from spotguard.checkpoint import CheckpointId, Manifest
from spotguard.checkpoint.layout import MANIFESTS, parse_manifest_key
from spotguard.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    ObjectNotFoundError,
)
from spotguard.pipeline.checkpoint import Checkpoint, Progress, ask_store, load_manifest
from spotguard.pipeline.objects import retried, together
from spotguard.stores import ObjectStore, VersionedStore

__all__ = ["DeletedCheckpoint", "deleted_checkpoints", "deleted_manifests", "restore_checkpoint"]


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
    return [
        DeletedCheckpoint(str(identity), manifest, _missing(store, manifest))
        if isinstance(manifest, Manifest)
        else DeletedCheckpoint(str(identity), None, str(manifest))
        for identity, manifest in deleted_manifests(_versioned(store)).items()
    ]


def deleted_manifests(store: VersionedStore) -> dict[CheckpointId, Manifest | CheckpointError]:
    """Manifests that somebody has deleted and the store keeps, in order. What retention deletes, it deletes for good.

    Returns:
        Each manifest, or what is wrong with it.
    """
    infos = retried(lambda: list(store.deleted(MANIFESTS)))
    wanted = [(identity, info.version) for info in infos if (identity := parse_manifest_key(info.key)) is not None]

    def read(item: tuple[CheckpointId, str | None]) -> Manifest | CheckpointError | None:
        try:
            return _read(store, *item)
        except CheckpointError as error:
            return error
        except ObjectNotFoundError:
            return None  # gone for good since it was listed

    found = zip(sorted(wanted), together(read, sorted(wanted)), strict=True)
    return {identity: manifest for (identity, _), manifest in found if manifest is not None}


def restore_checkpoint(store: ObjectStore, identity: CheckpointId, progress: Progress | None = None) -> Checkpoint:
    """Verify every shard of a deleted checkpoint, then make the shards and, last, its manifest visible again.

    The shards too: what stays out of sight is ended by the bucket's rule for old versions.

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
    for key in [*(shard.key for shard in checkpoint.manifest.shards), identity.manifest_key]:
        retried(lambda key=key: versioned.undelete(key))  # type: ignore[misc]
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
    try:
        together(lambda shard: ask_store(store, shard), manifest.shards)
    except CheckpointDamagedError as error:
        return str(error)
    return ""
