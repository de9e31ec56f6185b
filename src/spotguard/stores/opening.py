"""From a URI to a store."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from spotguard.errors import ConfigError
from spotguard.stores.base import ObjectStore
from spotguard.stores.local import LocalObjectStore
from spotguard.stores.memory import MemoryObjectStore

__all__ = ["open_store"]

_LOST_SLASH = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*:/"
)  # "s3:/bucket/run" would be a directory that goes with the machine


def open_store(uri: "str | os.PathLike[str]") -> ObjectStore:
    """Open the store that a URI names. Nothing is read or written yet.

    Args:
        uri: A path, ``file:///path`` or ``memory://name``.

    Raises:
        ConfigError: The scheme is not known, or names nothing.

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
    raise ConfigError(
        f"uri={text!r}: scheme {scheme!r} is not known to this release; use a directory path, file:///path or memory://name"
    )
