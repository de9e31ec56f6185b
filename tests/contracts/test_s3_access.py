"""Who may do what in a bucket, by which way, and for how long."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest

from servers import S3Server, _moto_user
from spotguard import CheckpointStore
from spotguard.errors import StoreAccessError
from spotguard.stores import ObjectRef
from spotguard.stores.s3 import S3ObjectStore, S3Options, preflight
from spotguard.stores.s3.address import S3Address
from spotguard.testing import FaultProxy, Status, matching
from spotguard.testing.object_store import get, put
from tls import behind_tls, make_certificate

MIB = 1 << 20
ALL = [
    "s3:ListBucket", "s3:ListBucketVersions", "s3:GetBucketVersioning", "s3:GetObject", "s3:GetObjectVersion", "s3:PutObject",
    "s3:DeleteObject", "s3:DeleteObjectVersion", "s3:ListBucketMultipartUploads", "s3:AbortMultipartUpload",
]  # fmt: skip
TIDYING = {
    "s3:ListBucketVersions": "can only hide what it deletes",
    "s3:ListBucketMultipartUploads": "left unfinished are kept",
    "s3:AbortMultipartUpload": "left unfinished are kept",
}


@pytest.fixture(autouse=True)
def nothing_has_been_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_said", set())


def store_of(server: S3Server, name: str, **options: Any) -> S3ObjectStore:
    session = boto3.Session(server.access_key, server.secret_key, region_name=server.region)
    chosen = S3Options(endpoint_url=server.endpoint, **options)
    return S3ObjectStore(f"s3://{server.versioned}/{name}", chosen, session=session)


@pytest.mark.parametrize(
    "missing",
    [
        ("s3:PutObject",),
        ("s3:GetObject",),
        ("s3:DeleteObject",),
        ("s3:ListBucket",),
        ("s3:GetObject", "s3:DeleteObject"),
        ("s3:PutObject", "s3:GetObject", "s3:DeleteObject"),
    ],
)
def test_every_missing_permission_is_named_before_the_first_save(moto: S3Server, missing: tuple[str, ...]) -> None:
    # In a bucket with versions S3 asks for the permission on versions where the request names one.
    left = [action for action in ALL if not action.removesuffix("Version").startswith(missing)]
    store = store_of(moto.restricted(*left), "-".join(missing).replace(":", ""))
    with pytest.raises(StoreAccessError) as caught:
        CheckpointStore(store).save({"model": {"weight": [1.0]}}, step=1)
    text = str(caught.value)
    for action in missing:
        assert action in text, text
    assert "arn:aws:s3:::versioned" in text
    kept = [
        action
        for action in ("s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:ListBucket")
        if action not in missing
    ]
    assert not [action for action in kept if action in text and not action.startswith(missing)], text


def test_what_may_not_be_read_is_never_taken_for_missing(moto: S3Server) -> None:
    CheckpointStore(store_of(moto, "private")).save({"model": {"weight": [1.0]}}, step=1)
    stranger = store_of(moto.restricted("s3:ListBucket", "s3:ListBucketVersions"), "private")
    for attempt in (
        lambda: stranger.open("run.json"),
        lambda: stranger.stat("run.json"),
        lambda: CheckpointStore(stranger).latest(),
    ):
        with pytest.raises(StoreAccessError, match="s3:GetObject"):
            attempt()


@pytest.mark.parametrize("missing", [*((action,) for action in TIDYING), tuple(TIDYING)], ids=str)
def test_what_a_run_can_do_without_is_said_once_with_what_it_comes_to(moto: S3Server, missing: tuple[str, ...]) -> None:
    user = moto.restricted(*(action for action in ALL if action not in missing))
    checkpoints = CheckpointStore(store_of(user, f"without-{len(missing)}-{missing[0][3:]}"))
    with pytest.warns(UserWarning, match="can do without") as caught:
        checkpoints.save({"model": {"weight": [1.0]}}, step=1)
    checkpoints.save({"model": {"weight": [2.0]}}, step=2)
    checkpoints.prune(1)
    store_of(user, "another").preflight()
    (warning,) = caught
    text = str(warning.message)
    assert [action for action in TIDYING if action in text] == [*missing]
    assert all(TIDYING[action] in text for action in missing)
    assert "AccessDenied: Access Denied" in text
    assert [item.step for item in checkpoints.list()] == [2]


def test_the_permission_to_delete_versions_is_one_that_a_run_can_do_without(moto: S3Server) -> None:
    with FaultProxy(moto.endpoint) as proxy:
        proxy.plan = matching(Status(403, "AccessDenied"), method="POST", query_contains="delete")
        store = store_of(moto.behind(proxy.uri), "without-delete-version")
        with pytest.warns(UserWarning, match=r"s3:DeleteObjectVersion on arn:aws:s3:::versioned/.*can only hide"):
            store.preflight()
    assert list(store_of(moto, "without-delete-version").list("")) == []


def test_whoever_only_reads_is_told_nothing_of_what_it_takes_to_delete(moto: S3Server) -> None:
    CheckpointStore(store_of(moto, "read-only")).save({"model": {"weight": [1.0]}}, step=1)
    reader = moto.restricted("s3:ListBucket", "s3:GetBucketVersioning", "s3:GetObject", "s3:GetObjectVersion")
    assert CheckpointStore(store_of(reader, "read-only")).load()["model"]["weight"] == [1.0]


def test_nobody_needs_to_be_allowed_to_ask_whether_there_are_versions(moto: S3Server) -> None:
    user = moto.restricted(*(action for action in ALL if action != "s3:GetBucketVersioning"))
    assert store_of(user, "unasked").able.versions


def test_a_start_asks_for_little(seaweedfs: S3Server) -> None:
    preflight._said.add((seaweedfs.plain, "versions"))
    for bucket, most in ((seaweedfs.versioned, 13), (seaweedfs.plain, 10)):
        with FaultProxy(seaweedfs.endpoint) as proxy:
            server = dataclasses.replace(seaweedfs.behind(proxy.uri), versioned=bucket)
            store_of(server, "little").preflight()
            assert len(proxy.requests) <= most


def test_a_key_that_may_not_be_used_is_named_as_the_server_names_it(moto: S3Server) -> None:
    said = (
        "User: arn:aws:sts::111122223333:assumed-role/trainer is not authorized to perform: kms:GenerateDataKey on resource: "
        "arn:aws:kms:us-east-1:111122223333:key/ours because no identity-based policy allows the kms:GenerateDataKey action"
    )
    store = store_of(moto, "kms", sse="aws:kms", kms_key_id="alias/ours")

    def deny(parsed: dict[str, Any], http_response: Any, **_: Any) -> None:
        http_response.status_code = parsed["ResponseMetadata"]["HTTPStatusCode"] = 403
        parsed["Error"] = {"Code": "AccessDenied", "Message": said}

    store.connection.client.meta.events.register("after-call.s3.PutObject", deny)
    with pytest.raises(StoreAccessError) as caught:
        store.preflight()
    assert "  kms:GenerateDataKey (AccessDenied: User: arn:aws:sts" in str(caught.value)
    assert "key/ours" in str(caught.value)
    assert "s3:PutObject" not in str(caught.value)


ACCESS_POINT = "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/ours"


@pytest.mark.parametrize(
    ("bucket", "expected"),
    [
        ("bucket", ("arn:aws-cn:s3:::bucket", "arn:aws-cn:s3:::bucket/run/*")),
        (ACCESS_POINT, (ACCESS_POINT, f"{ACCESS_POINT}/object/run/*")),
        (
            "ours-1234-s3alias",
            ("the access point ours-1234-s3alias", "objects run/* of the access point ours-1234-s3alias"),
        ),
    ],
)
def test_a_resource_is_named_as_a_policy_wants_it(bucket: str, expected: tuple[str, str]) -> None:
    address = S3Address.parse(f"s3://{bucket}/run")
    assert (address.resource("aws-cn"), address.resource("aws-cn", objects=True)) == expected


@pytest.mark.parametrize(("region", "partition"), [("cn-north-1", "aws-cn"), ("us-gov-west-1", "aws-us-gov")])
def test_a_missing_permission_is_named_in_the_partition_of_the_region(
    moto: S3Server, region: str, partition: str
) -> None:
    with FaultProxy(moto.endpoint) as proxy:
        proxy.plan = matching(Status(403, "AccessDenied"))
        store = store_of(moto.behind(proxy.uri), "far", region=region)
        with pytest.raises(StoreAccessError) as caught:
            store.preflight()
    assert f"s3:ListBucket on arn:{partition}:s3:::versioned (" in str(caught.value)
    assert f"s3:PutObject on arn:{partition}:s3:::versioned/far/* (" in str(caught.value)


def documented(server: S3Server, name: str, *, less: str = "") -> S3Server:
    """A user with the policy of the page, for a run of that name in our bucket."""
    page = (Path(__file__).parents[2] / "docs/how-to/s3.md").read_text()
    text = page.partition("```json\n")[2].partition("```")[0]
    statements = json.loads(text.replace("my-bucket", server.versioned).replace("run-17", name))["Statement"]
    assert [statement["Resource"] for statement in statements] == [
        f"arn:aws:s3:::{server.versioned}", f"arn:aws:s3:::{server.versioned}/{name}/*",
    ]  # fmt: skip
    for statement in statements:
        statement["Action"] = [action for action in statement["Action"] if action != less]
    # moto, other than Amazon, asks for this on the bucket where a request deletes several objects, before it looks at each.
    statements.append({"Effect": "Allow", "Action": "s3:DeleteObject", "Resource": f"arn:aws:s3:::{server.versioned}"})
    return _moto_user(server, statements)


def test_the_documented_policy_is_enough(moto: S3Server) -> None:
    checkpoints = CheckpointStore(store_of(documented(moto, "documented"), "documented", part_size=5 * MIB))
    for step in (1, 2, 3):
        checkpoints.save({"model": {"weight": [float(step)]}}, step=step)
    assert checkpoints.load()["model"]["weight"] == [3.0]
    put(checkpoints.objects, "large", bytes(11 * MIB), exclusive=True)
    checkpoints.prune(2)
    assert [item.step for item in checkpoints.list()] == [2, 3]
    lost = checkpoints.get(3)
    checkpoints.objects.delete([ObjectRef(lost.manifest.id.manifest_key)])
    assert [item.missing for item in checkpoints.deleted()] == [""]
    assert checkpoints.restore(lost.id).load()["model"]["weight"] == [3.0]
    checkpoints.objects.discard_partials(lambda key: True)
    with pytest.raises(StoreAccessError, match=f"arn:aws:s3:::{moto.versioned}/elsewhere"):
        store_of(documented(moto, "documented"), "elsewhere").preflight()


@pytest.mark.parametrize(
    "action",
    [
        "s3:ListBucket", "s3:ListBucketVersions", "s3:ListBucketMultipartUploads", "s3:GetObject", "s3:GetObjectVersion",
        "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload",
    ],
)  # fmt: skip
def test_the_documented_policy_is_the_least(moto: S3Server, action: str) -> None:
    store = store_of(documented(moto, action[3:], less=action), action[3:])
    if action in TIDYING:
        with pytest.warns(UserWarning, match=action):
            store.preflight()
    else:
        with pytest.raises(StoreAccessError, match=action):
            store.preflight()


def test_credentials_that_change_while_an_upload_is_under_way_are_taken_up(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a role's do every hour: boto3 asks for new ones, and every part is signed when it is sent."""
    current = tmp_path / "credentials.json"

    def hand_out(server: S3Server) -> None:
        fields = {
            "Version": 1,
            "AccessKeyId": server.access_key,
            "SecretAccessKey": server.secret_key,
            "Expiration": _soon(),
        }
        current.write_text(json.dumps(fields))

    first, second = moto.restricted("s3:*"), moto.restricted("s3:*")
    hand_out(first)
    config = tmp_path / "config"
    config.write_text(f"[profile role]\ncredential_process = {sys.executable} -c \"print(open('{current}').read())\"\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    options = S3Options(
        profile="role", region=moto.region, endpoint_url=moto.endpoint, part_size=5 * MIB, connections=1
    )
    store = S3ObjectStore(f"s3://{moto.versioned}/role", options)
    data = os.urandom(16 * MIB)
    with store.create("object") as writer:
        writer.write(data[: 6 * MIB])
        hand_out(second)
        iam = moto.client("iam")
        for user in iam.list_users()["Users"]:
            for key in iam.list_access_keys(UserName=user["UserName"])["AccessKeyMetadata"]:
                if key["AccessKeyId"] == first.access_key:
                    iam.delete_access_key(UserName=user["UserName"], AccessKeyId=first.access_key)
        iam.close()
        writer.write(data[6 * MIB :])
    assert get(store, "object") == data
    with pytest.raises(StoreAccessError):
        store_of(first, "role").stat("object")


def _soon() -> str:
    """So near that boto3 asks again before every request."""
    import datetime as dt

    return (dt.datetime.now(dt.timezone.utc) + dt.timedelta(minutes=1)).isoformat()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return make_certificate(tmp_path)


def test_over_tls_everything_works_and_nothing_is_signed_twice(
    seaweedfs: S3Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    with behind_tls(seaweedfs.endpoint, certificate) as endpoint:
        store = store_of(seaweedfs.behind(endpoint), "tls", part_size=5 * MIB)
        seen: list[str] = []
        store.connection.client.meta.events.register(
            "before-send.s3.UploadPart", lambda request, **_: seen.append(str(request.headers["X-Amz-Content-SHA256"]))
        )
        assert store.able.checksum == "crc64nvme"
        data = os.urandom(11 * MIB)
        put(store, "object", data, exclusive=True)
        assert get(store, "object") == data
        checkpoints = CheckpointStore(store)
        checkpoints.save({"model": {"weight": [1.0]}}, step=1)
        checkpoints.save({"model": {"weight": [2.0]}}, step=2)
        checkpoints.prune(1)
        assert [item.step for item in checkpoints.list()] == [2]
        store.connection.client.close()
    assert set(seen) == {"b'UNSIGNED-PAYLOAD'"} or set(seen) == {"UNSIGNED-PAYLOAD"}


def test_over_plain_http_every_byte_is_signed_unless_told_otherwise(seaweedfs: S3Server) -> None:
    for signing, unsigned in ((None, False), (True, False), (False, True)):
        store = store_of(seaweedfs, f"signing-{signing}", part_size=5 * MIB, payload_signing=signing)
        seen: list[bool] = []
        store.connection.client.meta.events.register(
            "before-send.s3.UploadPart",
            lambda request, seen=seen, **_: seen.append("UNSIGNED" in str(request.headers["X-Amz-Content-SHA256"])),
        )
        data = os.urandom(11 * MIB)
        put(store, "object", data)
        assert get(store, "object") == data
        assert len(seen) >= 2
        assert set(seen) == {unsigned}


def test_a_certificate_that_nobody_vouches_for_is_refused_with_the_remedy(
    seaweedfs: S3Server, certificate: Path
) -> None:
    with behind_tls(seaweedfs.endpoint, certificate) as endpoint:
        store = store_of(seaweedfs.behind(endpoint), "tls")
        with pytest.raises(StoreAccessError, match="AWS_CA_BUNDLE"):
            store.stat("object")


@pytest.mark.parametrize(
    ("uri", "options", "expected"),
    [
        ("s3://bucket-a/run", {"region": "eu-west-1"}, "https://bucket-a.s3.eu-west-1.amazonaws.com/run/key"),
        (
            "s3://bucket-a/run",
            {"region": "eu-west-1", "addressing": "path"},
            "https://s3.eu-west-1.amazonaws.com/bucket-a/run/key",
        ),
        (
            "s3://bucket-a/run",
            {"region": "eu-west-1", "dualstack": True},
            "https://bucket-a.s3.dualstack.eu-west-1.amazonaws.com/run/key",
        ),
        (
            "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/ours/run",
            {"region": "eu-west-1"},
            "https://ours-123456789012.s3-accesspoint.eu-west-1.amazonaws.com/run/key",
        ),
        (
            "s3://bucket-a/run",
            {"region": "eu-west-1", "endpoint_url": "https://minio.example", "addressing": "virtual"},
            "https://bucket-a.minio.example/run/key",
        ),
    ],
)
def test_requests_go_where_the_options_say(
    uri: str, options: dict[str, object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent: the request is taken from boto3 on its way to the network."""
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    store = S3ObjectStore(uri, S3Options(**options), session=boto3.Session("key", "secret"))  # type: ignore[arg-type]
    urls: list[str] = []

    class TakenError(Exception):
        pass

    def take(request: Any, **_: Any) -> None:
        urls.append(request.url)
        raise TakenError

    store.connection.client.meta.events.register("before-send.s3", take)
    with pytest.raises(TakenError):
        store.connection.call("get_object", "key")
    assert urls == [expected]
