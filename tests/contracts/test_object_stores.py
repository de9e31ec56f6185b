"""The contract of `ObjectStore` over every store of ours, and what only a directory can get wrong."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spotguard.errors import ObjectExistsError, StoreAccessError, StoreError, TransientStoreError
from spotguard.stores import LocalObjectStore, MemoryObjectStore, ObjectRef, ObjectStore
from spotguard.stores.posix import Posix
from spotguard.testing import ObjectStoreContract
from spotguard.testing.object_store import get, put

if TYPE_CHECKING:
    from typing_extensions import Buffer


class WithoutLinks(Posix):
    """A mount without hard links, such as many a network file system."""

    def link(self, source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source))


class TestLocalObjectStore(ObjectStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return LocalObjectStore(tmp_path / "made" / "by the first write")


class TestLocalObjectStoreWithoutLinks(ObjectStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return LocalObjectStore(tmp_path / "run", fs=WithoutLinks())


class TestMemoryObjectStore(ObjectStoreContract):
    @pytest.fixture
    def store(self) -> ObjectStore:
        return MemoryObjectStore()


CLAIM = """
import errno, os, sys
from spotguard.errors import ObjectExistsError
from spotguard.stores import LocalObjectStore
from spotguard.stores.posix import Posix

class WithoutLinks(Posix):
    def link(self, source, target):
        raise PermissionError(errno.EPERM, "no links")

store = LocalObjectStore(sys.argv[1], fs=WithoutLinks() if sys.argv[3] == "without" else None)
for round_ in range(20):
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with store.create(f"claims/{round_}", exclusive=True) as writer:
            writer.write(sys.argv[2].encode() * 10_000)
    except ObjectExistsError:
        print("lost", flush=True)
    else:
        print("won", flush=True)
"""


@pytest.mark.parametrize("links", ["with", "without"])
def test_of_eight_processes_exactly_one_wins(tmp_path: Path, links: str) -> None:
    command = [sys.executable, "-c", CLAIM, str(tmp_path)]
    claimants = [
        subprocess.Popen([*command, str(number), links], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(8)
    ]
    store = LocalObjectStore(tmp_path)
    for round_ in range(20):
        assert [line_of(claimant) for claimant in claimants] == ["ready"] * 8
        for claimant in claimants:
            assert claimant.stdin is not None
            claimant.stdin.write("go\n")
            claimant.stdin.flush()
        outcome = [line_of(claimant) for claimant in claimants]
        assert sorted(outcome) == ["lost"] * 7 + ["won"]
        assert get(store, f"claims/{round_}") == str(outcome.index("won")).encode() * 10_000
    for claimant in claimants:
        claimant.communicate()
        assert claimant.returncode == 0
    assert not [name for name in os.listdir(tmp_path / "claims") if name.endswith(".tmp")]


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


class RemovedBehindUs(Posix):
    """Another process deletes the last object of a directory right after we made sure that the directory is there."""

    def __init__(self, times: int) -> None:
        self.times = times

    def create(self, path: Path) -> int:
        if self.times:
            self.times -= 1
            path.parent.rmdir()
        return super().create(path)


def test_a_create_survives_that_its_empty_directory_is_removed(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path, fs=RemovedBehindUs(3))
    put(store, "checkpoints/one/model.pt", b"x", exclusive=True)
    assert get(store, "checkpoints/one/model.pt") == b"x"


class DeletedBehindUs(Posix):
    """Another process removes the directory between our unlink and our look at it."""

    def rmdir(self, path: Path) -> None:
        super().rmdir(path)
        super().rmdir(path)


def test_a_delete_survives_that_somebody_else_removes_the_directory(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path, fs=DeletedBehindUs())
    put(store, "checkpoints/one/model.pt", b"x")
    store.delete([ObjectRef("checkpoints/one/model.pt")])
    assert not (tmp_path / "checkpoints" / "one").exists()


def test_a_directory_goes_with_its_last_object_but_the_top_ones_stay(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path)
    put(store, "checkpoints/one/model.pt", b"x")
    put(store, "manifests/one.json", b"x")
    store.delete([ObjectRef("checkpoints/one/model.pt"), ObjectRef("manifests/one.json")])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "manifests"]


def test_a_failed_create_leaves_no_file_of_any_name(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path)
    with pytest.raises(ZeroDivisionError), store.create("object") as writer:
        writer.write(b"half")
        raise ZeroDivisionError
    put(store, "taken", b"x")
    with pytest.raises(ObjectExistsError), store.create("taken", exclusive=True):
        pass
    assert os.listdir(tmp_path) == ["taken"]


def test_what_a_killed_writer_left_is_out_of_sight_until_it_is_discarded(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path)
    put(store, "checkpoints/0001-0000000001/model.pt", b"x")
    killed = """
import os, sys
from spotguard.stores import LocalObjectStore
with LocalObjectStore(sys.argv[1]).create(sys.argv[2]) as writer:
    writer.write(b"half")
    os._exit(9)
"""
    for key in ("checkpoints/0001-0000000002/model.pt", "checkpoints/0002-0000000001/model.pt"):
        assert subprocess.run([sys.executable, "-c", killed, str(tmp_path), key], check=False).returncode == 9
    assert [info.key for info in store.list("")] == ["checkpoints/0001-0000000001/model.pt"]
    gone = store.discard_partials(lambda key: key.startswith("checkpoints/0001"))
    assert gone == ["checkpoints/0001-0000000002/model.pt"]
    assert not (tmp_path / "checkpoints" / "0001-0000000002").exists()
    assert len(os.listdir(tmp_path / "checkpoints" / "0002-0000000001")) == 1


class Failing(Posix):
    """One system call fails, with one error."""

    def __init__(self, call: str, number: int) -> None:
        self.failure = OSError(number, os.strerror(number))
        self.call = call

    def __getattribute__(self, name: str) -> Any:
        if name in ("create", "write", "fsync", "link", "replace", "mkdir") and name == self.call:
            raise self.failure
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StoreError),
        (errno.EDQUOT, StoreError),
        (errno.EIO, StoreError),
        (errno.EACCES, StoreAccessError),
        (errno.EROFS, StoreAccessError),
        (errno.ESTALE, TransientStoreError),
        (errno.EAGAIN, TransientStoreError),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value.__name__,
)
@pytest.mark.parametrize("call", ["create", "write", "fsync", "link"])
def test_an_error_of_the_system_is_said_in_our_words_and_leaves_nothing(
    tmp_path: Path, call: str, number: int, kind: type[StoreError]
) -> None:
    store = LocalObjectStore(tmp_path, fs=Failing(call, number))
    with pytest.raises(kind) as caught:
        put(store, "object", b"x", exclusive=True)
    assert type(caught.value) is kind
    assert caught.value.errno == number
    assert str(tmp_path / "object") in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_short_write_is_continued(tmp_path: Path) -> None:
    class Short(Posix):
        def write(self, descriptor: int, data: "Buffer") -> int:
            return super().write(descriptor, memoryview(data)[:3])

    store = LocalObjectStore(tmp_path, fs=Short())
    put(store, "object", b"0123456789")
    assert get(store, "object") == b"0123456789"


def test_a_place_where_no_directory_can_be_made_is_an_access_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file" / "run", Path("/proc/no-such-thing")):
        store = LocalObjectStore(root)
        assert list(store.list("")) == []
        with pytest.raises(StoreAccessError, match="check the path"):
            put(store, "object", b"x")


def test_what_cannot_be_looked_at_is_an_error_and_not_missing(tmp_path: Path) -> None:
    (tmp_path / "stop").symlink_to(tmp_path / "stop")
    with pytest.raises(StoreError) as caught:
        LocalObjectStore(tmp_path).stat("stop")
    assert caught.value.errno == errno.ELOOP


def test_stores_in_memory_are_shared_by_name() -> None:
    put(MemoryObjectStore.named("contract-shared"), "object", b"x")
    assert get(MemoryObjectStore.named("contract-shared"), "object") == b"x"
    assert MemoryObjectStore.named("contract-other").stat("object") is None
