"""An S3 server that costs next to nothing, so that what is measured is the client: `python benchmarks/null_s3.py FILE [--tls PEM]`.

It throws away what it is sent, inside the kernel, and answers reads from one file by sendfile. Loopback only; it prints its port.

- An object of up to 64 KiB is kept and its CRC64NVME compared; of a larger one, and of parts, nothing is kept.
- ``<anything>/bytes-<n>`` is always there: the first n bytes of FILE.
- A part without a checksum, of an upload that was begun with one, is answered with that which the bytes of FILE at its place have: whoever
  wants to be told that all has arrived has to send these.
- ``If-None-Match: *`` holds for what is kept, versioning is on, and a list has what is kept.
"""

import argparse
import base64
import contextlib
import mmap
import os
import re
import socket
import ssl
import threading
import urllib.parse
from pathlib import Path

from awscrt.checksums import crc64nvme

KEPT, STRIDE = 64 << 10, 4 << 20
XML = "<?xml version='1.0' encoding='UTF-8'?><{0} xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>{1}</{0}>"
ETAG, VERSION, DATE = '"d41d8cd98f00b204e9800998ecf8427e"', "v1", "Mon, 23 Nov 2026 14:00:00 GMT"


class Served:
    """What the server has: a file for reading, and small objects.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb", buffering=0)
        self.mapped = memoryview(mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ))
        self.size = path.stat().st_size
        self.kept: dict[str, bytes] = {}
        self.lengths: dict[str, int] = {}  # of the parts of an upload that was begun with a checksum
        self.values: dict[tuple[int, int], str] = {}

    def checksum(self, begin: int, length: int) -> str:
        """Of bytes of the file; computed once."""
        if (begin, length) not in self.values:
            value = crc64nvme(self.mapped[begin : begin + length])
            self.values[begin, length] = base64.b64encode(value.to_bytes(8, "big")).decode()
        return self.values[begin, length]

    def length(self, key: str) -> int | None:
        """Bytes of an object; None where it is not there."""
        if key in self.kept:
            return len(self.kept[key])
        wanted = re.search(r"/bytes-(\d+)$", key)
        return min(int(wanted[1]), self.size) if wanted else None


class Peer(threading.Thread):
    """One connection.

    Args:
        connection: The socket.
        served: What there is.
    """

    def __init__(self, connection: socket.socket, served: Served) -> None:
        super().__init__(daemon=True)
        self.connection, self.served = connection, served
        self.buffer = b""
        self.scratch = bytearray(STRIDE)
        # No copy at all: tcp(7) has MSG_TRUNC throw the bytes away where they are. Behind TLS they have to be decrypted.
        self.flags = 0 if isinstance(connection, ssl.SSLSocket) else socket.MSG_TRUNC

    def run(self) -> None:
        """Answer until the client has gone."""
        with contextlib.suppress(OSError, EOFError), self.connection:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                self.answer()

    def receive(self) -> None:
        """Wait for more."""
        if not (data := self.connection.recv(64 << 10)):
            raise EOFError
        self.buffer += data

    def until(self, end: bytes) -> bytes:
        """What comes before `end`."""
        while end not in self.buffer:
            self.receive()
        found, _, self.buffer = self.buffer.partition(end)
        return found

    def exactly(self, size: int) -> bytes:
        """So many bytes; all are thrown away where they are more than is kept."""
        if size <= KEPT:
            while len(self.buffer) < size:
                self.receive()
            found, self.buffer = self.buffer[:size], self.buffer[size:]
            return found
        left, self.buffer = size - len(self.buffer), self.buffer[size:]
        while left > 0:
            if not (count := self.connection.recv_into(self.scratch, min(left, STRIDE), self.flags)):
                raise EOFError
            left -= count
        return b""

    def body(self, headers: dict[str, str]) -> bytes | None:
        """The body of a request; None where it was thrown away."""
        if headers.get("expect", "").lower() == "100-continue":
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(self.until(b"\r\n").partition(b";")[0], 16):
                self.exactly(size)
                self.until(b"\r\n")
            while self.until(b"\r\n"):
                pass
            return None
        size = int(headers.get("content-length") or 0)
        data = self.exactly(size)
        # What boto3 sends with a checksum behind it has another length than the object, and is never small here.
        return data if len(data) == size and "x-amz-decoded-content-length" not in headers else None

    def answer(self) -> None:
        """One request."""
        first, *lines = self.until(b"\r\n\r\n").decode("latin1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        path, _, text = target.partition("?")
        query = urllib.parse.parse_qs(text, keep_blank_values=True)
        data = self.body(headers)
        bucket, _, key = urllib.parse.unquote(path).lstrip("/").partition("/")
        taken = headers.get("if-none-match") == "*" and key in self.served.kept
        if method == "GET" and not key:
            self.listing(bucket, query)
        elif method in ("GET", "HEAD"):
            self.read(key, headers, head=method == "HEAD")
        elif method == "DELETE":
            if "uploadId" not in query:
                self.served.kept.pop(key, None)
            self.reply("204 No Content")
        elif taken and "partNumber" not in query and "uploads" not in query:
            self.refuse("412 Precondition Failed", "PreconditionFailed")
        elif method == "PUT":
            self.write(key, data, headers, query)
        elif "uploads" in query:
            upload = f"u{len(self.served.lengths) + 1}"
            if headers.get("x-amz-checksum-algorithm") == "CRC64NVME":
                self.served.lengths[upload] = 0
            self.xml(
                "InitiateMultipartUploadResult",
                f"<Bucket>{bucket}</Bucket><Key>{key}</Key><UploadId>{upload}</UploadId>",
            )
        elif "uploadId" in query:
            self.xml("CompleteMultipartUploadResult", f"<Bucket>{bucket}</Bucket><Key>{key}</Key><ETag>{ETAG}</ETag>")
        else:
            self.refuse("501 Not Implemented", "NotImplemented")

    def write(self, key: str, data: bytes | None, headers: dict[str, str], query: dict[str, list[str]]) -> None:
        """A whole object, or a part of one."""
        said = headers.get("x-amz-checksum-crc64nvme")
        if data is not None and said and base64.b64decode(said) != crc64nvme(data).to_bytes(8, "big"):
            self.refuse("400 Bad Request", "BadDigest")
            return
        if data and key and "partNumber" not in query:
            self.served.kept[key] = data
        (upload,), extra = query.get("uploadId", [""]), ""
        if upload in self.served.lengths and not said:
            length = int(headers["content-length"])
            self.served.lengths[upload] = max(length, self.served.lengths[upload])
            begin = (int(query["partNumber"][0]) - 1) * self.served.lengths[upload]
            extra = f"x-amz-checksum-crc64nvme: {self.served.checksum(begin, length)}\r\n"
        self.reply("200 OK", extra=extra)

    def read(self, key: str, headers: dict[str, str], *, head: bool) -> None:
        """An object, or a range of one."""
        size = self.served.length(key)
        if size is None:
            self.refuse("404 Not Found", "NoSuchKey", head=head)
            return
        begin, end, status, extra = 0, size - 1, "200 OK", "Accept-Ranges: bytes\r\n"
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", "")):
            begin = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
            end = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
            if begin > end:
                self.refuse("416 Range Not Satisfiable", "InvalidRange", head=head)
                return
            status, extra = "206 Partial Content", f"{extra}Content-Range: bytes {begin}-{end}/{size}\r\n"
        length = end - begin + 1
        if key in self.served.kept and not head:
            self.reply(status, self.served.kept[key][begin : end + 1], extra)
            return
        self.reply(status, extra=extra, length=length)
        if not head:
            self.send(begin, length)

    def send(self, begin: int, length: int) -> None:
        """Bytes of the file; they do not pass through this process unless they have to be encrypted."""
        end = begin + length
        while begin < end:
            if isinstance(self.connection, ssl.SSLSocket):
                begin += self.connection.send(self.served.mapped[begin : min(end, begin + STRIDE)])
            else:
                begin += os.sendfile(self.connection.fileno(), self.served.file.fileno(), begin, end - begin)

    def listing(self, bucket: str, query: dict[str, list[str]]) -> None:
        """What is asked of a bucket."""
        prefix = query.get("prefix", [""])[0]
        found = {key: data for key, data in sorted(self.served.kept.items()) if key.startswith(prefix)}
        about = f"<LastModified>2026-11-23T14:00:00.000Z</LastModified><ETag>{ETAG}</ETag>"
        items = {key: f"<Key>{key}</Key><Size>{len(data)}</Size>{about}" for key, data in found.items()}
        name = f"<Name>{bucket}</Name><IsTruncated>false</IsTruncated>"
        if "versioning" in query:
            self.xml("VersioningConfiguration", "<Status>Enabled</Status>")
        elif "versions" in query:
            latest = f"<VersionId>{VERSION}</VersionId><IsLatest>true</IsLatest>"
            self.xml(
                "ListVersionsResult",
                name + "".join(f"<Version>{item}{latest}</Version>" for item in items.values()),
            )
        elif "uploads" in query:
            self.xml("ListMultipartUploadsResult", name)
        else:
            count = f"<KeyCount>{len(items)}</KeyCount>"
            self.xml(
                "ListBucketResult",
                name + count + "".join(f"<Contents>{item}</Contents>" for item in items.values()),
            )

    def reply(self, status: str, body: bytes = b"", extra: str = "", *, length: int | None = None) -> None:
        """Send the head of an answer, and its body where that is small."""
        length = len(body) if length is None else length
        head = (
            f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\nETag: {ETAG}\r\nx-amz-version-id: {VERSION}\r\n"
            f"Last-Modified: {DATE}\r\nx-amz-request-id: 1\r\n{extra}\r\n"
        )
        self.connection.sendall(head.encode() + body)

    def xml(self, root: str, inner: str) -> None:
        """Send a document."""
        self.reply("200 OK", XML.format(root, inner).encode(), "Content-Type: application/xml\r\n")

    def refuse(self, status: str, code: str, *, head: bool = False) -> None:
        """Send an error; the answer to HEAD has no body."""
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.reply(status, b"" if head else body, "Content-Type: application/xml\r\n")


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tls", type=Path, help="certificate and key")
    options = parser.parse_args()
    served, listening = Served(options.file), socket.create_server(("127.0.0.1", 0), backlog=256)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if options.tls else None
    if context:
        context.load_cert_chain(options.tls)
    print(listening.getsockname()[1], flush=True)
    while True:
        connection, _ = listening.accept()
        with contextlib.suppress(OSError):  # a client that does not trust us
            if context:
                connection = context.wrap_socket(connection, server_side=True)
            Peer(connection, served).start()


if __name__ == "__main__":
    main()
