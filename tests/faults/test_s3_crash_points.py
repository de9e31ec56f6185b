"""The process dies before, in the middle of, and after every request of a save in a bucket and of the sweep behind it."""

import functools
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
import torch

from faults.scenario import KEEP, in_child, snapshot_of, state_at
from faults.scenario import save as save_in
from servers import S3Server
from spotguard.checkpoint.layout import MANIFESTS, parse_manifest_key
from spotguard.pipeline.checkpoint import Checkpoint, load_manifest
from spotguard.pipeline.objects import together
from spotguard.pipeline.resolver import resolve
from spotguard.pipeline.writer import Writer
from spotguard.state.compare import first_difference
from spotguard.state.snapshot import Snapshot
from spotguard.stores import ObjectInfo
from spotguard.stores.s3 import S3ObjectStore, S3Options
from spotguard.stores.s3.body import Body

Record = Callable[[str, object], None]
MIB = 1 << 20
WITH_BODY = {"PutObject", "DeleteObjects", "UploadPart", "CompleteMultipartUpload"}
WITHOUT = {"DeleteObject", "CreateMultipartUpload", "AbortMultipartUpload"}
CHANGES = WITH_BODY | WITHOUT  # a request that only reads changes nothing: to die at it is to die after the one before
IN_PARTS = ["CreateMultipartUpload", "UploadPart", "UploadPart", "CompleteMultipartUpload"]
WHENS = ("before", "half", "after")
LARGE = torch.arange(6 * MIB // 4, dtype=torch.int32)
SESSION = boto3.Session()  # has read the description of the service once


class Requests:
    """Counts the requests of a store that change something, and dies at one of them as by SIGKILL.

    Args:
        at: Number of the request, from 1; 0 never dies.
        when: ``"before"`` it is sent, ``"half"`` of its body has been sent, or ``"after"`` the server has done it.
    """

    def __init__(self, store: S3ObjectStore, at: int = 0, when: str = "before") -> None:
        self.names: list[str] = []
        self._at, self._when = at, when
        self._lock, self._current = threading.Lock(), threading.local()  # parts are sent by several threads
        events = store.connection.client.meta.events
        events.register_first("before-send.s3", self._before)
        events.register_first("after-call.s3", self._after)

    def _before(self, request: Any, event_name: str, **_: Any) -> None:
        self._current.is_last = False
        if (name := event_name.rpartition(".")[2]) not in CHANGES:
            return
        with self._lock:
            self.names.append(name)
            self._current.is_last = len(self.names) == self._at
        if self._current.is_last and self._when == "before":
            os._exit(137)
        if self._current.is_last and self._when == "half":
            request.body = self._half_of(request.body)

    def _after(self, **_: Any) -> None:
        if self._current.is_last and self._when == "after":
            os._exit(137)

    def _half_of(self, body: Any) -> Iterator[bytes]:
        whole = (
            b"".join(bytes(piece) for piece in body.stream())
            if isinstance(body, Body)
            else body.read()
            if hasattr(body, "read")
            else bytes(body)
        )
        yield whole[: len(whole) // 2]
        os._exit(137)


@pytest.fixture(autouse=True)
def server(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    seaweedfs.use(monkeypatch)
    monkeypatch.setattr(
        "spotguard.stores.s3.store._PROBE_AGE_S", -60.0
    )  # a probe of a death a moment ago is old enough
    monkeypatch.setattr("spotguard.stores.s3.preflight._said", {(seaweedfs.plain, "versions")})
    return seaweedfs


def at(uri: str) -> S3ObjectStore:
    return S3ObjectStore(uri, S3Options(part_size=5 * MIB), session=SESSION)


def somewhere(bucket: str) -> str:
    return f"s3://{bucket}/{secrets.token_hex(8)}"


def large_state_at(step: int) -> dict[str, Any]:
    """With a member that changes at each step and is sent in two parts."""
    return {**state_at(step), "large": {"weight": LARGE + step}}


@functools.cache
def large_snapshot_at(step: int) -> Snapshot:
    return snapshot_of(step, large_state_at(step))


def save(store: S3ObjectStore, *steps: int) -> Writer:
    return save_in(store, *steps, snapshot=large_snapshot_at)


def copied(base: S3ObjectStore) -> S3ObjectStore:
    """The same run once more. Manifests name no versions here, so that a copy is as good as the original."""
    copy = at(somewhere(base.address.bucket))

    def one(info: ObjectInfo) -> None:
        source = {"Bucket": base.address.bucket, "Key": base.address.prefix + info.key}
        base.connection.client.copy_object(
            Bucket=copy.address.bucket, Key=copy.address.prefix + info.key, CopySource=source
        )

    together(one, list(base.list("")))
    return copy


def changes_of(start: Callable[[S3ObjectStore], object], uri: str) -> list[str]:
    """Names of the requests by which it changes something, in order."""
    reading, writing = os.pipe()

    def run() -> None:
        counted = Requests(store := at(uri))
        start(store)
        os.write(writing, " ".join(counted.names).encode())

    assert in_child(run) == 0
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read().split()


def points_of(names: list[str], when: str) -> list[int]:
    """Numbers of the requests to die at. One without a body has no middle: the server has got it, or not."""
    return [number for number, name in enumerate(names, 1) if when != "half" or name in WITH_BODY]


def die(start: Callable[[S3ObjectStore], object], uri: str, number: int, when: str) -> None:
    def run() -> None:
        Requests(store := at(uri), number, when)
        start(store)

    assert in_child(run) == 137, (number, when)


def check_visible(store: S3ObjectStore, steps: set[int]) -> int:
    """Every manifest is intact and every shard that it names is whole; the newest is that of one of these steps, with its content."""
    resolution = resolve(store, load=True)
    checkpoint = resolution.require()
    assert checkpoint is not None
    assert checkpoint.step in steps
    assert first_difference(resolution.loaded, large_state_at(checkpoint.step)) is None
    for info in store.list(MANIFESTS):
        identity = parse_manifest_key(info.key)
        assert identity is not None
        assert identity <= checkpoint.manifest.id
        if identity != checkpoint.manifest.id:  # that one has just been verified
            Checkpoint(store, load_manifest(store, identity)).verify()
    return checkpoint.step


def check_tidy(store: S3ObjectStore) -> None:
    """After a save that came to its end there is nothing without a reason: no upload, no orphan, no probe, no version of a shard twice."""
    named, kept = {"run.json"}, 0
    for info in store.list(MANIFESTS):
        identity = parse_manifest_key(info.key)
        assert identity is not None
        kept += 1
        named |= {info.key} | {shard.key for shard in load_manifest(store, identity).shards}
    assert kept == KEEP
    assert {info.key for info in store.list("") if not info.key.startswith("attempts/")} == named
    versions = [info.key for info, _, _ in store._list_versions("checkpoints/")]
    assert len(versions) == len(set(versions))
    assert list(store._uploads()) == []


@pytest.fixture(scope="module")
def base() -> list[S3ObjectStore]:
    """A run with two attempts, made once."""
    return []


@pytest.mark.parametrize("when", WHENS)
def test_death_at_any_request_of_a_save_leaves_the_old_or_the_new_checkpoint(
    server: S3Server, base: list[S3ObjectStore], record_property: Record, when: str
) -> None:
    if not base:
        base.append(at(somewhere(server.plain)))
        save(base[0], 10, 20)
        save(base[0], 30)

    def start(store: S3ObjectStore) -> object:
        return save(store, 40)

    names = changes_of(start, copied(base[0]).uri)
    assert [name for name in names if name in IN_PARTS] == IN_PARTS
    points, outcomes = points_of(names, when), set()
    for number in points:
        store = copied(base[0])
        die(start, store.uri, number, when)
        outcomes.add(check_visible(store, {30, 40}))
        save(store, 50)
        check_tidy(store)
    assert outcomes == {30, 40}  # on both sides of the commit
    record_property("crash points", len(points))


@pytest.mark.parametrize("when", WHENS)
def test_death_at_any_request_leaves_nothing_behind_where_versions_are_kept(
    server: S3Server, record_property: Record, when: str
) -> None:
    """One run that goes from death to death; each time a new start clears away what the dead one has left."""
    store, step = at(somewhere(server.versioned)), 30
    save(store, 10, 20)
    names = changes_of(lambda there: save(there, 30), store.uri)
    assert [name for name in names if name in IN_PARTS] == IN_PARTS
    points, outcomes = points_of(names, when), set()
    for number in points:
        die(lambda there, step=step: save(there, step + 10), store.uri, number, when)  # type: ignore[misc]
        outcomes.add(check_visible(store, {step, step + 10}) - step)
        step += 20
        save(at(store.uri), step)
        check_tidy(store)
    check_visible(store, {step})
    assert outcomes == {0, 10}
    record_property("crash points", len(points))


def test_death_at_any_request_of_the_very_first_start_does_not_wedge_the_run(
    server: S3Server, record_property: Record
) -> None:
    def start(store: S3ObjectStore) -> object:
        return save(store, 10)

    names = changes_of(start, somewhere(server.plain))
    for number, name in enumerate(names, 1):
        store = at(somewhere(server.plain))
        die(start, store.uri, number, "half" if number % 2 == 0 and name in WITH_BODY else "after")
        save(store, 20)
        check_visible(store, {20})
    record_property("crash points", len(names))
