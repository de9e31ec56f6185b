"""``hf://``: the contract over `HfFileSystem` itself, and what a repository of the Hub does that no other place does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hub import Hub
from spotguard import CheckpointStore
from spotguard.errors import ConfigError, StoreAccessError, TransientStoreError
from spotguard.state.compare import first_difference
from spotguard.stores import ObjectRef, ObjectStore
from spotguard.stores.fsspec_store import FsspecObjectStore
from spotguard.testing import ObjectStoreContract
from spotguard.testing.object_store import get, put

# huggingface_hub 2.4 uploads by an argument that httpx has given another name since.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
MIB = 1 << 20


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Hub() as hub:
        yield hub


def at(hub: Hub, **options: object) -> FsspecObjectStore:
    """A run in the repository, by somebody who promises to be alone."""
    chosen = {"endpoint": hub.endpoint, "token": hub.token, "single_writer": True} | options
    return FsspecObjectStore(f"hf://{hub.repository}/run-17", **chosen)  # type: ignore[arg-type]


@pytest.fixture
def store(hub: Hub) -> FsspecObjectStore:
    store = at(hub)
    with pytest.warns(UserWarning, match="nothing keeps a second writer out"):
        put(store, "first", b"", exclusive=True)
    store.delete([info.ref for info in store.list("")])
    return store


class TestHuggingFace(ObjectStoreContract):
    """All but the race."""

    @pytest.fixture
    def store(self, store: FsspecObjectStore) -> ObjectStore:
        return store

    test_of_eight_exclusive_writers_exactly_one_wins = None  # type: ignore[assignment]  # what it does not promise


def test_without_the_promise_it_is_refused(hub: Hub) -> None:
    with (
        pytest.raises(ConfigError, match="single_writer=True"),
        at(hub, single_writer=False).create("x", exclusive=True),
    ):
        pytest.fail("refused before anything is written")
    assert hub.commits == []


def test_each_object_is_one_commit(hub: Hub, store: FsspecObjectStore) -> None:
    hub.commits.clear()
    data = bytes(range(256)) * (20 * MIB >> 8)
    put(store, "checkpoints/1/model.pt", data, exclusive=True)
    assert [[line["key"] for line in commit] for commit in hub.commits] == [["header", "lfsFile"]]
    assert get(store, "checkpoints/1/model.pt") == data
    with store.open("checkpoints/1/model.pt") as reader:
        assert reader.read(5) == data[:5]
        put(store, "checkpoints/1/model.pt", bytes(len(data)))
        with pytest.raises(TransientStoreError, match="replaced"):
            reader.read()


@pytest.mark.parametrize("size", [1000, 12 * MIB])
def test_an_upload_that_is_cut_publishes_nothing_and_leaves_no_file_here(
    hub: Hub, store: FsspecObjectStore, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own tries
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    put(store, "model.pt", b"old")
    hub.cut = True
    with pytest.raises(TransientStoreError, match="no good answer"):
        put(store, "model.pt", bytes(size))
    assert list(tmp_path.iterdir()) == []
    hub.cut = False
    assert get(store, "model.pt") == b"old"
    assert [info.key for info in store.list("")] == ["model.pt"]


@pytest.mark.parametrize(
    ("repository", "token"),
    [("user/run", "hf_other"), ("user/run", False), ("user/nothing", "hf_test")],
    ids=["another token", "no token", "another repository"],
)
def test_a_repository_that_may_not_be_seen_is_not_an_empty_one(hub: Hub, repository: str, token: str | bool) -> None:
    """The Hub answers as if there were none, and the library as if a file were missing."""
    store = FsspecObjectStore(f"hf://{repository}/run-17", endpoint=hub.endpoint, token=token)
    for verb in (
        lambda: store.stat("x"),
        lambda: store.open("x"),
        lambda: store.list(""),
        lambda: store.delete([ObjectRef("x")]),
        lambda: put(store, "x", b""),
        lambda: CheckpointStore(store).latest(),
    ):
        with pytest.raises(StoreAccessError, match=r"may not be seen.*HF_TOKEN"):
            verb()


def test_a_run_goes_there_and_comes_back(hub: Hub) -> None:
    for step in (1, 2):
        state = {"model": {"weight": torch.arange(step * 1000)}}
        with pytest.warns(UserWarning, match="nothing keeps a second writer out"):
            CheckpointStore(at(hub)).save(state, step=step)
    latest = CheckpointStore(at(hub)).latest()
    assert latest is not None
    assert first_difference(latest.load(), state) is None
    assert sorted(hub.files) == [
        f"run-17/{key}"
        for key in (
            "attempts/0001.json",
            "attempts/0002.json",
            "checkpoints/0001-0000000001/model.pt",
            "checkpoints/0002-0000000002/model.pt",
            "manifests/0001-0000000001.json",
            "manifests/0002-0000000002.json",
            "run.json",
        )
    ]
