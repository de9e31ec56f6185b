"""The process dies before, in the middle of, and after every request of a save in a bucket and of the sweep behind it."""

import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from faults.scenario import KEEP, in_child, save, state_at
from servers import S3Server
from spotguard.checkpoint.layout import MANIFESTS, parse_manifest_key
from spotguard.pipeline.checkpoint import Checkpoint, load_manifest
from spotguard.pipeline.resolver import resolve
from spotguard.state.compare import first_difference
from spotguard.stores.s3 import S3ObjectStore
from spotguard.stores.s3.body import Body

Record = Callable[[str, object], None]
CHANGES = {
    "PutObject",
    "DeleteObject",
    "DeleteObjects",
    "CreateMultipartUpload",
    "UploadPart",
    "CompleteMultipartUpload",
}
SESSION = boto3.Session()  # has read the description of the service once


class Requests:
    """Counts the requests of a store, and dies at one of them as by SIGKILL.

    Args:
        at: Number of the request, from 1; 0 never dies.
        when: ``"before"`` it is sent, ``"half"`` of its body has been sent, or ``"after"`` the server has done it.
    """

    def __init__(self, store: S3ObjectStore, at: int = 0, when: str = "before") -> None:
        self.names: list[str] = []
        self._at, self._when = at, when
        events = store.connection.client.meta.events
        events.register_first("before-send.s3", self._before)
        events.register_first("after-call.s3", self._after)

    def _before(self, request: Any, event_name: str, **_: Any) -> None:
        self.names.append(event_name.rpartition(".")[2])
        if len(self.names) != self._at:
            return
        if self._when == "before" or (self._when == "half" and not request.body):
            os._exit(137)
        if self._when == "half":
            request.body = self._half_of(request.body)

    def _after(self, **_: Any) -> None:
        if len(self.names) == self._at and self._when == "after":
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
    return S3ObjectStore(uri, session=SESSION)


def somewhere(bucket: str) -> str:
    return f"s3://{bucket}/{secrets.token_hex(8)}"


def copied(base: S3ObjectStore) -> S3ObjectStore:
    """The same run once more. Manifests name no versions here, so that a copy is as good as the original."""
    copy = at(somewhere(base.address.bucket))
    for info in base.list(""):
        source = {"Bucket": base.address.bucket, "Key": base.address.prefix + info.key}
        base.connection.client.copy_object(
            Bucket=copy.address.bucket, Key=copy.address.prefix + info.key, CopySource=source
        )
    return copy


def requests_of(start: Callable[[S3ObjectStore], object], uri: str) -> list[str]:
    """Names of the requests that it makes, in order."""
    reading, writing = os.pipe()

    def run() -> None:
        counted = Requests(store := at(uri))
        start(store)
        os.write(writing, " ".join(counted.names).encode())

    assert in_child(run) == 0
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read().split()


def die(start: Callable[[S3ObjectStore], object], uri: str, number: int, when: str) -> None:
    def run() -> None:
        Requests(store := at(uri), number, when)
        start(store)

    assert in_child(run) == 137, (number, when)


def check_visible(store: S3ObjectStore, steps: set[int]) -> int:
    """Every manifest is intact and every shard that it names is whole; the newest is that of one of these steps, with its content."""
    for info in store.list(MANIFESTS):
        identity = parse_manifest_key(info.key)
        assert identity is not None
        Checkpoint(store, load_manifest(store, identity)).verify()
    resolution = resolve(store, load=True)
    checkpoint = resolution.require()
    assert checkpoint is not None
    assert checkpoint.step in steps
    assert first_difference(resolution.loaded, state_at(checkpoint.step)) is None
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
    """A run with four attempts, made once."""
    return []


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_death_at_any_request_of_a_save_leaves_the_old_or_the_new_checkpoint(
    server: S3Server, base: list[S3ObjectStore], record_property: Record, when: str
) -> None:
    if not base:
        base.append(at(somewhere(server.plain)))
        save(base[0], 10, 20)
        save(base[0], 30)

    def start(store: S3ObjectStore) -> object:
        return save(store, 40)

    names = requests_of(start, copied(base[0]).uri)
    points = [
        number for number, name in enumerate(names, 1) if name in CHANGES
    ]  # a read changes nothing: it is as the one before
    outcomes = set()
    for count, number in enumerate(points):
        store = copied(base[0])
        die(start, store.uri, number, when)
        outcomes.add(check_visible(store, {30, 40}))
        if count % 3 == 0:
            save(store, 50)
            check_visible(store, {50})
            check_tidy(store)
    assert outcomes == {30, 40}  # on both sides of the commit
    assert len(points) >= 10, names
    record_property("crash points", len(points))


def test_death_at_any_request_leaves_nothing_behind_where_versions_are_kept(
    server: S3Server, record_property: Record
) -> None:
    """One run that goes from death to death; every other save comes to its end."""
    store, step, deaths = at(somewhere(server.versioned)), 100, 0
    save(store, 10, 20, 30)
    save(store, step)
    number = 1
    while True:
        when = ("before", "half", "after")[number // 5 % 3]

        def start(number: int = number, when: str = when, step: int = step) -> None:
            Requests(there := at(store.uri), number, when)
            save(there, step + 1)

        status = in_child(start)
        assert status in (137, 0)
        step = check_visible(store, {step, step + 1}) + 1
        if status == 0:
            break
        deaths += 1
        number += 5
        save(at(store.uri), step)  # as a new start, which clears away what the dead one has left
        check_tidy(store)
    assert deaths >= 6
    record_property("crash points", deaths)


def test_death_at_any_request_of_the_very_first_start_does_not_wedge_the_run(server: S3Server) -> None:
    def start(store: S3ObjectStore) -> object:
        return save(store, 10)

    names = requests_of(start, somewhere(server.plain))
    points = [number for number, name in enumerate(names, 1) if name in CHANGES]
    for number in points:
        store = at(somewhere(server.plain))
        die(start, store.uri, number, "after" if number % 2 else "half")
        save(store, 20)
        check_visible(store, {20})
