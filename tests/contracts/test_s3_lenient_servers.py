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
from spotguard.stores.s3 import S3ObjectStore
from spotguard.testing import DropHeader, FaultProxy, Flip, matching
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
