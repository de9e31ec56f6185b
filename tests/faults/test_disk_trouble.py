"""A disk that is full, broken or closed: a clear error, the checkpoint before stands, and the next save works once it is mended."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.scenario import (
    check_content,
    check_goes_on,
    check_resolves,
    check_tidy,
    check_visible,
    copy_of,
    faulty,
    in_child,
    prepare,
    save,
    snapshot_at,
    state_at,
    write,
)
from spotguard.errors import ObjectExistsError, StoreAccessError, StoreError, TransientStoreError
from spotguard.pipeline.checkpoint_store import CheckpointStore
from spotguard.pipeline.commit import commit
from spotguard.pipeline.history import claim_attempt, open_run
from spotguard.pipeline.resolver import resolve
from spotguard.stores import LocalObjectStore, ObjectRef
from spotguard.testing.faults import Failing, Intercepting, Unsynced, without_links

Record = Callable[[str, object], None]
KINDS = {errno.ENOSPC: StoreError, errno.EIO: StoreError, errno.EACCES: StoreAccessError, errno.EDQUOT: StoreError}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints and leftovers."""
    root = tmp_path_factory.mktemp("base") / "run"
    prepare(root)
    return root


def members_at(step: int) -> dict[str, Any]:
    """State without what belongs to a rank."""
    return {name: tree for name, tree in state_at(step).items() if name != "rank-00000"}


def start(root: Path, fs: Intercepting) -> tuple[LocalObjectStore, str, int]:
    """Claim an attempt, and forget the system calls of that."""
    store = faulty(root, fs)
    run = open_run(store)
    attempt = claim_attempt(store).attempt
    fs.calls.clear()
    return store, run.run_id, attempt


@pytest.mark.parametrize("code", KINDS, ids=errno.errorcode.get)
def test_any_system_call_of_a_commit_that_fails_is_a_clear_error_and_the_checkpoint_before_stands(
    base: Path, tmp_path: Path, record_property: Record, code: int
) -> None:
    probe = Intercepting(Unsynced())
    store, run_id, attempt = start(copy_of(base, tmp_path / "run"), probe)
    commit(store, snapshot_at(50), run_id=run_id, attempt=attempt)
    calls, failed = list(probe.calls), 0
    for call in calls:
        root = copy_of(base, tmp_path / "run")
        fs = Failing(code, at=call.number, inner=Unsynced())
        fs.active = False
        store, run_id, attempt = start(root, fs)
        fs.active = True
        if call.name == "unlink":  # of the second name of a whole object: a commit is as good with it
            commit(store, snapshot_at(50), run_id=run_id, attempt=attempt)
            check_resolves(root, [50])
        else:
            with pytest.raises(StoreError) as caught:
                commit(store, snapshot_at(50), run_id=run_id, attempt=attempt)
            failed += 1
            assert type(caught.value) is KINDS[code]
            assert str(root) in str(caught.value)
            assert caught.value.errno == code
            check_resolves(root, [30, 50] if call.name == "sync_directory" else [30])
        assert fs.failed == 1
        check_visible(root)
        save(faulty(root, fs), 60)
        check_tidy(root)
    assert failed > 20
    record_property(f"failing calls ({errno.errorcode[code]})", failed)


def test_a_full_disk_is_an_event_and_the_next_save_works_and_clears_what_the_failed_ones_left(
    base: Path, tmp_path: Path
) -> None:
    for name in ("create", "write", "fsync", "mkdir"):
        root = copy_of(base, tmp_path / "run")
        fs = Failing(errno.ENOSPC, name, inner=Unsynced())
        fs.active = False
        store, run_id, attempt = start(root, fs)
        resumed = resolve(store).require()
        assert resumed is not None
        fs.active = True
        writer = write(store, run_id, attempt, resumed.manifest, 50, 51, expect=False)
        assert writer.failures == 2
        assert "No space left" in str(writer.error)
        check_resolves(root, [30])
        fs.active = False
        write(store, run_id, attempt, resumed.manifest, 60)
        check_resolves(root, [60])
        check_tidy(root)


def test_what_a_failed_save_left_is_removed_before_the_next_one_needs_the_space(base: Path, tmp_path: Path) -> None:
    """Else a disk with room for one more checkpoint would never recover."""
    root = copy_of(base, tmp_path / "run")
    fs = Intercepting(Failing(errno.ENOSPC, "link", inner=Unsynced()))
    store, run_id, attempt = start(copy_of(base, root), Intercepting(Unsynced()))
    broken = faulty(root, fs)
    resumed = resolve(store).require()
    assert resumed is not None
    write(broken, run_id, attempt, resumed.manifest, 50, 60, expect=False)
    shards = {call.path.parent.name for call in fs.calls if call.name == "replace"}
    left = {path.parent.name for path in (root / "checkpoints").rglob("*.pt")}
    assert shards == {f"{attempt:04d}-0000000050", f"{attempt:04d}-0000000060"}
    assert left & shards == {f"{attempt:04d}-0000000060"}


def test_saving_the_same_step_again_never_writes_over_what_may_be_committed(tmp_path: Path) -> None:
    """The commit happened, its last sync failed: the caller is told of an error and saves again, something else."""
    fs = Failing(errno.EIO, at=0, inner=Unsynced())
    fs.active = False
    store = CheckpointStore(faulty(tmp_path / "run", fs))
    store.save(members_at(10), step=10)
    fs.at, fs.active = 0, False
    probe = len(fs.calls)
    store.save(members_at(20), step=20)
    fs.at, fs.active = 2 * len(fs.calls) - probe, True  # the last call of the next save: the sync behind the link
    with pytest.raises(StoreError):
        store.save(members_at(30), step=30)
    fs.active = False
    assert store.load()["model"]["step"] == 30
    store.save({**members_at(30), "model": {"other": 1}}, step=30)
    assert store.load()["model"] == {"other": 1}
    assert len(store.list()) == 4
    for found in store.list():
        found.verify()


def test_a_name_that_exists_is_synced_before_anybody_relies_on_it(tmp_path: Path) -> None:
    """A retry finds what the first try made, whose sync had failed for a while: to be told "exists" must mean "durable"."""
    fs = Failing(errno.EAGAIN, at=7, inner=Unsynced())
    store = faulty(tmp_path, fs)
    with pytest.raises(TransientStoreError), store.create("object", exclusive=True) as writer:
        writer.write(b"1")
    made = len(fs.calls)
    assert fs.calls[-1].name == "sync_directory"
    with pytest.raises(ObjectExistsError), store.create("object", exclusive=True) as writer:
        writer.write(b"1")
    assert "sync_directory" in [call.name for call in fs.calls[made:]]


def test_on_a_mount_without_hard_links_one_of_eight_creates_wins(tmp_path: Path) -> None:
    outcomes: list[int] = []
    barrier = threading.Barrier(8)

    def create(number: int) -> None:
        store = faulty(tmp_path, without_links())
        barrier.wait()
        try:
            with store.create("folder/object", exclusive=True) as writer:
                writer.write(bytes([number]) * 1000)
        except ObjectExistsError:
            return
        outcomes.append(number)

    for _ in range(8):
        threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = outcomes
        assert (tmp_path / "folder/object").read_bytes() == bytes([winner]) * 1000
        outcomes.clear()
        faulty(tmp_path, without_links()).delete([ObjectRef("folder/object")])


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_a_commit_after_trouble_goes_on_as_if_there_had_been_none(base: Path, tmp_path: Path, *, links: bool) -> None:
    root = copy_of(base, tmp_path / "run")
    disk = Unsynced() if links else without_links(Unsynced())
    assert in_child(lambda: save(faulty(root, disk), 50)) == 0
    resolution = resolve(LocalObjectStore(root), load=True)
    check_content(resolution, 50)
    check_goes_on(root, 60)
