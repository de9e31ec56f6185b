"""One member, one torch file: laid out once, filled again at every save.

A torch file is a zip archive of stored (never compressed) records: ``data.pkl`` holds the structure, ``data/0``, ``data/1``, ... the
bytes of the storages, each at a multiple of 64 bytes. The layout depends on nothing but the sizes, so a save is one copy of each
storage to a known place plus a small pickle, and the buffer *is* the file: hashed, written and uploaded as it stands.

Two liberties, both of which ``torch.load`` allows: ``data.pkl`` is followed by zero bytes, for room to grow (a pickle ends at its STOP),
and the CRC-32 fields of the archive are zero, as after ``torch.serialization.set_crc32_options(False)``; the digest in the manifest
takes their place. Above 4 GiB the zip64 fields of the archive are used (PKWARE APPNOTE 6.3, section 4.5.3).
"""

import io
import pickle
import struct
import sys
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import torch

from spotguard.errors import CheckpointDamagedError, ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Layout", "MemoryFile", "check_loadable", "check_readable", "decode", "encode"]

_ALIGNMENT = 64
_SLACK = 4096  # the pickle may grow by about this much (a step count gains a digit) before a new layout is needed
_LIMIT32 = 0xFFFFFFFF


class _Pickler(pickle.Pickler):
    """Pickles the structure and collects the storages. The same persistent ids as `torch.save`, with every storage on the CPU."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[torch.UntypedStorage] = []
        self._keys: dict[int, tuple[str, torch.dtype]] = {}

    def persistent_id(self, obj: Any) -> tuple[str, Any, str, str, int] | None:
        if isinstance(obj, torch.storage.TypedStorage):
            storage, dtype, count = obj._untyped_storage, obj.dtype, obj._size()  # noqa: SLF001 - as torch.save does
            kind = getattr(torch, obj._pickle_storage_type())  # noqa: SLF001
        elif isinstance(obj, torch.UntypedStorage):
            storage, dtype, count, kind = obj, torch.uint8, obj.nbytes(), torch.UntypedStorage
        else:
            return None
        key, known = self._keys.setdefault(storage._cdata, (str(len(self.storages)), dtype))  # noqa: SLF001
        if known != dtype:
            raise ConfigError(
                f"two tensors view the same memory as {known} and as {dtype}; torch files cannot hold that: clone one"
            )
        if key == str(len(self.storages)):
            self.storages.append(storage)
        return ("storage", kind, key, "cpu", count)


def encode(tree: Any) -> tuple[bytes, list[torch.UntypedStorage]]:
    """Split a tree of tensors and plain values into the pickle of its structure and its storages (live, not copied)."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(tree)
    return file.getvalue(), pickler.storages


class _Record(NamedTuple):
    name: bytes
    header_at: int
    data_at: int
    size: int


class Layout:
    """Where everything stands in a torch file with storages of these sizes.

    Args:
        pickle_size: Bytes of the pickle that must fit at least.
        sizes: Bytes of each storage.

    Attributes:
        size: Bytes of the whole file.
        offsets: Where the bytes of each storage begin.
        room: Bytes there are for the pickle.
    """

    def __init__(self, pickle_size: int, sizes: list[int]) -> None:
        self.sizes = sizes
        self.room = -(-(pickle_size + _SLACK // 2) // _SLACK) * _SLACK
        small = {b"byteorder": sys.byteorder.encode(), b"version": b"3\n"}
        self._contents = {b"archive/" + name: text for name, text in small.items()}
        end, self._records = 0, []
        for name, size in [
            (b"data.pkl", self.room),
            (b"byteorder", len(sys.byteorder)),
            *((b"data/%d" % index, size) for index, size in enumerate(sizes)),
            (b"version", 2),
        ]:
            path = b"archive/" + name
            fixed = end + 30 + len(path) + 20 + 4  # header, name, room for the zip64 sizes, head of the padding field
            record = _Record(path, end, fixed + -fixed % _ALIGNMENT, size)
            self._records.append(record)
            end = record.data_at + size
        self._directory_at = end
        self._tail = self._directory()
        self.size = end + len(self._tail)
        self.pickle_at = self._records[0].data_at
        self.offsets = [record.data_at for record in self._records[2:-1]]

    def write_frame(self, image: memoryview) -> None:
        """Write everything but the pickle and the storages into the file image."""
        for record in self._records:
            header = self._local_header(record)
            image[record.header_at : record.header_at + len(header)] = header
            if text := self._contents.get(record.name):
                image[record.data_at : record.data_at + len(text)] = text
        image[self._directory_at : self.size] = self._tail

    def write_pickle(self, image: memoryview, data: bytes) -> None:
        """Write the pickle, and zero bytes behind it."""
        image[self.pickle_at : self.pickle_at + self.room] = data.ljust(self.room, b"\0")

    @staticmethod
    def _local_header(record: _Record) -> bytes:
        short, extra = _sizes(record.size)
        padding = record.data_at - record.header_at - 30 - len(record.name) - len(extra) - 4
        extra += struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", the padding field that torch writes
        return (
            struct.pack("<IHHHHHIIIHH", 0x04034B50, 45, 0, 0, 0, 33, 0, short, short, len(record.name), len(extra))
            + record.name
            + extra
        )

    def _directory(self) -> bytes:
        entries = bytearray()  # bytes would be copied whole for each of what may be many thousands
        for record in self._records:
            short, extra = _sizes(record.size)
            at = record.header_at
            if at >= _LIMIT32:
                body = extra[4:] + struct.pack("<Q", at)
                extra, at = struct.pack("<HH", 1, len(body)) + body, _LIMIT32
            entries += struct.pack(
                "<IHHHHHHIIIHHHHHII",
                0x02014B50,
                45,
                45,
                0,
                0,
                0,
                33,
                0,
                short,
                short,
                len(record.name),
                len(extra),
                0,
                0,
                0,
                0,
                at,
            )
            entries += record.name + extra
        count, at = len(self._records), self._directory_at
        end64 = b""
        if at + len(entries) >= _LIMIT32 or count >= 0xFFFF:
            end64 = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, len(entries), at)
            end64 += struct.pack("<IIQI", 0x07064B50, 0, at + len(entries), 1)
            count, at = min(count, 0xFFFF), _LIMIT32
        return bytes(entries) + end64 + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, len(entries), at, 0)


def _sizes(size: int) -> tuple[int, bytes]:
    """The 32-bit size field, and the zip64 extra field where 32 bits are too few."""
    return (size, b"") if size < _LIMIT32 else (_LIMIT32, struct.pack("<HHQQ", 1, 16, size, size))


class MemoryFile(io.RawIOBase):
    """A read-only file over a buffer, without a copy of it.

    Example:
        >>> MemoryFile(b"abc").read()
        b'abc'
    """

    def __init__(self, data: "Buffer") -> None:
        super().__init__()
        self._view = memoryview(data).cast("B")
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move; returns the new position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def readinto(self, buffer: "Buffer", /) -> int:
        """Fill `buffer` from here on; returns how many bytes there were."""
        target = memoryview(buffer).cast("B")
        piece = self._view[self._at : self._at + len(target)]
        target[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def decode(data: "Buffer", *, key: str) -> Any:
    """Read a verified torch file; runs no code from it.

    Args:
        data: The whole file.
        key: Where it was read, for the message.

    Raises:
        CheckpointDamagedError: Not a torch file, or one that needs code to be read.
    """
    try:
        return torch.load(cast("IO[bytes]", MemoryFile(data)), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise CheckpointDamagedError(f"{key} cannot be read by torch.load(weights_only=True): {error}") from error


def check_loadable(name: str, tree: Any) -> None:
    """Refuse, before training and not at the resume, a member that could not be read back.

    Raises:
        ConfigError: It holds an object that ``torch.load(weights_only=True)`` would refuse.
    """
    try:
        data, storages = encode(tree)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ConfigError(f"member {name!r}: its state_dict() cannot be saved: {error}") from error
    layout = Layout(len(data), [0] * len(storages))
    image = memoryview(bytearray(layout.size))
    layout.write_frame(image)
    layout.write_pickle(image, data)
    check_readable(name, image)


def check_readable(name: str, data: "Buffer") -> None:
    """Refuse a torch file that ``torch.load(weights_only=True)`` would refuse; looks at its structure only.

    Raises:
        ConfigError: Names the member and the classes that are in the way.
    """
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(MemoryFile(data))  # type: ignore[arg-type] # any file works
    if unsafe:
        raise ConfigError(
            f"member {name!r}: its state_dict() holds {', '.join(sorted(unsafe))}, which torch.load(weights_only=True) refuses to read. "
            "Return tensors, numbers, strings, lists and dicts only"
        )
