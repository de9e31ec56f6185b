"""The two kinds of reader: over bytes that were fetched when the object was opened, and in pieces."""

import concurrent.futures
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from spotguard.checkpoint import Digest
from spotguard.stores.base import Progress

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = ["LargeReader", "SmallReader"]

_PIECE = 16 << 20


class SmallReader(io.BytesIO):
    """An object that was read when it was opened."""

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


class LargeReader:
    """An object that is read in pieces. It raises once it has been replaced."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, parallel: int) -> None:
        self._fetch, self.size, self._parallel = fetch, size, parallel
        self._position = 0

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self.size - self._position)
        data = bytearray(left if size < 0 else min(size, left))
        self._position += self.read_into(data, self._position)
        return bytes(data)

    def read_into(
        self, buffer: "Buffer", offset: int, /, progress: Progress | None = None, digest: Digest | None = None
    ) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self.size - offset)]

        def piece(start: int) -> None:
            part = view[start : start + _PIECE]
            part[:] = self._fetch(offset + start, offset + start + len(part))
            if digest is not None:
                digest.update(part, offset + start)
            if progress is not None:
                progress(len(part))

        starts = range(0, len(view), _PIECE)
        if len(starts) < 2 or self._parallel < 2:
            for start in starts:
                piece(start)
            return len(view)
        with concurrent.futures.ThreadPoolExecutor(self._parallel, thread_name_prefix="spotguard-read") as pool:
            jobs = [pool.submit(piece, start) for start in starts]
            try:
                for job in jobs:
                    job.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return len(view)

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
