"""Objects in a bucket."""

import contextlib
import datetime as dt
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from spotguard.errors import ConfigError, ObjectExistsError, ObjectNotFoundError, StoreError
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
from spotguard.stores.s3.deletion import delete_for_good, delete_or_hide, without_versions
from spotguard.stores.s3.errors import AccessDeniedError, NotOfferedError
from spotguard.stores.s3.listing import pages, server_time
from spotguard.stores.s3.options import S3Options
from spotguard.stores.s3.preflight import (
    PROBE,
    Capabilities,
    bucket_versions,
    multipart_is_exclusive,
    preflight,
    versioning_of,
    warn_of_lacking,
)
from spotguard.stores.s3.reader import S3Reader
from spotguard.stores.s3.writer import S3Writer, digest_in

__all__ = ["S3ObjectStore"]

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
        self._versions_are_guessed = False
        self._denied: dict[str, StoreError] = {}  # why versions cannot be deleted for good, by permission
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
                self._versions, self._versions_are_guessed = self._able.versions, False
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
        # Before the preflight too, for whoever only reads or deletes: a server that does not know it answers without.
        params: dict[str, Any] = (
            {"ChecksumMode": "ENABLED"} if self._able is None or self._able.checksum == "crc64nvme" else {}
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
            try:
                found = [info for info, latest, marker in self._list_versions(prefix) if latest and not marker]
            except (AccessDeniedError, NotOfferedError) as error:
                self._denied["s3:ListBucketVersions"] = error
            else:
                self._denied.pop("s3:ListBucketVersions", None)
                if found or not self._versions_are_guessed:
                    return iter(sorted(found, key=lambda info: info.key))
        return iter(sorted(self._list_current(prefix), key=lambda info: info.key))

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        """See `ObjectStore.delete`. With a version that version is gone for good, without one a bucket with versions keeps it.

        Where versions may not be listed, or not be deleted, for want of a permission or because of a lock, everything is hidden under a
        delete marker: manifests and shards alike, so that what is brought back is whole.
        """
        wanted = [ObjectRef(check_key(ref.key), ref.version) for ref in refs]
        hidden = delete_or_hide(self.connection, without_versions(wanted) if self._denied else wanted)
        if hidden:
            self._denied["s3:DeleteObjectVersion"] = next(iter(hidden.values()))
        denied = {name: error for name, error in self._denied.items() if isinstance(error, AccessDeniedError)}
        warn_of_lacking(self.connection, denied)

    def discard_partials(self, is_stale: Callable[[str], bool]) -> Sequence[str]:
        """See `ObjectStore.discard_partials`: uploads that were never completed, and probes of starts that died."""
        gone = []
        with contextlib.suppress(AccessDeniedError, NotOfferedError):
            for key, upload, old in [*self._dated_uploads()]:
                if is_stale(key) or (key.startswith(PROBE) and old):
                    with contextlib.suppress(ObjectNotFoundError):
                        self.connection.call("abort_multipart_upload", key, UploadId=upload)
                    gone.append(key)
        if not self._probes_discarded:
            self._probes_discarded = True
            with contextlib.suppress(AccessDeniedError, NotOfferedError):
                delete_for_good(self.connection, list(self._old_probes()))
        return gone

    def _uploads(self) -> Iterator[tuple[str, str]]:
        return ((key, upload) for key, upload, _ in self._dated_uploads())

    def _dated_uploads(self) -> Iterator[tuple[str, str, bool]]:
        """Key and id of every upload, and whether it is too old for a probe that somebody is at."""
        for page in pages(self.connection, "list_multipart_uploads"):
            for upload in page.get("Uploads", []):
                old = _is_old(upload.get("Initiated"), server_time(page))
                yield upload["Key"].removeprefix(self.address.prefix), upload["UploadId"], old

    def _old_probes(self) -> Iterator[ObjectRef]:
        """Probes, each version, that nobody can be at any more."""
        versions = self._has_versions()
        for page in pages(self.connection, "list_object_versions" if versions else "list_objects_v2", PROBE):
            for item in [*page.get("Versions", []), *page.get("DeleteMarkers", []), *page.get("Contents", [])]:
                if _is_old(item["LastModified"], server_time(page)):
                    yield ObjectRef(item["Key"].removeprefix(self.address.prefix), item.get("VersionId"))

    def deleted(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `VersionedStore.deleted`.

        Raises:
            ConfigError: The bucket has never kept versions.
        """
        status, found = versioning_of(self.connection), [*self._list_versions(check_prefix(prefix))]
        none = status is None and found and all(info.version == "null" for info, _, _ in found)
        if status == "" or none:
            bucket = self.address.bucket
            raise ConfigError(
                f"{self.uri}: bucket {bucket} does not keep versions, so what was deleted is gone. For the future turn them on: "
                f"aws s3api put-bucket-versioning --bucket {bucket} --versioning-configuration Status=Enabled"
            )
        hidden = set[str]()
        for info, latest, marker in found:
            if latest and marker:
                hidden.add(info.key)
            elif not marker and info.key in hidden:  # the newest version of a key comes first
                hidden.discard(info.key)
                yield info

    def undelete(self, key: str) -> None:
        """See `VersionedStore.undelete`: removes its delete markers."""
        found = [entry for entry in self._list_versions(check_key(key)) if entry[0].key == key]
        if any(latest and marker for _, latest, marker in found):
            for error in delete_for_good(self.connection, [info.ref for info, _, marker in found if marker]).values():
                raise error

    def _list_current(self, prefix: str) -> Iterator[ObjectInfo]:
        for page in pages(self.connection, "list_objects_v2", prefix):
            self._seen = True
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # a "folder" that some console has made
                    yield ObjectInfo(item["Key"].removeprefix(self.address.prefix), item["Size"])

    def _list_versions(self, prefix: str) -> Iterator[tuple[ObjectInfo, bool, bool]]:
        """Every version below a prefix: what it is, whether it is the latest of its key, whether it is a delete marker.

        Versions come in the order of the keys, the newest of a key first. A marker comes before the versions that it hides.
        """
        for page in pages(self.connection, "list_object_versions", prefix):
            self._seen = True
            for name in ("DeleteMarkers", "Versions"):
                for item in page.get(name, []):
                    if not item["Key"].endswith("/"):
                        key = item["Key"].removeprefix(self.address.prefix)
                        info = ObjectInfo(key, item.get("Size", 0), item["VersionId"])
                        yield info, item["IsLatest"], name == "DeleteMarkers"

    def _has_versions(self) -> bool:
        if self._versions is None:
            told = bucket_versions(self.connection)
            self._versions, self._versions_are_guessed = told is not False, told is None
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
            self.connection.call("list_objects_v2", Prefix=self.address.prefix, MaxKeys=1)
            self._seen = True

    def _version_in(self, answer: Answer) -> str | None:
        version = answer.get("VersionId")
        return version if version and self._has_versions() else None


def _is_old(since: dt.datetime | None, now: dt.datetime) -> bool:
    """Whether a probe of that time is of a start that died. By the server's clock on both sides."""
    return since is not None and (now - since).total_seconds() >= _PROBE_AGE_S
