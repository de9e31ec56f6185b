"""A lifecycle rule for what versions and interrupted uploads leave behind, and what that costs."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from spotguard.stores.s3.connection import Connection
from spotguard.stores.s3.errors import code_of
from spotguard.stores.s3.listing import pages

__all__ = [
    "PRICE_PER_GB_MONTH",
    "Danger",
    "Kept",
    "apply_rule",
    "endangering",
    "kept_versions",
    "lifecycle_rule",
    "rules_of",
]

# S3 Standard in us-east-1, first 50 TB, in US dollars: https://aws.amazon.com/s3/pricing/
PRICE_PER_GB_MONTH = 0.023
# What has to be brought back before it can be read: https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-class-intro.html
_ARCHIVES = {"GLACIER", "DEEP_ARCHIVE"}


@dataclasses.dataclass(frozen=True)
class Danger:
    """A rule of the bucket that harms the run.

    Attributes:
        rule: Its name.
        does: What it does, in words.
    """

    rule: str
    does: str


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a bucket holds of a run besides what is visible.

    Attributes:
        versions: Objects that were overwritten or deleted and are still kept.
        size: Their bytes.
        uploads: Multipart uploads that were begun and neither completed nor aborted. Their bytes are not known: that would take a
            request for each, and a permission of its own.
    """

    versions: int
    size: int
    uploads: int

    @property
    def usd_per_month(self) -> float:
        """What their bytes cost at `PRICE_PER_GB_MONTH`; an estimate, at list price."""
        return self.size / 1e9 * PRICE_PER_GB_MONTH


def lifecycle_rule(prefix: str, *, days: int) -> dict[str, Any]:
    """The rule, as ``put_bucket_lifecycle_configuration`` takes it.

    Args:
        prefix: Of the run.
        days: How long an overwritten or deleted object is kept.

    Example:
        >>> lifecycle_rule("run-17/", days=7)["NoncurrentVersionExpiration"]
        {'NoncurrentDays': 7}
    """
    return {
        "ID": f"spotguard {prefix}"[:255],
        "Filter": {"Prefix": prefix},
        "Status": "Enabled",
        "NoncurrentVersionExpiration": {"NoncurrentDays": days},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days},
        "Expiration": {"ExpiredObjectDeleteMarker": True},
    }


def rules_of(connection: Connection) -> list[dict[str, Any]]:
    """The rules that the bucket has."""
    from botocore.exceptions import ClientError

    from spotguard.errors import StoreError

    try:
        answer = connection.call("get_bucket_lifecycle_configuration")
    except StoreError as error:
        cause = error.__cause__
        if isinstance(cause, ClientError) and code_of(cause) == "NoSuchLifecycleConfiguration":
            return []
        raise
    return list(answer.get("Rules", []))


def apply_rule(connection: Connection, rule: dict[str, Any]) -> None:
    """Add the rule to those of the bucket, or put it in the place of its older self. The others stay."""
    others = [item for item in rules_of(connection) if item.get("ID") != rule["ID"]]
    connection.call("put_bucket_lifecycle_configuration", LifecycleConfiguration={"Rules": [*others, rule]})


def endangering(rules: Sequence[dict[str, Any]], prefix: str, *, days: int = 0) -> list[Danger]:
    """Rules by which the bucket harms the run.

    Args:
        rules: Of the bucket.
        prefix: Of the run.
        days: How long overwritten and deleted objects are to be kept.

    Example:
        >>> endangering([{"ID": "tidy", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 30}}], "run-17/")
        [Danger(rule='tidy', does='deletes objects of this run that are in use')]
    """
    found = []
    for rule in rules:
        filters = rule.get("Filter", {})
        begins = filters.get("Prefix", filters.get("And", {}).get("Prefix", rule.get("Prefix", "")))
        if rule.get("Status") == "Enabled" and (prefix.startswith(begins) or begins.startswith(prefix)):
            found += [Danger(str(rule.get("ID", "without a name")), does) for does in _harm_of(rule, days)]
    return found


def _harm_of(rule: dict[str, Any], days: int) -> Iterator[str]:
    if {"Days", "Date"} & set(rule.get("Expiration", {})):
        yield "deletes objects of this run that are in use"
    if any(item.get("StorageClass") in _ARCHIVES for item in rule.get("Transitions", [])):
        yield "moves objects of this run that are in use to an archive, where they cannot be read"
    if any(item.get("StorageClass") in _ARCHIVES for item in rule.get("NoncurrentVersionTransitions", [])):
        yield "moves overwritten and deleted objects of this run to an archive, where they cannot be read"
    ends = rule.get("NoncurrentVersionExpiration", {})
    kept = ends.get("NoncurrentDays", days)
    if kept < days and "NewerNoncurrentVersions" not in ends:
        yield f"ends overwritten and deleted objects of this run after {kept} days, sooner than {days}"


def kept_versions(connection: Connection) -> Kept:
    """Count what the bucket keeps of the run besides what is visible."""
    versions = size = uploads = 0
    for page in pages(connection, "list_object_versions"):
        old = [item for item in page.get("Versions", []) if not item["IsLatest"]]
        versions, size = versions + len(old), size + sum(item["Size"] for item in old)
    for page in pages(connection, "list_multipart_uploads"):
        uploads += len(page.get("Uploads", []))
    return Kept(versions, size, uploads)
