"""What a run will need of a back end of fsspec is found out at its start: what is not allowed, what is not there, who one is not."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from servers import AzureServer, GcsServer
from spotguard import SpotGuard, TrainState
from spotguard.errors import ConfigError, StoreAccessError, StoreError
from spotguard.stores import PreflightStore
from spotguard.stores.fsspec_store import FsspecObjectStore
from spotguard.testing.object_store import get, put
from spotguard.testing.proxy import Fault, FaultProxy, Flip, Request, Status

_count = itertools.count()


def place() -> str:
    return f"preflight-{os.getpid()}-{next(_count)}"


@pytest.fixture(params=["memory", "file", "google", "azure"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FsspecObjectStore:
    if request.param == "google":
        gcs: GcsServer = request.getfixturevalue("gcs")
        return FsspecObjectStore(f"gs://{gcs.bucket}/{place()}", **gcs.options())
    if request.param == "azure":
        azurite: AzureServer = request.getfixturevalue("azurite")
        return FsspecObjectStore(f"az://{azurite.container}/{place()}", **azurite.options())
    return FsspecObjectStore(f"memory://{place()}" if request.param == "memory" else f"file://{tmp_path}/run")


def test_it_leaves_nothing_behind(store: FsspecObjectStore) -> None:
    assert isinstance(store, PreflightStore)
    store.preflight()
    assert list(store.list("")) == []
    assert [path for path, _ in store._driver.walk(f"{store._root}/")] == []


def test_what_a_start_that_died_left_is_cleared_away_a_day_later(store: FsspecObjectStore) -> None:
    for key in ("probe-0069200000-0123456789abcdef", "probe-ffffffffff-0123456789abcdef", "probe-of-mine"):
        put(store, key, b"")
    store.preflight()
    assert [info.key for info in store.list("")] == ["probe-ffffffffff-0123456789abcdef", "probe-of-mine"]


def assert_refused_at_step_0(store: FsspecObjectStore, message: str) -> None:
    state = TrainState(model=torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=message) as caught, SpotGuard(store, state, notices="none"):
        pytest.fail("nothing is trained")
    assert isinstance(caught.value.__cause__, StoreAccessError)


# -- what is not allowed -----------------------------------------------------------------------------------------------------------

Fits = Callable[[Request], bool]
GOOGLE: dict[str, Fits] = {
    "create": lambda request: request.method == "POST",
    "read": lambda request: request.method == "GET" and "alt=media" in request.query,
    "list": lambda request: request.method == "GET" and "prefix=" in request.query,
    "delete": lambda request: request.method == "DELETE",
}
AZURE: dict[str, Fits] = {
    "create": lambda request: request.method == "PUT",
    "read": lambda request: request.method == "GET" and "comp=list" not in request.query,
    "list": lambda request: "comp=list" in request.query,
    "delete": lambda request: request.method == "DELETE",
}


@pytest.fixture(params=["google", "azure"])
def restricted(request: pytest.FixtureRequest) -> Iterator[Callable[..., FsspecObjectStore]]:
    """Makes a store in which these things are not allowed."""
    server = request.getfixturevalue("gcs" if request.param == "google" else "azurite")
    rules = GOOGLE if request.param == "google" else AZURE
    with FaultProxy(server.endpoint) as proxy:

        def make(*denied: str, fault: Fault | None = None) -> FsspecObjectStore:
            proxy.plan = lambda one: (fault or Status(403)) if any(rules[verb](one) for verb in denied) else None
            options = server.behind(proxy.uri).options()
            uri = f"gs://{server.bucket}" if isinstance(server, GcsServer) else f"az://{server.container}"
            return FsspecObjectStore(f"{uri}/{place()}", **options)

        yield make


@pytest.mark.parametrize(
    "denied", [("create",), ("read",), ("list",), ("delete",), ("read", "delete"), ("create", "list")], ids="-".join
)
def test_everything_that_is_not_allowed_is_named_at_once(
    restricted: Callable[..., FsspecObjectStore], denied: tuple[str, ...]
) -> None:
    store = restricted(*denied)
    with pytest.raises(StoreAccessError, match=rf"not allowed there: {', '.join(denied)}\. .* the role Storage"):
        store.preflight()


def test_it_is_found_out_before_the_first_step(restricted: Callable[..., FsspecObjectStore]) -> None:
    """Without it the run would be trained up to the first sweep, and go on without one."""
    assert_refused_at_step_0(restricted("delete"), r"not allowed there: delete\.")


def test_bytes_that_come_back_as_others_are_noticed(restricted: Callable[..., FsspecObjectStore]) -> None:
    with pytest.raises(StoreError):
        restricted("read", fault=Flip(3, "response")).preflight()


# -- what is not there, and who one is not -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_place_that_does_not_exist_shows_before_the_first_step(
    gcs: GcsServer, azurite: AzureServer, scheme: str
) -> None:
    store = FsspecObjectStore(f"{scheme}://nowhere/run", **(gcs if scheme == "gs" else azurite).options())
    assert_refused_at_step_0(store, r"does not exist.*create it")


def test_a_wrong_key_shows_before_the_first_step(azurite: AzureServer) -> None:
    wrong = azurite.connection_string.replace("AccountKey=Eby8", "AccountKey=Abcd")
    store = FsspecObjectStore(f"az://{azurite.container}/run", connection_string=wrong)
    assert_refused_at_step_0(store, r"credentials: AZURE_STORAGE_ACCOUNT_NAME")


def test_once_it_has_succeeded_it_is_not_repeated(gcs: GcsServer) -> None:
    with FaultProxy(gcs.endpoint) as proxy:
        store = FsspecObjectStore(f"gs://{gcs.bucket}/{place()}", **gcs.behind(proxy.uri).options())
        store.preflight()
        before = len(proxy.requests)
        store.preflight()
        put(store, "object", b"x", exclusive=True)
        assert len(proxy.requests) == before + 1
        assert get(store, "object") == b"x"
