"""What the clients in `benchmarks/s3.py` do; that script starts this one, once or more, and says on stdin what is to be done next.

A line of JSON comes in, ``{"case": name, "up": true, "size": bytes, "memory": false}``, and one goes out: seconds, CPU seconds and, with
``memory``, the bytes by which the process grew at its peak. Every client is made and warmed up before it is measured.
"""

import argparse
import gc
import http.client
import importlib
import io
import json
import mmap
import os
import ssl
import sys
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).resolve().parent))  # or lightning.py there would be taken for the package

MIB = 1 << 20
PART = 32 * MIB
BUCKET, REGION = "bench", "us-east-1"
WARM_UP = 64 * MIB


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
        # Kept memory, as that of a snapshot: touched long before it is used.
        self.memory = memoryview(mmap.mmap(-1, self.size))
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
        kind: ``"limit"``, ``"ours"`` or ``"peer"``.
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
    """

    def __init__(self, setting: Setting, connections: int, part: int) -> None:
        address, context = urllib.parse.urlsplit(setting.endpoint), setting.context()
        host, port = str(address.hostname), address.port
        self.memory, self.part = setting.memory, part
        self.kept: list[http.client.HTTPConnection] = [
            http.client.HTTPSConnection(host, port, context=context)
            if context
            else http.client.HTTPConnection(host, port)
            for _ in range(connections)
        ]

    def all_at_once(self, size: int, move: Callable[[http.client.HTTPConnection, int, memoryview], None]) -> None:
        """Share the parts out to the connections."""
        failed: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for start in range(number * self.part, size, len(self.kept) * self.part):
                    move(self.kept[number], start, self.memory[start : min(size, start + self.part)])
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
            connection.request("PUT", f"/{BUCKET}/raw?partNumber={start}&uploadId=u1", data)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200

        self.all_at_once(size, put)

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

        self.all_at_once(size, get)
        return self.memory[:size]


# -- ours -------------------------------------------------------------------------------------------------------------------------


def store_of(setting: Setting, **options: Any) -> Any:
    stores = importlib.import_module("spotguard.stores.s3")
    return stores.S3ObjectStore(f"s3://{BUCKET}/run", stores.S3Options(endpoint_url=setting.endpoint, **options))


def ours_up(*, whole: bool, **options: Any) -> Callable[[Setting], Transfer]:
    """Parts, each with its CRC; `whole` as a commit does it, which computes the digest for the manifest before."""

    def make(setting: Setting) -> Transfer:
        from spotguard.checkpoint import digest_of

        store = store_of(setting, **options)
        store.preflight()

        def upload(size: int) -> None:
            data = setting.memory[:size]
            if whole:
                digest_of(data)
            with store.create("checkpoints/model.pt") as writer:
                writer.write(data)

        return upload

    return make


def ours_down(setting: Setting) -> Transfer:
    from spotguard.checkpoint import digest_of

    store = store_of(setting)

    def download(size: int) -> memoryview:
        data = setting.memory[:size]
        with store.open(f"bytes-{size}") as reader:
            reader.read_into(data, 0)
        assert digest_of(data) == setting.digest(size)
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


# -- boto3 ------------------------------------------------------------------------------------------------------------------------


class Memory(io.RawIOBase):
    """Bytes in memory as a file, without a copy."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._position = data, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Position of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move the next read."""
        self._position = offset + (0, self._position, len(self._data))[whence]
        return self._position

    def readinto(self, target: Any, /) -> int:
        """Read."""
        found = self._data[self._position : self._position + len(target)]
        target[: len(found)] = found
        self._position += len(found)
        return len(found)


def boto_client(*, tuned: bool) -> Any:
    boto3, config = importlib.import_module("boto3"), importlib.import_module("botocore.config")
    tuning = config.Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": False, "addressing_style": "path"},
    )
    return boto3.client("s3", config=tuning if tuned else config.Config(s3={"addressing_style": "path"}))


def boto_parts(*, tuned: bool) -> Any:
    transfer = importlib.import_module("boto3.s3.transfer")
    return transfer.TransferConfig(**({"multipart_chunksize": PART, "max_concurrency": 4} if tuned else {}))


def boto_up(*, tuned: bool, file: bool = True) -> Callable[[Setting], Transfer]:
    def make(setting: Setting) -> Transfer:
        client, parts = boto_client(tuned=tuned), boto_parts(tuned=tuned)

        def upload(size: int) -> None:
            if file:
                client.upload_file(str(setting.file(size)), BUCKET, "boto3", Config=parts)
            else:
                client.upload_fileobj(Memory(setting.memory[:size]), BUCKET, "boto3", Config=parts)

        return upload

    return make


def boto_down(*, tuned: bool) -> Callable[[Setting], Transfer]:
    def make(setting: Setting) -> Transfer:
        client, parts = boto_client(tuned=tuned), boto_parts(tuned=tuned)

        def download(size: int) -> Path:
            client.download_file(BUCKET, f"run/bytes-{size}", str(setting.target()), Config=parts)
            return setting.target()

        return download

    return make


def boto_read(setting: Setting) -> Transfer:  # noqa: ARG001 - the environment says where
    client = boto_client(tuned=False)
    return lambda size: client.get_object(Bucket=BUCKET, Key=f"run/bytes-{size}")["Body"].read()


# -- others -----------------------------------------------------------------------------------------------------------------------


def connector(setting: Setting, part: int) -> Any:
    package = importlib.import_module("s3torchconnector")
    config = package.S3ClientConfig(force_path_style=True, part_size=part)
    return package.S3Checkpoint(region=REGION, endpoint=setting.endpoint, s3client_config=config)


def connector_up(part: int) -> Callable[[Setting], Transfer]:
    def make(setting: Setting) -> Transfer:
        checkpoint = connector(setting, part)

        def upload(size: int) -> None:
            with checkpoint.writer(f"s3://{BUCKET}/connector") as writer:
                for start in range(0, size, part):
                    writer.write(setting.memory[start : min(size, start + part)])

        return upload

    return make


def connector_down(part: int) -> Callable[[Setting], Transfer]:
    def make(setting: Setting) -> Transfer:
        checkpoint = connector(setting, part)

        def download(size: int) -> memoryview:
            data, done = setting.memory[:size], 0
            with checkpoint.reader(f"s3://{BUCKET}/run/bytes-{size}") as reader:
                while done < size:
                    done += reader.readinto(data[done : done + part])
            return data

        return download

    return make


def obstore_of(setting: Setting, *, signed: bool) -> Any:
    return importlib.import_module("obstore.store").S3Store(
        BUCKET,
        endpoint=setting.endpoint,
        region=REGION,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "allow_invalid_certificates": True, "timeout": "300s"},
        **({} if signed else {"unsigned_payload": True}),
    )


def obstore_up(*, signed: bool, digest: bool = False, **how: Any) -> Callable[[Setting], Transfer]:
    """It sends no checksum, whatever the options: with `digest`, one is computed before, for whoever reads it to compare."""

    def make(setting: Setting) -> Transfer:
        store, put = obstore_of(setting, signed=signed), importlib.import_module("obstore").put
        crc64nvme = importlib.import_module("awscrt.checksums").crc64nvme if digest else None

        def upload(size: int) -> None:
            if crc64nvme is not None:
                crc64nvme(setting.memory[:size])
            put(store, "obstore", setting.memory[:size], use_multipart=True, **how)

        return upload

    return make


def obstore_get(setting: Setting) -> Transfer:
    store, get = obstore_of(setting, signed=True), importlib.import_module("obstore").get
    return lambda size: get(store, f"run/bytes-{size}").bytes()


def obstore_ranges(setting: Setting) -> Transfer:
    store, get_range = obstore_of(setting, signed=True), importlib.import_module("obstore").get_range
    futures = importlib.import_module("concurrent.futures")

    def download(size: int) -> memoryview:
        def one(start: int) -> None:
            end = min(size, start + PART)
            setting.memory[start:end] = memoryview(get_range(store, f"run/bytes-{size}", start=start, end=end))

        with futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(one, range(0, size, PART)))
        return setting.memory[:size]

    return download


def s3fs_of(setting: Setting) -> Any:
    verify = {"verify": str(setting.certificate)} if setting.certificate else {}
    package = importlib.import_module("s3fs")
    return package.S3FileSystem(endpoint_url=setting.endpoint, client_kwargs={"region_name": REGION, **verify})


def s3fs_put(setting: Setting) -> Transfer:
    system = s3fs_of(setting)
    return lambda size: system.put_file(str(setting.file(size)), f"{BUCKET}/s3fs")


def s3fs_get(setting: Setting) -> Transfer:
    system = s3fs_of(setting)

    def download(size: int) -> Path:
        system.get_file(f"{BUCKET}/run/bytes-{size}", str(setting.target()))
        return setting.target()

    return download


def s3fs_cat(setting: Setting) -> Transfer:
    system = s3fs_of(setting)
    return lambda size: system.cat_file(f"{BUCKET}/run/bytes-{size}")


# -- all of them ------------------------------------------------------------------------------------------------------------------

SHAPES = [(1, PART), (2, PART), (4, PART), (8, PART), (4, 8 * MIB), (2, 128 * MIB), (4, 128 * MIB)]
CONNECTOR = ("s3torchconnector", "torch")


def limits(*, up: bool) -> list[Case]:
    def maker(connections: int, part: int) -> Callable[[Setting], Transfer]:
        def make(setting: Setting) -> Transfer:
            raw = Raw(setting, connections, part)
            return raw.upload if up else raw.download

        return make

    return [
        Case(f"http.client, {connections} x {part // MIB} MiB", "limit", (), maker(connections, part))
        for connections, part in SHAPES
    ]


UPLOADS = [
    *limits(up=True),
    Case("spotguard, unsigned", "ours", ("spotguard",), ours_up(whole=False, payload_signing=False)),
    Case("spotguard as in a commit, unsigned", "ours", ("spotguard",), ours_up(whole=True, payload_signing=False)),
    Case("spotguard as in a commit, signed", "ours", ("spotguard",), ours_up(whole=True, payload_signing=True)),
    Case("boto3 upload_file", "peer", ("boto3",), boto_up(tuned=False)),
    Case("boto3 upload_file, 4 x 32 MiB, unsigned", "peer", ("boto3",), boto_up(tuned=True)),
    Case("boto3 upload_fileobj", "peer", ("boto3",), boto_up(tuned=False, file=False)),
    Case("boto3 upload_fileobj, 4 x 32 MiB, unsigned", "peer", ("boto3",), boto_up(tuned=True, file=False)),
    Case("s3torchconnector S3Checkpoint.writer", "peer", CONNECTOR, connector_up(8 * MIB), tls=False),
    Case("s3torchconnector S3Checkpoint.writer, 32 MiB", "peer", CONNECTOR, connector_up(PART), tls=False),
    Case("obstore put", "peer", ("obstore",), obstore_up(signed=True)),
    Case(
        "obstore put, 4 x 32 MiB",
        "peer",
        ("obstore",),
        obstore_up(signed=True, chunk_size=PART, max_concurrency=4),
    ),
    Case(
        "obstore put, 4 x 32 MiB, unsigned: no checksum",
        "peer",
        ("obstore",),
        obstore_up(signed=False, chunk_size=PART, max_concurrency=4),
    ),
    Case(
        "obstore put, 4 x 32 MiB, unsigned, and a digest",
        "peer",
        ("obstore", "awscrt"),
        obstore_up(signed=False, digest=True, chunk_size=PART, max_concurrency=4),
    ),
    Case("s3fs put_file", "peer", ("s3fs",), s3fs_put),
]

DOWNLOADS = [
    *limits(up=False),
    Case("spotguard, into kept memory", "ours", ("spotguard",), ours_down),
    Case("spotguard as in a load, into new memory", "ours", ("spotguard",), ours_fetch),
    Case("boto3 download_file", "peer", ("boto3",), boto_down(tuned=False)),
    Case("boto3 download_file, 4 x 32 MiB", "peer", ("boto3",), boto_down(tuned=True)),
    Case("boto3 get_object().read()", "peer", ("boto3",), boto_read),
    Case("s3torchconnector S3Checkpoint.reader", "peer", CONNECTOR, connector_down(8 * MIB), tls=False),
    Case("s3torchconnector S3Checkpoint.reader, 32 MiB", "peer", CONNECTOR, connector_down(PART), tls=False),
    Case("obstore get().bytes()", "peer", ("obstore",), obstore_get),
    Case("obstore get_range, 4 x 32 MiB, into kept memory", "peer", ("obstore",), obstore_ranges),
    Case("s3fs get_file", "peer", ("s3fs",), s3fs_get),
    Case("s3fs cat_file", "peer", ("s3fs",), s3fs_cat),
]

CASES = {True: UPLOADS, False: DOWNLOADS}  # to the server, and from it


class Worker:
    """Runs cases.

    Args:
        setting: Where.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.cases = {(case.name, up): case for up, cases in CASES.items() for case in cases}
        self.made: dict[tuple[str, bool], Transfer] = {}

    def run(self, name: str, *, up: bool, size: int, memory: bool) -> dict[str, float]:
        """Run one case once."""
        if (name, up) not in self.made:
            self.made[name, up] = self.cases[name, up].make(self.setting)
            self.once(name, up=up, size=MIB if memory else min(WARM_UP, size), memory=False)
        return self.once(name, up=up, size=size, memory=memory)

    def once(self, name: str, *, up: bool, size: int, memory: bool) -> dict[str, float]:
        """Prepare, run, look at what came."""
        setting, transfer = self.setting, self.made[name, up]
        setting.target().unlink(missing_ok=True)
        if up:
            setting.file(size)
        else:
            setting.memory[size - MIB : size] = bytes(MIB)
            if self.cases[name, up].kind == "ours":
                setting.digest(size)
        gc.collect()
        if memory:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak begins anew
        before = resident("VmRSS")
        cpu, began = time.process_time(), time.perf_counter()
        result = transfer(size)
        took, spent = time.perf_counter() - began, time.process_time() - cpu
        grown = resident("VmHWM") - before
        if not up:
            self.check(result, size)
        return {"s": took, "cpu": spent, **({"grown": float(grown)} if memory else {})}

    def check(self, result: Any, size: int) -> None:
        """Has the end come, and is it right?"""
        with self.setting.source.open("rb") as file:
            file.seek(size - MIB)
            expected = file.read(MIB)
        if isinstance(result, Path):
            with result.open("rb") as file:
                file.seek(size - MIB)
                assert file.read() == expected
        else:
            assert len(result) == size
            assert memoryview(result)[size - MIB :] == expected


def resident(name: str) -> int:
    """Memory of this process, now (``VmRSS``) or at its peak (``VmHWM``): proc(5)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def main() -> None:
    """Say what can be run here, then do what is asked for until there is nothing more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--certificate", type=Path)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    warnings.simplefilter("ignore")
    found = []
    for up, case in [(up, case) for up, cases in CASES.items() for case in cases]:
        missing = [package for package in case.needs if find_spec(package) is None]
        said = {"name": case.name, "kind": case.kind, "up": up, "needs": case.needs, "tls": case.tls}
        found.append({**said, "missing": missing})
    print(json.dumps(found), file=answers)
    if not sys.stdin.isatty():
        worker: Worker | None = None
        for line in sys.stdin:
            asked = json.loads(line)
            answer: dict[str, Any]
            try:
                worker = worker or Worker(Setting(options.endpoint, options.folder, options.certificate))
                answer = worker.run(asked["case"], up=asked["up"], size=asked["size"], memory=asked["memory"])
            except Exception as error:  # noqa: BLE001 - one client that fails is one row
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
