"""Who may do what in a bucket, by which way, and for how long."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest

from servers import S3Server
from spotguard import CheckpointStore
from spotguard.errors import StoreAccessError
from spotguard.stores.s3 import S3ObjectStore, S3Options, preflight
from spotguard.testing.object_store import get, put
from tls import behind_tls, make_certificate

MIB = 1 << 20
ALL = [
    "s3:ListBucket", "s3:ListBucketVersions", "s3:GetBucketVersioning", "s3:GetObject", "s3:GetObjectVersion", "s3:PutObject",
    "s3:DeleteObject", "s3:DeleteObjectVersion",
]  # fmt: skip


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


def test_the_documented_policy_is_enough(moto: S3Server) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/s3.md").read_text()
    policy = json.loads(page.partition("```json\n")[2].partition("```")[0])
    actions = [action for statement in policy["Statement"] for action in statement["Action"]]
    checkpoints = CheckpointStore(store_of(moto.restricted(*actions), "documented"))
    for step in (1, 2, 3):
        checkpoints.save({"model": {"weight": [float(step)]}}, step=step)
    checkpoints.prune(1)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 3
    assert [item.step for item in checkpoints.list()] == [3]


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
