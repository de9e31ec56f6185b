"""A throwaway key: what the server makes of it, and what we may do with it."""

import base64
import contextlib
import hashlib
import logging
import secrets
from typing import Any, Literal

from spotguard.errors import ConfigError, ObjectExistsError, ObjectNotFoundError, StoreError, TransientStoreError
from spotguard.stores.base import ObjectRef
from spotguard.stores.s3.connection import Answer, Connection
from spotguard.stores.s3.deletion import delete_for_good, delete_or_hide
from spotguard.stores.s3.errors import (
    AccessDeniedError,
    ArrivedDamagedError,
    NotOfferedError,
    code_of,
    permission,
)

__all__ = ["PROBE", "Checksum", "Probe", "encode_crc", "multipart_is_exclusive"]

logger = logging.getLogger(__name__)

PROBE = "probe-"
Checksum = Literal["crc64nvme", "crc32c"]

_BODY = b"spotguard finds out what this server does\n"
# A bucket that locks its objects takes none without; nor do some servers.
_MD5: dict[str, Any] = {"ContentMD5": base64.b64encode(hashlib.md5(_BODY, usedforsecurity=False).digest()).decode()}
_OTHER_BYTES = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "InvalidRequest"}


def encode_crc(value: int, bits: int = 64) -> str:
    """A CRC as S3 has it in headers: base64 of its bytes, the highest first.

    Example:
        >>> encode_crc(0xAE8B14860A799888)
        'rosUhgp5mIg='
    """
    return base64.b64encode(value.to_bytes(bits // 8, "big")).decode()


class Probe:
    """One key, written and deleted in every way that a run does.

    Attributes:
        denied: What is missing and a run cannot do without, by permission.
        lacking: What is missing and a run can do without.
    """

    def __init__(self, connection: Connection) -> None:
        self.denied: dict[str, AccessDeniedError] = {}
        self.lacking: dict[str, AccessDeniedError] = {}
        self._connection = connection
        self._key = PROBE + secrets.token_hex(8)
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
            self.denied[error.permission] = error
            return None

    def lists(self) -> None:
        """Without that permission what is missing could not be told from what is forbidden either."""
        self.attempt("list_objects_v2", Prefix=self._connection.address.prefix, MaxKeys=1)

    def put(self, *, tries: int = 8, **params: Any) -> bool:
        """Write it; False where we may not."""
        answer = self.attempt(
            "put_object",
            self._key,
            tries=tries,
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
            if not self.put(IfNoneMatch="*", **_MD5):
                return True  # nothing was found out; what is missing is said in the end
        except NotOfferedError:
            self.put(**_MD5)
            return False
        try:
            self.put(IfNoneMatch="*", **_MD5)
        except ObjectExistsError:
            return True
        return False

    def finds_checksum(self) -> Checksum | None:
        """The strongest whose wrong value is refused and whose right one is not.

        Raises:
            ConfigError: There is none, and the server takes no object without.
        """
        from awscrt.checksums import crc32c, crc64nvme

        if not self._written:
            return None
        checksums: list[tuple[Checksum, str, int, int]] = [
            ("crc64nvme", "ChecksumCRC64NVME", crc64nvme(_BODY), 64),
            ("crc32c", "ChecksumCRC32C", crc32c(_BODY), 32),
        ]
        for name, field, value, bits in checksums:
            right, wrong = ({field: encode_crc(number, bits)} for number in (value, value ^ 1))
            if self._takes(right) and self._compares(wrong):
                return name
        try:
            self.put()
        except TransientStoreError:
            raise
        except StoreError as error:
            raise ConfigError(
                f"{error}. It takes no object without a checksum, and compares none that spotguard sends: "
                "use a bucket that does not lock its objects (Object Lock)"
            ) from error
        return None

    def _takes(self, checksum: dict[str, Any]) -> bool:
        """Whether the server knows a checksum: it takes the right one."""
        try:
            return self.put(**checksum)
        except StoreError as error:
            if isinstance(error, TransientStoreError) and _code_in(error) not in _OTHER_BYTES:
                raise
            return False

    def _compares(self, checksum: dict[str, Any]) -> bool:
        """Whether the server says that these are other bytes. What fails for another reason says nothing about it."""

        def once() -> bool:
            try:
                self.put(tries=1, **checksum)
            except StoreError as error:
                if _code_in(error) in _OTHER_BYTES:
                    return True
                if isinstance(error, TransientStoreError):
                    raise TransientStoreError(str(error)) from error  # not yet retried enough
            return False

        return self._connection.retried(once, self._connection.uri(self._key))

    def reads_back(self) -> None:
        """What was written is what is there. Where nothing could be written, it is enough that nothing is said to be there."""
        params = self._connection.options.get_params
        if not self._written and permission("list_objects_v2", {}) in self.denied:
            return  # whoever may not list is told that every object that is not there is forbidden
        with contextlib.suppress(ObjectNotFoundError) if not self._written else contextlib.nullcontext():
            answer = self.attempt("get_object", self._key, **params)
            if answer is not None and answer["Body"].read() != _BODY:
                raise StoreError(
                    f"{self._connection.uri(self._key)} was written and reads back as something else; is this an S3 server?"
                )
        if self.versions and (version := self._written[-1].get("VersionId")):
            answer = self.attempt("get_object", self._key, VersionId=version, **params)
            if answer is not None:
                answer["Body"].close()

    def clean_up(self) -> None:
        """Leave nothing behind; by the requests by which a run deletes, which are tried here."""
        try:
            marker = self.attempt("delete_object", self._key) or {}
            versions = {answer.get("VersionId") for answer in [*self._written, marker]} - {None}
            denied = delete_for_good(self._connection, [ObjectRef(self._key, version) for version in versions])
            for error in denied.values():
                self.lacking[permission("delete_object", {"VersionId": "any"})] = error
            if denied:  # it is to be seen no more, at least: the marker may have gone
                self.attempt("delete_object", self._key)
        except StoreError as error:
            logger.debug("the probe could not be deleted: %s", error)

    def looks_for_remains(self, *, versions: bool) -> None:
        """What it takes to find and end what others leave behind. A server that does not know it, or not now, is no reason not to train."""
        requests: list[tuple[str, str | None, dict[str, Any]]] = [
            ("list_multipart_uploads", None, {"Prefix": self._connection.address.prefix, "MaxUploads": 1}),
            ("abort_multipart_upload", self._key, {"UploadId": secrets.token_hex(16)}),  # there is none of that name
        ]
        if versions:
            requests.append(
                ("list_object_versions", None, {"Prefix": self._connection.address.prefix, "MaxKeys": 1}),
            )
        for operation, key, params in requests:
            try:
                self._connection.call(operation, key, tries=1, **params)
            except AccessDeniedError as error:
                self.lacking[permission(operation, {})] = error
            except StoreError as error:
                logger.debug("%s could not be tried out: %s", operation, error)


def multipart_is_exclusive(connection: Connection) -> bool:
    """Whether a multipart upload can be told not to replace what is there. Asked only where one is about to."""
    key, options = PROBE + secrets.token_hex(8), connection.options
    written = [connection.call("put_object", key, Body=_BODY, **_MD5, **options.put_params)]
    try:
        upload = connection.call("create_multipart_upload", key, **options.put_params)["UploadId"]
        try:
            part = connection.call(
                "upload_part", key, UploadId=upload, PartNumber=1, Body=_BODY, **_MD5, **options.get_params
            )
            parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
            written.append(
                connection.call(
                    "complete_multipart_upload", key, UploadId=upload, MultipartUpload=parts, IfNoneMatch="*"
                )
            )
        except BaseException:
            with contextlib.suppress(StoreError):  # a later sweep finds it
                connection.call("abort_multipart_upload", key, UploadId=upload, tries=3)
            raise
    except ObjectExistsError:
        return True
    except NotOfferedError:
        return False
    except ArrivedDamagedError as error:  # nobody else knows the key, so it cannot be meant
        raise TransientStoreError(f"{error}; to be tried again") from error
    finally:
        with contextlib.suppress(StoreError):  # likewise
            delete_or_hide(connection, {ObjectRef(key, answer.get("VersionId")) for answer in written})
    return False


def _code_in(error: StoreError) -> str:
    return code_of(error.__cause__ or error)
