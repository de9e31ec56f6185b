"""Amazon S3 and what speaks its protocol, as a store: versioned, verified, streamed in parallel.

::

    address      s3://bucket/prefix, access points                     preflight   what the server does, what we may do
    connection   a boto3 client, errors in our words, retries          probe       the throwaway key that finds it out
    body         bytes on their way, without a copy                    writer      one PUT, or parts over several connections
    listing      page by page                                          reader      ranges over several connections
    deletion     in batches, for good or by a marker                   lifecycle   rules of the bucket, and what it keeps
"""

from spotguard.stores.s3.options import S3Options
from spotguard.stores.s3.store import S3ObjectStore

__all__ = ["S3ObjectStore", "S3Options"]
