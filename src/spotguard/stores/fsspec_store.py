"""Google Cloud Storage, Azure, Hugging Face, and whatever else fsspec knows, as a store."""

# ruff: noqa: SLF001 - how fsspec takes a URI apart has a leading underscore, and is what its own `open` calls

import contextlib
import functools
import importlib
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from spotguard._retry import draw_apart
from spotguard.checkpoint import Digest
from spotguard.errors import (
    ConfigError,
    DeadlineExceededError,
    MissingExtraError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
    TransientStoreError,
)
from spotguard.stores._fsspec.azure import AzureDriver
from spotguard.stores._fsspec.drivers import Body, Driver, FileSystemDriver, Found, LocalDriver, MemoryDriver
from spotguard.stores._fsspec.errors import translate
from spotguard.stores._fsspec.google import GoogleDriver
from spotguard.stores._fsspec.preflight import preflight
from spotguard.stores._fsspec.readers import LargeReader, SmallReader
from spotguard.stores.base import (
    ObjectInfo,
    ObjectReader,
    ObjectRef,
    ObjectWriter,
    Progress,
    check_deadline,
    check_key,
    check_prefix,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FsspecObjectStore"]

_T = TypeVar("_T")
_GOOGLE, _AZURE, _LOCAL = {"gs", "gcs"}, {"az", "abfs", "abfss"}, {"file", "local"}
_EXTRAS = dict.fromkeys(_GOOGLE, "gcp") | dict.fromkeys(_AZURE, "azure")
_CREDENTIALS = (
    dict.fromkeys(
        _GOOGLE,
        "GOOGLE_APPLICATION_CREDENTIALS, 'gcloud auth application-default login', or the account of the machine",
    )
    | dict.fromkeys(
        _AZURE,
        "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or 'az login', or AZURE_STORAGE_CONNECTION_STRING",
    )
    | {"hf": "HF_TOKEN, or 'hf auth login'"}
)
_ADVICE = (
    dict.fromkeys(_GOOGLE, ": on this bucket, the role Storage Object User (roles/storage.objectUser)")
    | dict.fromkeys(_AZURE, ": on this container, the role Storage Blob Data Contributor")
    | {"hf": ": a token that may write to this repository"}
)
_JITTER = {  # modules that would draw it from the generator of the training
    "gcp": ("gcsfs.retry", "google.auth._exponential_backoff"),
    "azure": ("azure.core.pipeline.policies._authentication", "azure.core.pipeline.policies._authentication_async"),
}
_WHOLE = 8 << 20  # an object up to here is read when it is opened, in one request: nobody can replace it in between
_REQUEST_TIMEOUT = 60.0  # seconds; gcsfs would wait for ever
_AFTERTHOUGHT = 2.0  # seconds to ask whether a create whose answer did not come has worked


class _Writer:
    def __init__(self, key: str, deadline: float | None) -> None:
        self._key, self._deadline = key, deadline
        self.body = Body()
        self.info: ObjectInfo | None = None

    def write(self, data: "Buffer", /, progress: Progress | None = None, digest: Digest | None = None) -> int:
        check_deadline(self._deadline, self._key)
        view = memoryview(data).cast("B")
        if digest is not None:
            digest.update(view, self.body.size)
        self.body.append(view, progress)
        return len(view)


class FsspecObjectStore:
    """Objects in a file system of fsspec.

    Exclusive create, on which the commit of a checkpoint rests, is there for Google Cloud Storage (``gs://``, ``gcs://``), Azure
    (``az://``, ``abfs://``, ``abfss://``), local files and memory. Any other back end refuses it, unless `single_writer` is set.

    Args:
        uri: Place of the objects.
        single_writer: You promise that never two processes write there at the same time. Then an exclusive create looks whether the
            key is taken and writes; two writers in the same instant may both win.
        **storage_options: What the file system takes, such as ``token``, ``endpoint_url`` or ``connection_string``.

    Raises:
        ConfigError: The URI names no place, or its scheme is not known to fsspec.
        MissingExtraError: The package for that back end is not installed; the message names it.

    Example:
        >>> store = FsspecObjectStore("memory://fsspec-doc")
        >>> with store.create("a/b", exclusive=True) as writer:
        ...     _ = writer.write(b"hello")
        >>> [info.key for info in store.list("a/")], store.open("a/b").read()
        (['a/b'], b'hello')
    """

    def __init__(self, uri: str, *, single_writer: bool = False, **storage_options: Any) -> None:
        self.uri = uri.rstrip("/")
        self._protocol, separator, place = uri.partition("://")
        if not separator or not place.strip("/"):
            raise ConfigError(f"uri={uri!r} names no place; write for example gs://my-bucket/my-run")
        if self._protocol in _EXTRAS and "/" not in place.strip("/"):
            raise ConfigError(
                f"uri={uri!r} names a whole bucket: a run needs a place of its own there, as in {uri.rstrip('/')}/run-17"
            )
        if self._protocol in _EXTRAS and {".", ".."} & set(place.split("/")):
            raise ConfigError(f"uri={uri!r}: '.' and '..' mean nothing in a bucket; write the place out")
        self._options, self._single_writer = storage_options, single_writer
        self._class = _file_system_class(self._protocol)
        self._root = str(self._class._strip_protocol(uri)).rstrip("/")
        self._credentials = _CREDENTIALS.get(self._protocol, f"see fsspec's documentation on {self._protocol}://")
        self._patient = (
            self._protocol in _EXTRAS
        )  # gcsfs and the client of Azure try again by themselves, for half a minute
        self._lock = threading.Lock()
        self._made: tuple[int, Driver] | None = None
        self._tried = False  # whether the preflight has been

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[ObjectWriter]:
        """See `ObjectStore.create`. All is sent when the block is left; until then the bytes are only held."""
        path = self._path(key)
        check_deadline(deadline, key)
        if exclusive:
            self.preflight()
        writer = _Writer(key, deadline)
        yield writer
        check_deadline(deadline, key)
        self._put(path, key, writer.body, exclusive=exclusive, deadline=deadline)
        writer.info = ObjectInfo(key, writer.body.size)

    def open(self, key: str, *, version: str | None = None) -> ObjectReader:  # noqa: ARG002 - no versions here
        """See `ObjectStore.open`. A small object is read at once; a large one raises TransientStoreError once it is replaced."""
        path = self._path(key)
        found = self._said(key, lambda: self._driver.find(path))
        if found is None:
            raise ObjectNotFoundError(f"{self.uri}/{key} does not exist")
        if found.size <= _WHOLE:
            return SmallReader(self._said(key, lambda: self._driver.read(path, 0, None, None)))

        def fetch(start: int, end: int) -> bytes:
            data = self._said(key, lambda: self._driver.read(path, start, end, found.pin))
            if len(data) != end - start:
                raise TransientStoreError(
                    f"{self.uri}/{key}: {len(data)} bytes came where {end - start} were asked for"
                )
            return data

        return LargeReader(fetch, found.size, self._driver.parallel)

    def stat(self, key: str, *, version: str | None = None) -> ObjectInfo | None:  # noqa: ARG002 - no versions here
        """See `ObjectStore.stat`."""
        path = self._path(key)
        found = self._said(key, lambda: self._driver.find(path))
        return None if found is None else ObjectInfo(key, found.size)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        check_prefix(prefix)
        base = f"{self._root}/"
        found = self._said(prefix, lambda: list(self._driver.walk(base + prefix)))
        objects = sorted((path[len(base) :], size) for path, size in found if path.startswith(base + prefix))
        # What begins with a dot is no object: temporary names, and the traces of others.
        return (ObjectInfo(key, size) for key, size in objects if "/." not in f"/{key}" and not key.endswith("/"))

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        """See `ObjectStore.delete`."""
        paths = [self._path(ref.key) for ref in refs]
        if paths:
            self._said("", lambda: self._driver.remove(paths))

    def discard_partials(self, is_stale: Callable[[str], bool]) -> Sequence[str]:
        """See `ObjectStore.discard_partials`."""
        return self._said("", lambda: self._driver.discard_partials(self._root, is_stale))

    def __reduce__(self) -> Any:
        return _again, (self.uri, self._single_writer, self._options)

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _put(self, path: str, key: str, body: Body, *, exclusive: bool, deadline: float | None) -> None:
        token = secrets.token_hex(16)
        try:
            self._driver.put(path, body, exclusive=exclusive, token=token, deadline=deadline)
        except Exception as error:
            translated = translate(
                error,
                f"{self.uri}/{key}",
                self._credentials,
                exclusive=exclusive,
                creating=True,
                exhausted=self._patient,
            )
            # The answer to a create that worked may get lost: then a retry, inside the library too, is told "exists", or there is no
            # answer at all. The token that we have sent along tells whether what is there is ours.
            if isinstance(translated, (ObjectExistsError, TransientStoreError)) and self._is_ours(path, token):
                return
            if deadline is not None and time.monotonic() >= deadline and not isinstance(translated, ObjectExistsError):
                raise DeadlineExceededError(
                    f"{self.uri}/{key} was not written by its deadline; nothing of it is visible"
                ) from error
            raise translated from (None if translated is error else error)

    def _is_ours(self, path: str, token: str) -> bool:
        try:
            found: Found | None = self._driver.find(path, patience=_AFTERTHOUGHT)
        except Exception:  # noqa: BLE001 - the first error is the one to tell
            return False
        return found is not None and found.token == token

    def preflight(self) -> None:
        """See `PreflightStore.preflight`. Once it has succeeded it is not repeated; the first exclusive create does it too."""
        with self._lock:
            if self._tried:
                return
            driver = self._said("", lambda: self._driver_unlocked())
            if not driver.exclusive and not self._single_writer:
                raise ConfigError(
                    f"{self.uri}: {self._protocol}:// has no exclusive create that spotguard knows of, so two processes could commit the "
                    "same checkpoint. Use a store that has it (a path, s3://, gs://, az://), or, if never two processes write there at "
                    f"the same time, say so: FsspecObjectStore({self.uri!r}, single_writer=True)"
                )
            if not driver.exclusive:
                warnings.warn(
                    f"{self.uri}: single_writer=True: nothing keeps a second writer out, a start that overlaps with another may spoil "
                    "the run",
                    stacklevel=2,
                )
            translated = functools.partial(
                translate, where=self.uri, credentials=self._credentials, exhausted=self._patient
            )
            advice = _ADVICE.get(self._protocol, "")
            preflight(driver, self.uri, self._root, translated, alone=self._single_writer, advice=advice)
            self._tried = True

    def _said(self, key: str, work: Callable[[], _T]) -> _T:
        """Do it, and say in our words what the back end says."""
        try:
            return work()
        except (StoreError, ConfigError):
            raise
        except Exception as error:
            raise translate(
                error, f"{self.uri}/{key}".rstrip("/"), self._credentials, exhausted=self._patient
            ) from error

    @property
    def _driver(self) -> Driver:
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[1]
        with self._lock:
            return self._driver_unlocked()

    def _driver_unlocked(self) -> Driver:
        # Made when it is first used, by the process that uses it: the thread behind fsspec does not survive a fork.
        if self._made is None or self._made[0] != os.getpid():
            self._made = (os.getpid(), self._make_driver())
        return self._made[1]

    def _make_driver(self) -> Driver:
        if self._protocol in _LOCAL:
            return LocalDriver(self._root)
        options = {**self._class._get_kwargs_from_urls(self.uri), **self._options}
        if self._protocol in _GOOGLE:
            options.setdefault("requests_timeout", _REQUEST_TIMEOUT)

        def make() -> Any:
            try:
                # An instance of our own: one that is shared could have been made with other options, and keeps what it has listed.
                return self._class(**options, skip_instance_cache=True)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{self.uri}: {error}; credentials: {self._credentials}") from error

        if self._protocol in _GOOGLE:
            return GoogleDriver(make())
        if self._protocol in _AZURE:
            return AzureDriver(make())
        kind = MemoryDriver if self._protocol == "memory" else FileSystemDriver
        return kind(make, self._protocol)


def _again(uri: str, single_writer: bool, options: dict[str, Any]) -> FsspecObjectStore:  # noqa: FBT001
    return FsspecObjectStore(uri, single_writer=single_writer, **options)


def _file_system_class(protocol: str) -> Any:
    import fsspec

    if protocol in _GOOGLE:
        # gcsfs 2026.10 asks a gRPC interface for the layout of the bucket before the first operation, and hangs for a minute where
        # that is blocked, twice as long as Google gives a preempted machine. It has to be told before it is imported.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        found = fsspec.get_filesystem_class(protocol)
        if protocol in _GOOGLE and os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"].lower() not in ("true", "1"):
            found = importlib.import_module(
                "gcsfs.core"
            ).GCSFileSystem  # the plain one, also where gcsfs was imported before us
        for name in _JITTER.get(_EXTRAS.get(protocol, ""), ()):
            with contextlib.suppress(ImportError):  # another release may have it elsewhere
                draw_apart(importlib.import_module(name))
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or getattr(error, "name", None) or protocol
        what = f"{protocol}:// needs the package {missing}, which is not installed"
        if protocol in _EXTRAS:
            raise MissingExtraError.of(_EXTRAS[protocol], what) from error
        raise MissingExtraError(f"{what}: pip install {missing.partition('.')[0]}") from error
    except ValueError as error:
        raise ConfigError(f"scheme {protocol!r} is not known to fsspec") from error
    return found
