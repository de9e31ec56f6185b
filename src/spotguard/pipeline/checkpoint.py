"""A committed checkpoint, to be verified and read."""

import dataclasses
import functools
import logging
import mmap
from collections.abc import Callable
from typing import Any

from spotguard.checkpoint import CheckpointId, Digest, Manifest, ShardRecord
from spotguard.errors import CheckpointDamagedError, ObjectNotFoundError, StoreError
from spotguard.pipeline.objects import Tally, changing_bytes, read_record, retried
from spotguard.stores import ObjectStore, Progress

__all__ = ["Checkpoint", "Progress", "ask_store", "fetch_shard", "load_manifest"]

logger = logging.getLogger(__name__)

_WINDOW = 128 << 20  # of a shard that is read to be verified, and not kept
_MAPPED = 4 << 20  # from here on memory comes in pages of its own


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

    def load(
        self, progress: Progress | None = None, *, take: Callable[[ShardRecord, memoryview], None] | None = None
    ) -> dict[str, Any]:
        """Read every member, verified before a byte of it is interpreted. Tensors are on the CPU.

        Args:
            progress: Called with the number of bytes done, for each piece.
            take: Called with the bytes of each shard, once they are verified.

        Returns:
            Member name to its state; what belongs to a rank is under ``rank-00000``.

        Raises:
            CheckpointDamagedError: A shard is missing, has another size or another digest.
        """
        from spotguard.state.codec import decode  # torch is loaded here, and not to list or verify checkpoints

        tree = {}
        for shard in self.manifest.shards:
            data = fetch_shard(self.store, shard, progress=progress)
            if take is not None:
                take(shard, data)
            tree[shard.name] = decode(data, key=f"{self.store.uri}/{shard.key}")
        return tree


def fetch_shard(
    store: ObjectStore, shard: ShardRecord, *, progress: Progress | None = None, keep: bool = True
) -> memoryview:
    """Read a shard and prove that it is the one that was committed.

    Args:
        store: Where it is.
        shard: What it must be.
        progress: Called with the number of bytes done, for each piece.
        keep: Whether to keep the bytes; without, memory for a window of them is enough.

    Returns:
        The bytes; empty without `keep`.

    Raises:
        CheckpointDamagedError: It is missing, has another size, or two readings agree on another digest.
        StoreError: Each reading gave other bytes: the way here is at fault, and that proves nothing of the shard.
    """
    where = f"{store.uri}/{shard.key}"

    if not shard.digest.startswith("crc64nvme:"):
        raise CheckpointDamagedError(f"{where}: digest {shard.digest.partition(':')[0]!r} is not known to this release")
    tally, seen = Tally(progress), list[str]()
    for _ in range(3):
        try:
            data, found = retried(functools.partial(_read_shard, store, shard, tally, keep=keep))
        except ObjectNotFoundError as error:
            raise CheckpointDamagedError(f"{where} is missing") from error
        if found == f"digest {shard.digest}":
            if seen:
                logger.warning("%s came damaged at first (%s), and whole when it was read again", where, seen[0])
            return data
        if seen == [found]:
            raise CheckpointDamagedError(f"{where} is damaged: {found}, the manifest says {shard.digest}")
        seen.append(found)
    raise StoreError(changing_bytes(where))


def _read_shard(store: ObjectStore, shard: ShardRecord, tally: Tally, *, keep: bool) -> tuple[memoryview, str]:
    """One reading: the bytes, if they are to be kept and are right, and what they turned out to be."""
    tally.restart()
    where = f"{store.uri}/{shard.key}"
    with store.open(shard.key, version=shard.version) as reader:
        if reader.size != shard.size:
            raise CheckpointDamagedError(f"{where} has {reader.size} bytes, the manifest says {shard.size}")
        window = shard.size if keep else _WINDOW
        buffer = _new_memory(min(window, shard.size))
        digest = Digest()
        for offset in range(0, shard.size, window or 1):
            piece = buffer[: min(window, shard.size - offset)]
            if (count := reader.read_into(piece, offset, tally, digest)) != len(piece):
                return buffer[:0], f"it ends before byte {offset + count + 1} while it is read"
    return buffer if keep and str(digest) == shard.digest else buffer[:0], f"digest {digest}"


def _new_memory(size: int) -> memoryview:
    """Memory that the system hands out as it is written to, by all connections at once; a bytearray is filled with zeros before."""
    if size < _MAPPED or not hasattr(mmap, "MAP_PRIVATE"):
        return memoryview(bytearray(size))
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def ask_store(store: ObjectStore, shard: ShardRecord) -> bool:
    """Ask the store alone, without reading the shard.

    Returns:
        Whether that is proof; False where the size is right and the store has not computed a digest of this kind.

    Raises:
        CheckpointDamagedError: It is missing, has another size or another digest.
    """
    where = f"{store.uri}/{shard.key}"
    info = retried(lambda: store.stat(shard.key, version=shard.version))
    if info is None:
        raise CheckpointDamagedError(f"{where} is missing")
    if info.size != shard.size:
        raise CheckpointDamagedError(f"{where} has {info.size} bytes, the manifest says {shard.size}")
    if info.digest is None or info.digest.partition(":")[0] != shard.digest.partition(":")[0]:
        return False
    if info.digest != shard.digest:
        raise CheckpointDamagedError(
            f"{where} is damaged: digest {info.digest} by the store's own account, the manifest says {shard.digest}"
        )
    return True


def load_manifest(store: ObjectStore, identity: CheckpointId, *, run_id: str | None = None) -> Manifest:
    """Read and verify one manifest.

    Raises:
        CheckpointDamagedError: It is not intact, or stands under another name, or belongs to another run.
        FormatTooNewError: A later release wrote it.
    """
    where = f"{store.uri}/{identity.manifest_key}"
    try:
        manifest = read_record(store, identity.manifest_key, lambda data: Manifest.from_bytes(data, key=where))
    except ObjectNotFoundError as error:
        raise CheckpointDamagedError(f"{where} is gone") from error
    if manifest.id != identity:
        raise CheckpointDamagedError(f"{where} is the manifest of {manifest.id}")
    if run_id is not None and manifest.run_id != run_id:
        raise CheckpointDamagedError(f"{where} belongs to run {manifest.run_id}, this is run {run_id}")
    return manifest
