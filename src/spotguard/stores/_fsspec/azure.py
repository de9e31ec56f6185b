"""Azure Blob Storage: the requests of a driver, sent through the client that adlfs has made."""

# ruff: noqa: FBT001 - as the driver has it

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator
from typing import Any

from spotguard.stores._fsspec.drivers import Block, Body, Found, Replaced
from spotguard.stores._fsspec.remote import TOKEN, RemoteDriver, ViewFile

__all__ = ["AzureDriver"]


class AzureDriver(RemoteDriver):
    """Block blobs, through the client that adlfs has made. A create is exclusive by ``If-None-Match: *``."""

    one_request = (
        1 << 20
    )  # Azure's client hands what is sent at once to the socket at once, which holds up the other requests
    _BLOCK = 16 << 20  # at most 50,000 of them: 780 GiB
    _LANES = 4

    def _blob(self, path: str) -> Any:
        container, _, key = path.partition("/")
        return self.fs.service_client.get_blob_client(container=container, blob=key)

    async def _put_whole(self, path: str, block: Block, exclusive: bool, token: str) -> None:
        async with self._blob(path) as blob:
            await self._moving(blob.upload_blob(block.data, overwrite=not exclusive, metadata=_metadata(token)))
        block.sent()

    async def _put_blocks(self, path: str, body: Body, exclusive: bool, token: str) -> None:
        from azure.core import MatchConditions
        from azure.core.exceptions import HttpResponseError
        from azure.storage.blob import BlobBlock

        names: list[str] = []
        blocks = body.blocks(self._BLOCK)

        async with self._blob(path) as blob:

            async def lane() -> None:
                for block in blocks:  # all lanes take from one iterator, on one thread: the names are in order
                    # Uncommitted blocks of one blob need names of one length; ours and those of adlfs have 32 digits.
                    names.append(base64.b64encode(uuid.uuid4().hex.encode()).decode())
                    body = ViewFile(block.data)
                    await self._moving(blob.stage_block(names[-1], body, length=block.size), body)
                    block.sent()

            lanes = [asyncio.ensure_future(lane()) for _ in range(self._LANES)]
            try:
                await asyncio.gather(*lanes)
            finally:
                for one in lanes:
                    one.cancel()
            condition: dict[str, Any] = {"match_condition": MatchConditions.IfMissing} if exclusive else {}
            try:
                await blob.commit_block_list(
                    [BlobBlock(name) for name in names], metadata=_metadata(token), **condition
                )
            except HttpResponseError as error:
                # A commit of somebody else drops the blocks that we have staged under the same name: whoever creates has lost.
                if "InvalidBlockList" not in _code(error):
                    raise
                if exclusive and await self._find(path) is not None:
                    raise FileExistsError(path) from error
                raise ConnectionError("another writer has written the same object meanwhile") from error

    async def _find(self, path: str) -> Found | None:
        from azure.core.exceptions import ResourceNotFoundError

        async with self._blob(path) as blob:
            try:
                found = await blob.get_blob_properties()
            except ResourceNotFoundError as error:
                if "ContainerNotFound" in _code(error):
                    raise
                return None
        metadata = found.metadata or {}
        if str(metadata.get("hdi_isfolder") or metadata.get("is_directory")).lower() == "true":
            return None
        return Found(int(found.size), str(found.etag), metadata.get(TOKEN))

    async def _read(self, path: str, start: int, end: int | None, pin: str | None) -> bytes:
        from azure.core import MatchConditions
        from azure.core.exceptions import ResourceModifiedError, ResourceNotFoundError

        same = {"etag": pin, "match_condition": MatchConditions.IfNotModified} if pin else {}
        where: dict[str, Any] = {} if end is None else {"offset": start, "length": end - start}
        async with self._blob(path) as blob:
            try:
                stream = await blob.download_blob(**where, **same)
                return bytes(await stream.readall())
            except (ResourceModifiedError, ResourceNotFoundError) as error:
                if pin is not None:
                    raise Replaced from error
                raise

    async def _remove(self, path: str) -> None:
        from azure.core.exceptions import ResourceNotFoundError

        async with self._blob(path) as blob:
            try:
                await blob.delete_blob(delete_snapshots="include")
            except ResourceNotFoundError as error:
                if "ContainerNotFound" in _code(error):
                    raise

    async def _pages(self, prefix: str) -> AsyncIterator[list[tuple[str, int]]]:
        container, _, start = prefix.partition("/")
        async with self.fs.service_client.get_container_client(container) as client:
            async for page in client.list_blobs(name_starts_with=start, include=["metadata"]).by_page():
                found = [blob async for blob in page]
                yield [
                    (f"{container}/{blob.name}", int(blob.size))
                    for blob in found
                    if str((blob.metadata or {}).get("hdi_isfolder")).lower() != "true"
                ]


def _metadata(token: str) -> dict[str, str]:
    return {
        "is_directory": "false",
        TOKEN: token,
    }  # the first is what adlfs writes: other users of the container may look for it


def _code(error: Exception) -> str:
    return str(getattr(error, "error_code", None) or "")
