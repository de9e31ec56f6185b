"""Bytes under keys: the port `ObjectStore`, and the stores behind it."""

from spotguard.stores.base import (
    ObjectInfo,
    ObjectReader,
    ObjectRef,
    ObjectStore,
    ObjectWriter,
    PreflightStore,
    Progress,
    VersionedStore,
    check_key,
)
from spotguard.stores.local import LocalObjectStore
from spotguard.stores.memory import MemoryObjectStore
from spotguard.stores.opening import open_store

__all__ = [
    "LocalObjectStore",
    "MemoryObjectStore",
    "ObjectInfo",
    "ObjectReader",
    "ObjectRef",
    "ObjectStore",
    "ObjectWriter",
    "PreflightStore",
    "Progress",
    "VersionedStore",
    "check_key",
    "open_store",
]
