"""What `FsspecObjectStore` asks of a back end, and how any file system of fsspec, its memory and its local files give it.

`put` is the point of it all. An exception inside ``with fs.open(path, "wb")`` makes gcsfs, adlfs and s3fs publish the bytes that were
written up to there, as if they were the object. So nothing here opens the final name for writing: the bytes are kept as the views that
the caller gave until the block is left well, and are then published in a way of which each back end promises that it is whole.
"""

# ruff: noqa: ARG002 - each driver takes what the port gives, and needs some of it

import contextlib
import dataclasses
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spotguard.stores.base import ObjectRef, Progress, check_deadline
from spotguard.stores.local import LocalObjectStore

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "Body",
    "Driver",
    "FileSystemDriver",
    "Found",
    "LocalDriver",
    "MemoryDriver",
    "Replaced",
    "is_about_the_place",
]

_ONE_PUT = {"hf", "s3", "s3a"}  # an object appears there in one step, when its last byte has been taken
_COPIED = 1 << 20  # bytes below which a view is copied: many small writes shall not become many small requests
_PIECE = 16 << 20
_PARTIAL = ".sg-"
_NO_PLACE = {"RepositoryNotFoundError", "RevisionNotFoundError", "BucketNotFoundError", "HFValidationError"}


class Replaced(Exception):  # noqa: N818 - never leaves the store: it is translated there
    """The object that is being read is not there any more, or is another one."""


def is_about_the_place(error: BaseException) -> bool:
    """Whether "not found" is said of the repository, which for Hugging Face may mean that it must not be seen, and not of an object."""
    cause: BaseException | None = error
    while cause is not None and _names(cause).isdisjoint(_NO_PLACE):
        cause = cause.__cause__
    return cause is not None


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


@dataclasses.dataclass(frozen=True)
class Found:
    """An object: its size, what tells it from another one under the same name, and the token of the create that wrote it."""

    size: int
    pin: str | None = None
    token: str | None = None


class Block:
    """Some bytes in a row, without a copy where they come from one view."""

    def __init__(self, pieces: list[tuple[memoryview, Progress | None]]) -> None:
        self._told = [(len(view), progress) for view, progress in pieces]
        self.data: Buffer = pieces[0][0] if len(pieces) == 1 else b"".join(view for view, _ in pieces)
        self.size = sum(size for size, _ in self._told)

    def sent(self) -> None:
        """Tell whoever wrote them."""
        for size, progress in self._told:
            if progress is not None:
                progress(size)


class Body:
    """The bytes of an object, as they were given to `write`."""

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[tuple[memoryview, Progress | None]] = []

    def append(self, view: memoryview, progress: Progress | None) -> None:
        """Take in some more; they have to stay as they are."""
        self._pieces.append((memoryview(bytes(view)) if len(view) < _COPIED else view, progress))
        self.size += len(view)

    def blocks(self, size: int) -> Iterator[Block]:
        """In blocks of exactly `size` bytes, but for the last one."""
        block: list[tuple[memoryview, Progress | None]] = []
        room = size
        for whole, progress in self._pieces:
            view = whole
            while len(view):
                block.append((view[:room], progress))
                room -= len(block[-1][0])
                view = view[len(block[-1][0]) :]
                if room == 0:
                    yield Block(block)
                    block, room = [], size
        if block:
            yield Block(block)

    def whole(self) -> Block:
        """All in one; a copy."""
        block = Block(self._pieces or [(memoryview(b""), None)])
        block.data = bytes(block.data)
        return block


class Driver(Protocol):
    """One back end. It raises what the back end raises; the store says it in our words.

    Attributes:
        exclusive: Exclusive create is documented to be atomic there.
        probe: Whether what answers really does it has to be tried: emulators and gateways accept the condition and ignore it.
        parallel: How many ranges of an object are read at once.
    """

    exclusive: bool
    probe: bool
    parallel: int

    def put(self, path: str, body: Body, *, exclusive: bool, token: str, deadline: float | None) -> None: ...

    def find(self, path: str, *, patience: float | None = None) -> Found | None: ...

    def read(self, path: str, start: int, end: int | None, pin: str | None) -> bytes: ...

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]: ...

    def remove(self, paths: Sequence[str]) -> None: ...

    def discard_partials(self, root: str, is_stale: Callable[[str], bool]) -> Sequence[str]: ...


class FileSystemDriver:
    """Any file system of fsspec. It goes to a temporary name first, for one like SFTP shows a file while it grows.

    Args:
        make: Makes the file system. Several threads never share one: what one of them has listed would answer the question of another.
        protocol: Its name.
    """

    exclusive = False
    probe = False
    parallel = 4

    def __init__(self, make: Callable[[], Any], protocol: str) -> None:
        self._make, self._one_put = make, protocol in _ONE_PUT
        self._idle: list[Any] = []

    @contextlib.contextmanager
    def _fs(self) -> Iterator[Any]:
        try:
            fs = self._idle.pop()
        except IndexError:
            fs = self._make()
        try:
            yield fs
        finally:
            self._idle.append(fs)

    def put(self, path: str, body: Body, *, exclusive: bool, token: str, deadline: float | None) -> None:
        if exclusive and self.find(path) is not None:  # only with single_writer: somebody else could come in between
            raise FileExistsError(path)
        if self._one_put:
            self._upload(path, body, deadline)
            return
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/{_PARTIAL}{name}-{secrets.token_hex(6)}.tmp"
        try:
            with self._fs() as fs:
                fs.makedirs(folder, exist_ok=True)
            self._upload(temporary, body, deadline)
            found = self.find(temporary)
            if found is None or found.size != body.size:
                raise OSError(f"{found.size if found else 0} bytes are there after {body.size} were written")
            check_deadline(deadline, path)
            with self._fs() as fs:
                fs.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception), self._fs() as fs:
                fs.rm_file(temporary)
            raise

    def _upload(self, path: str, body: Body, deadline: float | None) -> None:
        with self._fs() as fs:
            file = fs.open(path, "wb")
            try:
                for block in body.blocks(_PIECE):
                    check_deadline(deadline, path)
                    file.write(block.data)
                    block.sent()
                check_deadline(deadline, path)
                file.close()
            except BaseException:
                # Neither `close` nor the finalizer, which calls it, may run: they would publish what is there.
                with contextlib.suppress(Exception):
                    file.discard()
                with contextlib.suppress(AttributeError):
                    file.closed = True
                with contextlib.suppress(AttributeError, OSError):  # huggingface_hub collects it on the disk
                    file.temp_file.close()
                    Path(file.temp_file.name).unlink()
                raise

    def find(self, path: str, *, patience: float | None = None) -> Found | None:
        with self._fs() as fs:
            fs.invalidate_cache()
            try:
                info = fs.info(path)
            except (FileNotFoundError, NotADirectoryError) as error:
                if is_about_the_place(error):
                    raise
                return None
        return Found(int(info["size"]), self._pin(info)) if info["type"] == "file" else None

    def _pin(self, info: dict[str, Any]) -> str:
        # Not fs.ukey(path): it would ask again, and hash times of access too.
        names = (
            "size",
            "etag",
            "ETag",
            "generation",
            "blob_id",
            "ino",
            "mtime",
            "modified",
            "created",
            "last_modified",
            "LastModified",
        )
        return repr([info.get(name) for name in names])

    def read(self, path: str, start: int, end: int | None, pin: str | None) -> bytes:
        with self._fs() as fs:
            data = fs.cat_file(path, start=start, end=end)
        if pin is not None:
            found = self.find(path)
            if found is None or found.pin != pin:
                raise Replaced
        return bytes(data)

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        with self._fs() as fs:
            fs.invalidate_cache()
            try:
                found = fs.find(prefix.rpartition("/")[0], detail=True)
            except (FileNotFoundError, NotADirectoryError) as error:
                if is_about_the_place(error):
                    raise
                return
        for path, info in found.items():
            yield fs._strip_protocol(path), int(info["size"])  # noqa: SLF001 - fsspec's own way to say it

    def remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            if self.find(path) is None:  # a directory is no object, and some would remove it with all that is below
                continue
            try:
                with self._fs() as fs:
                    fs.rm_file(path)
            except Exception as error:
                if _names(error).isdisjoint({"FileNotFoundError", "EntryNotFoundError"}):  # else somebody was faster
                    raise

    def discard_partials(self, root: str, is_stale: Callable[[str], bool]) -> Sequence[str]:
        gone = []
        for path, _ in list(self.walk(f"{root}/")):
            folder, _, name = path[len(root) + 1 :].rpartition("/")
            if not (name.startswith(_PARTIAL) and name.endswith(".tmp")):
                continue
            key = f"{folder}/{name[len(_PARTIAL) : -17]}".lstrip("/")  # 17: a dash, twelve digits and the ending
            if is_stale(key):
                with contextlib.suppress(FileNotFoundError), self._fs() as fs:
                    fs.rm_file(path)
                gone.append(key)
        return gone


class MemoryDriver(FileSystemDriver):
    """fsspec's dictionary, which all instances share. No other process sees it, so a lock of this process is enough."""

    exclusive = True
    parallel = 1
    _lock = threading.RLock()

    def put(self, path: str, body: Body, *, exclusive: bool, token: str, deadline: float | None) -> None:
        block = body.whole()
        with self._lock:
            check_deadline(deadline, path)
            if exclusive and self.find(path) is not None:
                raise FileExistsError(path)
            with self._fs() as fs:
                fs.pipe_file(path, block.data)
        block.sent()

    def find(self, path: str, *, patience: float | None = None) -> Found | None:
        with self._lock:
            return super().find(path, patience=patience)

    def read(self, path: str, start: int, end: int | None, pin: str | None) -> bytes:
        with self._lock:  # a file that is open there has one position, which all its readers share
            return super().read(path, start, end, pin)

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        with self._lock:
            return iter(list(super().walk(prefix)))

    def remove(self, paths: Sequence[str]) -> None:
        with self._lock:
            super().remove(paths)


class LocalDriver:
    """fsspec's local files are written in place. `LocalObjectStore` knows better."""

    exclusive = True
    probe = False
    parallel = 1

    def __init__(self, root: str) -> None:
        self._root, self._store = root, LocalObjectStore(root)

    def put(self, path: str, body: Body, *, exclusive: bool, token: str, deadline: float | None) -> None:
        with self._store.create(self._key(path), exclusive=exclusive, deadline=deadline) as writer:
            for block in body.blocks(_PIECE):
                writer.write(block.data)
                block.sent()

    def find(self, path: str, *, patience: float | None = None) -> Found | None:
        info = self._store.stat(self._key(path))
        return None if info is None else Found(info.size, _identity(Path(path).stat()))

    def read(self, path: str, start: int, end: int | None, pin: str | None) -> bytes:
        with Path(path).open("rb") as file:
            if pin is not None and _identity(os.fstat(file.fileno())) != pin:
                raise Replaced
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((f"{self._root}/{info.key}", info.size) for info in self._store.list(self._key(prefix)))

    def remove(self, paths: Iterable[str]) -> None:
        self._store.delete([ObjectRef(self._key(path)) for path in paths])

    def discard_partials(self, root: str, is_stale: Callable[[str], bool]) -> Sequence[str]:
        return self._store.discard_partials(is_stale)

    def _key(self, path: str) -> str:
        return path[len(self._root) + 1 :]


def _identity(found: os.stat_result) -> str:
    return f"{found.st_dev}-{found.st_ino}-{found.st_mtime_ns}"
