"""Google Cloud Storage: the requests of a driver, sent through gcsfs."""

# ruff: noqa: FBT001, SLF001 - the requests of gcsfs have a leading underscore, and are what its own classes are made of

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from spotguard.stores._fsspec.drivers import Block, Body, Found, Replaced
from spotguard.stores._fsspec.errors import NoPlaceError
from spotguard.stores._fsspec.remote import TOKEN, RemoteDriver, ViewFile

__all__ = ["GoogleDriver"]

_BYTES = "application/octet-stream"
_MORE = 308  # how Google says that it waits for the next chunk
_TRIES = 10


class GoogleDriver(RemoteDriver):
    """The JSON interface: https://cloud.google.com/storage/docs/json_api/v1. A create is exclusive by ``ifGenerationMatch=0``."""

    _CHUNK = 32 << 20  # has to be a multiple of 256 KiB; chunks go one after the other

    async def _put_whole(self, path: str, block: Block, exclusive: bool, token: str) -> None:
        url, about, condition = self._new(path, exclusive, token)
        head = f"--{token}\nContent-Type: application/json; charset=UTF-8\n\n{json.dumps(about)}\n--{token}\nContent-Type: {_BYTES}\n\n"
        body = ViewFile(b"".join((head.encode(), block.data, f"\n--{token}--".encode())))
        headers = {"Content-Type": f'multipart/related; boundary="{token}"', "Content-Length": str(len(body))}
        request = self.fs._call("POST", url, uploadType="multipart", headers=headers, data=body, **condition)
        await self._moving(request, body)
        block.sent()

    async def _put_blocks(self, path: str, body: Body, exclusive: bool, token: str) -> None:
        url, about, condition = self._new(path, exclusive, token)
        headers = {"X-Upload-Content-Type": _BYTES, "X-Upload-Content-Length": str(body.size)}
        answer, _ = await self.fs._call("POST", url, uploadType="resumable", json=about, headers=headers, **condition)
        session = answer["Location"]
        try:
            offset = 0
            for block in body.blocks(self._CHUNK):
                # Google keeps the condition with the session and looks again at its end. Emulators forget it: then this look is all.
                if exclusive and offset + block.size == body.size and await self._find(path) is not None:
                    raise FileExistsError(path)
                await self._chunk(session, memoryview(block.data), offset, body.size)
                block.sent()
                offset += block.size
        except BaseException:
            # In the background: we may have been cancelled, and whoever has a deadline has no time for it.
            task = asyncio.get_running_loop().create_task(self._cancel(session))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
            raise

    def _new(self, path: str, exclusive: bool, token: str) -> tuple[str, dict[str, Any], dict[str, str]]:
        bucket, _, key = path.partition("/")
        url = f"{self.fs._location}/upload/storage/v1/b/{bucket}/o"
        return url, {"name": key, "metadata": {TOKEN: token}}, {"ifGenerationMatch": "0"} if exclusive else {}

    async def _chunk(self, session: str, view: memoryview, offset: int, size: int) -> None:
        """Send one chunk, and again what the service says it has not taken of it."""
        end = offset + len(view)
        for _ in range(_TRIES):
            headers = {
                "Content-Range": f"bytes {offset}-{end - 1}/{size}",
                "Content-Length": str(len(view)),
                "Content-Type": _BYTES,
            }
            try:
                body = ViewFile(view)
                request = self.fs._request("POST", session, headers=headers, data=body)
                status, answer, _, _ = await self._moving(request, body)
            except FileNotFoundError as error:  # not of the bucket, that was there a moment ago
                raise ConnectionError("the upload session is gone") from error
            if status != _MORE:
                if end != size:
                    raise ConnectionError(f"the upload was taken for complete after {end} of {size} bytes")
                return
            taken = int(answer["Range"].rpartition("-")[2]) + 1 if "Range" in answer else 0
            if taken == end != size:
                return
            if not offset <= taken < end:
                break
            offset, view = taken, view[taken - offset :]
        raise ConnectionError(f"the service has not taken the bytes before {end}")

    async def _cancel(self, session: str) -> None:
        with contextlib.suppress(Exception):
            await self.fs._request("DELETE", session.replace("&ifGenerationMatch=0", ""))

    async def _find(self, path: str) -> Found | None:
        bucket, _, key = path.partition("/")
        try:
            found = await self.fs._call("GET", "b/{}/o/{}", bucket, key, json_out=True)
        except FileNotFoundError:
            return None
        return Found(int(found.get("size", 0)), str(found["generation"]), found.get("metadata", {}).get(TOKEN))

    async def _read(self, path: str, start: int, end: int | None, pin: str | None) -> bytes:
        url = self.fs.url(path) + (f"&generation={pin}" if pin else "")
        headers = {"Range": f"bytes={start}-{end - 1}"} if end is not None else {}
        try:
            _, data = await self.fs._call("GET", url, headers=headers)
        except FileNotFoundError as error:
            if pin is not None:
                raise Replaced from error
            raise
        return bytes(data)

    async def _remove(self, path: str) -> None:
        bucket, _, key = path.partition("/")
        with contextlib.suppress(FileNotFoundError):
            await self.fs._call("DELETE", "b/{}/o/{}", bucket, key)

    async def _pages(self, prefix: str) -> AsyncIterator[list[tuple[str, int]]]:
        bucket, _, start = prefix.partition("/")
        more: dict[str, str] = {}
        while True:
            try:
                page = await self.fs._call(
                    "GET",
                    "b/{}/o",
                    bucket,
                    json_out=True,
                    prefix=start,
                    fields="nextPageToken,items(name,size)",
                    **more,
                )
            except FileNotFoundError as error:  # of a bucket that is there, a listing is never "not found"
                raise NoPlaceError(f"bucket {bucket!r} does not exist; create it, or correct the URI") from error
            yield [(f"{bucket}/{item['name']}", int(item.get("size", 0))) for item in page.get("items", [])]
            if "nextPageToken" not in page:
                return
            more = {"pageToken": page["nextPageToken"]}
