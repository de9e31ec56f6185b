"""Servers that do not know a header that we send: what is not honoured is found out, and said or refused.

Without users moto compares no signatures, so a header can be taken from a request on its way to it.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator

import pytest

from contracts.test_s3_store import nothing_has_been_said, store_at  # noqa: F401 - a fixture
from servers import S3Server
from spotguard import CheckpointStore
from spotguard.errors import CheckpointDamagedError, ConfigError, ObjectExistsError
from spotguard.pipeline.objects import write_object
from spotguard.stores import ObjectRef
from spotguard.stores.s3 import S3ObjectStore, lifecycle
from spotguard.stores.s3.errors import NotOfferedError
from spotguard.testing import DropHeader, Fault, FaultProxy, Flip, Request, Status, matching
from spotguard.testing.object_store import get, put

MIB = 1 << 20


@pytest.fixture(scope="module")
def trusting() -> Iterator[S3Server]:
    """A moto that lets everybody in; `servers.moto` has users, and compares signatures."""
    server_module = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    threaded = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    threaded.start()
    try:
        host, port = threaded.get_host_and_port()
        server = S3Server(f"http://{host}:{port}", "anybody", "anything")
        client = server.client()
        client.create_bucket(Bucket=server.versioned)
        client.put_bucket_versioning(Bucket=server.versioned, VersioningConfiguration={"Status": "Enabled"})
        client.close()
        yield server
    finally:
        threaded.stop()


@pytest.fixture
def proxy(trusting: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(trusting.endpoint) as proxy:
        yield proxy


@pytest.fixture
def behind(trusting: S3Server, proxy: FaultProxy) -> Callable[..., S3ObjectStore]:
    """An empty store, by way of the proxy."""

    def at(**options: object) -> S3ObjectStore:
        return store_at(trusting.behind(proxy.uri), trusting.versioned, part_size=5 * MIB, **options)

    return at


def test_a_server_that_ignores_the_condition_of_a_put_is_refused_before_anything_is_written(
    behind: Callable[..., S3ObjectStore], proxy: FaultProxy
) -> None:
    proxy.plan = matching(DropHeader("if-none-match"))
    store = behind()
    with pytest.raises(ConfigError, match=r"ignores 'If-None-Match: \*'.*single_writer=True"):
        put(store, "object", b"x", exclusive=True)
    proxy.plan = None
    assert list(store.list("")) == []


def test_who_promises_to_be_alone_may_use_it(
    behind: Callable[..., S3ObjectStore], proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.plan = matching(DropHeader("if-none-match"))
    store = behind(single_writer=True)
    assert not store.able.exclusive
    put(store, "object", b"first", exclusive=True)
    with pytest.raises(ObjectExistsError):
        put(store, "object", b"second", exclusive=True)
    assert get(store, "object") == b"first"
    with pytest.raises(ObjectExistsError):
        put(store, "object", bytes(11 * MIB), exclusive=True)
    assert list(store._uploads()) == []
    assert caplog.text.count("cannot create exclusively") == 1


def test_a_server_that_ignores_the_condition_only_at_the_end_of_a_multipart_upload_is_refused_there(
    behind: Callable[..., S3ObjectStore], proxy: FaultProxy
) -> None:
    proxy.plan = matching(DropHeader("if-none-match"), method="POST", query_contains="uploadId")
    store = behind()
    assert store.able.exclusive
    put(store, "small", b"x", exclusive=True)
    with pytest.raises(ConfigError, match=r"end of a multipart upload.*part_size"):
        put(store, "large", bytes(11 * MIB), exclusive=True)
    put(store, "large", bytes(11 * MIB))  # a shard, which needs no condition: its key belongs to one attempt
    assert sorted(info.key for info in store.list("")) == ["large", "small"]
    assert list(store._uploads()) == []


def test_a_server_that_compares_no_checksum_is_said_once_and_damage_on_the_way_to_it_is_found_on_load(
    behind: Callable[..., S3ObjectStore], proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    proxy.plan = matching(DropHeader("x-amz-checksum-*"))
    checkpoints = CheckpointStore(behind())
    assert checkpoints.objects.able.checksum is None  # type: ignore[attr-defined]
    checkpoints.save({"model": {"weight": os.urandom(1000)}}, step=1)
    proxy.plan = matching(Flip(500), method="PUT", path_contains="model", times=1)
    damaged = checkpoints.save({"model": {"weight": os.urandom(1000)}}, step=2)
    assert len(proxy.faulted) > 1
    proxy.plan = None
    with pytest.raises(CheckpointDamagedError, match="model"):
        damaged.load()
    newest = checkpoints.resolve().checkpoint
    assert newest is not None
    assert newest.step == 1
    assert caplog.text.count("compares no checksum") == 1


@pytest.mark.parametrize("checksum", ["crc64nvme", "crc32c"])
def test_a_request_carries_the_strongest_checksum_that_the_server_compares(
    behind: Callable[..., S3ObjectStore],
    proxy: FaultProxy,
    checksum: str,
) -> None:
    """Asked of requests, not of the server: moto compares none. Nor does it say what it has computed of a part, which is found out once."""
    store = behind()
    store._able = dataclasses.replace(store.able, checksum=checksum)  # type: ignore[arg-type]
    del proxy.requests[:]
    put(store, "first", bytes(11 * MIB))
    ends = [request for request in proxy.requests if request.method == "POST" and "uploadId" in request.query]
    assert ("x-amz-checksum-crc64nvme" in ends[0].headers) == (checksum == "crc64nvme")
    del proxy.requests[:]
    put(store, "small", b"x")
    put(store, "large", bytes(11 * MIB))
    sent = [request for request in proxy.requests if request.method == "PUT"]
    assert len(sent) == 4
    assert all(f"x-amz-checksum-{checksum}" in request.headers for request in sent)
    assert not any("x-amz-trailer" in request.headers for request in proxy.requests)


ALL = {"put", "start", "part", "end", "get", "head"}
KEY = {"x-amz-server-side-encryption-customer-algorithm": "AES256"}


@pytest.mark.parametrize(
    ("options", "headers", "where"),
    [
        ({"sse": "AES256"}, {"x-amz-server-side-encryption": "AES256"}, {"put", "start"}),
        (
            {"sse": "aws:kms", "kms_key_id": "alias/ours"},
            {
                "x-amz-server-side-encryption": "aws:kms",
                "x-amz-server-side-encryption-aws-kms-key-id": "alias/ours",
            },
            {"put", "start"},
        ),
        ({"customer_key": b"k" * 32}, KEY, {"put", "start", "part", "get", "head"}),
        ({"requester_pays": True}, {"x-amz-request-payer": "requester"}, ALL),
    ],
    ids=["SSE-S3", "SSE-KMS", "SSE-C", "requester pays"],
)
def test_the_headers_of_an_encryption_go_with_the_requests_that_take_them(
    behind: Callable[..., S3ObjectStore],
    proxy: FaultProxy,
    options: dict[str, object],
    headers: dict[str, str],
    where: set[str],
) -> None:
    store = behind(**options)
    store.preflight()
    del proxy.requests[:]
    for name, size in {"small": 10, "large": 11 * MIB}.items():
        put(store, name, bytes(size))
        assert len(get(store, name)) == size
        assert store.stat(name) is not None
    found: dict[str, set[bool]] = {}
    for request in proxy.requests:
        kind = {"GET": "get", "HEAD": "head", "PUT": "put"}.get(request.method, "start")
        kind = "part" if "partNumber" in request.query else "end" if "uploadId" in request.query else kind
        found.setdefault(kind, set()).add(all(request.headers.get(name) == value for name, value in headers.items()))
    assert found.keys() == ALL
    assert {kind for kind, carried in found.items() if carried == {True}} >= where
    if "end" in found and where == {"put", "start"}:
        assert all(found[kind] == {False} for kind in ALL - where)


def test_who_pays_is_told_with_every_request_that_can_tell(
    behind: Callable[..., S3ObjectStore], proxy: FaultProxy
) -> None:
    store = behind(requester_pays=True)
    store.preflight()
    for name, size in {"small": 10, "large": 11 * MIB}.items():
        put(store, name, bytes(size), exclusive=True)
        assert len(get(store, name)) == size
        assert store.stat(name) is not None
    with pytest.raises(ZeroDivisionError), store.create("broken") as writer:
        writer.write(bytes(11 * MIB))
        raise ZeroDivisionError
    store.delete([ObjectRef("small")])
    assert [info.key for info in store.deleted("")] == ["small"]
    store.undelete("small")
    store.connection.call("create_multipart_upload", "stale")
    assert store.discard_partials(lambda key: key == "stale") == ["stale"]
    store.delete([info.ref for info in store.list("")])
    lifecycle.kept_versions(store.connection)
    silent = [request for request in proxy.requests if request.headers.get("x-amz-request-payer") != "requester"]
    assert {request.query for request in silent} == {"versioning"}  # which has no such header
    assert {request.method for request in proxy.requests} == {"GET", "HEAD", "PUT", "POST", "DELETE"}


@pytest.mark.parametrize(
    "answer", [Status(405, "MethodNotAllowed"), Status(501, "NotImplemented"), Status(403, "AccessDenied")], ids=str
)
@pytest.mark.parametrize("bucket", ["versioned", "without"])
def test_where_versions_cannot_be_asked_about_what_is_written_tells(
    trusting: S3Server, proxy: FaultProxy, answer: Status, bucket: str
) -> None:
    """As at an access point, which does not offer the question."""
    client = trusting.client()
    client.create_bucket(Bucket="without")
    client.close()
    proxy.plan = matching(answer, query_contains="versioning")
    store = store_at(trusting.behind(proxy.uri), bucket)
    if bucket == "versioned":
        put(store, "object", b"x", exclusive=True)
    else:
        with pytest.warns(UserWarning, match="does not keep versions"):
            put(store, "object", b"x", exclusive=True)
    assert store.able.versions == (bucket == "versioned")
    reader = S3ObjectStore(store.uri, store.connection.options, session=store.connection._session)  # before any write
    (info,) = reader.list("")
    assert get(reader, "object") == b"x"
    reader.delete([info.ref])
    assert list(store.list("")) == []


def test_where_versions_are_wanted_and_cannot_be_turned_on_what_is_written_tells(
    behind: Callable[..., S3ObjectStore], proxy: FaultProxy
) -> None:
    proxy.plan = matching(Status(405, "MethodNotAllowed"), query_contains="versioning")
    for wanted in ("require", "enable"):
        assert behind(versioning=wanted).able.versions


def test_what_is_not_offered_for_a_bucket_is_not_taken_for_a_bucket_that_is_missing(
    behind: Callable[..., S3ObjectStore], proxy: FaultProxy
) -> None:
    proxy.plan = matching(Status(405, "MethodNotAllowed"), query_contains="lifecycle")
    with pytest.raises(NotOfferedError, match="does not know get_bucket_lifecycle_configuration"):
        lifecycle.rules_of(behind().connection)


def test_a_version_that_is_a_delete_marker_is_not_there(behind: Callable[..., S3ObjectStore]) -> None:
    """The answer is 405."""
    store = behind()
    put(store, "object", b"x")
    store.delete([ObjectRef("object")])
    (marker,) = (info.version for info, _, marker in store._list_versions("") if marker)
    assert store.stat("object", version=marker) is None
    with pytest.raises(FileNotFoundError):
        store.open("object", version=marker)


def second_with_crc64(answer: Status, times: int) -> Callable[[Request], Fault | None]:
    """The probe with the right checksum passes, the one with the wrong checksum is answered so, so often."""
    seen: list[Request] = []

    def plan(request: Request) -> Fault | None:
        if request.method == "PUT" and "x-amz-checksum-crc64nvme" in request.headers:
            seen.append(request)
            return answer if 1 < len(seen) <= 1 + times else None
        return None

    return plan


@pytest.mark.parametrize("answer", [Status(503, "SlowDown"), Status(500), Status(403, "ExpiredToken")], ids=str)
def test_a_probe_that_fails_for_another_reason_says_nothing_about_checksums(
    behind: Callable[..., S3ObjectStore], proxy: FaultProxy, seaweedfs: S3Server, answer: Status
) -> None:
    proxy.plan = second_with_crc64(answer, 1)
    assert behind().able.checksum is None
    assert len(proxy.faulted) == 1
    with FaultProxy(seaweedfs.endpoint) as other:
        other.plan = second_with_crc64(answer, 2)
        assert store_at(seaweedfs.behind(other.uri), seaweedfs.versioned).able.checksum == "crc64nvme"
        assert len(other.faulted) == 2


@pytest.mark.parametrize("error", ["BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "InvalidRequest"])
def test_a_server_that_calls_a_wrong_checksum_wrong_compares_it(
    behind: Callable[..., S3ObjectStore], proxy: FaultProxy, error: str
) -> None:
    proxy.plan = second_with_crc64(Status(400, error), 1)
    assert behind().able.checksum == "crc64nvme"


@pytest.mark.parametrize("error", ["ConditionalRequestConflict", "OperationAborted"])
@pytest.mark.parametrize("size", [1000, 11 * MIB])
def test_a_create_that_met_another_writer_is_tried_again(
    behind: Callable[..., S3ObjectStore], proxy: FaultProxy, error: str, size: int
) -> None:
    store, data = behind(), os.urandom(size)
    store.preflight()
    store._multipart_is_exclusive()
    where: dict[str, str] = {"method": "PUT"} if size < MIB else {"method": "POST", "query_contains": "uploadId"}
    proxy.plan = matching(Status(409, error), times=2, path_contains="object", **where)  # type: ignore[arg-type]
    write_object(store, "object", data, exclusive=True)
    assert len(proxy.faulted) == 2
    assert get(store, "object") == data
    with pytest.raises(ObjectExistsError):
        write_object(store, "object", data, exclusive=True)


def test_an_upload_that_met_another_writer_at_its_end_begins_anew(
    behind: Callable[..., S3ObjectStore], proxy: FaultProxy, trusting: S3Server
) -> None:
    """Amazon answers 409 and wants all of it once more: the upload that it was is not to be used again."""
    store, data = behind(), os.urandom(11 * MIB)
    store.preflight()
    store._multipart_is_exclusive()
    client = trusting.client()

    def spend(request: Request) -> Fault | None:
        if request.method != "POST" or "uploadId" not in request.query or proxy.faulted:
            return None
        for upload in client.list_multipart_uploads(Bucket=trusting.versioned, Prefix=store.address.prefix)["Uploads"]:
            client.abort_multipart_upload(Bucket=trusting.versioned, Key=upload["Key"], UploadId=upload["UploadId"])
        return Status(409, "ConditionalRequestConflict")

    proxy.plan = spend
    write_object(store, "object", data, exclusive=True)
    assert len(proxy.faulted) == 1
    assert get(store, "object") == data
    assert list(store._uploads()) == []
    client.close()
