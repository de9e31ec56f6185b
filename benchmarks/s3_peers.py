"""The clients that ours is measured against in `benchmarks/s3.py`, each as its documentation has it, and as fast as we could make it."""

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.s3_clients import BUCKET, MIB, PART, REGION, Case, Setting, Transfer

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


# -- the cases --------------------------------------------------------------------------------------------------------------------

CONNECTOR = ("s3torchconnector", "torch")

UPLOADS = [
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
