"""A disk that can lose its power: what may be found on it afterwards.

The model, which allows a little more than ext4 and xfs do and so is on the safe side of both:

- The bytes of a file are certain once it was synced. Until then it may be found empty, cut off, full of zeros, or whole.
- A name is certain once its directory was synced: created, linked, renamed or removed. Until then each change may have happened or not,
  in any combination; a rename happens as a whole. A sync of the file does not help its name.
- A directory that is lost takes everything below it along.
"""

import dataclasses
import itertools
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spotguard.stores.posix import Posix

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["PowerCut", "PowerCutDisk", "Tree"]

Tree = Mapping[str, "bytes | None"]
"""Path below the root to content; None for a directory."""


@dataclasses.dataclass(eq=False)
class _File:
    data: bytes = b""
    synced: bytes | None = None

    def found(self, damage: str) -> bytes:
        if self.synced == self.data:
            return self.data
        certain = self.synced or b""
        rest = len(self.data) - len(certain)
        return {
            "empty": certain,
            "short": self.data[: len(certain) + rest // 2],
            "zeros": certain + bytes(rest),
            "whole": self.data,
        }[damage]


@dataclasses.dataclass(eq=False)
class _Directory:
    names: dict[str, "_File | _Directory"] = dataclasses.field(default_factory=dict)
    synced: dict[str, "_File | _Directory"] = dataclasses.field(default_factory=dict)
    pending: list[dict[str, "_File | _Directory | None"]] = dataclasses.field(default_factory=list)

    def apply(self, change: "dict[str, _File | _Directory | None]") -> None:
        _apply(self.names, change)
        self.pending.append(change)

    def sync(self) -> None:
        self.synced, self.pending = dict(self.names), []


def _apply(names: "dict[str, _File | _Directory]", change: "dict[str, _File | _Directory | None]") -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


@dataclasses.dataclass(frozen=True)
class PowerCut:
    """One way in which the disk may be found.

    Attributes:
        after: Number of system calls before the cut.
        call: The last of them, in words.
        survived: What became of that which was not synced, in words.
        marks: What had been marked before the cut, see `PowerCutDisk.mark`.
        tree: Every file and directory.
    """

    after: int
    call: str
    survived: str
    marks: tuple[str, ...]
    tree: Tree = dataclasses.field(repr=False)

    def write_to(self, root: Path) -> None:
        """Put that disk into a directory that is empty."""
        for path, data in sorted(self.tree.items()):
            if data is None:
                (root / path).mkdir(parents=True, exist_ok=True)
            else:
                (root / path).write_bytes(data)


class PowerCutDisk(Posix):
    """Makes the calls, and remembers which of them a power cut could undo.

    Args:
        root: An empty directory; everything happens below it.
        seed: For the combinations of changes that are tried where there are too many for all.

    Example:
        >>> import tempfile
        >>> from spotguard.stores import LocalObjectStore
        >>> root = Path(tempfile.mkdtemp())
        >>> disk = PowerCutDisk(root)
        >>> with LocalObjectStore(root, fs=disk).create("object") as writer:
        ...     _ = writer.write(b"bytes")
        >>> {cut.tree.get("object") for cut in disk.cuts} == {None, b"bytes"}  # never a part of it
        True
    """

    def __init__(self, root: Path, *, seed: int = 0) -> None:
        self.root = root
        self.cuts: list[PowerCut] = []
        self._top = _Directory()
        self._open: dict[int, _File] = {}
        self._marks: tuple[str, ...] = ()
        self._calls = 0
        self._random = random.Random(seed)
        self._seen: set[tuple[object, ...]] = set()

    def mark(self, text: str) -> None:
        """Note that something is promised from here on: that a save has returned, say."""
        self._marks += (text,)
        self._cut(f"mark {text}")

    def create(self, path: Path) -> int:
        """Adds a name."""
        descriptor = super().create(path)
        self._open[descriptor] = _File()
        self._change(path, self._open[descriptor], "create")
        return descriptor

    def write(self, descriptor: int, data: "Buffer") -> int:
        """Adds bytes."""
        done = super().write(descriptor, data)
        self._open[descriptor].data += bytes(memoryview(data).cast("B")[:done])
        self._cut("write")
        return done

    def fsync(self, descriptor: int) -> None:
        """Makes the bytes certain."""
        self._open[descriptor].synced = self._open[descriptor].data
        self._cut("fsync")

    def link(self, source: Path, target: Path) -> None:
        """Adds a name."""
        super().link(source, target)
        self._change(target, self._node(source), "link")

    def replace(self, source: Path, target: Path) -> None:
        """Changes two names as one, if they are in the same directory."""
        super().replace(source, target)
        assert source.parent == target.parent, "the model knows renames within a directory only"
        self._directory(target.parent).apply({source.name: None, target.name: self._node(source)})
        self._cut(f"replace {target.name}")

    def unlink(self, path: Path) -> None:
        """Removes a name."""
        super().unlink(path)
        self._change(path, None, "unlink")

    def mkdir(self, path: Path) -> None:
        """Adds a name."""
        super().mkdir(path)
        self._change(path, _Directory(), "mkdir")

    def rmdir(self, path: Path) -> None:
        """Removes a name."""
        super().rmdir(path)
        self._change(path, None, "rmdir")

    def sync_directory(self, path: Path) -> None:
        """Makes the names certain."""
        if not path.is_dir():
            super().sync_directory(path)
        if path.is_relative_to(self.root):
            self._directory(path).sync()
            self._cut("sync_directory")

    def _change(self, path: Path, node: "_File | _Directory | None", name: str) -> None:
        self._directory(path.parent).apply({path.name: node})
        self._cut(f"{name} {path.name}")

    def _node(self, path: Path) -> "_File | _Directory":
        node: _File | _Directory = self._top
        for part in path.relative_to(self.root).parts:
            assert isinstance(node, _Directory)
            node = node.names[part]
        return node

    def _directory(self, path: Path) -> _Directory:
        node = self._node(path)
        assert isinstance(node, _Directory)
        return node

    def _cut(self, call: str) -> None:
        """Remember every disk that would be found if the power failed now."""
        self._calls += 1
        changes = list(self._pending(self._top))
        for chosen in self._choices(len(changes)):
            lost = {id(changes[index]) for index in range(len(changes)) if index not in chosen}
            for damage in ("empty", "short", "zeros", "whole"):
                tree: dict[str, bytes | None] = {}
                _found(self._top, "", lost, damage, tree)
                key = (self._marks, tuple(sorted(tree.items())))
                if key not in self._seen:
                    self._seen.add(key)
                    survived = f"{len(chosen)} of {len(changes)} changed names are kept, unsynced files are {damage}"
                    self.cuts.append(PowerCut(self._calls, call, survived, self._marks, tree))

    def _pending(self, directory: _Directory) -> "Iterator[dict[str, _File | _Directory | None]]":
        """Changes that are not certain, below `directory`; those in a directory that was removed cannot matter."""
        yield from directory.pending
        nodes = {id(node): node for node in itertools.chain(directory.names.values(), directory.synced.values())}
        for node in nodes.values():
            if isinstance(node, _Directory):
                yield from self._pending(node)

    def _choices(self, count: int) -> Iterator[frozenset[int]]:
        """Sets of changes that survive: all of them up to 4 changes; else none, all, each prefix, each one, all but one, some at random."""
        everything = frozenset(range(count))
        if count <= 4:
            for size in range(count + 1):
                yield from map(frozenset, itertools.combinations(range(count), size))
            return
        yield from (frozenset(range(end)) for end in range(count + 1))
        for index in range(count):
            yield frozenset({index})
            yield everything - {index}
        for _ in range(8):
            yield frozenset(index for index in range(count) if self._random.random() < 0.5)


def _found(directory: _Directory, prefix: str, lost: set[int], damage: str, tree: "dict[str, bytes | None]") -> None:
    names = dict(directory.synced)
    for change in directory.pending:
        if id(change) not in lost:
            _apply(names, change)
    for name, node in names.items():
        path = f"{prefix}{os.sep}{name}" if prefix else name
        if isinstance(node, _Directory):
            tree[path] = None
            _found(node, path, lost, damage, tree)
        else:
            tree[path] = node.found(damage)
