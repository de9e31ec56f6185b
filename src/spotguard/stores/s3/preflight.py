"""What the server does, and what we may do there: found out at the start with a throwaway key, not at the first save."""

import base64
import dataclasses
import logging
import secrets
import warnings
from typing import Any, Literal

from spotguard.errors import ConfigError, ObjectExistsError, StoreAccessError, StoreError
from spotguard.stores.s3.connection import Answer, Connection
from spotguard.stores.s3.errors import AccessDeniedError, NotOfferedError, permission

__all__ = ["PROBE", "Capabilities", "bucket_versions", "encode_crc", "multipart_is_exclusive", "preflight"]

logger = logging.getLogger(__name__)

PROBE = "probe-"
_BODY = b"spotguard finds out what this server does\n"
_said: set[tuple[str, str]] = set()  # what has been said of a bucket in this process


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a bucket offers.

    Attributes:
        exclusive: ``If-None-Match: *`` is honoured.
        checksum: The strongest checksum that the server compares with the bytes it gets; None where it compares none.
        versions: The bucket keeps what is overwritten or deleted.
    """

    exclusive: bool
    checksum: Literal["crc64nvme", "crc32c"] | None
    versions: bool


def encode_crc(value: int, bits: int = 64) -> str:
    """A CRC as S3 has it in headers: base64 of its bytes, the highest first.

    Example:
        >>> encode_crc(0xAE8B14860A799888)
        'rosUhgp5mIg='
    """
    return base64.b64encode(value.to_bytes(bits // 8, "big")).decode()


def bucket_versions(connection: Connection) -> bool | None:
    """Whether the bucket keeps versions; None where we may not ask."""
    try:
        return connection.call("get_bucket_versioning").get("Status") == "Enabled"
    except AccessDeniedError:
        return None
    except NotOfferedError:
        return False


def preflight(connection: Connection) -> Capabilities:
    """List, write, write exclusively, write with a wrong checksum, read back and delete.

    Raises:
        StoreAccessError: Names every permission that is missing.
        ConfigError: The bucket does not keep versions, or the server cannot create exclusively, and that is required.
    """
    versions = _versions_as_wanted(connection)
    probe = _Probe(connection)
    try:
        probe.attempt("list_objects_v2", Prefix=connection.address.prefix, MaxKeys=1)
        exclusive = probe.finds_exclusive()
        checksum = probe.finds_checksum()
        probe.reads_back()
    finally:
        probe.clean_up()
    probe.raise_denied()
    if versions is None:
        versions = probe.versions
    _check(connection, exclusive=exclusive, versions=versions)
    if checksum is None:
        _say_once(
            connection, "the server compares no checksum with what it is sent; damage on the way to it is found on load"
        )
    return Capabilities(exclusive, checksum, versions)


def multipart_is_exclusive(connection: Connection) -> bool:
    """Whether a multipart upload can be told not to replace what is there. Asked only where one is about to."""
    key, options = PROBE + secrets.token_hex(8), connection.options
    connection.call("put_object", key, Body=_BODY, **options.put_params)
    upload = connection.call("create_multipart_upload", key, **options.put_params)["UploadId"]
    try:
        part = connection.call("upload_part", key, UploadId=upload, PartNumber=1, Body=_BODY, **options.get_params)
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        connection.call(
            "complete_multipart_upload",
            key,
            UploadId=upload,
            MultipartUpload=parts,
            IfNoneMatch="*",
            **options.request_params,
        )
    except ObjectExistsError:
        connection.call("abort_multipart_upload", key, UploadId=upload, **options.request_params)
        return True
    except NotOfferedError:
        return False
    finally:
        for version in connection.call("list_object_versions", Prefix=connection.address.prefix + key).get(
            "Versions", [{}]
        ):
            connection.call(
                "delete_object", key, **({"VersionId": version["VersionId"]} if "VersionId" in version else {})
            )
    return False


class _Probe:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._key = PROBE + secrets.token_hex(8)
        self._denied: dict[str, None] = {}
        self._written: list[Answer] = []

    @property
    def versions(self) -> bool:
        """Whether what was written has got a version."""
        return any(answer.get("VersionId", "null") != "null" for answer in self._written)

    def attempt(self, operation: str, key: str | None = None, **params: Any) -> Answer | None:
        """Make a request; None where we may not."""
        try:
            return self._connection.call(operation, key, **params)
        except AccessDeniedError as error:
            self._denied[error.permission or str(error)] = None
            return None

    def put(self, **params: Any) -> bool:
        """Write the probe; False where we may not."""
        answer = self.attempt(
            "put_object",
            self._key,
            recover=self._after_a_lost_answer,
            Body=_BODY,
            **params,
            **self._connection.options.put_params,
        )
        if answer is not None:
            self._written.append(answer)
        return answer is not None

    def _after_a_lost_answer(self) -> Answer | None:
        """The key is ours alone: the first of our requests has got through, unless one before it has."""
        if self._written:
            return None
        return self._connection.call("head_object", self._key, **self._connection.options.get_params)

    def finds_exclusive(self) -> bool:
        """The first exclusive create works, and the second does not."""
        try:
            if not self.put(IfNoneMatch="*"):
                return True  # nothing was found out; what is missing is said by `raise_denied`
        except NotOfferedError:
            self.put()
            return False
        try:
            self.put(IfNoneMatch="*")
        except ObjectExistsError:
            return True
        return False

    def finds_checksum(self) -> Literal["crc64nvme", "crc32c"] | None:
        """The strongest whose wrong value is refused and whose right one is not."""
        from awscrt.checksums import crc32c, crc64nvme

        if not self._written:
            return None
        right = {"ChecksumCRC64NVME": encode_crc(crc64nvme(_BODY)), "ChecksumCRC32C": encode_crc(crc32c(_BODY), 32)}
        wrong = {
            "ChecksumCRC64NVME": encode_crc(crc64nvme(_BODY) ^ 1),
            "ChecksumCRC32C": encode_crc(crc32c(_BODY) ^ 1, 32),
        }
        names: dict[str, Literal["crc64nvme", "crc32c"]] = {
            "ChecksumCRC64NVME": "crc64nvme",
            "ChecksumCRC32C": "crc32c",
        }
        for field, name in names.items():
            try:
                self.put(**{field: right[field]})
            except StoreError:
                continue  # unknown to the server
            try:
                self.put(tries=1, **{field: wrong[field]})
            except StoreError:
                return name
        return None

    def reads_back(self) -> None:
        """What was written is what is there."""
        if not self._written:
            return
        answer = self.attempt("get_object", self._key, **self._connection.options.get_params)
        if answer is not None and answer["Body"].read() != _BODY:
            raise StoreError(
                f"{self._connection.uri(self._key)} was written and reads back as something else; is this an S3 server?"
            )
        if self.versions and (version := self._written[-1].get("VersionId")):
            answer = self.attempt("get_object", self._key, VersionId=version, **self._connection.options.get_params)
            if answer is not None:
                answer["Body"].close()

    def clean_up(self) -> None:
        """Leave nothing behind."""
        for version in {answer.get("VersionId") for answer in self._written}:
            try:
                self.attempt("delete_object", self._key, **({"VersionId": version} if version else {}))
            except StoreError as error:
                logger.debug("the probe could not be deleted: %s", error)

    def raise_denied(self) -> None:
        """Say everything that is missing at once."""
        if not self._denied:
            return
        address = self._connection.address
        on_bucket = {permission("list_objects_v2", {}), permission("list_object_versions", {})}
        lines = [
            f"  {name} on {address.arn}" + ("" if name in on_bucket else f"/{address.prefix}*") for name in self._denied
        ]
        raise StoreAccessError(
            f"{address.uri}: these permissions are missing:\n" + "\n".join(lines) + "\n"
            "Add them to the policy of the user or role; docs/how-to/s3.md has a minimal one"
        )


def _versions_as_wanted(connection: Connection) -> bool | None:
    wanted, bucket = connection.options.versioning, connection.address.bucket
    versions = bucket_versions(connection)
    if wanted == "enable" and not versions:
        connection.call("put_bucket_versioning", VersioningConfiguration={"Status": "Enabled"})
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
