"""What is listed, deleted, hidden and brought back, where servers, policies and locks are in the way."""

import os
import secrets
from collections.abc import Callable
from typing import Any

import pytest

from contracts.test_s3_store import at_uri, nothing_has_been_said, store_at, uploads_of, weights  # noqa: F401 - a fixture
from servers import S3Server
from spotguard import CheckpointStore
from spotguard.errors import ConfigError, StoreAccessError, StoreError, TransientStoreError
from spotguard.stores import ObjectRef
from spotguard.stores.s3 import S3ObjectStore, lifecycle
from spotguard.stores.s3.preflight import PROBE
from spotguard.testing.object_store import get, put

MIB = 1 << 20


@pytest.fixture
def store(seaweedfs: S3Server) -> S3ObjectStore:
    return store_at(seaweedfs, seaweedfs.versioned, part_size=5 * MIB)


def on(store: S3ObjectStore, event: str, action: Callable[..., object]) -> None:
    """See requests of a store on their way, or answers."""
    store.connection.client.meta.events.register(event, action)


def bucket_of(server: S3Server, *, status: str = "", **options: Any) -> str:
    """A bucket of one's own."""
    client, name = server.client(), f"bucket-{secrets.token_hex(8)}"
    client.create_bucket(Bucket=name, **options)
    if status:
        client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": status})
    client.close()
    return name


# -- listings ---------------------------------------------------------------------------------------------------------------------


def test_uploads_are_found_past_a_page_that_does_not_name_its_last_key(store: S3ObjectStore) -> None:
    """SeaweedFS names the id only."""
    keys = [f"checkpoints/0001-0000000010/{name}.pt" for name in "abcde"]
    for key in keys:
        store.connection.call("create_multipart_upload", key)
    on(store, "provide-client-params.s3.ListMultipartUploads", lambda params, **_: {**params, "MaxUploads": 2})
    assert lifecycle.kept_versions(store.connection).uploads == 5
    assert sorted(store.discard_partials(lambda key: key.startswith("checkpoints"))) == keys
    assert uploads_of(store) == []


@pytest.mark.parametrize("named", [True, False])
def test_a_listing_of_uploads_that_never_ends_is_left(store: S3ObjectStore, named: bool) -> None:
    store.connection.call("create_multipart_upload", "checkpoints/0001-0000000010/model.pt")
    asked: list[dict[str, Any]] = []

    def goes_on(parsed: dict[str, Any], **_: Any) -> None:
        parsed["IsTruncated"] = True
        if named:
            parsed["NextUploadIdMarker"] = "anything"
        else:
            parsed.pop("NextUploadIdMarker", None)

    on(store, "after-call.s3.ListMultipartUploads", goes_on)
    on(store, "provide-client-params.s3.ListMultipartUploads", lambda params, **_: asked.append(params))
    assert len({upload for _, upload in store._uploads()}) == 1
    assert len(asked) <= 3


def test_a_listing_of_versions_goes_on_behind_a_key_where_no_version_is_named(store: S3ObjectStore) -> None:
    for name in "abc":
        put(store, f"folder/{name}", b"x")
    asked: list[dict[str, Any]] = []

    def ask(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        asked.append(params)
        return {**params, "MaxKeys": 1}

    on(store, "provide-client-params.s3.ListObjectVersions", ask)
    on(store, "after-call.s3.ListObjectVersions", lambda parsed, **_: parsed.pop("NextVersionIdMarker", None))
    assert [info.key for info in store.list("folder/")] == ["folder/a", "folder/b", "folder/c"]
    assert len(asked) > 2
    assert not any("VersionIdMarker" in params for params in asked)


def test_objects_are_never_passed_over_by_a_listing_that_does_not_go_on(store: S3ObjectStore) -> None:
    for name in "abc":
        put(store, f"folder/{name}", b"x")
    on(store, "provide-client-params.s3.ListObjectVersions", lambda params, **_: {**params, "MaxKeys": 1})

    def no_marker(parsed: dict[str, Any], **_: Any) -> None:
        parsed.pop("NextKeyMarker", None)
        parsed.pop("NextVersionIdMarker", None)

    on(store, "after-call.s3.ListObjectVersions", no_marker)
    assert [info.key for info in store.list("folder/")] == ["folder/a", "folder/b", "folder/c"]  # by the other listing


def test_the_upload_of_a_probe_that_died_is_aborted_once_nobody_can_be_at_it(
    store: S3ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.connection.call("create_multipart_upload", PROBE + "0123456789abcdef")
    store.discard_partials(lambda key: False)
    assert uploads_of(store) == [PROBE + "0123456789abcdef"]
    monkeypatch.setattr("spotguard.stores.s3.store._PROBE_AGE_S", -60.0)
    store.discard_partials(lambda key: False)
    assert uploads_of(store) == []


# -- deleting ---------------------------------------------------------------------------------------------------------------------


def refuse(store: S3ObjectStore, code: str, *, times: int) -> list[list[str]]:
    """The server says of some keys, and so often, that it could not; returns the keys of each request."""
    asked: list[list[str]] = []

    def ask(params: dict[str, Any], **_: Any) -> None:
        asked.append([item["Key"].rpartition("/")[2] for item in params["Delete"]["Objects"]])

    def answer(parsed: dict[str, Any], **_: Any) -> None:
        if len(asked) <= times:
            keys = [key for key in asked[-1] if key != "a"]
            parsed["Errors"] = [{"Key": f"{store.address.prefix}{key}", "Code": code, "Message": "no"} for key in keys]

    on(store, "provide-client-params.s3.DeleteObjects", ask)
    on(store, "after-call.s3.DeleteObjects", answer)
    return asked


@pytest.mark.parametrize("code", ["SlowDown", "InternalError"])
def test_of_a_batch_only_what_failed_for_now_is_deleted_again(
    store: S3ObjectStore, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spotguard.stores.s3.connection._LONGEST_WAIT_S", 0.01)
    for key in ("a", "b", "c"):
        put(store, key, b"x")
    asked = refuse(store, code, times=2)
    store.delete([ObjectRef(key) for key in ("a", "b", "c")])
    assert asked == [["a", "b", "c"], ["b", "c"], ["b", "c"]]


def test_what_cannot_be_deleted_in_many_tries_is_named(store: S3ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotguard.stores.s3.connection._LONGEST_WAIT_S", 0.01)
    asked = refuse(store, "SlowDown", times=1000)
    with pytest.raises(TransientStoreError, match=r"/b: SlowDown.*2 in all"):
        store.delete([ObjectRef(key) for key in ("a", "b", "c")])
    assert len(asked) == 8


def test_what_fails_for_good_is_not_tried_again(store: S3ObjectStore) -> None:
    asked = refuse(store, "InvalidArgument", times=1000)
    with pytest.raises(StoreError, match=r"/b: .*InvalidArgument"):
        store.delete([ObjectRef(key) for key in ("a", "b")])
    assert len(asked) == 1


def three_checkpoints(store: S3ObjectStore) -> CheckpointStore:
    checkpoints = CheckpointStore(store)
    for step in (10, 20, 30):
        checkpoints.save(weights(float(step)), step=step)
    return checkpoints


def check_hidden_whole(store: S3ObjectStore) -> None:
    """Retention has hidden two checkpoints of three, and each comes back."""
    checkpoints = CheckpointStore(store)
    assert [item.step for item in checkpoints.list()] == [30]
    found = checkpoints.deleted()
    assert [item.manifest and item.manifest.step for item in found] == [10, 20]
    assert [item.missing for item in found] == ["", ""]
    assert checkpoints.restore(found[0].id).load()["model"]["weight"][0] == 10.0


def test_without_the_permission_to_list_versions_retention_hides_checkpoints_whole(moto: S3Server) -> None:
    three_checkpoints(owner := store_at(moto, moto.versioned))
    user = moto.restricted("s3:ListBucketVersions", denied=True)
    with pytest.warns(UserWarning, match="s3:ListBucketVersions") as caught:
        CheckpointStore(at_uri(user, owner.uri)).prune(1)
    assert len(caught) == 1
    check_hidden_whole(owner)


def locking_bucket(server: S3Server) -> str:
    """A bucket that locks what is written there for a day."""
    bucket, client = bucket_of(server, ObjectLockEnabledForBucket=True), server.client()
    rule = {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}
    client.put_object_lock_configuration(
        Bucket=bucket, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule}
    )
    client.close()
    return bucket


def test_where_a_bucket_locks_its_objects_retention_hides_checkpoints_whole(seaweedfs: S3Server) -> None:
    store = store_at(seaweedfs, locking_bucket(seaweedfs), part_size=5 * MIB)
    with pytest.warns(UserWarning, match=r"locks every object for 1 days \(GOVERNANCE\)") as caught:
        store.preflight()
    assert len(caught) == 1
    assert list(store.list("")) == []
    put(store, "large", data := os.urandom(11 * MIB), exclusive=True)
    assert get(store, "large") == data
    three_checkpoints(store).prune(1)
    assert not [info.key for info in store.list("") if info.key.startswith(PROBE)]
    check_hidden_whole(store)


def test_a_bucket_that_wants_checksums_which_the_server_does_not_compare_is_refused(moto: S3Server) -> None:
    with pytest.raises(ConfigError, match=r"no object without a checksum.*Object Lock"):
        put(store_at(moto, locking_bucket(moto)), "object", b"x")


# -- what was deleted -------------------------------------------------------------------------------------------------------------


def test_a_bucket_that_never_kept_versions_has_nothing_to_bring_back_and_says_so(seaweedfs: S3Server) -> None:
    store = store_at(seaweedfs, seaweedfs.plain)
    for attempt in (
        lambda: CheckpointStore(store).deleted(),
        lambda: CheckpointStore(store).restore("0001-0000000010"),
    ):
        with pytest.raises(ConfigError, match=r"does not keep versions.*aws s3api put-bucket-versioning"):
            attempt()


def test_a_bucket_that_keeps_versions_no_more_still_brings_back_what_it_kept(seaweedfs: S3Server) -> None:
    store = store_at(seaweedfs, bucket_of(seaweedfs, status="Enabled"))
    checkpoints = three_checkpoints(store)
    store.delete([ObjectRef("manifests/0001-0000000010.json")])
    client = seaweedfs.client()
    client.put_bucket_versioning(Bucket=store.address.bucket, VersioningConfiguration={"Status": "Suspended"})
    client.close()
    assert [item.missing for item in checkpoints.deleted()] == [""]
    assert checkpoints.restore("0001-0000000010").step == 10


def test_a_manifest_that_was_overwritten_is_back_once_the_later_version_is_deleted(store: S3ObjectStore) -> None:
    """As the documentation says, for which there is no command."""
    checkpoints = three_checkpoints(store)
    key = "manifests/0001-0000000030.json"
    with store.create(key) as writer:
        writer.write(b"something else")
    assert checkpoints.deleted() == []
    found = checkpoints.resolve().checkpoint
    assert found is not None
    assert found.step == 20
    assert writer.info is not None
    store.delete([writer.info.ref])
    assert [item.step for item in checkpoints.list()] == [10, 20, 30]
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 30


@pytest.mark.parametrize("status", ["", "Enabled", "Suspended"])
@pytest.mark.parametrize("server", ["seaweedfs", "moto"])
def test_a_reader_never_mixes_two_objects_whatever_a_bucket_keeps(
    server: str, status: str, request: pytest.FixtureRequest
) -> None:
    found: S3Server = request.getfixturevalue(server)
    store = store_at(found, bucket_of(found, status=status), part_size=5 * MIB)
    old, new = os.urandom(3 * MIB), os.urandom(3 * MIB)
    store.connection.call("put_object", "object", Body=old)
    with store.open("object") as reader:
        store.connection.call("put_object", "object", Body=new)
        if status == "Enabled":
            assert reader.read() == old
        else:
            with pytest.raises(StoreError, match="was overwritten while it was being read"):
                reader.read()
    assert get(store, "object") == new


# -- the probe of a multipart upload ----------------------------------------------------------------------------------------------


def test_the_end_of_an_upload_is_tried_out_without_the_permission_to_list_versions(moto: S3Server) -> None:
    owner = store_at(moto, moto.versioned)
    store = at_uri(moto.restricted("s3:ListBucketVersions", denied=True), owner.uri, part_size=5 * MIB)
    with pytest.warns(UserWarning, match="s3:ListBucketVersions"):
        put(store, "object", bytes(11 * MIB), exclusive=True)
    assert [info.key for info, *_ in owner._list_versions("")] == ["object"]


@pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload"])
def test_a_probe_whose_upload_fails_leaves_none(store: S3ObjectStore, operation: str) -> None:
    def deny(parsed: dict[str, Any], http_response: Any, **_: Any) -> None:
        http_response.status_code = parsed["ResponseMetadata"]["HTTPStatusCode"] = 403
        parsed["Error"] = {"Code": "AccessDenied", "Message": "no"}

    on(store, f"after-call.s3.{operation}", deny)
    with pytest.raises(StoreAccessError):
        store._multipart_is_exclusive()
    assert uploads_of(store) == []
    assert [*store._list_versions("")] == []


# -- rules of the bucket ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "does"),
    [
        ({"Expiration": {"Days": 30}}, "deletes objects of this run that are in use"),
        ({"Transitions": [{"Days": 1, "StorageClass": "GLACIER"}]}, "in use to an archive"),
        ({"Transitions": [{"Days": 1, "StorageClass": "DEEP_ARCHIVE"}]}, "in use to an archive"),
        (
            {"NoncurrentVersionTransitions": [{"NoncurrentDays": 1, "StorageClass": "GLACIER"}]},
            "overwritten and deleted objects of this run to an archive",
        ),
        ({"NoncurrentVersionExpiration": {"NoncurrentDays": 3}}, "after 3 days, sooner than 7"),
        ({"NoncurrentVersionExpiration": {"NoncurrentDays": 7}}, None),
        ({"NoncurrentVersionExpiration": {"NoncurrentDays": 1, "NewerNoncurrentVersions": 2}}, None),
        ({"Transitions": [{"Days": 1, "StorageClass": "GLACIER_IR"}]}, None),
        ({"Expiration": {"ExpiredObjectDeleteMarker": True}}, None),
        ({"Expiration": {"Days": 30}, "Status": "Disabled"}, None),
        ({"Expiration": {"Days": 30}, "Filter": {"Prefix": "others/"}}, None),
    ],
)
def test_a_rule_that_harms_a_run_is_told_from_one_that_does_not(rule: dict[str, Any], does: str | None) -> None:
    rules = [{"ID": "tidy", "Status": "Enabled", "Filter": {"Prefix": ""}, **rule}]
    found = lifecycle.endangering(rules, "run-17/", days=7)
    assert [danger.rule for danger in found] == ([] if does is None else ["tidy"])
    assert does is None or does in found[0].does
