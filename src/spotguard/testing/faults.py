"""Trouble on demand for a local store: death at any system call, calls that fail, and power cuts.

Each class here takes the place of `spotguard.stores.posix.Posix`, and they can be stacked::

    store = LocalObjectStore(path, fs=Dying(at=17))                  # the process dies before system call 17
    store = LocalObjectStore(path, fs=Failing(errno.ENOSPC, "write"))  # the disk is full

`spotguard.testing.power` has the disk that forgets what was not synced. All system calls count but `close`, which changes nothing.
"""

import dataclasses
import errno as errors
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from spotguard.stores.posix import Posix

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "Announce",
    "Dying",
    "Failing",
    "Halted",
    "Intercepting",
    "SystemCall",
    "Unsynced",
    "exit_at_once",
    "halt",
    "without_links",
]

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class SystemCall:
    """One call on its way to the system.

    Attributes:
        number: Counts the calls, from 1.
        name: Method of `Posix`: ``"create"``, ``"write"``, ``"fsync"``, ``"link"``, ``"replace"``, ``"unlink"``, ``"mkdir"``,
            ``"rmdir"`` or ``"sync_directory"``.
        path: The file or directory; of a link or a rename the new name.
    """

    number: int
    name: str
    path: Path

    def __str__(self) -> str:
        return f"call {self.number}, {self.name} of {self.path}"


class Intercepting(Posix):
    """Hands every system call to `around`, which a subclass overrides.

    Args:
        inner: What makes the calls in the end.

    Attributes:
        calls: All calls so far.

    Example:
        >>> import tempfile
        >>> from spotguard.stores import LocalObjectStore
        >>> fs = Intercepting()
        >>> with LocalObjectStore(tempfile.mkdtemp(), fs=fs).create("object") as writer:
        ...     _ = writer.write(b"bytes")
        >>> [call.name for call in fs.calls]
        ['sync_directory', 'create', 'write', 'fsync', 'replace', 'sync_directory']
    """

    def __init__(self, inner: Posix | None = None) -> None:
        self.inner = inner or Posix()
        self.calls: list[SystemCall] = []
        self._paths: dict[int, Path] = {}
        self._lock = threading.Lock()

    def around(self, call: SystemCall, action: Callable[[], _T]) -> _T:  # noqa: ARG002 - subclasses look at it
        """Make the call, or do not."""
        return action()

    def half(self, call: SystemCall, descriptor: int, data: "Buffer") -> int:  # noqa: ARG002 - subclasses look at it
        """Make a write; a subclass may write less than all."""
        return self.inner.write(descriptor, data)

    def _do(self, name: str, path: Path, action: Callable[[], _T]) -> _T:
        return self.around(self._count(name, path), action)

    def _count(self, name: str, path: Path) -> SystemCall:
        with self._lock:
            call = SystemCall(len(self.calls) + 1, name, path)
            self.calls.append(call)
        return call

    def create(self, path: Path) -> int:
        """Counted."""
        descriptor = self._do("create", path, lambda: self.inner.create(path))
        self._paths[descriptor] = path
        return descriptor

    def write(self, descriptor: int, data: "Buffer") -> int:
        """Counted."""
        call = self._count("write", self._paths[descriptor])
        return self.around(call, lambda: self.half(call, descriptor, data))

    def fsync(self, descriptor: int) -> None:
        """Counted."""
        self._do("fsync", self._paths[descriptor], lambda: self.inner.fsync(descriptor))

    def close(self, descriptor: int) -> None:
        """Not counted."""
        self.inner.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """Counted."""
        self._do("link", target, lambda: self.inner.link(source, target))

    def replace(self, source: Path, target: Path) -> None:
        """Counted."""
        self._do("replace", target, lambda: self.inner.replace(source, target))

    def unlink(self, path: Path) -> None:
        """Counted."""
        self._do("unlink", path, lambda: self.inner.unlink(path))

    def mkdir(self, path: Path) -> None:
        """Counted."""
        self._do("mkdir", path, lambda: self.inner.mkdir(path))

    def rmdir(self, path: Path) -> None:
        """Counted."""
        self._do("rmdir", path, lambda: self.inner.rmdir(path))

    def sync_directory(self, path: Path) -> None:
        """Counted."""
        self._do("sync_directory", path, lambda: self.inner.sync_directory(path))


class Halted(BaseException):
    """The machine stands still: what `halt` raises, and every call after it."""


def exit_at_once() -> None:
    """Die as by SIGKILL: no cleanup, no handler, exit status 137."""
    os._exit(137)


def halt() -> None:
    """Die without leaving the process: no further call of the same `Dying` reaches the disk, so no cleanup can either."""
    raise Halted


class Announce:
    """Say through a pipe that the place has been reached, and wait there to be killed.

    Args:
        descriptor: Writing end of a pipe.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self) -> None:
        """One byte, then nothing ever again."""
        os.write(self._descriptor, b"!")
        while True:
            threading.Event().wait()


class Dying(Intercepting):
    """Dies at one system call.

    Args:
        at: Number of the call, from 1; 0 never dies.
        when: ``"before"`` it, ``"after"`` it, or ``"half"``: a write puts half of its bytes into the file first, any other call dies
            before it.
        death: What dying is: `exit_at_once`, `halt`, or an `Announce`.
        inner: What makes the calls in the end.

    Example:
        >>> import tempfile
        >>> from spotguard.stores import LocalObjectStore
        >>> store = LocalObjectStore(tempfile.mkdtemp(), fs=Dying(at=5, death=halt))  # before the rename
        >>> try:
        ...     with store.create("object") as writer:
        ...         _ = writer.write(b"bytes")
        ... except Halted:
        ...     print(store.stat("object"), [path.suffix for path in store.root.iterdir()])
        None ['.tmp']
    """

    def __init__(
        self, at: int = 0, when: str = "before", *, death: Callable[[], None] = exit_at_once, inner: Posix | None = None
    ) -> None:
        super().__init__(inner)
        if when not in ("before", "half", "after"):
            raise ValueError(f"when={when!r}: write 'before', 'half' or 'after'")
        self.at, self.when = at, when
        self._death = death
        self.dead = False

    def around(self, call: SystemCall, action: Callable[[], _T]) -> _T:
        """Die here, or pass on."""
        if self.dead:
            raise Halted
        here = call.number == self.at
        if here and (self.when == "before" or (self.when == "half" and call.name != "write")):
            self._die()
        try:
            return action()
        finally:  # also when the system says no
            if here:
                self._die()

    def half(self, call: SystemCall, descriptor: int, data: "Buffer") -> int:
        """All bytes, or half of them if this is the place."""
        view = memoryview(data).cast("B")
        here = call.number == self.at and self.when == "half"
        return self.inner.write(descriptor, view[: len(view) // 2] if here else view)

    def _die(self) -> None:
        self.dead = True
        self._death()


class Failing(Intercepting):
    """Fails calls instead of making them, as a full disk or a broken one does.

    Args:
        errno: The error, such as ``errno.ENOSPC``.
        names: Calls that fail, such as ``"write"``.
        at: Only the call of this number fails; 0 for all of those names.
        inner: What makes the calls in the end.

    Attributes:
        active: Set it to False and the trouble is over.
        failed: How many calls failed.

    Example:
        >>> import errno, tempfile
        >>> from spotguard.stores import LocalObjectStore
        >>> store = LocalObjectStore(tempfile.mkdtemp(), fs=Failing(errno.ENOSPC, "write"))
        >>> with store.create("object") as writer:  # doctest: +ELLIPSIS
        ...     _ = writer.write(b"bytes")
        Traceback (most recent call last):
        ...
        spotguard.errors.StoreError: ...: No space left on device; free space or keep fewer checkpoints ('spotguard prune')
    """

    def __init__(self, errno: int, *names: str, at: int = 0, inner: Posix | None = None) -> None:
        super().__init__(inner)
        self.errno, self.at = errno, at
        self.names: Collection[str] = names
        self.active, self.failed = True, 0

    def around(self, call: SystemCall, action: Callable[[], _T]) -> _T:
        """Fail, or pass on."""
        wanted = call.number == self.at if self.at else not self.names or call.name in self.names
        if self.active and wanted:
            self.failed += 1
            raise OSError(self.errno, os.strerror(self.errno), str(call.path))
        return action()


def without_links(inner: Posix | None = None) -> Failing:
    """A mount that has no hard links, such as FAT or many a network share."""
    return Failing(errors.EPERM, "link", inner=inner)


class Unsynced(Posix):
    """Skips every sync, for tests about anything but durability that would spend their time on it."""

    def fsync(self, descriptor: int) -> None:
        """Not done."""

    def sync_directory(self, path: Path) -> None:
        """Not done; raises as the real one does where there is no such directory."""
        path.stat()
