"""A directory as a store. An object is visible whole and durable, or not at all, through a crash at any point.

Create is: temporary file in the same directory, write, fsync, link (exclusive) or rename (else), fsync of the directory. A rename
without the first fsync can leave an empty file after a power cut, one without the second can lose the name.
"""

import contextlib
import errno
import io
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spotguard.checkpoint import Digest
from spotguard.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    TransientStoreError,
)
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
from spotguard.stores.posix import Posix

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["LocalObjectStore"]

_CHUNK = 8 << 20  # between two looks at the deadline
_TRIES = 50  # to create a file in a directory that somebody else removes, because it is empty
_PARTIAL = re.compile(r"\.sg-(.+)-[0-9a-f]{12}\.tmp|\.sg-(.+)\.lock")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
_TRANSIENT = {errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Writer:
    def __init__(self, fs: Posix, descriptor: int, path: Path, key: str, deadline: float | None) -> None:
        self._fs, self._descriptor, self._path, self._key, self._deadline = fs, descriptor, path, key, deadline
        self.size = 0
        self.info: ObjectInfo | None = None

    def write(self, data: "Buffer", /, progress: Progress | None = None, digest: Digest | None = None) -> int:
        view = memoryview(data).cast("B")
        done = 0
        with _translated(self._path):
            while done < len(view):
                check_deadline(self._deadline, self._key)
                count = self._fs.write(self._descriptor, view[done : done + _CHUNK])
                if digest is not None:
                    digest.update(view[done : done + count], self.size + done)
                done += count
                if progress is not None:
                    progress(count)
        self.size += done
        return done


class _Reader(io.FileIO):
    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self.size = os.fstat(self.fileno()).st_size

    def read_into(
        self, buffer: "Buffer", offset: int, /, progress: Progress | None = None, digest: Digest | None = None
    ) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view):
            count = os.preadv(self.fileno(), [view[done : done + _CHUNK]], offset + done)
            if count == 0:
                break
            if digest is not None:
                digest.update(view[done : done + count], offset + done)
            done += count
            if progress is not None:
                progress(count)
        return done


class LocalObjectStore:
    """Objects as files below a directory, which is made by the first write.

    Args:
        root: The directory.
        fs: The system calls; tests put a faulty one here.

    Example:
        >>> import tempfile
        >>> store = LocalObjectStore(Path(tempfile.mkdtemp()))
        >>> with store.create("a/b", exclusive=True) as writer:
        ...     _ = writer.write(b"hello")
        >>> with store.open("a/b") as reader:
        ...     store.stat("a/b").size, reader.read()
        (5, b'hello')
    """

    def __init__(self, root: "str | os.PathLike[str]", *, fs: Posix | None = None) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)
        self._fs = fs or Posix()
        self._synced: set[Path] = set()  # directories whose own name is known to be durable

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[ObjectWriter]:
        """See `ObjectStore.create`."""
        final = self.root / check_key(key)
        check_deadline(deadline, key)
        temporary = final.with_name(f".sg-{final.name}-{secrets.token_hex(6)}.tmp")
        with _translated(final):
            descriptor = self._create_temporary(temporary)
        writer = _Writer(self._fs, descriptor, final, key, deadline)
        try:
            try:
                yield writer
                check_deadline(deadline, key)
                with _translated(final):
                    self._fs.fsync(descriptor)
            finally:
                with _translated(final):  # over a network the quota may speak up only here
                    self._fs.close(descriptor)
            check_deadline(deadline, key)
            with _translated(final):
                if exclusive:
                    self._name_exclusively(temporary, final)
                else:
                    self._fs.replace(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                self._fs.unlink(temporary)
            raise
        with _translated(final):
            self._sync_nearest(final.parent)
        writer.info = ObjectInfo(key, writer.size)

    def open(self, key: str, *, version: str | None = None) -> ObjectReader:  # noqa: ARG002 - no versions here
        """See `ObjectStore.open`."""
        path = self.root / check_key(key)
        with _translated(path), _directories_are_no_objects(path):
            return _Reader(path)

    def stat(self, key: str, *, version: str | None = None) -> ObjectInfo | None:  # noqa: ARG002 - no versions here
        """See `ObjectStore.stat`."""
        path = f"{self.uri}/{check_key(key)}"
        try:
            found = os.stat(path)  # noqa: PTH116 - asked every second for a request to stop: a `Path` costs as much again
        except (FileNotFoundError, NotADirectoryError):  # and this is the answer
            return None
        except OSError as error:
            raise _translate(error, Path(path)) from error
        return ObjectInfo(key, found.st_size) if stat.S_ISREG(found.st_mode) else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        folder = check_prefix(prefix).rpartition("/")[0]
        return (ObjectInfo(key, size) for key, size in self._walk(self.root / folder, folder) if key.startswith(prefix))

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        """See `ObjectStore.delete`. Durable when it returns; a directory that becomes empty goes with its last object."""
        touched: set[Path] = set()
        for ref in refs:
            path = self.root / check_key(ref.key)
            try:
                with _translated(path), _directories_are_no_objects(path):
                    self._fs.unlink(path)
                    if _lock_of(path).exists():  # from a mount without hard links
                        self._fs.unlink(_lock_of(path))
            except ObjectNotFoundError:
                continue
            touched.add(path.parent)
        for folder in sorted(touched):
            with _translated(folder):
                self._drop_if_empty(folder)
                self._sync_nearest(folder)

    def discard_partials(self, is_stale: Callable[[str], bool]) -> Sequence[str]:
        """See `ObjectStore.discard_partials`."""
        gone = []
        for folder, folders, names in os.walk(self.root):
            inside = Path(folder).relative_to(self.root)
            left = len(folders) + len(names)
            for name in sorted(names):  # a temporary file before the lock that lets it be renamed
                match = _PARTIAL.fullmatch(name)
                if match is None:
                    continue
                key = (inside / (match[1] or match[2])).as_posix()
                if not is_stale(key) or (match[2] and (Path(folder) / match[2]).exists()):
                    continue
                with _translated(Path(folder, name)), contextlib.suppress(FileNotFoundError):
                    self._fs.unlink(Path(folder, name))
                gone.append(key)
                left -= 1
            if left == 0 and inside.parts[1:] and is_stale(inside.as_posix()):
                with _translated(Path(folder)):
                    self._drop_if_empty(Path(folder))
        return gone

    def _name_exclusively(self, temporary: Path, final: Path) -> None:
        try:
            self._fs.link(temporary, final)
        except FileExistsError:
            # Over NFS the answer to a link that worked may be lost and the retry told "exists": the link count knows (open(2)).
            if temporary.stat().st_nlink != 2:
                self._fs.sync_directory(final.parent)  # whoever is told that it exists may rely on it
                raise
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._name_by_lock(temporary, final)
            return
        with contextlib.suppress(
            OSError
        ):  # the object has its name; a second one is cleared away by `discard_partials`
            self._fs.unlink(temporary)

    def _name_by_lock(self, temporary: Path, final: Path) -> None:
        """A mount without hard links: whoever creates the lock file may rename, and nobody else ever will."""
        self._fs.close(self._fs.create(_lock_of(final)))
        self._fs.sync_directory(final.parent)
        if final.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
        try:
            self._fs.replace(temporary, final)
        except OSError:
            with contextlib.suppress(OSError):
                self._fs.unlink(_lock_of(final))  # ours, and the name is still free
            raise

    def _create_temporary(self, path: Path) -> int:
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):  # a delete may have removed the directory, for it was empty
                self._make_directories(path.parent)
                return self._fs.create(path)
        raise StoreAccessError(f"{path.parent}: no directory can be made there; check the path")

    def _sync_nearest(self, folder: Path) -> None:
        """Make the names in a directory durable, or, where it is gone with its last object, that it is gone."""
        while True:
            try:
                self._fs.sync_directory(folder)
            except FileNotFoundError:
                folder = folder.parent
            else:
                return

    def _make_directories(self, folder: Path) -> None:
        missing, path = [], folder
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                self._fs.mkdir(path)
            self._fs.sync_directory(path.parent)
        # One that was found here may be from a process that was killed before it had synced it.
        for path in (folder, *folder.parents):
            if path in self._synced or not path.is_relative_to(self.root):
                break
            if path not in missing:
                with contextlib.suppress(*([PermissionError] if path == self.root else [])):  # above us we may not look
                    self._fs.sync_directory(path.parent)
            self._synced.add(path)

    def _drop_if_empty(self, folder: Path) -> None:
        if folder == self.root or folder.parent == self.root:
            return  # "manifests" and its like stay: a writer may be about to create in them
        self._synced.discard(folder)
        try:
            self._fs.rmdir(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
        try:
            with _translated(folder), _directories_are_no_objects(folder), os.scandir(folder) as entries:
                # "a.b" sorts before "a/b": a directory takes part in the order of the keys with its slash.
                found = sorted((entry.name + "/" * entry.is_dir(), entry) for entry in entries)
        except ObjectNotFoundError:
            return
        for name, entry in found:
            key = f"{prefix}/{name}" if prefix else name
            if name.startswith("."):
                continue
            if name.endswith("/"):
                yield from self._walk(folder / entry.name, key[:-1])
            else:
                with contextlib.suppress(FileNotFoundError):  # deleted while we were listing
                    yield key, entry.stat().st_size


def _lock_of(path: Path) -> Path:
    return path.with_name(f".sg-{path.name}.lock")


@contextlib.contextmanager
def _directories_are_no_objects(path: Path) -> Iterator[None]:
    """A key that names a directory, or one below an object, names nothing, as in a store without directories."""
    try:
        yield
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Say in our words what the system said about `path`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise _translate(error, path) from error


def _translate(error: OSError, path: Path) -> StoreError:
    kind: type[StoreError]
    if isinstance(error, FileExistsError):
        kind, advice = ObjectExistsError, "exists already"
    elif isinstance(error, FileNotFoundError):
        kind, advice = ObjectNotFoundError, "does not exist"
    elif error.errno in _ACCESS:
        kind, advice = StoreAccessError, f"{error.strerror}; check the path, its owner and its mode"
    elif error.errno in _FULL:
        kind, advice = StoreError, f"{error.strerror}; free space or keep fewer checkpoints ('spotguard prune')"
    elif error.errno in _TRANSIENT:
        kind, advice = TransientStoreError, f"{error.strerror}"
    else:
        kind, advice = StoreError, f"{error.strerror or error}"
    translated = kind(f"{path}: {advice}")
    translated.errno = error.errno
    return translated
