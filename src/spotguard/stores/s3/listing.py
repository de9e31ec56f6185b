"""Listings, page by page, as servers end them."""

import datetime as dt
import email.utils
from collections.abc import Iterator
from typing import Any, Literal

from spotguard._time import utc_now
from spotguard.stores.s3.connection import Answer, Connection
from spotguard.stores.s3.errors import NotOfferedError

__all__ = ["pages", "server_time"]

Listing = Literal["list_objects_v2", "list_object_versions", "list_multipart_uploads"]

_MARKERS = {
    "list_objects_v2": ("ContinuationToken",),
    "list_object_versions": ("KeyMarker", "VersionIdMarker"),
    "list_multipart_uploads": ("KeyMarker", "UploadIdMarker"),
}


def pages(connection: Connection, operation: Listing, prefix: str = "") -> Iterator[Answer]:
    """What is below a prefix of the run.

    Raises:
        NotOfferedError: The server says that there is more and not where. Uploads end there: those left are found once these are aborted.
            Objects do not: one that is passed over would be taken for missing.
    """
    params: dict[str, Any] = {}
    while True:
        page = connection.call(operation, Prefix=connection.address.prefix + prefix, **params)
        yield page
        if not page.get("IsTruncated"):
            return
        before, params = params, _following(operation, page)
        if not params or params == before:
            if operation == "list_multipart_uploads":
                return
            raise NotOfferedError(f"{connection.uri(prefix)}: the server does not say where the listing goes on")


def _following(operation: Listing, page: Answer) -> dict[str, Any]:
    """The markers that the server has named; of an upload, where it has named none, those of the last one."""
    params = {name: page[f"Next{name}"] for name in _MARKERS[operation] if page.get(f"Next{name}")}
    if not params and (uploads := page.get("Uploads")):
        return {"KeyMarker": uploads[-1]["Key"], "UploadIdMarker": uploads[-1]["UploadId"]}
    return params


def server_time(answer: Answer) -> dt.datetime:
    """When the server answered, by its own clock."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return utc_now() if date is None else email.utils.parsedate_to_datetime(date)
