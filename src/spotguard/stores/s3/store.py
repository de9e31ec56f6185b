"""Objects in a bucket."""

import contextlib
import email.utils
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from spotguard.errors import ConfigError, ObjectExistsError, ObjectNotFoundError, StoreError, TransientStoreError
from spotguard.stores.base import (
    ObjectInfo,
    ObjectReader,
    ObjectRef,
    ObjectWriter,
    check_deadline,
    check_key,
    check_prefix,
)
from spotguard.stores.s3.address import S3Address
from spotguard.stores.s3.connection import Answer, Connection
from spotguard.stores.s3.errors import AccessDeniedError, NotOfferedError
from spotguard.stores.s3.options import S3Options
from spotguard.stores.s3.preflight import PROBE, Capabilities, bucket_versions, multipart_is_exclusive, preflight
from spotguard.stores.s3.reader import S3Reader
from spotguard.stores.s3.writer import S3Writer, digest_in

__all__ = ["S3ObjectStore"]

_BATCH = 1000  # keys in one request to delete: https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html

_PROBE_AGE_S = 600.0  # after which the start that wrote a probe is dead: a preflight takes a second


class S3ObjectStore:
    """Objects below a prefix of a bucket of Amazon S3, or of a server that speaks its protocol.

    Nothing is sent before it is first used. The first write makes sure that everything needed is allowed and works.

    Args:
        uri: ``s3://bucket/prefix``.
        options: How to talk to the server.
        session: A ``boto3.Session``, where the usual chain of credentials is not what is wanted.

    Raises:
        ConfigError: That is no S3 URI.

    Example:
        >>> S3ObjectStore("s3://my-bucket/run-17/").uri
        's3://my-bucket/run-17'
    """

    def __init__(self, uri: str, options: S3Options | None = None, *, session: Any = None) -> None:
        self.address = S3Address.parse(uri)
        self.uri = self.address.uri
        self.connection = Connection(self.address, options or S3Options(), session)
        self._lock = threading.Lock()
        self._able: Capabilities | None = None
        self._versions: bool | None = None
        self._exclusive_multipart: bool | None = None
        self._probes_discarded = False
        self._seen = False  # that the bucket is there

    @property
    def able(self) -> Capabilities:
        """What the server does; found out, with what we may do, when it is first asked for.

        Raises:
            StoreAccessError: Names every permission that is missing.
            ConfigError: The bucket is not fit for a run.
        """
        with self._lock:
            if self._able is None:
                self._able = preflight(self.connection)
                self._versions = self._able.versions
            return self._able

    def preflight(self) -> None:
        """See `PreflightStore.preflight`. Once it has succeeded it is not repeated."""
        _ = self.able

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[ObjectWriter]:
        """See `ObjectStore.create`."""
        check_deadline(deadline, check_key(key))
        able = self.able
        writer = S3Writer(self.connection, able, key, exclusive=exclusive, deadline=deadline)
        try:
            yield writer
            if exclusive and not (able.exclusive and (not writer.in_parts or self._multipart_is_exclusive())):
                self._refuse_existing(key)
            writer.finish()
        except BaseException:
            writer.abandon()
            raise

    def open(self, key: str, *, version: str | None = None) -> ObjectReader:
        """See `ObjectStore.open`."""
        try:
            return S3Reader(self.connection, check_key(key), version)
        except ObjectNotFoundError:
            self._check_bucket()
            raise

    def stat(self, key: str, *, version: str | None = None) -> ObjectInfo | None:
        """See `ObjectStore.stat`."""
        params: dict[str, Any] = (
            {"ChecksumMode": "ENABLED"} if self._able and self._able.checksum == "crc64nvme" else {}
        )
        if version is not None:
            params["VersionId"] = version
        try:
            found = self.connection.call("head_object", check_key(key), **params, **self.connection.options.get_params)
        except ObjectNotFoundError:
            self._check_bucket()  # the answer to HEAD has no body that could tell one from the other
            return None
        return ObjectInfo(
            key,
            found["ContentLength"],
            self._version_in(found),
            digest_in(found) if params.get("ChecksumMode") else None,
        )

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`. In a bucket with versions each object comes with its own.

        Sorted here: a server that keeps keys in directories lists ``a/b`` before ``a-b``.
        """
        check_prefix(prefix)
        if self._has_versions():
            with contextlib.suppress(AccessDeniedError, NotOfferedError):
                found = (info for info, latest, marker in self._list_versions(prefix) if latest and not marker)
                return iter(sorted(found, key=lambda info: info.key))
        return iter(sorted(self._list_current(prefix), key=lambda info: info.key))

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        """See `ObjectStore.delete`. With a version that version is gone for good, without one a bucket with versions keeps it."""
        wanted = [
            {"Key": self.address.prefix + check_key(ref.key)} | ({"VersionId": ref.version} if ref.version else {})
            for ref in refs
        ]
        for start in range(0, len(wanted), _BATCH):
            self._delete(wanted[start : start + _BATCH])

    def discard_partials(self, is_stale: Callable[[str], bool]) -> Sequence[str]:
        """See `ObjectStore.discard_partials`: uploads that were never completed, and probes of starts that died."""
        gone = []
        with contextlib.suppress(AccessDeniedError, NotOfferedError):
            for key, upload in [*self._uploads()]:
                if is_stale(key):
                    with contextlib.suppress(ObjectNotFoundError):
                        self.connection.call(
                            "abort_multipart_upload", key, UploadId=upload, **self.connection.options.request_params
                        )
                    gone.append(key)
        if not self._probes_discarded:
            self._probes_discarded = True
            with contextlib.suppress(AccessDeniedError, NotOfferedError):
                self.delete(list(self._old_probes()))
        return gone

    def _uploads(self) -> Iterator[tuple[str, str]]:
        params: dict[str, Any] = {}
        while True:
            page = self.connection.call(
                "list_multipart_uploads",
                Prefix=self.address.prefix,
                **params,
                **self.connection.options.request_params,
            )
            for upload in page.get("Uploads", []):
                yield upload["Key"].removeprefix(self.address.prefix), upload["UploadId"]
            if not page.get("IsTruncated"):
                return
            params = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _old_probes(self) -> Iterator[ObjectRef]:
        """Probes, each version, that nobody can be at any more. By the server's clock on both sides."""
        page = self.connection.call("list_object_versions", Prefix=self.address.prefix + PROBE)
        now = email.utils.parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
        for item in [*page.get("Versions", []), *page.get("DeleteMarkers", [])]:
            if (now - item["LastModified"]).total_seconds() >= _PROBE_AGE_S:
                version = item["VersionId"] if self._has_versions() else None
                yield ObjectRef(item["Key"].removeprefix(self.address.prefix), version)

    def deleted(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `VersionedStore.deleted`."""
        hidden = set[str]()
        for info, latest, marker in self._list_versions(check_prefix(prefix)):
            if latest and marker:
                hidden.add(info.key)
            elif not marker and info.key in hidden:  # the newest version of a key comes first
                hidden.discard(info.key)
                yield info

    def undelete(self, key: str) -> None:
        """See `VersionedStore.undelete`: removes its delete markers."""
        found = [entry for entry in self._list_versions(check_key(key)) if entry[0].key == key]
        if any(latest and marker for _, latest, marker in found):
            self.delete(info.ref for info, _, marker in found if marker)

    def _delete(self, batch: Sequence[dict[str, str]]) -> None:
        try:
            answer = self.connection.call(
                "delete_objects", Delete={"Objects": [*batch], "Quiet": True}, **self.connection.options.request_params
            )
        except NotOfferedError:
            for item in batch:
                params: dict[str, Any] = {"VersionId": item["VersionId"]} if "VersionId" in item else {}
                with contextlib.suppress(ObjectNotFoundError):
                    self.connection.call(
                        "delete_object",
                        item["Key"].removeprefix(self.address.prefix),
                        **params,
                        **self.connection.options.request_params,
                    )
            return
        errors = [
            error for error in answer.get("Errors", []) if error.get("Code") not in ("NoSuchKey", "NoSuchVersion")
        ]
        if errors:
            first = errors[0]
            where = f"s3://{self.address.bucket}/{first.get('Key')}"
            kind = StoreError
            if first.get("Code") == "AccessDenied":
                kind = AccessDeniedError
            elif first.get("Code") in ("InternalError", "SlowDown", "ServiceUnavailable"):
                kind = TransientStoreError
            raise kind(
                f"{where} could not be deleted ({first.get('Code')}: {first.get('Message', '')}), {len(errors)} in all"
            )

    def _list_current(self, prefix: str) -> Iterator[ObjectInfo]:
        params: dict[str, Any] = {}
        while True:
            page = self.connection.call(
                "list_objects_v2",
                Prefix=self.address.prefix + prefix,
                **params,
                **self.connection.options.request_params,
            )
            self._seen = True
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # a "folder" that some console has made
                    yield ObjectInfo(item["Key"].removeprefix(self.address.prefix), item["Size"])
            if not page.get("IsTruncated"):
                return
            params = {"ContinuationToken": page["NextContinuationToken"]}

    def _list_versions(self, prefix: str) -> Iterator[tuple[ObjectInfo, bool, bool]]:
        """Every version below a prefix: what it is, whether it is the latest of its key, whether it is a delete marker.

        Versions come in the order of the keys, the newest of a key first. A marker comes before the versions that it hides.
        """
        params: dict[str, Any] = {}
        while True:
            page = self.connection.call(
                "list_object_versions",
                Prefix=self.address.prefix + prefix,
                **params,
                **self.connection.options.request_params,
            )
            self._seen = True
            for name in ("DeleteMarkers", "Versions"):
                for item in page.get(name, []):
                    if not item["Key"].endswith("/"):
                        key = item["Key"].removeprefix(self.address.prefix)
                        info = ObjectInfo(key, item.get("Size", 0), item["VersionId"])
                        yield info, item["IsLatest"], name == "DeleteMarkers"
            if not page.get("IsTruncated"):
                return
            params = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page.get("NextVersionIdMarker", "")}

    def _has_versions(self) -> bool:
        if self._versions is None:
            self._versions = bucket_versions(self.connection) is not False  # where we may not ask, the listing tells
        return self._versions

    def _multipart_is_exclusive(self) -> bool:
        with self._lock:
            if self._exclusive_multipart is None:
                self._exclusive_multipart = multipart_is_exclusive(self.connection)
        if not self._exclusive_multipart and not self.connection.options.single_writer:
            raise ConfigError(
                f"{self.uri}: the server ignores 'If-None-Match: *' at the end of a multipart upload; "
                "make parts larger than the object (part_size)"
            )
        return self._exclusive_multipart

    def _refuse_existing(self, key: str) -> None:
        """What an exclusive create comes to on a server that has none: good enough for a single writer."""
        if self.stat(key) is not None:
            raise ObjectExistsError(f"{self.uri}/{key} exists already")

    def _check_bucket(self) -> None:
        if not self._seen:
            self.connection.call(
                "list_objects_v2", Prefix=self.address.prefix, MaxKeys=1, **self.connection.options.request_params
            )
            self._seen = True

    def _version_in(self, answer: Answer) -> str | None:
        version = answer.get("VersionId")
        return version if version and self._has_versions() else None
