"""A lifecycle rule for what versions and interrupted uploads leave behind, and what that costs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from spotguard.stores.s3.connection import Connection
from spotguard.stores.s3.errors import code_of

__all__ = ["PRICE_PER_GB_MONTH", "Kept", "apply_rule", "endangering", "kept_versions", "lifecycle_rule", "rules_of"]

# S3 Standard in us-east-1, first 50 TB, in US dollars: https://aws.amazon.com/s3/pricing/
PRICE_PER_GB_MONTH = 0.023


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a bucket holds of a run besides what is visible.

    Attributes:
        versions: Objects that were overwritten or deleted and are still kept.
        size: Their bytes.
        uploads: Multipart uploads that were begun and neither completed nor aborted.
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


def endangering(rules: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    """Rules by which the bucket deletes objects of the run that are in use, by name.

    Example:
        >>> endangering([{"ID": "tidy", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 30}}], "run-17/")
        ['tidy']
    """
    found = []
    for rule in rules:
        filters = rule.get("Filter", {})
        begins = filters.get("Prefix", filters.get("And", {}).get("Prefix", rule.get("Prefix", "")))
        expires = {"Days", "Date"} & set(rule.get("Expiration", {}))
        if rule.get("Status") == "Enabled" and expires and (prefix.startswith(begins) or begins.startswith(prefix)):
            found.append(str(rule.get("ID", "without a name")))
    return found


def kept_versions(connection: Connection) -> Kept:
    """Count what the bucket keeps of the run besides what is visible."""
    prefix, params = connection.address.prefix, dict[str, Any]()
    versions = size = uploads = 0
    while True:
        page = connection.call("list_object_versions", Prefix=prefix, **params)
        old = [item for item in page.get("Versions", []) if not item["IsLatest"]]
        versions, size = versions + len(old), size + sum(item["Size"] for item in old)
        if not page.get("IsTruncated"):
            break
        params = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page.get("NextVersionIdMarker", "")}
    params = {}
    while True:
        page = connection.call("list_multipart_uploads", Prefix=prefix, **params)
        uploads += len(page.get("Uploads", []))
        if not page.get("IsTruncated"):
            return Kept(versions, size, uploads)
        params = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
