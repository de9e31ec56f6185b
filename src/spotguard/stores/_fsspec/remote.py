"""The two back ends that are driven by their own interface: Google Cloud Storage through gcsfs, Azure through adlfs.

fsspec gives the connection, the credentials and the retries; the requests are ours, because the calls of fsspec cannot say what a
create has to say: a condition on a large object, a token that tells whose an object is, the generation that a read began with.

Whole or not at all: a small object is one request with a known length, and a server drops a body that is too short. A larger
one goes in blocks which nobody sees until one last request names them all: the last chunk of a resumable upload, whose session has
been told the full length, or Azure's commit of a block list. What is left of an upload that was cut off is invisible, costs nothing
to readers, and is dropped by the service after a week.
"""

# ruff: noqa: FBT001 - the requests of gcsfs have a leading underscore, and are what its own classes are made of

import asyncio
import concurrent.futures
import io
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from spotguard.stores._fsspec.drivers import Block, Body, Found
from spotguard.stores.base import check_deadline

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["TOKEN", "RemoteDriver", "ViewFile"]

_T = TypeVar("_T")
TOKEN = "spotguard_write"  # noqa: S105 - the name of the metadata, which for Azure has to be an identifier
_AT_ONCE = 16  # deletes


class RemoteDriver:
    exclusive = True
    probe = True
    parallel = 4
    one_request = 8 << 20
    stall_s = (
        60.0  # an upload of which nothing moves for so long is given up; a server may take that long over the last byte
    )

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        self._background: set[asyncio.Task[None]] = set()

    def put(self, path: str, body: Body, *, exclusive: bool, token: str, deadline: float | None) -> None:
        check_deadline(deadline, path)
        one = body.size <= self.one_request
        upload = (
            self._put_whole(path, body.whole(), exclusive, token)
            if one
            else self._put_blocks(path, body, exclusive, token)
        )
        self._run(upload, None if deadline is None else max(0.001, deadline - time.monotonic()))

    def find(self, path: str, *, patience: float | None = None) -> Found | None:
        return self._run(self._find(path), patience)

    def read(self, path: str, start: int, end: int | None, pin: str | None) -> bytes:
        return self._run(self._read(path, start, end, pin))

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        pages = self._pages(prefix)
        while (page := self._run(_next(pages))) is not None:
            yield from page

    def remove(self, paths: Sequence[str]) -> None:
        async def remove() -> None:
            gate = asyncio.Semaphore(_AT_ONCE)

            async def one(path: str) -> None:
                async with gate:
                    await self._remove(path)

            for error in await asyncio.gather(*map(one, paths), return_exceptions=True):  # the others go all the same
                if isinstance(error, BaseException):
                    raise error

        self._run(remove())

    def discard_partials(self, root: str, is_stale: Callable[[str], bool]) -> Sequence[str]:
        del root, is_stale
        return []  # uploads that were cut off cannot be listed; the service drops them after a week

    def _run(self, work: Coroutine[Any, Any, _T], patience: float | None = None) -> _T:
        """Run it on fsspec's loop. Unlike `fsspec.asyn.sync`, it is stopped when we stop waiting: nothing is published behind us."""
        future = asyncio.run_coroutine_threadsafe(work, self.fs.loop)
        try:
            return future.result(patience)
        except BaseException:
            future.cancel()
            concurrent.futures.wait([future], timeout=1)
            raise

    async def _moving(self, request: Coroutine[Any, Any, _T], body: "ViewFile | None" = None) -> _T:
        """Wait for a request as long as its body moves. aiohttp can wait for ever to send on a connection that is already cut."""
        task, seen = asyncio.ensure_future(request), -1
        try:
            while not (await asyncio.wait({task}, timeout=self.stall_s))[0]:
                position = 0 if body is None else body.tell()
                if position == seen or body is None:
                    raise TimeoutError(f"nothing of the upload has moved for {self.stall_s:g} s")
                seen = position
            return task.result()
        finally:
            task.cancel()

    async def _put_whole(self, path: str, block: Block, exclusive: bool, token: str) -> None:
        raise NotImplementedError

    async def _put_blocks(self, path: str, body: Body, exclusive: bool, token: str) -> None:
        raise NotImplementedError

    async def _find(self, path: str) -> Found | None:
        raise NotImplementedError

    async def _read(self, path: str, start: int, end: int | None, pin: str | None) -> bytes:
        raise NotImplementedError

    async def _remove(self, path: str) -> None:
        raise NotImplementedError

    def _pages(self, prefix: str) -> AsyncIterator[list[tuple[str, int]]]:
        raise NotImplementedError


async def _next(pages: AsyncIterator[_T]) -> _T | None:
    return await anext(pages, None)


class ViewFile(io.RawIOBase):
    """A view as the body of a request: without a copy of the whole, in pieces, and from the start again at each try.

    aiohttp takes bytes too, but then hands them to the socket in one go, which holds up every other request of the loop, and takes the
    308 by which Google asks for the next chunk for a redirect that it cannot follow when the body is an asynchronous iterator.
    """

    def __init__(self, data: "Buffer") -> None:
        self._view, self._position = memoryview(data).cast("B"), 0

    def __len__(self) -> int:
        return len(self._view)

    def readinto(self, buffer: Any) -> int:
        piece = self._view[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Not now: older releases of aiohttp close a body that they have sent, and a retry needs it again."""
