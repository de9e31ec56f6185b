"""Writing an object: one PUT, or parts over several connections, straight from the caller's memory."""

import base64
import contextlib
import secrets
import threading
from typing import TYPE_CHECKING, Any

from spotguard.errors import ObjectNotFoundError, SpotguardError, StoreError
from spotguard.stores.base import ObjectInfo, Progress, check_deadline
from spotguard.stores.s3.body import Body, Piece
from spotguard.stores.s3.connection import Answer, Connection
from spotguard.stores.s3.lanes import Lanes
from spotguard.stores.s3.preflight import Capabilities, encode_crc

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["S3Writer", "digest_in"]

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
_MOST_PARTS, _LARGEST_PART = 10_000, 5 << 30
_SMALL = 1 << 20  # what is copied rather than held on to
_WRITER = "spotguard-writer"  # metadata by which we recognise an object of ours when the answer to our request was lost


class S3Writer:
    """See `ObjectWriter`. The bytes of an object that fits into one part go at the end, in one request.

    Args:
        connection: To the bucket.
        able: What the server does.
        key: Of the object.
        exclusive: Fail if it exists.
        deadline: Instant (monotonic seconds) by which it must be whole.
    """

    def __init__(
        self, connection: Connection, able: Capabilities, key: str, *, exclusive: bool, deadline: float | None
    ) -> None:
        self.info: ObjectInfo | None = None
        self._connection, self._able, self._key, self._deadline = connection, able, key, deadline
        self._condition: dict[str, Any] = {"IfNoneMatch": "*"} if exclusive and able.exclusive else {}
        self._lanes = Lanes(connection.options.connections, deadline=deadline, what=connection.uri(key))
        self._mine = secrets.token_hex(16)
        self._waiting: list[Piece] = []
        self._size = self._held = 0  # bytes in all, and those not yet given to a part
        self._part_size = connection.options.part_size
        self._upload: str | None = None
        self._parts: dict[int, tuple[Answer, int, int]] = {}  # answer, length and CRC by number
        self._numbers = 0
        self._lock = threading.Lock()

    @property
    def in_parts(self) -> bool:
        """Whether it is a multipart upload."""
        return self._upload is not None

    def write(self, data: "Buffer", /, progress: Progress | None = None) -> int:
        """See `ObjectWriter.write`. Blocks while as many parts are on their way as there are connections."""
        check_deadline(self._deadline, self._key)
        view = memoryview(data).cast("B")
        self._fit_parts(len(view))
        if view.nbytes:
            self._waiting.append(Piece(view if view.nbytes >= _SMALL else memoryview(bytes(view)), progress))
        self._held += view.nbytes
        self._size += view.nbytes
        while self._held > self._part_size:
            self._start_part(self._part_size)
        return view.nbytes

    def finish(self) -> None:
        """Make the object visible."""
        check_deadline(self._deadline, self._key)
        if self._upload is None:
            answer = self._put(self._take(self._held))
        else:
            if self._held:
                self._start_part(self._held)
            self._lanes.join()
            answer = self._complete()
        version = answer.get("VersionId") if self._able.versions else None
        self.info = ObjectInfo(
            self._key, self._size, version, digest_in(answer) if self._able.checksum == "crc64nvme" else None
        )

    def abandon(self) -> None:
        """Leave nothing behind: parts of an upload that is never completed cost money and are not to be seen."""
        self._lanes.cancel(patience=5.0 if self._deadline is None else 0.5)
        if self._upload is not None:
            upload, self._upload = self._upload, None
            # The one who waits may have no time left; the request needs a moment, not him.
            thread = threading.Thread(target=self._abort, args=(upload,), name="spotguard-s3-abort", daemon=True)
            thread.start()
            thread.join(None if self._deadline is None else 1.0)

    def _abort(self, upload: str) -> None:
        with contextlib.suppress(SpotguardError):  # `discard_partials` finds it later
            self._connection.call(
                "abort_multipart_upload", self._key, UploadId=upload, tries=3, **self._connection.options.request_params
            )

    def _fit_parts(self, coming: int) -> None:
        """Make parts larger where those left would not be enough: for what is known to come, and for what may follow."""
        known, left = self._held + coming, max(1, (_MOST_PARTS - self._numbers) // 2)
        options = self._connection.options
        grown = max(options.share_of(known), options.part_size << self._numbers // 1000, -(-known // left))
        self._part_size = min(_LARGEST_PART, max(self._part_size, grown))

    def _take(self, size: int) -> list[Piece]:
        """The next `size` bytes."""
        pieces: list[Piece] = []
        self._held -= size
        while size:
            data, progress = self._waiting.pop(0)
            pieces.append(Piece(data[:size], progress))
            if len(data) > size:
                self._waiting.insert(0, Piece(data[size:], progress))
            size -= len(pieces[-1].data)
        return pieces

    def _start_part(self, size: int) -> None:
        if self._upload is None:
            self._upload = self._create()
        pieces = self._take(size)
        self._numbers += 1
        number = self._numbers
        self._lanes.run(lambda: self._send(number, pieces, size))

    def _send(self, number: int, pieces: list[Piece], size: int) -> None:
        value = self._crc(pieces)
        answer = self._connection.call(
            "upload_part",
            self._key,
            deadline=self._deadline,
            check=self._lanes.check,
            UploadId=self._upload,
            PartNumber=number,
            Body=Body(pieces, check=self._lanes.check),
            ContentLength=size,
            **self._checksum(value),
            **self._connection.options.get_params,
        )
        with self._lock:
            self._parts[number] = answer, size, value

    def _checksum(self, value: int) -> dict[str, Any]:
        if self._able.checksum is None:
            return {}
        return (
            {"ChecksumCRC64NVME": encode_crc(value)}
            if self._able.checksum == "crc64nvme"
            else {"ChecksumCRC32C": encode_crc(value, 32)}
        )

    def _crc(self, pieces: list[Piece]) -> int:
        from awscrt.checksums import crc32c, crc64nvme

        function, value = crc64nvme if self._able.checksum == "crc64nvme" else crc32c, 0
        for piece in pieces if self._able.checksum else []:
            value = function(piece.data, value)
        return value

    def _put(self, pieces: list[Piece]) -> Answer:
        return self._connection.call(
            "put_object",
            self._key,
            deadline=self._deadline,
            check=self._lanes.check,
            recover=self._ours,
            Body=Body(pieces, check=self._lanes.check),
            ContentLength=self._size,
            Metadata={_WRITER: self._mine},
            **self._condition,
            **self._checksum(self._crc(pieces)),
            **self._connection.options.put_params,
        )

    def _create(self) -> str:
        params: dict[str, Any] = {}
        if self._able.checksum == "crc64nvme":
            params = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}
        elif self._able.checksum == "crc32c":
            params = {"ChecksumAlgorithm": "CRC32C"}
        answer = self._connection.call(
            "create_multipart_upload",
            self._key,
            deadline=self._deadline,
            check=self._lanes.check,
            Metadata={_WRITER: self._mine},
            **params,
            **self._connection.options.put_params,
        )
        return str(answer["UploadId"])

    def _complete(self) -> Answer:
        from awscrt.checksums import combine_crc64nvme

        parts, params, whole = [], dict[str, Any](), 0
        for number, (answer, size, value) in sorted(self._parts.items()):
            parts.append({"PartNumber": number, "ETag": answer["ETag"], **self._checksum(value)})
            whole = combine_crc64nvme(whole, value, size)
        if self._able.checksum == "crc64nvme":
            params = {
                "ChecksumCRC64NVME": encode_crc(whole),
                "ChecksumType": "FULL_OBJECT",
                "MpuObjectSize": self._size,
            }
        params |= (
            self._connection.options.get_params if self._able.checksum else self._connection.options.request_params
        )
        try:
            answer = self._connection.call(
                "complete_multipart_upload",
                self._key,
                deadline=self._deadline,
                check=self._lanes.check,
                recover=self._ours,
                UploadId=self._upload,
                MultipartUpload={"Parts": parts},
                **self._condition,
                **params,
            )
        except ObjectNotFoundError as error:
            raise StoreError(
                f"{self._connection.uri(self._key)}: the upload was aborted by somebody else: a lifecycle rule, or a later attempt"
            ) from error
        self._upload = None
        return answer

    def _ours(self) -> Answer | None:
        """What an earlier request of ours has made, whose answer was lost; None if what is there is somebody else's."""
        with contextlib.suppress(ObjectNotFoundError):
            found = self._connection.call(
                "head_object", self._key, ChecksumMode="ENABLED", **self._connection.options.get_params
            )
            metadata = {
                name.lower(): value for name, value in found.get("Metadata", {}).items()
            }  # rclone writes capitals
            if metadata.get(_WRITER) == self._mine and found["ContentLength"] == self._size:
                self._upload = None
                return found
        return None


def digest_in(answer: Answer) -> str | None:
    """What the server has computed over a whole object; None where it said nothing of the kind."""
    encoded = answer.get("ChecksumCRC64NVME")
    if not encoded or answer.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return None
    return f"crc64nvme:{base64.b64decode(encoded).hex()}"
