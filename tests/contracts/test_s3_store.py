"""The contract of `ObjectStore` over real S3 servers, and what only S3 can get wrong."""

import dataclasses
import os
import secrets
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import boto3
import pytest
import torch

from servers import S3Server
from spotguard import CheckpointStore, KeepNewest, S3CheckpointStore
from spotguard.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    ConfigError,
    DeadlineExceededError,
    ObjectExistsError,
    StoreAccessError,
    TransientStoreError,
)
from spotguard.stores import ObjectRef, ObjectStore, open_store
from spotguard.stores.s3 import S3ObjectStore, S3Options, preflight
from spotguard.testing import ObjectStoreContract
from spotguard.testing.object_store import assert_absent, get, put

MIB = 1 << 20


def store_at(server: S3Server, bucket: str, **options: Any) -> S3ObjectStore:
    """An empty store on that server."""
    return at_uri(server, f"s3://{bucket}/{secrets.token_hex(8)}", **options)


def at_uri(server: S3Server, uri: str, **options: Any) -> S3ObjectStore:
    session = boto3.Session(server.access_key, server.secret_key, region_name=server.region)
    return S3ObjectStore(uri, S3Options(endpoint_url=server.endpoint, **options), session=session)


def client_of(server: S3Server) -> Any:
    session = boto3.Session(server.access_key, server.secret_key, region_name=server.region)
    return session.client("s3", endpoint_url=server.endpoint)


@pytest.fixture(autouse=True)
def nothing_has_been_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test hears what is said once of a bucket."""
    monkeypatch.setattr(preflight, "_said", set())


class TestSeaweedFSWithVersions(ObjectStoreContract):
    @pytest.fixture
    def store(self, seaweedfs: S3Server) -> ObjectStore:
        return store_at(seaweedfs, seaweedfs.versioned, part_size=5 * MIB)


class TestSeaweedFSWithoutVersions(ObjectStoreContract):
    @pytest.fixture
    def store(self, seaweedfs: S3Server) -> ObjectStore:
        preflight._said.add((seaweedfs.plain, "versions"))
        return store_at(seaweedfs, seaweedfs.plain)


class TestMoto(ObjectStoreContract):
    @pytest.fixture
    def store(self, moto: S3Server) -> ObjectStore:
        return store_at(moto, moto.versioned)


@pytest.fixture
def store(seaweedfs: S3Server) -> S3ObjectStore:
    return store_at(seaweedfs, seaweedfs.versioned, part_size=5 * MIB)


# -- versions ---------------------------------------------------------------------------------------------------------------------


def weights(value: float) -> dict[str, Any]:
    return {"model": {"weight": torch.full((1000,), value)}}


@pytest.mark.parametrize("harm", ["overwritten", "deleted", "overwritten and deleted"])
def test_a_committed_checkpoint_is_read_whatever_has_happened_to_its_keys(store: S3ObjectStore, harm: str) -> None:
    checkpoints = CheckpointStore(store)
    checkpoint = checkpoints.save(weights(1.0), step=10)
    for shard in checkpoint.manifest.shards:
        assert shard.version is not None
        if "overwritten" in harm:
            put(store, shard.key, b"something else")
        if "deleted" in harm:
            store.delete([ObjectRef(shard.key)])
    found = CheckpointStore(at_uri_of(store)).latest()
    assert found is not None
    assert torch.equal(found.load()["model"]["weight"], weights(1.0)["model"]["weight"])


def at_uri_of(store: S3ObjectStore, **options: Any) -> S3ObjectStore:
    """The same place, as another process sees it."""
    changed = dataclasses.replace(store.connection.options, **options)
    return S3ObjectStore(store.uri, changed, session=store.connection._session)


def test_a_checkpoint_whose_manifest_was_deleted_comes_back(store: S3ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    checkpoints.save(weights(1.0), step=10)
    lost = checkpoints.save(weights(2.0), step=20)
    assert checkpoints.deleted() == []
    store.delete([ObjectRef(lost.manifest.id.manifest_key)] * 2)
    store.delete([ObjectRef(shard.key) for shard in lost.manifest.shards])
    assert [item.step for item in checkpoints.list()] == [10]
    assert [(item.id, item.missing) for item in checkpoints.deleted()] == [(lost.id, "")]
    assert checkpoints.restore(lost.id).step == 20
    assert checkpoints.deleted() == []
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.load()["model"]["weight"][0] == 2.0
    with pytest.raises(CheckpointNotFoundError, match="ls --deleted"):
        checkpoints.restore(lost.id)


@pytest.mark.parametrize("later", [False, True], ids=["at once", "once its shared shard is in no other checkpoint"])
def test_a_sweep_leaves_what_restore_brings_back(store: S3ObjectStore, *, later: bool) -> None:
    """Somebody deletes the manifest of step 30; the next start saves step 35 and sweeps."""
    frozen = {"backbone": {"weight": torch.arange(9.0)}}
    checkpoints = CheckpointStore(store)
    for step in (10, 20, 30):
        lost = checkpoints.save(weights(float(step)) | frozen, step=step)
    store.delete([ObjectRef(lost.manifest.id.manifest_key)])
    again = CheckpointStore(at_uri_of(store))
    again.save(weights(35.0) | frozen, step=35)
    again.prune(1)
    assert [(item.id, item.missing) for item in again.deleted()] == [(lost.id, "")]
    if later:
        last = CheckpointStore(at_uri_of(store))
        last.save(weights(40.0) | {"backbone": {"weight": torch.zeros(9)}}, step=40)
        last.prune(1)
        assert [checkpoint.step for checkpoint in last.list()] == [40]
    shown = {info.key for info in store.list("checkpoints/")}
    assert lost.manifest.id.shard_key("model") not in shown  # and the rule of the bucket for old versions ends it
    back = CheckpointStore(at_uri_of(store)).restore(lost.id)
    assert {shard.key for shard in back.manifest.shards} <= {info.key for info in store.list("checkpoints/")}
    assert back.load()["model"]["weight"][0] == 30.0
    assert torch.equal(back.load()["backbone"]["weight"], torch.arange(9.0))


def test_a_deleted_checkpoint_whose_shard_is_gone_for_good_stays_deleted(store: S3ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    lost = checkpoints.save(weights(1.0), step=10)
    (shard,) = lost.manifest.shards
    store.delete([ObjectRef(lost.manifest.id.manifest_key), ObjectRef(shard.key, shard.version)])
    (found,) = checkpoints.deleted()
    assert "model.pt is missing" in found.missing
    with pytest.raises(CheckpointDamagedError, match="missing"):
        checkpoints.restore(lost.id)
    assert checkpoints.list() == []


def test_a_directory_has_nothing_to_bring_back(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="bucket with versions"):
        CheckpointStore(tmp_path).deleted()


def test_retention_leaves_no_version_of_what_it_deletes(store: S3ObjectStore, seaweedfs: S3Server) -> None:
    checkpoints = CheckpointStore(store)
    for step in (10, 20, 30):
        checkpoints.save(weights(float(step)), step=step)
    hidden = checkpoints.get(10).manifest.shards[0]
    store.delete([ObjectRef(hidden.key)])  # somebody hides a shard of a checkpoint under a delete marker
    plan = checkpoints.prune(KeepNewest(1), dry_run=True)
    assert [identity.step for identity in plan.drop] == [10, 20]
    assert len(list(store.list("manifests/"))) == 3
    checkpoints.prune(KeepNewest(1))
    page = client_of(seaweedfs).list_object_versions(Bucket=store.address.bucket, Prefix=store.address.prefix)
    left = [item["Key"].removeprefix(store.address.prefix) for item in page["Versions"]]
    assert sorted(key.split("/")[0] for key in left) == ["attempts", "checkpoints", "manifests", "run.json"]
    latest = CheckpointStore(at_uri_of(store)).latest()
    assert latest is not None
    assert latest.step == 30


def test_more_objects_than_a_batch_holds_are_deleted(store: S3ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotguard.stores.s3.deletion._BATCH", 3)
    for number in range(8):
        put(store, f"folder/{number}", b"x")
    store.delete(info.ref for info in list(store.list("folder/")))
    assert list(store.list("")) == []
    assert list(store.deleted("")) == []  # nothing is kept of what is deleted by version


def test_a_bucket_without_versions_is_refused_where_they_are_required(seaweedfs: S3Server) -> None:
    store = store_at(seaweedfs, seaweedfs.plain, versioning="require")
    with pytest.raises(ConfigError, match=r"aws s3api put-bucket-versioning --bucket plain .*Status=Enabled"):
        put(store, "object", b"x")
    assert list(store.list("")) == []


def test_a_bucket_without_versions_is_warned_of_once(seaweedfs: S3Server) -> None:
    with pytest.warns(UserWarning, match="does not keep versions") as caught:
        put(store_at(seaweedfs, seaweedfs.plain), "object", b"x")
    assert len(caught) == 1
    with warnings.catch_warnings(record=True) as again:
        put(store_at(seaweedfs, seaweedfs.plain), "object", b"x")
    assert not again


def test_versions_are_turned_on_where_that_is_asked_for(moto: S3Server) -> None:
    client = client_of(moto)
    client.create_bucket(Bucket="to-be-versioned")
    store = at_uri(moto, "s3://to-be-versioned/run", versioning="enable")
    put(store, "object", b"x")
    assert client.get_bucket_versioning(Bucket="to-be-versioned")["Status"] == "Enabled"
    info = store.stat("object")
    assert info is not None
    assert info.version


@pytest.mark.parametrize("server", ["seaweedfs", "moto"])
def test_once_versions_are_turned_on_a_shard_from_before_is_named_by_version_or_written_again(
    server: str, request: pytest.FixtureRequest
) -> None:
    which: S3Server = request.getfixturevalue(server)
    client, bucket = client_of(which), f"late-{secrets.token_hex(4)}"
    client.create_bucket(Bucket=bucket)
    preflight._said.add((bucket, "versions"))
    store = at_uri(which, f"s3://{bucket}/run")
    frozen = {"backbone": {"weight": torch.arange(500.0)}}
    old = CheckpointStore(store).save(weights(1.0) | frozen, step=10)
    assert [shard.version for shard in old.manifest.shards] == [None, None]
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    checkpoints = CheckpointStore(at_uri_of(store))
    for step in (20, 30):
        new = checkpoints.save(weights(float(step)) | frozen, step=step)
        assert all(shard.version is not None for shard in new.manifest.shards)
    put(store, next(shard.key for shard in old.manifest.shards if shard.name == "backbone"), b"something else")
    found = CheckpointStore(at_uri_of(store)).latest()
    assert found is not None
    assert found.step == 30
    assert torch.equal(found.load()["backbone"]["weight"], torch.arange(500.0))


@pytest.mark.parametrize("bucket", ["versioned", "plain"])
@pytest.mark.parametrize("server", ["seaweedfs", "moto"])
def test_a_run_that_was_copied_is_read_by_key_proven_by_digest_and_goes_on(
    server: str, bucket: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    which: S3Server = request.getfixturevalue(server)
    preflight._said.add((which.plain, "versions"))
    store, copy = store_at(which, which.versioned), store_at(which, getattr(which, bucket))
    frozen = {"backbone": {"weight": torch.arange(500.0)}}
    for step in (10, 20):
        CheckpointStore(store).save(weights(float(step)) | frozen, step=step)
    for info in list(store.list("")):  # what 'aws s3 cp --recursive' does
        put(copy, info.key, get(store, info.key))
    found = CheckpointStore(at_uri_of(copy)).latest()
    assert found is not None
    assert found.step == 20
    overlooks = (server, bucket) == ("seaweedfs", "plain")  # there, a version that is asked for is passed over
    assert caplog.text.count("was copied here, it seems") == (0 if overlooks else 1)
    checkpoints = CheckpointStore(at_uri_of(copy))
    new = checkpoints.save(weights(30.0) | frozen, step=30)
    for shard in new.manifest.shards:
        assert overlooks or (shard.version is not None) == (bucket == "versioned")
        assert copy.stat(shard.key, version=shard.version) is not None
    checkpoints.prune(1)
    found = CheckpointStore(at_uri_of(copy)).latest()
    assert found is not None
    assert torch.equal(found.load()["backbone"]["weight"], torch.arange(500.0))


def test_what_has_come_in_the_place_of_a_version_that_is_gone_is_not_taken_for_it(store: S3ObjectStore) -> None:
    checkpoints = CheckpointStore(store)
    checkpoints.save(weights(1.0), step=10)
    (shard,) = checkpoints.save(weights(2.0), step=20).manifest.shards
    put(store, shard.key, get(store, shard.key)[:-1] + b"?")
    store.delete([ObjectRef(shard.key, shard.version)])
    resolution = CheckpointStore(at_uri_of(store)).resolve()
    (rejected,) = resolution.rejected
    assert f"version {shard.version} is not there" in rejected.reason
    assert resolution.checkpoint is not None
    assert resolution.checkpoint.step == 10


# -- integrity --------------------------------------------------------------------------------------------------------------------


def test_what_the_server_compares_is_found_out(
    store: S3ObjectStore, moto: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.able.checksum == "crc64nvme"
    assert "compares no checksum" not in caplog.text
    assert store_at(moto, moto.versioned).able.checksum is None
    assert store_at(moto, moto.versioned).able.checksum is None
    assert caplog.text.count("compares no checksum") == 1


@pytest.mark.parametrize("server", ["seaweedfs", "moto"])
def test_a_command_that_writes_nothing_has_the_server_tell_the_digest_where_it_knows(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    which: S3Server = request.getfixturevalue(server)
    store = store_at(which, which.versioned)
    for step in (10, 20):
        CheckpointStore(store).save(weights(float(step)), step=step)
    fresh, read = at_uri_of(store), list[str]()
    real = S3ObjectStore.open

    def open_and_note(self: S3ObjectStore, key: str, *, version: str | None = None) -> Any:
        read.append(key)
        return real(self, key, version=version)

    monkeypatch.setattr(S3ObjectStore, "open", open_and_note)
    CheckpointStore(fresh).prune(1)
    assert fresh._able is None
    assert [key for key in read if key.startswith("checkpoints/")] == (
        [] if server == "seaweedfs" else ["checkpoints/0002-0000000020/model.pt"]
    )


@pytest.mark.parametrize("size", [1000, 12 * MIB + 17])
def test_the_server_tells_the_digest_of_what_it_holds(store: S3ObjectStore, size: int) -> None:
    from spotguard.checkpoint import digest_of

    data = os.urandom(size)
    with store.create("object") as writer:
        writer.write(data)
    info = store.stat("object")
    assert info is not None
    assert writer.info is not None
    assert info.digest == writer.info.digest == digest_of(data)
    assert get(store, "object") == data


def test_the_probe_leaves_nothing_behind(store: S3ObjectStore) -> None:
    assert store.able.exclusive
    assert list(store.list("")) == []
    assert list(store.deleted("")) == []


def test_the_probe_of_a_start_that_died_is_cleared_away_once_nobody_can_be_at_it(
    store: S3ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, preflight.PROBE + "0123456789abcdef", b"x")
    store.discard_partials(lambda key: False)
    assert [info.key for info in store.list("")] == [preflight.PROBE + "0123456789abcdef"]
    monkeypatch.setattr("spotguard.stores.s3.store._PROBE_AGE_S", -60.0)
    at_uri_of(store).discard_partials(lambda key: False)
    assert list(store.list("")) == []
    assert list(store.deleted("")) == []


# -- streaming --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 1000, 700 * 1024, 5 * MIB, 13 * MIB])
def test_however_the_bytes_come_they_arrive_in_order(store: S3ObjectStore, cut: int) -> None:
    data = os.urandom(13 * MIB + 5)[: max(13 * MIB if cut > 1000 else 0, 3000)]
    with store.create("object") as writer:
        for start in range(0, len(data), cut):
            writer.write(data[start : start + cut])
    assert get(store, "object") == data


def test_progress_adds_up_to_every_byte(store: S3ObjectStore) -> None:
    told: list[int] = []
    with store.create("object") as writer:
        writer.write(bytearray(12 * MIB), told.append)
        writer.write(b"tail", told.append)
    assert sum(told) == 12 * MIB + 4
    assert len(told) > 5  # pieces that grow while the network is fast
    told.clear()
    with store.open("object") as reader:
        assert reader.read_into(bytearray(12 * MIB + 4), 0, told.append) == 12 * MIB + 4
    assert sum(told) == 12 * MIB + 4


@pytest.mark.parametrize("ending", ["exception", "deadline"])
def test_an_upload_that_is_left_is_aborted(store: S3ObjectStore, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    deadline = time.monotonic() + 3600 if ending == "deadline" else None
    error: type[BaseException] = DeadlineExceededError if ending == "deadline" else ZeroDivisionError
    assert store.able.exclusive
    with pytest.raises(error), store.create("object", deadline=deadline) as writer:
        writer.write(bytearray(12 * MIB))
        if ending == "exception":
            raise ZeroDivisionError
        real = time.monotonic
        monkeypatch.setattr("time.monotonic", lambda: real() + 7200)
    monkeypatch.undo()
    assert_absent(store, "object")
    assert uploads_of(store) == []


def uploads_of(store: S3ObjectStore) -> list[str]:
    page = store.connection.client.list_multipart_uploads(Bucket=store.address.bucket, Prefix=store.address.prefix)
    return [item["Key"].removeprefix(store.address.prefix) for item in page.get("Uploads", [])]


def test_uploads_of_older_attempts_are_cleared_away(store: S3ObjectStore) -> None:
    for name in ("checkpoints/0001-0000000010/model.pt", "checkpoints/0003-0000000010/model.pt"):
        store.connection.call("create_multipart_upload", name)
    assert list(store.discard_partials(lambda key: key.startswith("checkpoints/0001"))) == [
        "checkpoints/0001-0000000010/model.pt"
    ]
    assert uploads_of(store) == ["checkpoints/0003-0000000010/model.pt"]


def test_ten_thousand_parts_are_enough_for_any_object() -> None:
    """However it comes: at once, or in pieces whose number nobody knows."""
    from spotguard.stores.s3.preflight import Capabilities
    from spotguard.stores.s3.writer import S3Writer

    for size, pieces in [(5 << 40, 1), (48 << 40, 1), (5 << 40, 5 << 15), (3 << 40, 3 << 17)]:
        store = S3ObjectStore("s3://bucket/run")
        writer = S3Writer(store.connection, Capabilities(True, None, True), "object", exclusive=False, deadline=None)
        piece = size // pieces
        for _ in range(pieces):  # what `write` does, without the bytes
            writer._fit_parts(piece)
            writer._held += piece
            count, writer._held = divmod(writer._held, writer._part_size)
            writer._numbers += count
        assert writer._numbers + 1 <= 10_000, (size, pieces, writer._numbers)
        assert writer._part_size <= 5 << 30


@pytest.mark.parametrize(
    ("part_size", "pieces", "expected"),
    [
        (32, [100], [25] * 4),
        (32, [33], [16.5, 16.5]),
        (32, [32], []),
        (5, [5.5], [5, 0.5]),
        (5, [11], [5, 5, 1]),
        (5, [4, 4, 4, 4], [5, 5, 5, 1]),
    ],
)
def test_parts_are_of_equal_size_and_none_but_the_last_is_smaller_than_s3_takes(
    monkeypatch: pytest.MonkeyPatch, part_size: int, pieces: list[float], expected: list[float]
) -> None:
    from spotguard.stores.s3.preflight import Capabilities
    from spotguard.stores.s3.writer import S3Writer

    parts: list[float] = []
    monkeypatch.setattr(
        S3Writer, "_start_part", lambda self, size: parts.append(sum(len(piece.data) for piece in self._take(size)))
    )
    store = S3ObjectStore("s3://bucket/run", S3Options(part_size=part_size * MIB))
    writer = S3Writer(store.connection, Capabilities(True, None, True), "object", exclusive=False, deadline=None)
    for piece in pieces:
        writer.write(bytearray(int(piece * MIB)))
    if parts:
        parts.append(writer._held)
    assert [size / MIB for size in parts if size] == expected


def test_a_child_that_is_forked_while_a_client_is_made_makes_its_own() -> None:
    from spotguard.stores.s3 import connection

    store = S3ObjectStore("s3://bucket/run", S3Options(region="us-east-1"))
    with connection._making:
        if not (child := os.fork()):
            try:
                signal.alarm(20)
                os._exit(0 if store.connection.client else 1)
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_an_exclusive_object_in_parts_is_refused_at_its_end(store: S3ObjectStore) -> None:
    put(store, "object", b"old")
    with pytest.raises(ObjectExistsError), store.create("object", exclusive=True) as writer:
        writer.write(bytearray(12 * MIB))
    assert get(store, "object") == b"old"
    assert uploads_of(store) == []
    with store.create("other", exclusive=True) as writer:
        writer.write(bytearray(12 * MIB))
    assert get(store, "other") == bytes(12 * MIB)
    assert sorted(info.key for info in store.list("")) == ["object", "other"]


# -- access -----------------------------------------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist_is_named(seaweedfs: S3Server) -> None:
    store = store_at(seaweedfs, "no-such-bucket-here")
    attempts: list[Callable[[], object]] = [
        lambda: put(store, "object", b"x"),
        lambda: store.open("object"),
        lambda: store.stat("object"),
        lambda: list(store.list("")),
    ]
    for attempt in attempts:
        with pytest.raises(StoreAccessError, match=r"no-such-bucket-here.*does not exist"):
            attempt()


def test_wrong_credentials_are_told_from_missing_ones(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(seaweedfs, secret_key="wrong")
    with pytest.raises(StoreAccessError, match="credentials are refused"):
        put(store_at(wrong, seaweedfs.plain), "object", b"x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    without = S3ObjectStore("s3://plain/run", S3Options(endpoint_url=seaweedfs.endpoint))
    with pytest.raises(StoreAccessError, match="set AWS_PROFILE"):
        put(without, "object", b"x")


@pytest.mark.parametrize(
    ("trouble", "remedy"),
    [
        ({"AWS_SECRET_ACCESS_KEY": None}, "^s3://plain/run: Partial credentials.*set AWS_PROFILE"),
        ({"AWS_PROFILE": "nobody"}, r"^s3://plain/run: The config profile \(nobody\)"),
        ({"AWS_ENDPOINT_URL_S3": "127.0.0.1:1"}, "begin it with https:// or http://"),
        ({"AWS_ENDPOINT_URL_S3": "{endpoint}/plain"}, "is it an S3 server.*without the bucket"),
        ({"AWS_ENDPOINT_URL_S3": "https://{address}"}, "does not speak TLS.*http://"),
    ],
    ids=["half the credentials", "profile", "no scheme", "a path", "tls"],
)
def test_what_will_not_get_better_is_said_at_once_with_its_remedy(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch, trouble: dict[str, str | None], remedy: str
) -> None:
    seaweedfs.use(monkeypatch)
    for name, value in trouble.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            address = seaweedfs.endpoint.removeprefix("http://")
            monkeypatch.setenv(name, value.format(endpoint=seaweedfs.endpoint, address=address))
    began = time.monotonic()
    with pytest.raises((StoreAccessError, ConfigError), match=remedy):
        S3ObjectStore("s3://plain/run").preflight()
    assert time.monotonic() - began < 5


def test_a_server_that_cannot_be_reached_is_said_with_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    store = S3ObjectStore("s3://plain/run", S3Options(endpoint_url="http://127.0.0.1:1", region="us-east-1"))
    with pytest.raises(TransientStoreError, match=r"check the network.*endpoint_url"):
        store.connection.call("get_bucket_versioning", tries=1)


@pytest.mark.parametrize(
    "options",
    [
        {"sse": "AES256"},
        {"sse": "aws:kms", "kms_key_id": "alias/ours"},
        {"customer_key": b"k" * 32},
        {"requester_pays": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_to_encrypt_and_to_pay_goes_through_the_whole_life_of_an_object(
    moto: S3Server, options: dict[str, Any]
) -> None:
    store = store_at(moto, moto.versioned, part_size=5 * MIB, **options)
    for name, data in {"small": b"bytes", "large": os.urandom(11 * MIB)}.items():
        put(store, name, data, exclusive=True)
        assert get(store, name) == data
        info = store.stat(name)
        assert info is not None
        assert info.size == len(data)
    head = client_of(moto).head_object(
        Bucket=moto.versioned,
        Key=store.address.prefix + "small",
        **({} if "customer_key" not in options else store.connection.options.get_params),
    )
    assert head.get("ServerSideEncryption") == (options.get("sse") or head.get("ServerSideEncryption"))
    store.delete(info.ref for info in list(store.list("")))
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"versioning": "always"}, "versioning='always'"),
        ({"sse": "rot13"}, "sse='rot13'"),
        ({"kms_key_id": "alias/ours"}, "kms_key_id"),
        ({"customer_key": b"short"}, "32 bytes"),
        ({"part_size": 1}, "5 MiB"),
        ({"connections": 0}, "connections"),
        ({"stall_s": 0}, "stall_s"),
        ({"stall_s": "20s"}, "stall_s='20s'.*number"),
        ({"part_size": "16MB"}, "part_size='16MB'.*number"),
        ({"connections": True}, "connections=True.*number"),
        ({"customer_key": "k" * 32}, "32 bytes"),
        ({"endpoint_url": "localhost:9000"}, "endpoint_url='localhost:9000'.*http://localhost:9000"),
        ({"speed": 9}, "no option 'speed'"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        S3CheckpointStore("s3://bucket/run", **options)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://", "s3://bucket", "s3://bucket/", "s3:///key", "s3://bucket/../x", "s3://bucket/run?versioning=require",
        "s3://bucket/run\n", "s3://bucket/run ", "s3://bucket/run\u200b", "s3://bucket/r\x01n", f"s3://bucket/{'é' * 500}",
    ],
    ids=lambda uri: ascii(uri)[:40],
)  # fmt: skip
def test_a_uri_that_names_no_place_for_a_run_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="s3://"):
        open_store(uri)
