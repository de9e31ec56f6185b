"""From a URI to a store."""

import difflib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from spotguard.errors import ConfigError
from spotguard.stores.base import ObjectStore
from spotguard.stores.local import LocalObjectStore
from spotguard.stores.memory import MemoryObjectStore

__all__ = ["open_store"]

# "s3:/bucket/run" would be a directory that goes with the machine; so would "s3:bucket/run", "s3//bucket/run", "arn:aws:s3:::bucket/run".
_LOST_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_LOST_MORE = re.compile(r"(s3a?|gs|gcs|az|abfss?|hf)(:|//)|arn:", re.IGNORECASE)
_S3 = {"s3", "s3a"}
_USUAL = ("file", "memory", "s3", "gs", "az", "abfs", "hf")


def open_store(uri: "str | os.PathLike[str]") -> ObjectStore:
    """Open the store that a URI names. Nothing is read or written yet.

    Args:
        uri: A path, ``file:///path``, ``memory://name``, ``s3://bucket/run``, ``gs://bucket/run``, ``az://container/run``, or whatever
            else fsspec knows.

    Raises:
        ConfigError: The scheme is not known, or names nothing.
        MissingExtraError: The package for that scheme is not installed.

    Example:
        >>> open_store("memory://demo").uri
        'memory://demo'
    """
    text = os.fspath(uri)
    if not text.strip():
        raise ConfigError("uri='' names no place; give a directory such as 'runs/my-run'")
    scheme, separator, rest = text.partition("://")
    if not separator:
        if _LOST_SLASH.match(text):
            raise ConfigError(
                f"uri={text!r} is neither a URI nor a plain path: a URI has two slashes after its scheme, as in file:///data/my-run. "
                f"If a directory is really called that, write './{text}'"
            )
        if _LOST_MORE.match(text):
            raise ConfigError(
                f"uri={text!r} would be a directory on this machine; a bucket is written s3://bucket/run-17. "
                f"If a directory is really called that, write './{text}'"
            )
        return LocalObjectStore(Path(text))
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError(
                f"uri={text!r}: a file URI has three slashes and an absolute path, as in file:///data/my-run"
            )
        return LocalObjectStore(Path(unquote(parts.path)))
    if scheme == "memory":
        return MemoryObjectStore.named(rest.strip("/"))
    return _open_remote(text, scheme)


def _open_remote(uri: str, scheme: str) -> ObjectStore:
    # Imported here: a run in a directory shall not pay for clients that it does not use.
    if scheme in _S3:
        from spotguard.stores.s3 import S3ObjectStore

        return S3ObjectStore(uri)
    if scheme in ("http", "https"):
        raise ConfigError(
            f"uri={uri!r} is a web address; write s3://bucket/run-17, gs://bucket/run-17 or az://container/run-17. "
            "AWS_ENDPOINT_URL_S3 is for the address of an S3 server"
        )
    import fsspec

    known = {*fsspec.available_protocols(), *_S3}
    if scheme in known:
        from spotguard.stores.fsspec_store import FsspecObjectStore

        return FsspecObjectStore(uri)
    close = difflib.get_close_matches(scheme.lower(), [*_USUAL, *sorted(known)], n=1, cutoff=0.5)
    meant = f" Did you mean {close[0]}://?" if close else ""
    usual = ", ".join(f"{name}://" for name in _USUAL)
    raise ConfigError(
        f"uri={uri!r}: scheme {scheme!r} is not known.{meant} Use a directory path, one of {usual}, or a scheme that fsspec knows"
    )
