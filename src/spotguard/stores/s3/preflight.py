"""What the server does, and what we may do there: found out at the start with a throwaway key, not at the first save."""

import dataclasses
import logging
import warnings
from collections.abc import Mapping

from spotguard.errors import ConfigError, StoreAccessError, StoreError
from spotguard.stores.s3.connection import Connection
from spotguard.stores.s3.errors import AccessDeniedError, NotOfferedError
from spotguard.stores.s3.probe import PROBE, Checksum, Probe, encode_crc, multipart_is_exclusive

__all__ = [
    "PROBE",
    "Capabilities",
    "bucket_versions",
    "encode_crc",
    "multipart_is_exclusive",
    "preflight",
    "versioning_of",
    "warn_of_lacking",
]

logger = logging.getLogger(__name__)

_said: set[tuple[str, str]] = set()  # what has been said of a bucket in this process

_UPLOADS_STAY = "uploads that a killed process left unfinished are kept, and paid for, until a lifecycle rule ends them"
_WITHOUT = {
    "s3:ListBucketVersions": "retention can only hide what it deletes, and a deleted checkpoint cannot be listed or restored",
    "s3:DeleteObjectVersion": "retention can only hide what it deletes: it is kept, and paid for, until a lifecycle rule ends it",
    "s3:ListBucketMultipartUploads": _UPLOADS_STAY,
    "s3:AbortMultipartUpload": _UPLOADS_STAY,
}
_ON_THE_BUCKET = {"s3:ListBucket", "s3:ListBucketVersions", "s3:ListBucketMultipartUploads"}


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a bucket offers.

    Attributes:
        exclusive: ``If-None-Match: *`` is honoured.
        checksum: The strongest checksum that the server compares with the bytes it gets; None where it compares none.
        versions: The bucket keeps what is overwritten or deleted.
    """

    exclusive: bool
    checksum: Checksum | None
    versions: bool


def versioning_of(connection: Connection) -> str | None:
    """``"Enabled"``, ``"Suspended"``, or empty where versions never were; None where we may not ask, or cannot, as at an access point."""
    try:
        return str(connection.call("get_bucket_versioning").get("Status", ""))
    except (AccessDeniedError, NotOfferedError):
        return None


def bucket_versions(connection: Connection) -> bool | None:
    """Whether the bucket keeps versions; None where that cannot be asked: then what is written tells."""
    status = versioning_of(connection)
    return None if status is None else status == "Enabled"


def preflight(connection: Connection) -> Capabilities:
    """List, write, write exclusively, write with a wrong checksum, read back, delete, and look for what others left behind.

    Raises:
        StoreAccessError: Names every permission that is missing and that a run cannot do without.
        ConfigError: The bucket does not keep versions, or the server cannot create exclusively, and that is required.
    """
    versions = _versions_as_wanted(connection)
    probe = Probe(connection)
    try:
        probe.lists()
        exclusive = probe.finds_exclusive()
        checksum = probe.finds_checksum()
        probe.reads_back()
    finally:
        probe.clean_up()
    if versions is None:
        versions = probe.versions
    _raise_denied(connection, probe.denied)
    _check(connection, exclusive=exclusive, versions=versions)
    probe.looks_for_remains(versions=versions)
    warn_of_lacking(connection, probe.lacking)
    if checksum is None:
        _say_once(
            connection, "the server compares no checksum with what it is sent; damage on the way to it is found on load"
        )
    return Capabilities(exclusive, checksum, versions)


def warn_of_lacking(connection: Connection, lacking: Mapping[str, AccessDeniedError]) -> None:
    """Say, once, which permissions a run does without, and what that comes to."""
    bucket = connection.address.bucket
    new = {name: error for name, error in lacking.items() if (bucket, name) not in _said}
    _said.update((bucket, name) for name in new)
    lines = [f"{_where(connection, name, error)}: {_WITHOUT[name]}" for name, error in new.items()]
    locked = _lock_of(connection) if "s3:DeleteObjectVersion" in new else None
    if locked is not None:  # whoever has all permissions is told the same
        lines = [line for line in lines if "s3:DeleteObjectVersion" not in line]
        warnings.warn(
            f"bucket {bucket} locks every object for {locked}: retention can only hide what it deletes; it is kept, and paid for, "
            "until its lock has ended and a lifecycle rule deletes it ('spotguard s3 lifecycle')",
            UserWarning,
            stacklevel=2,
        )
    if lines:
        warnings.warn(
            f"{connection.address.uri}: these permissions are missing, and a run can do without:\n  "
            + "\n  ".join(lines),
            UserWarning,
            stacklevel=2,
        )


def _lock_of(connection: Connection) -> str | None:
    """For how long the bucket locks what is written; None where it does not, or we may not ask."""
    try:
        answer = connection.call("get_object_lock_configuration", tries=3)
    except StoreError:
        return None
    rule = answer.get("ObjectLockConfiguration", {}).get("Rule", {}).get("DefaultRetention", {})
    length = f"{rule['Years']} years" if rule.get("Years") else f"{rule['Days']} days" if rule.get("Days") else None
    return length and f"{length} ({rule.get('Mode', 'Object Lock')})"


def _raise_denied(connection: Connection, denied: Mapping[str, AccessDeniedError]) -> None:
    """Say everything that is missing at once."""
    if denied:
        lines = [f"  {_where(connection, name, error)}" for name, error in denied.items()]
        raise StoreAccessError(
            f"{connection.address.uri}: these permissions are missing:\n" + "\n".join(lines) + "\n"
            "Add them to the policy of the user or role; docs/how-to/s3.md has a minimal one"
        )


def _where(connection: Connection, name: str, error: AccessDeniedError) -> str:
    """A permission and what it is for; with the words of the server, which knows better: of a key of KMS, say."""
    address, partition = connection.address, connection.client.meta.partition
    on = f" on {address.resource(partition, objects=name not in _ON_THE_BUCKET)}" if name.startswith("s3:") else ""
    return f"{name}{on} ({error.said})"


def _versions_as_wanted(connection: Connection) -> bool | None:
    wanted, bucket = connection.options.versioning, connection.address.bucket
    versions = bucket_versions(connection)
    if wanted == "enable" and not versions:
        try:
            connection.call("put_bucket_versioning", VersioningConfiguration={"Status": "Enabled"})
        except NotOfferedError:  # by way of an access point, say; then what is written tells
            return None
        versions = bucket_versions(connection)
        logger.info("versioning is now on in bucket %s", bucket)
    return versions


def _check(connection: Connection, *, exclusive: bool, versions: bool) -> None:
    options, bucket, uri = connection.options, connection.address.bucket, connection.address.uri
    remedy = f"aws s3api put-bucket-versioning --bucket {bucket} --versioning-configuration Status=Enabled"
    if not versions and options.versioning == "require":
        raise ConfigError(
            f"{uri}: bucket {bucket} does not keep versions, and versioning='require'. "
            f"Turn them on with '{remedy}', or pass versioning='enable'"
        )
    if not versions and options.versioning == "enable":
        raise ConfigError(
            f"{uri}: versioning='enable', and the server keeps no versions even so; pass versioning='auto' to go without"
        )
    if not versions and (bucket, "versions") not in _said:
        _said.add((bucket, "versions"))
        warnings.warn(
            f"bucket {bucket} does not keep versions: a shard that somebody overwrites or deletes is lost. Turn them on with '{remedy}'",
            UserWarning,
            stacklevel=2,
        )
    if not exclusive and not options.single_writer:
        raise ConfigError(
            f"{uri}: the server ignores 'If-None-Match: *', so two processes that write to this run could not be kept apart. "
            "Use a server or a bucket that honours it, or promise by single_writer=True that there is never a second one"
        )
    if not exclusive:
        _say_once(
            connection,
            "the server cannot create exclusively; single_writer=True promises that no second process writes to this run",
        )


def _say_once(connection: Connection, text: str) -> None:
    if (connection.address.bucket, text) not in _said:
        _said.add((connection.address.bucket, text))
        logger.warning("%s: %s", connection.address.uri, text)
