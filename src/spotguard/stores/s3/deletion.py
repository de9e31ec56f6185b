"""Deleting in batches: what fails for now is tried again, and what may not be deleted for good is hidden."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spotguard.errors import ObjectNotFoundError, StoreError, TransientStoreError
from spotguard.stores.base import ObjectRef
from spotguard.stores.s3.connection import Connection
from spotguard.stores.s3.errors import AccessDeniedError, NotOfferedError, translate

__all__ = ["delete_for_good", "delete_or_hide", "without_versions"]

_BATCH = 1000  # keys in one request: https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html

Denied = Mapping[ObjectRef, AccessDeniedError]


def delete_or_hide(connection: Connection, refs: Iterable[ObjectRef]) -> Denied:
    """Delete objects, those with a version for good. Where that is denied, by a policy or by a lock, a delete marker hides the key.

    Returns:
        What was hidden, each with what the server said to its deletion.

    Raises:
        AccessDeniedError: Not even a marker may be set.
        StoreError: As of the first that could not be deleted.
    """
    denied = delete_for_good(connection, refs)
    hidden = {ref: error for ref, error in denied.items() if ref.version is not None}
    refused = [error for ref, error in denied.items() if ref.version is None]
    refused += delete_for_good(connection, without_versions(hidden)).values()
    if refused:
        raise refused[0]
    return hidden


def without_versions(refs: Iterable[ObjectRef]) -> list[ObjectRef]:
    """Their keys, each once."""
    return [*dict.fromkeys(ObjectRef(ref.key) for ref in refs)]


def delete_for_good(connection: Connection, refs: Iterable[ObjectRef]) -> Denied:
    """Delete objects, by version where they have one; one that is gone already is no error.

    Returns:
        Those that we may not delete, each with what the server said.

    Raises:
        StoreError: As of the first that could not be deleted, after those that failed for now were tried again.
    """
    wanted, denied = [*refs], dict[ObjectRef, AccessDeniedError]()
    for start in range(0, len(wanted), _BATCH):
        denied |= _Batch(connection, wanted[start : start + _BATCH]).delete()
    return denied


class _Batch:
    """What one request holds, until all of it is deleted or refused."""

    def __init__(self, connection: Connection, refs: Sequence[ObjectRef]) -> None:
        self._connection, self._left = connection, [*refs]
        self._denied: dict[ObjectRef, AccessDeniedError] = {}
        self._failed: list[StoreError] = []

    def delete(self) -> Denied:
        self._connection.retried(self._once, self._connection.address.uri)
        if self._failed:
            raise self._failed[0]
        return self._denied

    def _once(self) -> None:
        objects = [{"Key": self._connection.address.prefix + ref.key} | _version(ref) for ref in self._left]
        try:
            answer = self._connection.call("delete_objects", Delete={"Objects": objects, "Quiet": True})
        except NotOfferedError:
            for ref in self._left:
                self._delete_alone(ref)
            return
        except AccessDeniedError as error:  # a server that decides about the request, not about each key
            self._denied |= dict.fromkeys(self._left, error)
            return
        again = list[tuple[ObjectRef, Exception]]()
        for entry in answer.get("Errors", []):
            for ref, problem in self._errors_of(entry):
                if isinstance(problem, TransientStoreError):
                    again.append((ref, problem))
                else:
                    self._note(ref, problem)
        self._left = [ref for ref, _ in again]
        if again:
            raise TransientStoreError(f"{again[0][1]}; could not be deleted, {len(again)} in all")

    def _errors_of(self, entry: dict[str, Any]) -> list[tuple[ObjectRef, Exception]]:
        """What an entry says, in our words. Some servers leave out the version: then it is said of all that were asked for."""
        from botocore.exceptions import ClientError

        key = str(entry.get("Key", "")).removeprefix(self._connection.address.prefix)
        version = entry.get("VersionId")
        said = ClientError({"Error": entry, "ResponseMetadata": {}}, "DeleteObjects")
        return [
            (ref, translate(said, operation="delete_object", where=self._connection.uri(key), params=_version(ref)))
            for ref in self._left
            if ref.key == key and version in (None, "", ref.version)
        ]

    def _delete_alone(self, ref: ObjectRef) -> None:
        try:
            self._connection.call("delete_object", ref.key, **_version(ref))
        except (AccessDeniedError, ObjectNotFoundError) as error:
            self._note(ref, error)

    def _note(self, ref: ObjectRef, error: Exception) -> None:
        if isinstance(error, AccessDeniedError):
            self._denied[ref] = error
        elif isinstance(error, StoreError) and not isinstance(error, ObjectNotFoundError):
            self._failed.append(error)


def _version(ref: ObjectRef) -> dict[str, Any]:
    return {} if ref.version is None else {"VersionId": ref.version}
