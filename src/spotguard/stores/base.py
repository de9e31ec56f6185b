"""The storage port: five verbs over keys. Nothing of any one back end is in it."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from spotguard.checkpoint import Digest
from spotguard.errors import ConfigError, DeadlineExceededError

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = [
    "ObjectInfo",
    "ObjectReader",
    "ObjectRef",
    "ObjectStore",
    "ObjectWriter",
    "PreflightStore",
    "Progress",
    "VersionedStore",
    "check_deadline",
    "check_key",
    "check_prefix",
]

Progress = Callable[[int], None]
"""Told how many more bytes are done."""

_COMPONENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


@dataclasses.dataclass(frozen=True)
class ObjectRef:
    """An object to delete: by version in a store that has versions, else by key alone."""

    key: str
    version: str | None = None


@dataclasses.dataclass(frozen=True)
class ObjectInfo:
    """What a store knows of an object.

    Attributes:
        key: Its name.
        size: Bytes.
        version: Version id, in a store that has versions.
        digest: What the store itself has computed over the bytes that it holds, written as in `spotguard.checkpoint.digest`; None where
            it computes none, or was not asked.
    """

    key: str
    size: int
    version: str | None = None
    digest: str | None = dataclasses.field(default=None, compare=False)

    @property
    def ref(self) -> ObjectRef:
        """This object, to be deleted."""
        return ObjectRef(self.key, self.version)


class ObjectWriter(Protocol):
    """Takes the bytes of one object, in order. After the ``with`` block `info` tells what was stored."""

    info: ObjectInfo | None

    def write(self, data: "Buffer", /, progress: Progress | None = None, digest: Digest | None = None) -> int:
        """Append all of `data`; returns its length in bytes.

        Args:
            data: The bytes. They must stay as they are until the block is left: a store may still be sending them, without a copy.
            progress: Called with the number of bytes that are on their way, for each piece; from any thread, also after `write` has
                returned. A piece that has to be sent again is taken back by a negative number.
            digest: Takes in the bytes at their places in the object, while the processor has them at hand to send them; it is complete
                when the block is left.
        """
        ...


class ObjectReader(Protocol):
    """A whole object, open for reading."""

    size: int

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes from the current position, or all that is left."""
        ...

    def read_into(
        self, buffer: "Buffer", offset: int, /, progress: Progress | None = None, digest: Digest | None = None
    ) -> int:
        """Fill `buffer` from `offset` on; returns how many bytes there were. Leaves the position alone.

        Args:
            buffer: Where they go. A store with a network in between fills a large one over several connections at once.
            offset: First byte of the object to read.
            progress: Called with the number of bytes that have come, for each piece, from any thread.
            digest: Takes in the bytes at their places in the object, as they come and while the processor has them at hand.
        """
        ...

    def close(self) -> None:
        """Let go of it."""
        ...

    def __enter__(self) -> "Self": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


@runtime_checkable
class ObjectStore(Protocol):
    """A place for objects. Every implementation passes `spotguard.testing.object_store`.

    Attributes:
        uri: Where it is, in a form that `open_store` takes.
    """

    uri: str

    def create(
        self, key: str, *, exclusive: bool = False, deadline: float | None = None
    ) -> AbstractContextManager[ObjectWriter]:
        """Write an object: whole and durable when the block is left, or not at all when it is left by an exception.

        Args:
            key: Its name.
            exclusive: Fail if the key exists; of several writers exactly one wins.
            deadline: Instant (monotonic seconds) by which the object must be whole.

        Raises:
            ObjectExistsError: The key is taken (with `exclusive`), raised when the block is left.
            DeadlineExceededError: The deadline has passed.
            StoreAccessError: The store may not be written to.
        """
        ...

    def open(self, key: str, *, version: str | None = None) -> ObjectReader:
        """Open an object; raises ObjectNotFoundError when it is not there."""
        ...

    def stat(self, key: str, *, version: str | None = None) -> ObjectInfo | None:
        """What is known of an object; None when it is not there. Trouble on the way raises, it is never "not there"."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every whole object whose key starts with `prefix`, in the order of the keys."""
        ...

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        """Remove objects; one that is already gone is no error."""
        ...

    def discard_partials(self, is_stale: Callable[[str], bool]) -> Sequence[str]:
        """Remove what interrupted creates left behind out of sight, for those keys that `is_stale` says yes to."""
        ...


@runtime_checkable
class PreflightStore(ObjectStore, Protocol):
    """A store that can find out in advance whether a run can be kept there."""

    def preflight(self) -> None:
        """Try everything that a run will need, and leave nothing behind.

        Raises:
            StoreAccessError: Names every permission that is missing.
            ConfigError: The store is not fit for a run.
        """
        ...


@runtime_checkable
class VersionedStore(ObjectStore, Protocol):
    """A store that keeps what was deleted, and can bring it back."""

    def deleted(self, prefix: str) -> Iterator[ObjectInfo]:
        """The last version of every object that has been deleted, in the order of the keys."""
        ...

    def undelete(self, key: str) -> None:
        """Make the last version of a deleted object visible again; one that is not deleted stays as it is."""
        ...


def check_key(key: str) -> str:
    """Refuse a key that some store could not hold, or that would leave the run.

    Raises:
        ConfigError: It is empty, absolute, has a ``..``, a hidden or an over-long component, or a character outside
            ``A-Z a-z 0-9 . _ -``.

    Example:
        >>> check_key("manifests/0004-0000001200.json")
        'manifests/0004-0000001200.json'
    """
    if len(key) > 900 or not all(_COMPONENT.fullmatch(part) for part in key.split("/")):
        raise ConfigError(
            f"key {key!r} is refused: write components of A-Z a-z 0-9 . _ - joined by '/', none empty or starting with a dot"
        )
    return key


def check_prefix(prefix: str) -> str:
    """Refuse a prefix that no key could start with; the empty prefix is every key."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def check_deadline(deadline: float | None, key: str) -> None:
    """Raise DeadlineExceededError once `deadline` (monotonic seconds) has passed."""
    if deadline is not None and time.monotonic() > deadline:
        raise DeadlineExceededError(f"{key} was not written by its deadline; nothing of it is visible")
