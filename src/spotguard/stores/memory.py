"""A store in the memory of this process, for tests and for trying things out. Named stores are shared by everyone who opens them."""

import contextlib
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from spotguard.checkpoint import Digest
from spotguard.errors import ObjectExistsError, ObjectNotFoundError
from spotguard.stores.base import (
    ObjectInfo,
    ObjectReader,
    ObjectRef,
    ObjectWriter,
    Progress,
    check_deadline,
    check_key,
    check_prefix,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MemoryObjectStore"]


class _Writer:
    def __init__(self, key: str, deadline: float | None) -> None:
        self.key, self.deadline = key, deadline
        self.data = bytearray()
        self.info: ObjectInfo | None = None

    def write(self, data: "Buffer", /, progress: Progress | None = None, digest: Digest | None = None) -> int:
        check_deadline(self.deadline, self.key)
        view = memoryview(data).cast("B")
        if digest is not None:
            digest.update(view, len(self.data))
        self.data += view
        if progress is not None:
            progress(len(view))
        return len(view)


class _Reader(io.BytesIO):
    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.size = len(data)

    def read_into(
        self, buffer: "Buffer", offset: int, /, progress: Progress | None = None, digest: Digest | None = None
    ) -> int:
        target = memoryview(buffer).cast("B")
        piece = self.getbuffer()[offset : offset + len(target)]
        target[: len(piece)] = piece
        if digest is not None:
            digest.update(piece, offset)
        if progress is not None:
            progress(len(piece))
        return len(piece)


class MemoryObjectStore:
    """Objects in a dictionary.

    Args:
        name: What comes after ``memory://``.

    Example:
        >>> store = MemoryObjectStore("doc")
        >>> with store.create("a/b") as writer:
        ...     _ = writer.write(b"hello")
        >>> [info.key for info in store.list("a/")], store.open("a/b").read()
        (['a/b'], b'hello')
    """

    _named: dict[str, "MemoryObjectStore"] = {}  # noqa: RUF012 - shared on purpose: a URI names one place

    def __init__(self, name: str = "") -> None:
        self.uri = f"memory://{name}"
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @classmethod
    def named(cls, name: str) -> "MemoryObjectStore":
        """The one store of that name in this process."""
        return cls._named.setdefault(name, cls(name))

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[ObjectWriter]:
        """See `ObjectStore.create`."""
        writer = _Writer(check_key(key), deadline)
        check_deadline(deadline, key)
        yield writer
        check_deadline(deadline, key)
        with self._lock:
            if exclusive and key in self._objects:
                raise ObjectExistsError(f"{self.uri}/{key} exists already")
            self._objects[key] = bytes(writer.data)
        writer.info = ObjectInfo(key, len(writer.data))

    def open(self, key: str, *, version: str | None = None) -> ObjectReader:  # noqa: ARG002 - no versions here
        """See `ObjectStore.open`."""
        try:
            return _Reader(self._objects[check_key(key)])
        except KeyError:
            raise ObjectNotFoundError(f"{self.uri}/{key} does not exist") from None

    def stat(self, key: str, *, version: str | None = None) -> ObjectInfo | None:  # noqa: ARG002 - no versions here
        """See `ObjectStore.stat`."""
        data = self._objects.get(check_key(key))
        return None if data is None else ObjectInfo(key, len(data))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        check_prefix(prefix)
        with self._lock:
            found = sorted((key, len(data)) for key, data in self._objects.items() if key.startswith(prefix))
        return (ObjectInfo(key, size) for key, size in found)

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        """See `ObjectStore.delete`."""
        for ref in refs:
            with self._lock:
                self._objects.pop(check_key(ref.key), None)

    def discard_partials(self, is_stale: Callable[[str], bool]) -> Sequence[str]:  # noqa: ARG002
        """Nothing partial outlives the process here."""
        return []
