"""A committed checkpoint, to be verified and read."""

import dataclasses
from collections.abc import Callable
from typing import Any

from spotguard.checkpoint import CheckpointId, Digest, Manifest, ShardRecord
from spotguard.errors import CheckpointDamagedError, ObjectNotFoundError
from spotguard.pipeline.objects import read_object, retried
from spotguard.stores import ObjectStore

__all__ = ["Checkpoint", "load_manifest"]

_PIECE = 32 << 20
Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A frozen handle on one committed checkpoint.

    Attributes:
        store: Where it is.
        manifest: What it consists of.

    Example:
        >>> from spotguard import CheckpointStore
        >>> store = CheckpointStore("memory://doc-checkpoint")
        >>> checkpoint = store.save({"model": {"weight": [1.0, 2.0]}}, step=10)
        >>> checkpoint.step, checkpoint.load()
        (10, {'model': {'weight': [1.0, 2.0]}})
    """

    store: ObjectStore = dataclasses.field(repr=False)
    manifest: Manifest = dataclasses.field(repr=False)
    id: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", str(self.manifest.id))

    @property
    def step(self) -> int:
        """Step boundaries passed when it was taken."""
        return self.manifest.step

    @property
    def metrics(self) -> dict[str, float]:
        """What was recorded with it."""
        return dict(self.manifest.metrics)

    def verify(self, progress: Progress | None = None) -> None:
        """Read every shard and compare size and digest with the manifest.

        Args:
            progress: Called with the number of bytes done, for each piece.

        Raises:
            CheckpointDamagedError: Names the shard and what is wrong with it.
        """
        for shard in self.manifest.shards:
            fetch_shard(self.store, shard, progress=progress, keep=False)

    def load(self, progress: Progress | None = None) -> dict[str, Any]:
        """Read every member, verified before a byte of it is interpreted. Tensors are on the CPU.

        Returns:
            Member name to its state; what belongs to a rank is under ``rank-00000``.

        Raises:
            CheckpointDamagedError: A shard is missing, has another size or another digest.
        """
        from spotguard.state.codec import decode  # torch is loaded here, and not to list or verify checkpoints

        tree = {}
        for shard in self.manifest.shards:
            tree[shard.name] = decode(
                fetch_shard(self.store, shard, progress=progress), key=f"{self.store.uri}/{shard.key}"
            )
        return tree


def fetch_shard(
    store: ObjectStore, shard: ShardRecord, *, progress: Progress | None = None, keep: bool = True
) -> memoryview:
    """Read a shard and prove that it is the one that was committed.

    Args:
        store: Where it is.
        shard: What it must be.
        progress: Called with the number of bytes done, for each piece.
        keep: Whether to keep the bytes; without, memory for one piece is enough.

    Returns:
        The bytes; empty without `keep`.

    Raises:
        CheckpointDamagedError: It is missing, has another size or another digest.
    """
    where = f"{store.uri}/{shard.key}"

    def fetch() -> memoryview:
        if not shard.digest.startswith("crc64nvme:"):
            raise CheckpointDamagedError(
                f"{where}: digest {shard.digest.partition(':')[0]!r} is not known to this release"
            )
        with store.open(shard.key, version=shard.version) as reader:
            if reader.size != shard.size:
                raise CheckpointDamagedError(f"{where} has {reader.size} bytes, the manifest says {shard.size}")
            whole = memoryview(bytearray(shard.size if keep else min(shard.size, _PIECE)))
            digest = Digest()
            for offset in range(0, shard.size, _PIECE):
                length = min(_PIECE, shard.size - offset)
                piece = whole[offset : offset + length] if keep else whole[:length]
                if reader.read_into(piece, offset) != length:
                    raise CheckpointDamagedError(f"{where} ends before byte {offset + length} while it is read")
                digest.update(piece)
                if progress is not None:
                    progress(length)
        if str(digest) != shard.digest:
            raise CheckpointDamagedError(f"{where} is damaged: digest {digest}, the manifest says {shard.digest}")
        return whole if keep else whole[:0]

    try:
        return retried(fetch)
    except ObjectNotFoundError as error:
        raise CheckpointDamagedError(f"{where} is missing") from error


def load_manifest(store: ObjectStore, identity: CheckpointId, *, run_id: str | None = None) -> Manifest:
    """Read and verify one manifest.

    Raises:
        CheckpointDamagedError: It is not intact, or stands under another name, or belongs to another run.
        FormatTooNewError: A later release wrote it.
    """
    where = f"{store.uri}/{identity.manifest_key}"
    try:
        manifest = Manifest.from_bytes(read_object(store, identity.manifest_key), key=where)
    except ObjectNotFoundError as error:
        raise CheckpointDamagedError(f"{where} is gone") from error
    if manifest.id != identity:
        raise CheckpointDamagedError(f"{where} is the manifest of {manifest.id}")
    if run_id is not None and manifest.run_id != run_id:
        raise CheckpointDamagedError(f"{where} belongs to run {manifest.run_id}, this is run {run_id}")
    return manifest
