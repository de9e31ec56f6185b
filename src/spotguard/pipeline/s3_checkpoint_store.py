"""The checkpoint store in S3, with its options by name."""

import dataclasses
from typing import Any

from spotguard.errors import ConfigError
from spotguard.pipeline.checkpoint_store import CheckpointStore
from spotguard.stores.s3 import S3ObjectStore, S3Options

__all__ = ["S3CheckpointStore"]


class S3CheckpointStore(CheckpointStore):
    """A `CheckpointStore` in a bucket of Amazon S3, or of a server that speaks its protocol.

    ``CheckpointStore("s3://...")`` is the same with every option at its default. `SpotGuard` takes one in place of a URI.

    Args:
        uri: ``s3://bucket/prefix``; nothing is sent before the first use.
        session: A ``boto3.Session``, where the usual chain of credentials is not what is wanted.
        options: Fields of `spotguard.stores.s3.S3Options`, such as ``versioning="require"``.

    Raises:
        ConfigError: The URI, or the name or value of an option, makes no sense.

    Example:
        >>> store = S3CheckpointStore("s3://my-bucket/run-17", versioning="require", sse="aws:kms")
        >>> store.uri
        's3://my-bucket/run-17'
    """

    def __init__(self, uri: str, *, session: Any = None, **options: Any) -> None:
        known = [field.name for field in dataclasses.fields(S3Options)]
        if unknown := [name for name in options if name not in known]:
            raise ConfigError(f"S3CheckpointStore has no option {unknown[0]!r}; it has {', '.join(known)}")
        super().__init__(S3ObjectStore(uri, S3Options(**options), session=session))
