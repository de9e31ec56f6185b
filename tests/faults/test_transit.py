"""Bits that flip on the way from the store are no damage: only what is wrong twice in the same way is."""

import random
from collections.abc import Callable

import pytest

from faults.scenario import check_content, snapshot_at
from spotguard.checkpoint import CheckpointId
from spotguard.errors import CheckpointDamagedError, StoreError
from spotguard.pipeline.checkpoint import fetch_shard, load_manifest
from spotguard.pipeline.commit import commit
from spotguard.pipeline.history import claim_attempt, open_run, read_history
from spotguard.pipeline.resolver import resolve
from spotguard.stores import MemoryObjectStore, ObjectReader
from spotguard.stores.memory import _Reader

Tamper = Callable[[bytes, int], bytes]
NEWEST = CheckpointId(1, 20)


def another_bit(data: bytes, number: int) -> bytes:
    """A bit that is another one each time."""
    place = random.Random(number).randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def same_bit(data: bytes, number: int) -> bytes:
    return another_bit(data, 0)


class Line(MemoryObjectStore):
    """What is read of keys that contain `key` arrives changed, the first `times` times."""

    key, times, readings = "", 0, 0
    tamper: Tamper = staticmethod(another_bit)

    def open(self, key: str, *, version: str | None = None) -> ObjectReader:
        with super().open(key, version=version) as reader:
            data = reader.read()
        if self.key and self.key in key:
            self.readings += 1
            if self.readings <= self.times:
                return _Reader(self.tamper(data, self.readings))
        return _Reader(data)


class Short(_Reader):
    """Ends too early, and says the right size."""

    def read_into(self, buffer, offset, /, progress=None, digest=None):  # type: ignore[no-untyped-def]
        return super().read_into(memoryview(buffer)[:-5], offset, progress, digest)


class ShortLine(Line):
    """Readings end too early instead."""

    def open(self, key: str, *, version: str | None = None) -> ObjectReader:
        with super().open(key, version=version) as reader:
            data = reader.read()
        return Short(data) if self.key and self.key in key and self.readings <= self.times else _Reader(data)


@pytest.fixture(params=[Line, ShortLine])
def line(request: pytest.FixtureRequest) -> Line:
    """A run with checkpoints at steps 10 and 20."""
    store: Line = request.param()
    run, claim, before = open_run(store), claim_attempt(store), None
    for step in (10, 20):
        before, _ = commit(
            store, snapshot_at(step), run_id=run.run_id, attempt=claim.attempt, previous=before, reuse=False
        )
    if isinstance(store, ShortLine):
        store.tamper = lambda data, number: data
    return store


@pytest.mark.parametrize("keep", [True, False])
def test_a_shard_that_comes_damaged_once_is_read_again(
    line: Line, caplog: pytest.LogCaptureFixture, *, keep: bool
) -> None:
    shard = load_manifest(line, NEWEST).shards[0]
    line.key, line.times = shard.key, 1
    counted: list[int] = []
    data = fetch_shard(line, shard, progress=counted.append, keep=keep)
    assert bytes(data) == (bytes(snapshot_at(20).shards[0].data) if keep else b"")
    assert line.readings == 2
    assert sum(counted) == shard.size
    assert "whole when it was read again" in caplog.text


def test_a_damaged_reading_does_not_make_the_start_fall_back(line: Line) -> None:
    line.key, line.times = NEWEST.shard_key("model"), 1
    resolution = resolve(line, load=True)
    assert not resolution.rejected
    check_content(resolution, 20)


@pytest.mark.parametrize("times", [2, 99])
def test_the_same_wrong_bytes_twice_are_damage(line: Line, times: int) -> None:
    line.tamper, line.key, line.times = same_bit, NEWEST.shard_key("model"), times
    with pytest.raises(CheckpointDamagedError, match="damaged"):
        fetch_shard(line, load_manifest(line, NEWEST).shards[0])
    assert line.readings == 2
    line.readings = 0
    (rejected,) = resolve(line).rejected
    assert rejected.id == str(NEWEST)


def test_other_wrong_bytes_each_time_are_an_error_and_no_reason_for_an_older_checkpoint() -> None:
    store = Line()
    run, claim = open_run(store), claim_attempt(store)
    for step in (10, 20):
        commit(store, snapshot_at(step), run_id=run.run_id, attempt=claim.attempt)
    store.key, store.times = NEWEST.shard_key("model"), 2
    check_content(resolve(store, load=True), 20)  # the third reading was right
    store.readings, store.times = 0, 99
    with pytest.raises(StoreError, match="change from one reading to the next"):
        resolve(store)
    assert store.readings == 3


@pytest.mark.parametrize("key", [NEWEST.manifest_key, "attempts/0001.json", "run.json"])
def test_a_record_that_comes_damaged_once_is_read_again(key: str) -> None:
    store = Line()
    run, claim = open_run(store), claim_attempt(store)
    commit(store, snapshot_at(20), run_id=run.run_id, attempt=claim.attempt)
    store.key, store.times = key, 1
    assert open_run(store) == run
    assert not read_history(store).damaged
    assert load_manifest(store, NEWEST).step == 20
    assert store.readings >= 2
    store.readings, store.times = 0, 99
    with pytest.raises(StoreError, match="change from one reading to the next"):
        _ = open_run(store), read_history(store), load_manifest(store, NEWEST)
    store.readings, store.tamper = 0, same_bit
    if key == "attempts/0001.json":
        assert 1 in read_history(store).damaged
    else:
        with pytest.raises(CheckpointDamagedError, match=key.rpartition("/")[2]):
            _ = open_run(store), load_manifest(store, NEWEST)
