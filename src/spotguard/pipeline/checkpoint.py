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

__all__ = ["Checkpoint", "Progress", "ask_store", "fetch_shard", "find_shard", "load_manifest"]

logger = logging.getLogger(__name__)

_WINDOW = 128 << 20  # of a shard that is read to be verified, and not kept
_copied: set[str] = set()  # runs of which it has been said that they were copied
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

    def verify(self, progress: Progress | None = None, *, proven: set[ShardRecord] | None = None) -> None:
        """Read every shard and compare size and digest with the manifest.

        Args:
            progress: Called with the number of bytes done, for each piece.
            proven: Shards that need not be read again, of the other checkpoints that share them; those of this one are added.

        Raises:
            CheckpointDamagedError: Names the shard and what is wrong with it.
        """
        for shard in self.manifest.shards:
            if proven is None or shard not in proven:
                find_shard(self.store, shard, progress=progress, keep=False)
            if proven is not None:
                proven.add(shard)

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
        return self.read(progress, keep=True, take=take)[1]

    def read(
        self,
        progress: Progress | None = None,
        *,
        keep: bool,
        take: Callable[[ShardRecord, memoryview], None] | None = None,
    ) -> tuple["Checkpoint", dict[str, Any]]:
        """As `load`, or without `keep` as `verify`; also tells what was found.

        Returns:
            This checkpoint without the versions that are not there, and the members.
        """
        tree, found = dict[str, Any](), list[ShardRecord]()
        for shard in self.manifest.shards:
            record, data = find_shard(self.store, shard, progress=progress, keep=keep)
            found.append(record)
            if not keep:
                continue
            from spotguard.state.codec import decode  # torch is loaded here, and not to list or verify checkpoints

            if take is not None:
                take(shard, data)
            tree[shard.name] = decode(data, key=f"{self.store.uri}/{shard.key}")
        return Checkpoint(self.store, self.manifest.model_copy(update={"shards": tuple(found)})), tree


def fetch_shard(
    store: ObjectStore, shard: ShardRecord, *, progress: Progress | None = None, keep: bool = True
) -> memoryview:
    """The bytes of a shard; see `find_shard`."""
    return find_shard(store, shard, progress=progress, keep=keep)[1]


def find_shard(
    store: ObjectStore, shard: ShardRecord, *, progress: Progress | None = None, keep: bool = True
) -> tuple[ShardRecord, memoryview]:
    """Read a shard and prove that it is the one that was committed.

    The version that the manifest names is read. Where that is not there, as in a run that was copied to another place, what is there now is
    read: size and digest prove that it is the same.

    Args:
        store: Where it is.
        shard: What it must be.
        progress: Called with the number of bytes done, for each piece.
        keep: Whether to keep the bytes; without, memory for a window of them is enough.

    Returns:
        The shard, without a version if the one that it names is not there; and the bytes, empty without `keep`.

    Raises:
        CheckpointDamagedError: It is missing, has another size, or two readings agree on another digest.
        StoreError: Each reading gave other bytes: the way here is at fault, and that proves nothing of the shard.
    """
    where, wanted = f"{store.uri}/{shard.key}", shard

    if not shard.digest.startswith("crc64nvme:"):
        raise CheckpointDamagedError(f"{where}: digest {shard.digest.partition(':')[0]!r} is not known to this release")
    tally, seen = Tally(progress), list[str]()
    while len(seen) < 3:
        try:
            data, found = retried(functools.partial(_read_shard, store, wanted, where, tally, keep=keep))
        except ObjectNotFoundError as error:
            if wanted.version is None:
                raise CheckpointDamagedError(f"{store.uri}/{shard.key} is missing") from error
            wanted, where = _without_version(wanted, where)
            continue
        if found == f"digest {shard.digest}":
            if seen:
                logger.warning("%s came damaged at first (%s), and whole when it was read again", where, seen[0])
            if wanted is not shard:
                _say_copied(store)
            return wanted, data
        if seen == [found]:
            raise CheckpointDamagedError(f"{where} is damaged: {found}, the manifest says {shard.digest}")
        seen.append(found)
    raise StoreError(changing_bytes(where))


def _without_version(shard: ShardRecord, where: str) -> tuple[ShardRecord, str]:
    """The shard as it stands now, and how to call that in a message."""
    return shard.model_copy(update={"version": None}), f"{where} (version {shard.version} is not there, this one is)"


def _say_copied(store: ObjectStore) -> None:
    if store.uri not in _copied:
        _copied.add(store.uri)
        logger.warning(
            "%s was copied here, it seems: the versions that its manifests name are not there. Size and digest prove its shards",
            store.uri,
        )


def _read_shard(
    store: ObjectStore, shard: ShardRecord, where: str, tally: Tally, *, keep: bool
) -> tuple[memoryview, str]:
    """One reading: the bytes, if they are to be kept and are right, and what they turned out to be."""
    tally.restart()
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


def ask_store(store: ObjectStore, shard: ShardRecord) -> tuple[ShardRecord, bool]:
    """Ask the store alone, without reading the shard.

    Returns:
        The shard, without a version if the one that it names is not there; and whether the answer is proof: False where the size is right
        and the store has not computed a digest of this kind.

    Raises:
        CheckpointDamagedError: It is missing, has another size or another digest.
    """
    where, found = f"{store.uri}/{shard.key}", shard
    info = retried(lambda: store.stat(shard.key, version=shard.version))
    if info is None and shard.version is not None:
        found, where = _without_version(shard, where)
        info = retried(lambda: store.stat(shard.key))
    if info is None:
        raise CheckpointDamagedError(f"{store.uri}/{shard.key} is missing")
    if info.size != shard.size:
        raise CheckpointDamagedError(f"{where} has {info.size} bytes, the manifest says {shard.size}")
    if info.digest is None or info.digest.partition(":")[0] != shard.digest.partition(":")[0]:
        return found, False
    if info.digest != shard.digest:
        raise CheckpointDamagedError(
            f"{where} is damaged: digest {info.digest} by the store's own account, the manifest says {shard.digest}"
        )
    return found, True


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
