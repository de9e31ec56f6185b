"""The contract of `ObjectStore` over the back ends of fsspec, and the traps that they have laid."""

import contextlib
import itertools
import json
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from servers import AzureServer, GcsServer
from spotguard.errors import (
    ConfigError,
    DeadlineExceededError,
    MissingExtraError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    TransientStoreError,
)
from spotguard.stores import LocalObjectStore, MemoryObjectStore, ObjectStore, fsspec_store, open_store
from spotguard.stores._fsspec.errors import translate
from spotguard.stores.fsspec_store import FsspecObjectStore
from spotguard.testing import ObjectStoreContract
from spotguard.testing.object_store import assert_absent, get, put

MIB = 1 << 20
LARGE = bytes(range(256)) * (40 * MIB >> 8) + b"tail"  # more than a block of any back end, and no multiple of one
_count = itertools.count()


def google(server: GcsServer) -> FsspecObjectStore:
    return FsspecObjectStore(f"gs://{server.bucket}/{place()}", **server.options())


def azure(server: AzureServer) -> FsspecObjectStore:
    return FsspecObjectStore(f"az://{server.container}/{place()}", **server.options())


def place() -> str:
    return f"fsspec-{os.getpid()}-{next(_count)}"


class TestFsspecMemory(ObjectStoreContract):
    @pytest.fixture
    def store(self) -> ObjectStore:
        return FsspecObjectStore(f"memory://{place()}")


class TestFsspecLocal(ObjectStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return FsspecObjectStore(f"file://{tmp_path}/run")


class TestFsspecGoogle(ObjectStoreContract):
    @pytest.fixture
    def store(self, gcs: GcsServer) -> ObjectStore:
        return google(gcs)


class TestFsspecAzure(ObjectStoreContract):
    @pytest.fixture
    def store(self, azurite: AzureServer) -> ObjectStore:
        return azure(azurite)


@pytest.fixture(params=["memory", "local", "google", "azure"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FsspecObjectStore:
    if request.param == "google":
        return google(request.getfixturevalue("gcs"))
    if request.param == "azure":
        return azure(request.getfixturevalue("azurite"))
    return FsspecObjectStore(f"memory://{place()}" if request.param == "memory" else f"local://{tmp_path}/run")


@pytest.fixture(params=["google", "azure"])
def behind(request: pytest.FixtureRequest) -> Callable[[str], FsspecObjectStore]:
    """Makes a store that reaches its server by an address."""
    if request.param == "google":
        gcs: GcsServer = request.getfixturevalue("gcs")
        return lambda uri: google(gcs.behind(uri))
    azurite: AzureServer = request.getfixturevalue("azurite")
    return lambda uri: azure(azurite.behind(uri))


# -- large objects -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [False, True])
def test_an_object_of_several_blocks_is_whole_or_not_there(store: FsspecObjectStore, *, exclusive: bool) -> None:
    told: list[int] = []
    with pytest.raises(ZeroDivisionError), store.create("object", exclusive=exclusive) as writer:
        writer.write(LARGE)
        raise ZeroDivisionError
    assert_absent(store, "object")
    with store.create("object", exclusive=exclusive) as writer:
        assert writer.write(memoryview(LARGE)[:5], told.append) == 5
        assert writer.write(memoryview(LARGE)[5 : 33 * MIB + 7], told.append) == 33 * MIB + 2
        assert writer.write(memoryview(LARGE)[33 * MIB + 7 :], told.append) == len(LARGE) - 33 * MIB - 7
        assert_absent(store, "object")
    assert sum(told) == len(LARGE)
    told.clear()
    buffer = bytearray(len(LARGE) + 9)
    with store.open("object") as reader:
        assert reader.size == len(LARGE)
        assert reader.read_into(buffer, 0, told.append) == len(LARGE)
        assert reader.read_into(memoryview(buffer)[:9], len(LARGE) - 4) == 4
        assert (reader.read(3), reader.read(2)) == (LARGE[:3], LARGE[3:5])
    assert buffer[:4] == b"tail"
    assert buffer[4:] == LARGE[4:] + b"\0" * 9
    assert sum(told) >= len(LARGE)
    if exclusive:
        with pytest.raises(ObjectExistsError), store.create("object", exclusive=True) as writer:
            writer.write(LARGE[1:])
        assert store.stat("object") is not None


def test_a_large_object_that_is_replaced_while_it_is_read_is_no_mixture(store: FsspecObjectStore) -> None:
    put(store, "object", LARGE)
    with store.open("object") as reader:
        assert reader.read(5) == LARGE[:5]
        put(store, "object", bytes(len(LARGE)))
        with pytest.raises(TransientStoreError, match="replaced"):
            reader.read()


# -- connections -------------------------------------------------------------------------------------------------------------------


class Proxy:
    """Between us and a server: lets `limit` bytes of all requests pass, then nothing; or loses the answer to one request."""

    def __init__(
        self, server: str, *, limit: float = float("inf"), cut: bool = False, lose: bytes | None = None
    ) -> None:
        self.target = urlsplit(server)
        self.limit, self.cut, self.lose = limit, cut, lose
        self.lost = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()[1]
        self.open: list[socket.socket] = []
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.address}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.open.append(client)
                server = socket.create_connection((self.target.hostname, self.target.port))
                self.open.append(server)
                self.threads += [threading.Thread(target=job, args=(client, server)) for job in (self._up, self._down)]
                for thread in self.threads[-2:]:
                    thread.start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                self.limit -= len(data)
                if self.limit < 0:
                    if self.cut:
                        break
                    continue  # swallowed: the server waits, and so do we
                if self.lose is not None and self.lose in data:
                    self.lose, self.lost = None, id(client)
                server.sendall(data)
        _shut(server, client)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if self.lost == id(client):
                    break
                # The address of an upload session leads around us, unless we say otherwise.
                client.sendall(data.replace(f":{self.target.port}/".encode(), f":{self.address}/".encode()))
        _shut(client)

    def close(self) -> None:
        _shut(self.listener, *self.open)
        for thread in self.threads:
            thread.join(10)
        for one in (self.listener, *self.open):
            one.close()


def _shut(*ends: socket.socket) -> None:
    """Each of them, whatever has become of the others: an end that stays open is a peer that waits for ever."""
    for one in ends:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxied() -> Iterator[Callable[..., Proxy]]:
    with contextlib.ExitStack() as stack:

        def make(*args: Any, **kwargs: Any) -> Proxy:
            proxy = Proxy(*args, **kwargs)
            stack.callback(proxy.close)
            return proxy

        yield make


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "stalled"])
@pytest.mark.parametrize("size", [900_000, len(LARGE)], ids=["one request", "many"])
def test_a_connection_that_is_lost_midway_publishes_nothing(
    behind: Callable[[str], FsspecObjectStore],
    gcs: GcsServer,
    azurite: AzureServer,
    proxied: Callable[..., Proxy],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    *,
    cut: bool,
) -> None:
    monkeypatch.setattr(fsspec_store, "_AFTERTHOUGHT", 0.3)
    direct = behind("http://unused")
    google_store = direct.uri.startswith("gs")
    proxy = proxied(gcs.endpoint if google_store else azurite.endpoint, limit=size * 0.8, cut=cut)
    through = behind(proxy.uri)
    plain = FsspecObjectStore(through.uri, **(gcs if google_store else azurite).options())
    put(plain, "object", b"old")
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError), through.create("object", deadline=began + 0.7) as writer:
        writer.write(LARGE[:size])
    assert time.monotonic() - began < 4
    assert proxy.limit < 0, "it was lost on the way"
    assert get(plain, "object") == b"old"
    assert [(info.key, info.size) for info in plain.list("")] == [("object", 3)]


@pytest.mark.parametrize("size", [10, len(LARGE)], ids=["one request", "many"])
def test_a_create_whose_answer_was_lost_is_ours(
    behind: Callable[[str], FsspecObjectStore],
    gcs: GcsServer,
    azurite: AzureServer,
    proxied: Callable[..., Proxy],
    size: int,
) -> None:
    google_store = behind("http://unused").uri.startswith("gs")
    last = {True: b"ifGenerationMatch=0", False: b"comp=blocklist" if size > MIB else b"x-ms-blob-type: BlockBlob"}[
        google_store
    ]
    if google_store and size > MIB:
        last = f"-{size - 1}/{size}".encode()  # the last chunk
    proxy = proxied(gcs.endpoint if google_store else azurite.endpoint)
    through = behind(proxy.uri)
    put(through, "other", b"x", exclusive=True)  # the probe is behind us
    if not google_store:
        quick(through)
    proxy.lose, generator = last, random.getstate()
    with through.create("object", exclusive=True) as writer:
        writer.write(LARGE[:size])
    assert proxy.lost
    assert random.getstate() == generator, "a retry has drawn from the generator of the training"
    assert writer.info is not None
    with pytest.raises(ObjectExistsError), through.create("object", exclusive=True) as writer:
        writer.write(LARGE[:size])  # the same bytes, but it was somebody else
    assert get(through, "object") == LARGE[:size]


def test_a_connection_that_is_cut_at_each_try_is_a_transient_error(
    azurite: AzureServer, proxied: Callable[..., Proxy]
) -> None:
    store = azure(azurite.behind(proxied(azurite.endpoint, limit=30 * MIB, cut=True).uri))
    plain = FsspecObjectStore(store.uri, **azurite.options())
    quick(store)
    with pytest.raises(TransientStoreError, match="no good answer") as caught:
        put(store, "object", LARGE)
    assert caught.value.exhausted
    assert_absent(plain, "object")


@pytest.mark.parametrize("size", [7, len(LARGE)], ids=["one request", "blocks"])
def test_an_upload_that_stalls_is_given_up_without_a_deadline(
    behind: Callable[[str], FsspecObjectStore],
    gcs: GcsServer,
    azurite: AzureServer,
    proxied: Callable[..., Proxy],
    size: int,
) -> None:
    endpoint = gcs.endpoint if behind("http://unused").uri.startswith("gs") else azurite.endpoint
    proxy = proxied(endpoint)
    store = behind(proxy.uri)
    put(store, "other", b"x", exclusive=True)  # the probe is behind us
    store._driver.stall_s = 0.5  # type: ignore[attr-defined]
    proxy.limit = size / 2
    with pytest.raises(TransientStoreError, match=r"nothing of the upload has moved for 0\.5 s"):
        put(store, "object", LARGE[:size])


def quick(store: FsspecObjectStore) -> None:
    """Azure's client waits 15 s before a retry, and aiohttp at times for ever on a connection that was cut."""
    policy = store._driver.fs.service_client._config.retry_policy  # type: ignore[attr-defined]
    policy.initial_backoff = policy.increment_base = policy.random_jitter_range = 0
    store._driver.stall_s = 2.0  # type: ignore[attr-defined]


def test_a_server_that_is_not_there_is_a_transient_error(azurite: AzureServer) -> None:
    store = azure(azurite.behind("http://127.0.0.1:1"))
    quick(store)
    with pytest.raises(TransientStoreError, match="no good answer"):
        store.stat("object")


# -- exclusive create --------------------------------------------------------------------------------------------------------------

CLAIM = """
import json, sys
from spotguard.errors import ObjectExistsError
from spotguard.stores.fsspec_store import FsspecObjectStore

stores = [FsspecObjectStore(uri, **options) for uri, options in json.loads(sys.argv[2])]
print("ready", flush=True)
for line in sys.stdin:
    which, size, key = json.loads(line)
    try:
        with stores[which].create(key, exclusive=True) as writer:
            writer.write(sys.argv[1].encode() * size)
    except ObjectExistsError:
        print("lost", flush=True)
    else:
        print("won", flush=True)
"""


def test_of_eight_processes_exactly_one_wins(gcs: GcsServer, azurite: AzureServer) -> None:
    stores = [google(gcs), azure(azurite)]
    places = json.dumps([(stores[0].uri, gcs.options()), (stores[1].uri, azurite.options())])
    claimants = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(number), places], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(8)
    ]
    try:
        assert [line_of(claimant) for claimant in claimants] == ["ready"] * 8
        for round_, (which, size) in enumerate([(0, 1000), (1, 1000)] * 4 + [(0, 5 * MIB), (1, 3 * MIB)]):
            key = f"claims/{round_}"
            for claimant in claimants:
                assert claimant.stdin is not None
                claimant.stdin.write(json.dumps([which, size, key]) + "\n")
                claimant.stdin.flush()
            outcome = [line_of(claimant) for claimant in claimants]
            assert sorted(outcome) == ["lost"] * 7 + ["won"]
            assert get(stores[which], key) == str(outcome.index("won")).encode() * size
    finally:
        for claimant in claimants:
            claimant.communicate()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


class OddFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A protocol that nobody has heard of."""

    protocol = "odd"


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[str]:
    fsspec.register_implementation("odd", OddFileSystem, clobber=True)
    yield f"odd://{tmp_path}/run"
    _registry.pop("odd")


def test_a_back_end_without_exclusive_create_is_refused(odd: str) -> None:
    store = FsspecObjectStore(odd)
    with pytest.raises(ConfigError, match="single_writer=True"), store.create("object", exclusive=True):
        pytest.fail("refused before anything is written")
    put(store, "object", b"x")
    assert get(store, "object") == b"x"


class TestFsspecSingleWriter(ObjectStoreContract):
    """Any file system: all but the race."""

    @pytest.fixture
    def store(self, odd: str) -> ObjectStore:
        store = FsspecObjectStore(odd, single_writer=True)
        with pytest.warns(UserWarning, match="nothing keeps a second writer out"):
            put(store, "first", b"", exclusive=True)
        store.delete([info.ref for info in store.list("")])
        return store

    test_of_eight_exclusive_writers_exactly_one_wins = None  # type: ignore[assignment]  # what it does not promise


def test_what_a_killed_writer_left_is_out_of_sight_until_it_is_discarded(odd: str, tmp_path: Path) -> None:
    store = FsspecObjectStore(odd)
    put(store, "folder/object", b"x")
    (tmp_path / "run" / "folder" / ".sg-other-0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / "run" / "folder" / ".sg-fresh-0123456789ab.tmp").write_bytes(b"half")
    assert [info.key for info in store.list("")] == ["folder/object"]
    assert store.discard_partials(lambda key: key == "folder/other") == ["folder/other"]
    assert sorted(os.listdir(tmp_path / "run" / "folder")) == [".sg-fresh-0123456789ab.tmp", "object"]


def test_a_server_that_ignores_the_condition_is_refused(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = google(gcs)
    new = store._driver._new  # type: ignore[attr-defined]
    monkeypatch.setattr(store._driver, "_new", lambda path, exclusive, token: new(path, False, token))
    with pytest.raises(ConfigError, match="second exclusive create"), store.create("object", exclusive=True):
        pytest.fail("refused before anything is written")
    assert [path for path, _ in store._driver.walk(store._root)] == []


# -- errors ------------------------------------------------------------------------------------------------------------------------


def test_a_missing_bucket_is_said(gcs: GcsServer, azurite: AzureServer) -> None:
    for store in (
        FsspecObjectStore("gs://nowhere/run", **gcs.options()),
        FsspecObjectStore("az://nowhere/run", **azurite.options()),
    ):
        with pytest.raises(StoreAccessError, match=r"does not exist.*create it"):
            put(store, "object", b"x")
        with pytest.raises(StoreAccessError, match=r"does not exist.*create it"):
            store.list("")


@pytest.mark.parametrize("status", [401, 403])
def test_access_denied_is_not_not_found(status: int) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.dumps({"error": {"code": status, "message": "you may not"}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = refuse  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever).start()
        store = FsspecObjectStore(
            "gs://bucket/run", token="anon", endpoint_url=f"http://127.0.0.1:{server.server_port}"
        )
        for verb in (
            lambda: store.stat("x"),
            lambda: store.open("x"),
            lambda: store.list(""),
            lambda: put(store, "x", b""),
        ):
            with pytest.raises(StoreAccessError, match=r"gs://bucket/run.*refused.*GOOGLE_APPLICATION_CREDENTIALS"):
                verb()
        server.shutdown()


def test_a_wrong_key_of_azure_is_not_not_found(azurite: AzureServer) -> None:
    wrong = azurite.connection_string.replace("AccountKey=Eby8", "AccountKey=Abcd")
    store = FsspecObjectStore("az://plain/run", connection_string=wrong)
    with pytest.raises(StoreAccessError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        store.stat("object")
    with pytest.raises(StoreAccessError, match="refused"):
        put(store, "object", b"x", exclusive=True)


class HttpError(Exception):
    """As gcsfs, huggingface_hub and aiohttp have them: a number in an attribute."""

    def __init__(self, number: int, attribute: str = "code") -> None:
        super().__init__(f"{number}")
        setattr(self, attribute, number)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (HttpError(403), StoreAccessError),
        (HttpError(401, "status"), StoreAccessError),
        (HttpError(404), ObjectNotFoundError),
        (HttpError(429, "status_code"), TransientStoreError),
        (HttpError(503), TransientStoreError),
        (HttpError(400), StoreError),
        (OSError("Forbidden: http://x/y\nno"), StoreAccessError),
        (PermissionError(13, "no"), StoreAccessError),
        (FileNotFoundError("x"), ObjectNotFoundError),
        (ConnectionResetError(), TransientStoreError),
        (TimeoutError(), TransientStoreError),
        (FileExistsError("x"), ObjectExistsError),
        (HttpError(412), ObjectExistsError),
        (NotImplementedError(), StoreError),
        (ValueError("odd"), StoreError),
    ],
    ids=repr,
)
def test_an_error_of_a_back_end_is_said_in_our_words(error: Exception, kind: type[StoreError]) -> None:
    found = translate(error, "gs://bucket/key", "see there", exclusive=True)
    assert type(found) is kind
    assert str(found).startswith("gs://bucket/key: ")


@pytest.mark.parametrize(
    ("uri", "module", "advice"),
    [
        (
            "gs://bucket/run",
            "gcsfs",
            "gs:// needs the package gcsfs, which is not installed: pip install 'spotguard[gcp]'",
        ),
        (
            "az://bucket/run",
            "adlfs",
            "az:// needs the package adlfs, which is not installed: pip install 'spotguard[azure]'",
        ),
        ("hf://user/run", "huggingface_hub", "not installed: pip install huggingface_hub"),
    ],
)
def test_a_package_that_is_missing_is_named(
    uri: str, module: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(_registry, uri.partition(":")[0], raising=False)
    with pytest.raises(MissingExtraError, match=re.escape(advice)):
        open_store(uri)


def test_credentials_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)
    pytest.importorskip("adlfs")
    with pytest.raises(ConfigError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container/run").stat("object")


# -- opening -----------------------------------------------------------------------------------------------------------------------


def test_a_uri_is_opened_by_the_store_for_it(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    gcs.use(monkeypatch)
    store = open_store(f"gs://{gcs.bucket}/{place()}/")
    assert isinstance(store, FsspecObjectStore)
    assert not store.uri.endswith("/")
    put(store, "object", b"x", exclusive=True)
    assert get(open_store(store.uri), "object") == b"x"
    assert isinstance(open_store("memory://x"), MemoryObjectStore)
    assert isinstance(open_store("file:///x"), LocalObjectStore)
    assert isinstance(open_store("local:///x"), FsspecObjectStore)


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("gcp://bucket/run", r"Did you mean gcs://\?"),
        ("S3://bucket/run", r"Did you mean s3://\?"),
        ("nonsense-of-mine://bucket/run", "not known. Use a directory path"),
        ("gs://", "names no place"),
        ("az:///", "names no place"),
        ("gs://bucket/../run", "write the place out"),
        ("az://container/team/../run", "write the place out"),
        ("abfs://container/./run", "write the place out"),
    ],
)
def test_a_uri_that_names_nothing_is_refused(uri: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        open_store(uri)


def test_a_store_works_in_a_forked_child_and_after_pickling(gcs: GcsServer) -> None:
    store = google(gcs)
    put(store, "object", b"x", exclusive=True)
    assert get(pickle.loads(pickle.dumps(store)), "object") == b"x"
    script = """
import json, os, sys
from spotguard.stores.fsspec_store import FsspecObjectStore
store = FsspecObjectStore(sys.argv[1], **json.loads(sys.argv[2]))
assert store.open("object").read() == b"x"
if (child := os.fork()) == 0:
    assert store.open("object").read() == b"x"
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    command = [sys.executable, "-c", script, store.uri, json.dumps(gcs.options())]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_plain_path_does_not_import_fsspec(tmp_path: Path) -> None:
    script = "import sys; from spotguard.stores import open_store; open_store(sys.argv[1]); assert 'fsspec' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_other_packages_see_nothing_of_ours(store: FsspecObjectStore) -> None:
    """What is there is what a listing of fsspec itself finds: no markers, no leftovers."""
    put(store, "folder/object", b"x", exclusive=True)
    kind: Any = type(store._driver).__name__
    others = {"LocalDriver": LocalFileSystem(), "MemoryDriver": fsspec.filesystem("memory")}
    fs = others.get(kind) or store._driver.fs  # type: ignore[attr-defined]
    fs.invalidate_cache()
    assert [path.removeprefix(store._root) for path in fs.find(store._root)] == ["/folder/object"]
