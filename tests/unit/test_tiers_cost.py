"""What a commit and its sweep ask of a store across a network: nothing twice, and no bytes where the store itself knows the digest."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
import torch

from spotguard.checkpoint import CheckpointId, digest_of
from spotguard.checkpoint.layout import CHECKPOINTS
from spotguard.errors import ObjectExistsError, ObjectNotFoundError
from spotguard.events import Event, SaveFailed
from spotguard.pipeline.checkpoint_store import CheckpointStore
from spotguard.pipeline.history import read_history
from spotguard.pipeline.sweeper import Known, sweep
from spotguard.pipeline.tiers import Tiers
from spotguard.pipeline.writer import Writer
from spotguard.policies import KeepNewest
from spotguard.state.snapshot import HostBuffers, ShardImage, Snapshot
from spotguard.stores import ObjectInfo, ObjectReader, ObjectRef, ObjectStore
from spotguard.stores.memory import MemoryObjectStore, _Reader, _Writer


class Bucket:
    """Keeps every version of every object, and counts requests. `digests`: it computes them."""

    uri = "bucket://run"

    def __init__(self, *, digests: bool = True) -> None:
        self.versions: dict[str, list[tuple[str, bytes | None]]] = {}  # None is a delete marker
        self.digests = digests
        self.requests: Counter[str] = Counter()
        self.deletions: list[list[ObjectRef]] = []
        self.together, self.most = 0, 0
        self._lock = threading.Lock()
        self._count = 0

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[_Writer]:
        writer = _Writer(key, deadline)
        yield writer
        with self._lock:
            if exclusive and self._current(key):
                raise ObjectExistsError(key)
            self._count += 1
            self.versions.setdefault(key, []).append((f"v{self._count}", bytes(writer.data)))
            writer.info = ObjectInfo(key, len(writer.data), f"v{self._count}")

    def open(self, key: str, *, version: str | None = None) -> ObjectReader:
        self.requests[f"GET {key}"] += 1
        found = self._find(key, version)
        if found is None:
            raise ObjectNotFoundError(key)
        return _Reader(found[1])

    def stat(self, key: str, *, version: str | None = None) -> ObjectInfo | None:
        self.requests["HEAD"] += 1
        found = self._find(key, version)
        if found is None:
            return None
        return ObjectInfo(key, len(found[1]), found[0], digest_of(found[1]) if self.digests else None)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self.requests[f"LIST {prefix}"] += 1
        found = [(key, self._current(key)) for key in sorted(self.versions) if key.startswith(prefix)]
        return iter([ObjectInfo(key, len(item[1]), item[0]) for key, item in found if item])

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        self.deletions.append(list(refs))
        for ref in self.deletions[-1]:
            if ref.version is None:
                self.versions[ref.key].append(("marker", None))
            else:
                self.versions[ref.key] = [item for item in self.versions[ref.key] if item[0] != ref.version]

    def discard_partials(self, is_stale: Callable[[str], bool]) -> Sequence[str]:
        return []

    def _current(self, key: str) -> tuple[str, bytes] | None:
        last = (self.versions.get(key) or [("", None)])[-1]
        return None if last[1] is None else (last[0], last[1])

    def _find(self, key: str, version: str | None) -> tuple[str, bytes] | None:
        if version is None:
            return self._current(key)
        return next(((name, data) for name, data in self.versions.get(key, []) if name == version and data), None)


def snapshot_at(step: int) -> Snapshot:
    trees = {"model": {"weight": torch.full((9,), float(step))}, "backbone": {"weight": torch.ones(9)}}
    images = tuple(ShardImage(name, None, HostBuffers().capture(name, tree)) for name, tree in trees.items())
    return Snapshot(step, 0, step, finished=False, shards=images)


def train(
    store: ObjectStore, *steps: int, keep: int = 2, between: Callable[[int], None] = lambda step: None
) -> list[Event]:
    """Commit these steps and sweep behind each."""
    events: list[Event] = []
    tiers = Tiers([store])
    run_id = tiers.open()
    claim, history = tiers.claim()
    resumed = tiers.resolve(history, run_id).require()
    writer = Writer(
        tiers,
        run_id=run_id,
        attempt=claim.attempt,
        retention=KeepNewest(keep),
        publish=events.append,
        resumed=resumed.manifest if resumed else None,
    )
    for step in steps:
        writer.submit(snapshot_at(step), {})
        writer.drain()
        between(step)
    writer.close()
    return events


def gets(store: Bucket, prefix: str) -> dict[str, int]:
    return {name.partition(" ")[2]: count for name, count in store.requests.items() if name.startswith(f"GET {prefix}")}


def test_a_sweep_reads_no_shard_where_the_store_knows_its_digest() -> None:
    store = Bucket()
    train(store, 10, 20, 30, 40)
    assert gets(store, CHECKPOINTS) == {}
    assert [identity.step for identity in read_history(store).manifests] == [30, 40]


def test_without_digests_of_the_store_each_version_of_a_shard_is_read_back_once() -> None:
    store = Bucket(digests=False)
    train(store, 10, 20, 30, 40)
    read = gets(store, CHECKPOINTS)
    assert set(read.values()) == {1}
    assert set(read) == {CheckpointId(1, 10).shard_key("backbone")} | {
        CheckpointId(1, step).shard_key("model") for step in (30, 40)
    }


@pytest.mark.parametrize("digests", [True, False])
def test_what_the_store_has_not_kept_as_it_was_is_found_before_anything_is_deleted(*, digests: bool) -> None:
    store = Bucket(digests=digests)
    train(store, 10, 20)

    def damage(step: int) -> None:
        if step == 30:
            (version, data) = store.versions[CheckpointId(2, 30).shard_key("model")][0]
            assert data is not None
            store.versions[CheckpointId(2, 30).shard_key("model")] = [(version, data[:-1] + b"?")]

    def sweep_again() -> None:
        sweep(store, KeepNewest(1))

    train(store, 30, keep=9, between=damage)
    before = len(store.deletions)
    with pytest.raises(ValueError, match="is damaged"):
        sweep_again()
    assert len(store.deletions) == before
    del store.versions[CheckpointId(2, 30).shard_key("model")]
    with pytest.raises(ValueError, match="is missing"):
        sweep_again()
    assert len(store.deletions) == before


def test_claims_and_manifests_are_read_once_in_an_attempt() -> None:
    store = Bucket()
    train(store, 10, 20)
    store.requests.clear()
    train(store, 30, 40, 50, 60)
    newest = set(gets(store, "manifests/0002"))
    assert set(gets(store, "attempts/").values()) == {1}
    assert set(gets(store, "manifests/0001").values()) == {1}
    assert all(count == 1 for count in gets(store, "manifests/0002").values())  # the newest, fresh, before others go
    assert newest <= {CheckpointId(2, step).manifest_key for step in (30, 40, 50, 60)}


def test_what_is_missing_is_read_eight_at_a_time() -> None:
    store = Bucket()
    train(store, *range(10, 200, 10), keep=99)
    barrier = threading.Barrier(8, timeout=20)
    at_once: list[int] = []

    class Slow(Bucket):
        def open(self, key: str, *, version: str | None = None) -> ObjectReader:
            if key.startswith("manifests/"):
                with contextlib.suppress(threading.BrokenBarrierError):
                    at_once.append(barrier.wait(timeout=2 if at_once else 20))
            return super().open(key, version=version)

    slow = Slow()
    slow.versions = store.versions
    known = Known()
    assert len(known.read_manifests(slow, known.look(slow))) == 19
    assert len(at_once) >= 8
    assert len(CheckpointStore(store).list()) == 19


def test_each_kind_is_deleted_by_one_request_and_by_version() -> None:
    store = Bucket()
    train(store, 10, 20, 30, 40, 50, keep=9)
    sweep(store, KeepNewest(1))
    manifests, shards = store.deletions
    assert [ref.key for ref in manifests] == [CheckpointId(1, step).manifest_key for step in (10, 20, 30, 40)]
    assert [ref.key for ref in shards] == [CheckpointId(1, step).shard_key("model") for step in (10, 20, 30, 40)]
    assert all(ref.version for ref in [*manifests, *shards])
    assert sum(len(kept) for key, kept in store.versions.items() if key.startswith(CHECKPOINTS)) == 2


def test_shards_under_a_delete_marker_go_with_the_checkpoint_that_names_them() -> None:
    """Somebody has deleted them without a version; the store goes on keeping them, and charging for them."""
    store = Bucket()
    train(store, 10, 20, 30, keep=9)
    store.delete(
        [ObjectRef(CheckpointId(1, 10).shard_key("model")), ObjectRef(CheckpointId(1, 10).shard_key("backbone"))]
    )
    plan = sweep(store, KeepNewest(1))
    assert {ref.key for ref in plan.hidden} == {CheckpointId(1, 10).shard_key("model")}
    assert [name for name, _ in store.versions[CheckpointId(1, 10).shard_key("model")]] == ["marker"]
    assert len(store.versions[CheckpointId(1, 10).shard_key("backbone")]) == 2  # the newest one names that version
    CheckpointStore(store).verify(30)


def test_a_sweep_with_nothing_to_delete_asks_for_no_deletion() -> None:
    store = Bucket()
    events = train(store, 10, 20, keep=9)
    assert store.deletions == []
    assert not [event for event in events if isinstance(event, SaveFailed)]


def test_a_store_without_versions_is_read_back_each_time() -> None:
    class Counting(MemoryObjectStore):
        readings = 0

        def open(self, key: str, *, version: str | None = None) -> ObjectReader:
            self.readings += key == CheckpointId(1, 10).shard_key("backbone")
            return super().open(key, version=version)

    store = Counting()
    train(store, 10, 20, 30, 40, keep=1)
    assert store.readings == 3


def test_what_was_deleted_by_hand_is_asked_for_once_in_an_attempt_and_again_where_there_is_a_reason() -> None:
    class Versioned(Bucket):
        def deleted(self, prefix: str) -> Iterator[ObjectInfo]:
            self.requests["DELETED"] += 1
            found = [(key, kept) for key, kept in sorted(self.versions.items()) if key.startswith(prefix)]
            hidden = [(key, *kept[-2]) for key, kept in found if len(kept) > 1 and kept[-1][1] is None]
            return iter([ObjectInfo(key, len(data), name) for key, name, data in hidden if data is not None])

        def undelete(self, key: str) -> None:
            raise NotImplementedError

    store = Versioned()
    train(store, *range(10, 80, 10))
    assert store.requests["DELETED"] == 2  # by the start, which tells of it, and by the first sweep

    def delete(step: int) -> None:
        if step == 90:
            store.delete([ObjectRef(CheckpointId(2, 90).manifest_key)])

    train(store, 80, 90, 100, 110, 120, between=delete)
    assert store.requests["DELETED"] == 5
    kept = [(step, len(store.versions[CheckpointId(2, step).shard_key("model")])) for step in (80, 90, 100, 110, 120)]
    assert kept == [(80, 0), (90, 2), (100, 0), (110, 1), (120, 1)]
