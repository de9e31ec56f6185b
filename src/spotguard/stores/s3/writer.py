"""Writing an object: one PUT, or parts over several connections, straight from the caller's memory."""

import base64
import contextlib
import secrets
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from spotguard.checkpoint import Digest
from spotguard.errors import ObjectNotFoundError, SpotguardError, StoreError, TransientStoreError
from spotguard.stores.base import ObjectInfo, Progress, check_deadline
from spotguard.stores.s3.body import Body, Piece
from spotguard.stores.s3.connection import Answer, Connection
from spotguard.stores.s3.errors import ArrivedDamagedError
from spotguard.stores.s3.lanes import Lanes
from spotguard.stores.s3.preflight import Capabilities, encode_crc

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["S3Writer", "digest_in"]

_T = TypeVar("_T")

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
_MOST_PARTS, _SMALLEST_PART, _LARGEST_PART = 10_000, 5 << 20, 5 << 30
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
        self._lanes = Lanes(lambda: connection.up.lanes, deadline=deadline, what=connection.uri(key))
        self._mine = secrets.token_hex(16)
        self._waiting: list[Piece] = []
        self._size = self._held = 0  # bytes in all, and those not yet given to a part
        self._part_size = connection.options.part_size
        self._upload: str | None = None
        self._parts: dict[int, tuple[dict[str, Any], int, int]] = {}  # as the end names them, with length and CRC
        self._numbers = 0
        self._lock = threading.Lock()

    @property
    def in_parts(self) -> bool:
        """Whether it is a multipart upload."""
        return self._upload is not None

    def write(self, data: "Buffer", /, progress: Progress | None = None, digest: Digest | None = None) -> int:
        """See `ObjectWriter.write`. Blocks while as many parts are on their way as there are connections."""
        check_deadline(self._deadline, self._key)
        view = memoryview(data).cast("B")
        self._fit_parts(len(view))
        if view.nbytes:
            held = view if view.nbytes >= _SMALL else memoryview(bytes(view))
            self._waiting.append(Piece(held, progress, digest, self._size))
        self._held += view.nbytes
        self._size += view.nbytes
        while self._held > self._part_size:
            self._start_part(self._part_size)
        return view.nbytes

    def finish(self) -> None:
        """Make the object visible."""
        check_deadline(self._deadline, self._key)
        if self._upload is None:
            pieces = self._take(self._held)
            answer = self._in_time(lambda: self._put(pieces))
        else:
            if self._held:
                self._start_part(self._held)
            self._lanes.join()
            answer = self._in_time(self._complete)
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

    def _in_time(self, request: Callable[[], _T]) -> _T:
        """Make a request; where there is a deadline, wait for it no longer than that: a server that has died says nothing."""
        if self._deadline is None:
            return request()
        answers: list[_T] = []
        self._lanes.run(lambda: answers.append(request()))
        self._lanes.join()
        return answers[0]

    def _abort(self, upload: str) -> None:
        with contextlib.suppress(SpotguardError):  # `discard_partials` finds it later
            self._connection.call("abort_multipart_upload", self._key, UploadId=upload, tries=3)

    def _fit_parts(self, coming: int) -> None:
        """Make parts larger where those left would not be enough: for what is known to come, and for what may follow."""
        known, left = self._held + coming, max(1, (_MOST_PARTS - self._numbers) // 2)
        share, thousands = self._connection.up.share_of(known), self._numbers // 1000
        grown = self._connection.options.part_size << thousands if thousands else 0
        least = self._part_size if self._numbers else _SMALLEST_PART
        self._part_size = min(_LARGEST_PART, max(least, grown, share, -(-known // left)))

    def _take(self, size: int) -> list[Piece]:
        """The next `size` bytes."""
        pieces: list[Piece] = []
        self._held -= size
        while size:
            piece, rest = self._waiting.pop(0).cut(size)
            pieces.append(piece)
            if len(rest.data):
                self._waiting.insert(0, rest)
            size -= len(piece.data)
        return pieces

    def _start_part(self, size: int) -> None:
        if self._upload is None:
            self._upload = self._in_time(self._create)
        pieces = self._take(size)
        self._numbers += 1
        number = self._numbers
        self._lanes.run(lambda: self._send(number, pieces))

    def _send(self, number: int, pieces: list[Piece]) -> None:
        """Send a part, and see to it that the server has got these bytes.

        In an upload with a checksum over the whole object parts need none, and the server answers each with the one that it has computed:
        https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html. Then the bytes are hashed while they
        are sent. A server that does not answer with it, or asks for a checksum with each part, gets one before the bytes.
        """
        body = Body(pieces, self._connection.up, check=self._lanes.check, hashes=self._able.checksum == "crc64nvme")
        told = self._able.checksum == "crc64nvme" and not self._connection.wants_part_checksums

        def confirm(answer: Answer) -> None:
            found = answer.get("ChecksumCRC64NVME")
            if found is None:
                self._connection.wants_part_checksums = True  # the end of the upload will tell of this part
            elif found != encode_crc(body.crc):
                raise TransientStoreError(f"{self._connection.uri(self._key)}: part {number} has arrived damaged")

        checksum = {} if told else self._checksum_of(body)
        try:
            answer = self._upload_part(number, body, checksum, confirm if told else None)
        except StoreError as error:
            if not told or "checksum" not in str(error).lower() or isinstance(error, TransientStoreError):
                raise
            self._connection.wants_part_checksums = True
            checksum = self._checksum_of(body)
            answer = self._upload_part(number, body, checksum, None)
        if told and "ChecksumCRC64NVME" in answer:
            checksum = {"ChecksumCRC64NVME": answer["ChecksumCRC64NVME"]}
        body.tell_digests()
        with self._lock:
            part = {"PartNumber": number, "ETag": answer["ETag"], **checksum}
            self._parts[number] = part, body.size, body.crc if self._able.checksum == "crc64nvme" else 0

    def _upload_part(
        self, number: int, body: Body, checksum: dict[str, Any], confirm: Callable[[Answer], None] | None
    ) -> Answer:
        return self._connection.call(
            "upload_part",
            self._key,
            deadline=self._deadline,
            check=self._lanes.check,
            confirm=confirm,
            UploadId=self._upload,
            PartNumber=number,
            Body=body,
            ContentLength=body.size,
            **checksum,
            **self._connection.options.get_params,
        )

    def _checksum_of(self, body: Body) -> dict[str, Any]:
        """The checksum that is told before the bytes."""
        if self._able.checksum == "crc64nvme":
            return {"ChecksumCRC64NVME": encode_crc(body.hash())}
        if self._able.checksum == "crc32c":
            return {"ChecksumCRC32C": encode_crc(body.crc32c(), 32)}
        return {}

    def _put(self, pieces: list[Piece]) -> Answer:
        body = Body(pieces, self._connection.up, check=self._lanes.check)
        answer = self._connection.call(
            "put_object",
            self._key,
            deadline=self._deadline,
            check=self._lanes.check,
            recover=self._ours,
            Body=body,
            ContentLength=self._size,
            Metadata={_WRITER: self._mine},
            **self._condition,
            **self._checksum_of(body),
            **self._connection.options.put_params,
        )
        body.tell_digests()
        return answer

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

        parts, params, whole = list[dict[str, Any]](), dict[str, Any](), 0
        for _, (part, size, value) in sorted(self._parts.items()):
            parts.append(part)
            whole = combine_crc64nvme(whole, value, size)
        if self._able.checksum == "crc64nvme":
            params = {
                "ChecksumCRC64NVME": encode_crc(whole),
                "ChecksumType": "FULL_OBJECT",
                "MpuObjectSize": self._size,
            }
        if self._able.checksum:
            params |= self._connection.options.get_params
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
        except (
            ArrivedDamagedError
        ) as error:  # a part was damaged on the way, and the server did not say which: all over again
            raise TransientStoreError(f"{error}; the upload has to be repeated as a whole") from error
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
                "head_object",
                self._key,
                deadline=self._deadline,
                ChecksumMode="ENABLED",
                **self._connection.options.get_params,
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
