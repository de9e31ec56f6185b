"""Reading an object: ranges over several connections, straight into the caller's memory."""

import contextlib
import http.client
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from spotguard.checkpoint import Digest
from spotguard.errors import ObjectExistsError, StoreError, TransientStoreError
from spotguard.stores.base import Progress
from spotguard.stores.s3.connection import Answer, Connection
from spotguard.stores.s3.errors import NotOfferedError
from spotguard.stores.s3.lanes import Lanes
from spotguard.stores.s3.throughput import Stride

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer, Self

__all__ = ["S3Reader"]

_HEAD = 1 << 20  # read when the object is opened: most of ours are smaller


class _Range(NamedTuple):
    """What is read in one go: how much at once, whether to go on, and who is told of what has come."""

    stride: Stride
    check: Callable[[], None] | None = None
    progress: Progress | None = None
    digest: Digest | None = None


class S3Reader:
    """See `ObjectReader`. Whatever happens to the key meanwhile, all bytes are of the object that was opened.

    Args:
        connection: To the bucket.
        key: Of the object.
        version: Which of its versions; None for the current one.

    Raises:
        ObjectNotFoundError: It is not there.
    """

    def __init__(self, connection: Connection, key: str, version: str | None) -> None:
        self._connection, self._key = connection, key
        self._position = 0
        self._pin: dict[str, Any] = {"VersionId": version} if version is not None else {}
        self._is_fixed = version not in (None, "null")  # what has no version, or that one, can be written over
        first = memoryview(bytearray(_HEAD))
        self.size = -1
        try:
            length = self._some(first, 0, _Range(Stride(connection.down)))
        except StoreError as error:
            if "InvalidRange" not in str(error):
                raise
            length, self.size = 0, 0  # an object of no bytes has no range
        while length < min(self.size, _HEAD):
            length += self._some(first[length:], length, _Range(Stride(connection.down)))
        self._first = bytes(first[:length])

    def read(self, size: int = -1, /) -> bytes:
        """See `ObjectReader.read`."""
        left = max(0, self.size - self._position)
        data = bytearray(left if size < 0 else min(size, left))
        self._position += self.read_into(data, self._position)
        return bytes(data)

    def read_into(
        self, buffer: "Buffer", offset: int, /, progress: Progress | None = None, digest: Digest | None = None
    ) -> int:
        """See `ObjectReader.read_into`."""
        view = memoryview(buffer).cast("B")[: max(0, self.size - offset)]
        done = min(len(view), max(0, len(self._first) - offset))
        if done:
            view[:done] = self._first[offset : offset + done]
            if digest is not None:
                digest.update(view[:done], offset)
            if progress is not None:
                progress(done)
        lanes = Lanes(lambda: self._connection.down.lanes, what=self._connection.uri(self._key))
        step = self._connection.down.share_of(len(view) - done)
        try:
            for start in range(done, len(view), step or 1):
                piece = view[start : start + step]
                lanes.run(lambda piece=piece, start=start: self._fill(piece, offset + start, progress, lanes, digest))  # type: ignore[misc]
            lanes.join()
        except BaseException:
            lanes.cancel()
            raise
        return len(view)

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None", /
    ) -> None:
        self.close()

    def _fill(
        self, view: memoryview, offset: int, progress: Progress | None, lanes: Lanes, digest: Digest | None
    ) -> None:
        done, how = 0, _Range(Stride(self._connection.down), lanes.check, progress, digest)
        while done < len(view):
            done += self._some(view[done:], offset + done, how)

    def _some(self, view: memoryview, offset: int, how: _Range) -> int:
        """Read on from where the last request was cut off; retried as long as nothing comes."""
        return int(self._connection.retried(lambda: self._once(view, offset, how), self._connection.uri(self._key)))

    def _once(self, view: memoryview, offset: int, how: _Range) -> int:
        """One request; returns how many bytes came, which are fewer than asked for at the end, or where the connection broke."""
        from botocore.exceptions import BotoCoreError

        where = self._connection.uri(self._key)
        params = {**self._pin, **self._connection.options.get_params}
        try:
            answer = self._connection.call(
                "get_object", self._key, check=how.check, Range=f"bytes={offset}-{offset + len(view) - 1}", **params
            )
        except ObjectExistsError as error:  # 412: it is not the one any more that was opened
            raise StoreError(f"{where} was overwritten while it was being read") from error
        self._check_range(answer, offset)
        expected = min(len(view), self.size - offset)
        body = answer["Body"]
        try:
            done = _drain(body, view[:expected], offset, how)
        except InterruptedError:  # of the check
            body.close()
            raise
        except (OSError, http.client.HTTPException, BotoCoreError) as error:  # before a whole stride had come
            body.close()
            how.stride.restart()
            raise TransientStoreError(f"{where}: the connection broke at byte {offset}: {error}") from error
        if done < expected:
            body.close()
            how.stride.restart()  # of one that breaks off nothing is kept
            if done == 0:
                raise TransientStoreError(f"{where}: the connection was closed at byte {offset}")
        return done

    def _check_range(self, answer: Answer, offset: int) -> None:
        where, status = self._connection.uri(self._key), answer["ResponseMetadata"]["HTTPStatusCode"]
        if status == 206:
            span, _, total = str(answer.get("ContentRange", "")).removeprefix("bytes ").partition("/")
            size, begin = int(total), int(span.partition("-")[0])
        else:
            size, begin = int(answer["ContentLength"]), 0
        if begin != offset:
            raise NotOfferedError(
                f"{where}: the server answers the request for bytes from {offset} on with those from {begin} on"
            )
        if self.size < 0:
            self.size = size
            if not self._is_fixed:
                pins = {"VersionId": answer.get("VersionId"), "IfMatch": answer.get("ETag")}
                self._pin |= {name: value for name, value in pins.items() if value}
        elif size != self.size:
            raise StoreError(f"{where} had {self.size} bytes and now has {size}")


def _drain(body: Any, view: memoryview, offset: int, how: _Range) -> int:
    """Read a response into memory; returns how much came before it ended.

    The way past two layers of copying is not documented; where it looks different one day, the documented one is taken.
    """
    done = 0
    raw = getattr(body, "_raw_stream", None)
    source = getattr(getattr(raw, "_fp", None), "readinto", None)
    while done < len(view):
        if how.check is not None:
            how.check()
        stride = view[done : done + how.stride.next(len(view) - done)]
        try:
            if source is not None:
                count = source(stride)
            else:
                data = body.read(len(stride))
                count = len(data)
                stride[:count] = data
        except Exception:
            if done:
                return done
            raise
        if not count:
            return done
        if how.digest is not None:
            how.digest.update(stride[:count], offset + done)
        done += count
        if how.progress is not None:
            how.progress(count)
    with contextlib.suppress(Exception):  # the end has to be seen for the connection to be used again
        if raw is not None:
            raw.read(1)
    return done
