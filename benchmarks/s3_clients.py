"""What is measured in `benchmarks/s3.py`: plain HTTP, which is the limit, and ours; `s3_peers.py` has the others."""

import http.client
import importlib
import mmap
import os
import ssl
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awscrt.checksums import crc64nvme

MIB = 1 << 20
PART = 32 * MIB
BUCKET, REGION = "bench", "us-east-1"


class Setting:
    """Where everything is.

    Args:
        endpoint: Of the server.
        folder: In memory (tmpfs), with a file ``served`` that the server serves too.
        certificate: Of the server, over TLS.
    """

    def __init__(self, endpoint: str, folder: Path, certificate: Path | None) -> None:
        self.endpoint, self.folder, self.certificate = endpoint, folder, certificate
        self.source, self.digests = folder / "served", dict[int, str]()
        self.size = self.source.stat().st_size
        # Kept memory, as that of a snapshot: in large pages, touched long before it is used.
        pages = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        self.memory = memoryview(pages)
        with self.source.open("rb", buffering=0) as file:
            done = 0
            while done < self.size:
                done += file.readinto(self.memory[done : done + 64 * MIB]) or 0

    def file(self, size: int) -> Path:
        """A file of that size, to be sent."""
        path = self.folder / f"file-{size}" if size != self.size else self.source
        if not path.exists():
            path.write_bytes(self.memory[:size])
        return path

    def source_end(self, size: int) -> bytes:
        """The last MiB of the first bytes of what the server serves."""
        with self.source.open("rb") as file:
            file.seek(size - MIB)
            return file.read(MIB)

    def digest(self, size: int) -> str:
        """Of the first bytes of what the server serves."""
        if size not in self.digests:
            from spotguard.checkpoint import Digest

            digest, left = Digest(), size
            with self.source.open("rb") as file:
                while left:
                    digest.update(data := file.read(min(left, 8 * MIB)))
                    left -= len(data)
            self.digests[size] = str(digest)
        return self.digests[size]

    def target(self) -> Path:
        """Where a file goes that is fetched."""
        return self.folder / f"target-{os.getpid()}"

    def context(self) -> ssl.SSLContext | None:
        """To trust the server."""
        return ssl.create_default_context(cafile=str(self.certificate)) if self.certificate else None


Transfer = Callable[[int], Any]  # moves so many bytes; returns what it has got, if anything


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        name: What is measured.
        kind: ``"limit"``, ``"digest"`` (the limit with a digest on), ``"ours"`` or ``"peer"``.
        needs: The packages.
        make: Makes a client.
        tls: Whether it can be told to trust a certificate of our own.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    make: Callable[[Setting], Transfer]
    tls: bool = True


# -- the limit --------------------------------------------------------------------------------------------------------------------


class Raw:
    """Nothing but HTTP: `http.client`, several kept connections, bytes from and to where they lie.

    Args:
        setting: Where.
        connections: How many.
        part: Bytes of a request.
        digest: Compute a CRC of each part, before it is sent or when it has come.
        new: Download into new memory.
    """

    def __init__(
        self, setting: Setting, connections: int, part: int, *, digest: bool = False, new: bool = False
    ) -> None:
        address, context = urllib.parse.urlsplit(setting.endpoint), setting.context()
        host, port = str(address.hostname), address.port
        self.memory, self.part, self.digest, self.new = setting.memory, part, digest, new
        self.kept: list[http.client.HTTPConnection] = [
            http.client.HTTPSConnection(host, port, context=context)
            if context
            else http.client.HTTPConnection(host, port)
            for _ in range(connections)
        ]

    def all_at_once(
        self, memory: memoryview, size: int, move: Callable[[http.client.HTTPConnection, int, memoryview], None]
    ) -> None:
        """Share the parts out to the connections."""
        failed: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for start in range(number * self.part, size, len(self.kept) * self.part):
                    move(self.kept[number], start, memory[start : min(size, start + self.part)])
            except BaseException as error:  # noqa: BLE001 - raised below
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(self.kept))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def upload(self, size: int) -> None:
        """A PUT for each part."""

        def put(connection: http.client.HTTPConnection, start: int, data: memoryview) -> None:
            if self.digest:
                crc64nvme(data)
            connection.request("PUT", f"/{BUCKET}/raw?partNumber={start}&uploadId=u1", data)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200

        self.all_at_once(self.memory, size, put)

    def download(self, size: int) -> memoryview:
        """A ranged GET for each part."""

        def get(connection: http.client.HTTPConnection, start: int, data: memoryview) -> None:
            wanted = {"Range": f"bytes={start}-{start + len(data) - 1}"}
            connection.request("GET", f"/{BUCKET}/raw/bytes-{size}", headers=wanted)
            answer, done = connection.getresponse(), 0
            while done < len(data):
                done += answer.readinto(data[done:])
            answer.read()
            assert answer.status == 206
            if self.digest:
                crc64nvme(data)

        memory = self.memory
        if self.new:
            memory = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.all_at_once(memory, size, get)
        return memory[:size]


# -- ours -------------------------------------------------------------------------------------------------------------------------


def store_of(setting: Setting, **options: Any) -> Any:
    stores = importlib.import_module("spotguard.stores.s3")
    return stores.S3ObjectStore(f"s3://{BUCKET}/run", stores.S3Options(endpoint_url=setting.endpoint, **options))


def ours_up(**options: Any) -> Callable[[Setting], Transfer]:
    """As a commit does it: compared with the last commit up to the first difference, then sent, with the digest for the manifest."""

    def make(setting: Setting) -> Transfer:
        from spotguard.checkpoint import Digest

        store = store_of(setting, **options)
        store.preflight()
        last: dict[int, Digest] = {}

        def upload(size: int) -> None:
            data = setting.memory[:size]
            setting.memory[0] ^= 255  # training has gone on
            assert size not in last or not last[size].describes(data)
            setting.memory[0] ^= 255
            last[size] = Digest()
            with store.create("checkpoints/model.pt") as writer:
                writer.write(data, None, last[size])
            assert str(last[size]) == setting.digest(size)

        return upload

    return make


def ours_down(setting: Setting) -> Transfer:
    from spotguard.checkpoint import Digest

    store = store_of(setting)

    def download(size: int) -> memoryview:
        data, digest = setting.memory[:size], Digest()
        with store.open(f"bytes-{size}") as reader:
            reader.read_into(data, 0, None, digest)
        assert str(digest) == setting.digest(size)
        return data

    return download


def ours_fetch(setting: Setting) -> Transfer:
    """What a load does: the memory is new."""
    from spotguard.checkpoint import ShardRecord
    from spotguard.pipeline.checkpoint import fetch_shard

    store = store_of(setting)

    def download(size: int) -> memoryview:
        key, digest = f"bytes-{size}", setting.digest(size)
        return fetch_shard(store, ShardRecord(name="model", key=key, size=size, digest=digest, version="v1"))

    return download


# -- the cases --------------------------------------------------------------------------------------------------------------------

SHAPES = [(1, PART), (2, PART), (4, PART), (8, PART), (4, 8 * MIB), (2, 128 * MIB), (4, 128 * MIB)]


def limits(*, up: bool) -> list[Case]:
    def maker(connections: int, part: int, *, digest: bool = False, new: bool = False) -> Callable[[Setting], Transfer]:
        def make(setting: Setting) -> Transfer:
            raw = Raw(setting, connections, part, digest=digest, new=new)
            return raw.upload if up else raw.download

        return make

    return [
        *(
            Case(f"http.client, {connections} x {part // MIB} MiB", "limit", (), maker(connections, part))
            for connections, part in SHAPES
        ),
        *(
            Case(
                f"http.client, {connections} x {part // MIB} MiB, and a CRC",
                "digest",
                ("awscrt",),
                maker(connections, part, digest=True),
            )
            for connections, part in SHAPES[1:]
        ),
        *(
            Case(
                f"http.client, {connections} x {part // MIB} MiB, and a CRC, into new memory",
                "digest",
                ("awscrt",),
                maker(connections, part, digest=True, new=True),
            )
            for connections, part in SHAPES[1:]
            if not up
        ),
    ]


UPLOADS = [
    *limits(up=True),
    Case("spotguard as in a commit, unsigned", "ours", ("spotguard",), ours_up(payload_signing=False)),
    Case("spotguard as in a commit, signed", "ours", ("spotguard",), ours_up(payload_signing=True)),
]

DOWNLOADS = [
    *limits(up=False),
    Case("spotguard, into kept memory", "ours", ("spotguard",), ours_down),
    Case("spotguard as in a load, into new memory", "ours", ("spotguard",), ours_fetch),
]
