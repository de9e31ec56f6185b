"""Small whole objects, read and written with retries: a transient error is tried again, anything else is raised as it is."""

from collections.abc import Callable
from typing import TypeVar

import tenacity

from spotguard.errors import TransientStoreError
from spotguard.stores import ObjectStore

__all__ = ["read_object", "retried", "write_object"]

_T = TypeVar("_T")


def retried(action: Callable[[], _T]) -> _T:
    """Do something with a store, up to five times over about ten seconds while it fails for now (full jitter)."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, TransientStoreError) and not error.exhausted),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
        stop=tenacity.stop_after_attempt(5),
        reraise=True,
    )
    return retrying(action)


def read_object(store: ObjectStore, key: str) -> bytes:
    """All bytes of an object; raises ObjectNotFoundError when it is not there."""

    def read() -> bytes:
        with store.open(key) as reader:
            return reader.read()

    return retried(read)


def write_object(store: ObjectStore, key: str, data: bytes, *, exclusive: bool = False) -> None:
    """Write an object whole."""

    def write() -> None:
        with store.create(key, exclusive=exclusive) as writer:
            writer.write(data)

    retried(write)
