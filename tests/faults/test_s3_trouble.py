"""A network that delays, breaks, lies and forgets, between us and a real server; and eight starts at once."""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
import torch

from faults.scenario import end_child, fork, ignore, save, snapshot_at, state_at
from servers import S3Server
from spotguard import CheckpointStore
from spotguard.checkpoint.layout import ATTEMPTS, claim_key
from spotguard.errors import ObjectExistsError, StoreAccessError, StoreError
from spotguard.pipeline.checkpoint import Checkpoint, load_manifest
from spotguard.pipeline.history import claim_attempt, open_run, read_history
from spotguard.pipeline.resolver import resolve
from spotguard.pipeline.writer import Writer
from spotguard.policies import KeepNewest
from spotguard.state.compare import first_difference
from spotguard.stores.s3 import S3ObjectStore, S3Options
from spotguard.testing.object_store import get, put
from spotguard.testing.proxy import (
    Fault,
    FaultProxy,
    Flip,
    LostResponse,
    Reset,
    Stall,
    Status,
    Truncate,
    each,
    matching,
)

MIB = 1 << 20
SAVES = int(os.environ.get("FAULTED_SAVES", "200"))


@pytest.fixture
def proxy(seaweedfs: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(seaweedfs.endpoint) as proxy:
        yield proxy


@pytest.fixture
def place(seaweedfs: S3Server) -> Callable[..., S3ObjectStore]:
    """The same place, straight or by another way."""
    name = secrets.token_hex(8)

    def at(endpoint: str = seaweedfs.endpoint, **options: Any) -> S3ObjectStore:
        session = boto3.Session(seaweedfs.access_key, seaweedfs.secret_key, region_name=seaweedfs.region)
        chosen = S3Options(endpoint_url=endpoint, part_size=5 * MIB, **options)
        return S3ObjectStore(f"s3://{seaweedfs.versioned}/{name}", chosen, session=session)

    return at


def parts_of(proxy: FaultProxy) -> list[str]:
    return [request.query for request in proxy.requests if "partNumber" in request.query and "object" in request.path]


@pytest.mark.parametrize(
    "fault",
    [Reset(3 * MIB), Status(503, "SlowDown"), Status(500), Status(403, "ExpiredToken"), LostResponse(), Flip(2 * MIB)],
    ids=str,
)
def test_only_the_part_that_failed_is_sent_again(
    place: Callable[..., S3ObjectStore], proxy: FaultProxy, fault: Any
) -> None:
    store, data = place(proxy.uri), os.urandom(18 * MIB)
    store.preflight()
    told: list[int] = []
    proxy.plan = matching(fault, method="PUT", path_contains="object", query_contains="partNumber=2", times=2)
    with store.create("object", exclusive=True) as writer:
        writer.write(data, told.append)
    assert get(place(), "object") == data
    sent = parts_of(proxy)
    assert len(sent) == len(set(sent)) + 2
    assert sum("partNumber=2" in query for query in sent) == 3
    assert sum(told) == len(data)  # what had to be sent again was taken back


def test_a_transfer_that_stalls_is_noticed_and_tried_again(
    place: Callable[..., S3ObjectStore], proxy: FaultProxy
) -> None:
    store, data = place(proxy.uri, stall_s=1.0), os.urandom(11 * MIB)
    store.preflight()
    proxy.plan = matching(Stall(MIB), method="PUT", query_contains="partNumber=1", times=1)
    put(store, "object", data)
    proxy.plan = matching(Stall(2 * MIB, "response"), method="GET", path_contains="object", skip=1, times=1)
    assert get(store, "object") == data
    assert len(proxy.faulted) == 2


def test_a_wait_for_a_server_that_does_not_answer_is_told_of_though_not_for_each_part(
    place: Callable[..., S3ObjectStore],
    proxy: FaultProxy,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spotguard.stores.s3.connection._PATIENCE_S", 0.9)
    store = place(proxy.uri, stall_s=1.0)
    store.preflight()
    proxy.plan = matching(Status(500), method="PUT", query_contains="partNumber", times=2)
    put(store, "first", os.urandom(11 * MIB))
    assert "no success" not in caplog.text, "that was soon over"
    proxy.plan = matching(Stall(MIB), method="PUT", query_contains="partNumber", times=3)
    put(store, "second", os.urandom(16 * MIB))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([text for text in told if "no success for 1 s: tried again after" in text]) == 1, told


def test_what_is_refused_for_good_is_aborted(place: Callable[..., S3ObjectStore], proxy: FaultProxy) -> None:
    store = place(proxy.uri)
    store.preflight()
    proxy.plan = matching(Status(403, "AccessDenied"), method="PUT", query_contains="partNumber", skip=1)
    with pytest.raises(StoreAccessError, match="s3:PutObject"):
        put(store, "object", bytes(18 * MIB))
    assert place().stat("object") is None
    assert list(place()._uploads()) == []


@pytest.mark.parametrize("size", [1000, 11 * MIB])
def test_a_create_whose_answer_was_lost_has_worked(
    place: Callable[..., S3ObjectStore], proxy: FaultProxy, size: int
) -> None:
    store, data = place(proxy.uri), os.urandom(size)
    store.preflight()
    store._multipart_is_exclusive()
    last: dict[str, Any] = {"method": "PUT"} if size < MIB else {"method": "POST", "query_contains": "uploadId"}
    proxy.plan = matching(LostResponse(), times=1, path_contains="object", **last)
    with store.create("object", exclusive=True) as writer:
        writer.write(data)
    assert len(proxy.faulted) == 1
    assert writer.info is not None
    info = place().stat("object")
    assert info is not None
    assert writer.info.version == info.version
    assert get(place(), "object") == data


def test_after_a_lost_answer_somebody_elses_object_is_not_taken_for_ours(
    place: Callable[..., S3ObjectStore], proxy: FaultProxy
) -> None:
    """The same bytes, even: of two claimants with equal content one has lost."""
    store = place(proxy.uri)
    store.preflight()
    put(place(), "object", b"the same", exclusive=True)
    proxy.plan = matching(Reset(), method="PUT", path_contains="object", times=1)
    with pytest.raises(ObjectExistsError):
        put(store, "object", b"the same", exclusive=True)
    assert len(proxy.faulted) == 1


@pytest.mark.parametrize(
    "fault", [Reset(3 * MIB, "response"), Truncate(2 * MIB), Truncate(0), Status(503, "SlowDown")], ids=str
)
def test_a_download_goes_on_where_it_was_cut_off(
    place: Callable[..., S3ObjectStore], proxy: FaultProxy, fault: Any
) -> None:
    data = os.urandom(18 * MIB)
    put(place(), "object", data)
    proxy.plan = matching(fault, method="GET", path_contains="object", times=3)
    told: list[int] = []
    with place(proxy.uri).open("object") as reader:
        buffer = bytearray(reader.size)
        assert reader.read_into(buffer, 0, told.append) == len(data)
    assert buffer == data
    assert sum(told) == len(data)
    assert len(proxy.faulted) == 3


def test_a_bit_that_flips_on_the_way_here_is_no_damage(place: Callable[..., S3ObjectStore], proxy: FaultProxy) -> None:
    state = {"model": state_at(10)["model"]}
    CheckpointStore(place()).save(state, step=10)
    proxy.plan = matching(Flip(300, "response"), method="GET", path_contains="model.pt", times=1)
    latest = CheckpointStore(place(proxy.uri)).latest()
    assert len(proxy.faulted) == 1
    assert latest is not None
    assert first_difference(latest.load(), state) is None


def test_saves_over_a_faulty_network_commit_what_verifies_and_lose_nothing(
    place: Callable[..., S3ObjectStore], proxy: FaultProxy, record_property: Callable[[str, object], None]
) -> None:
    """Every tenth save has a shard of two parts. `make soak` makes 2,000 of them."""
    faults: list[Fault] = [
        Reset(100), Reset(50, "response"), Status(500), Status(503, "SlowDown"), Truncate(40), LostResponse(), Flip(60),
        Flip(60, "response"),
    ]  # fmt: skip
    often, seldom = each(0.3, [*faults, Reset(3 * MIB), Flip(MIB // 2)], seed=8), each(0.1, faults, seed=7)
    proxy.plan = lambda request: (often if "uploadId=" in request.query else seldom)(request)
    large = torch.arange(6 * MIB // 4, dtype=torch.int32)

    def state_of(step: int) -> dict[str, Any]:
        return {"model": {"step": step}} | ({"large": {"weight": large + step}} if step % 10 == 0 else {})

    checkpoints = CheckpointStore(place(proxy.uri))
    committed, failed = [], 0
    for step in range(1, SAVES + 1):
        try:
            committed.append(checkpoints.save(state_of(step), step=step).id)
        except StoreError:
            failed += 1
    store = place()
    found = [str(identity) for identity in read_history(store).manifests]
    assert set(committed) <= set(found)
    for identity in read_history(store).manifests:
        checkpoint = Checkpoint(store, load_manifest(store, identity))
        assert first_difference(checkpoint.load(), state_of(checkpoint.step)) is None
    latest = resolve(store).require()
    assert latest is not None
    assert latest.id == found[-1]
    assert len(committed) > 0.9 * SAVES
    in_parts = [request for request, _ in proxy.faulted if "uploadId=" in request.query]
    assert len(proxy.faulted) - len(in_parts) > SAVES // 5
    assert len(in_parts) > SAVES // 20
    record_property("faulted saves", SAVES)
    record_property("faults", len(proxy.faulted))
    record_property("faults of parts and their end", len(in_parts))
    record_property("failed saves", failed)


def test_of_eight_starts_at_once_each_has_its_own_attempt_and_no_checkpoint_is_mixed(
    place: Callable[..., S3ObjectStore],
) -> None:
    reading, writing = os.pipe()

    def start(number: int) -> None:
        """Claims, resumes, and saves until somebody else has taken over."""
        store = place()
        run, claim = open_run(store), claim_attempt(store)
        resumed = resolve(store, run_id=run.run_id).require()
        writer = Writer(
            store,
            run_id=run.run_id,
            attempt=claim.attempt,
            retention=KeepNewest(50),
            publish=ignore,
            resumed=resumed.manifest if resumed else None,
        )
        first = resumed.step if resumed else 0
        for step in range(first + 10, first + 40, 10):
            writer.submit(snapshot_at(step), {"number": float(number)})
            writer.drain()
        writer.close()
        told = {"number": number, "pid": os.getpid(), "attempt": claim.attempt, "error": type(writer.error).__name__}
        os.write(writing, json.dumps(told).encode() + b"\n")  # in one piece: pipe(7)

    children = []
    for number in range(8):
        children.append(fork())
        if children[-1] == 0:
            end_child(lambda number=number: start(number))  # type: ignore[misc]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 8
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = [json.loads(line) for line in pipe]

    store = place()
    history = read_history(store)
    assert not history.damaged
    # One claim for each number, made once and never written over; each start holds one, and knows whose it is.
    claims = [info.key for info, _, _ in store._list_versions(ATTEMPTS)]
    assert claims == [claim_key(attempt) for attempt in range(1, len(claims) + 1)]
    held = {one["attempt"]: one for one in told}
    assert len(held) == len(told) == 8
    assert {attempt: history.claims[attempt].pid for attempt in held} == {
        attempt: one["pid"] for attempt, one in held.items()
    }
    # A start claims again where somebody has committed between its look and its claim. What it gave up has no commit.
    for attempt in set(history.claims) - set(held):
        assert history.claims[attempt].pid in [one["pid"] for other, one in held.items() if other > attempt]
    assert {identity.attempt for identity in history.manifests} <= set(held)
    # Each has done all that it wanted, or was overtaken; whoever came last was not.
    last = max(held)
    assert last == history.newest_attempt
    for attempt, one in held.items():
        commits = sum(identity.attempt == attempt for identity in history.manifests)
        assert (one["error"] == "FencedError" and attempt < last) or (one["error"] == "NoneType" and commits == 3)
    for identity in history.manifests:
        checkpoint = Checkpoint(store, load_manifest(store, identity))
        assert first_difference(checkpoint.load(), state_at(checkpoint.step)) is None
        assert len({shard.key for shard in checkpoint.manifest.shards}) == 3
        assert checkpoint.manifest.metrics == {"number": held[identity.attempt]["number"]}
    newest = resolve(store).require()
    assert newest is not None
    assert newest.manifest.attempt == last
    save(store, newest.step + 10)
