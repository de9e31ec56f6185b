"""Amazon S3 and what speaks its protocol, as a store: versioned, verified, streamed in parallel.

::

    address      s3://bucket/prefix, access points                     preflight   what the server does, what we may do
    connection   a boto3 client, errors in our words, retries          writer      one PUT, or parts over several connections
    body         bytes on their way, without a copy                    reader      ranges over several connections
"""

from spotguard.stores.s3.options import S3Options
from spotguard.stores.s3.store import S3ObjectStore

__all__ = ["S3ObjectStore", "S3Options"]
