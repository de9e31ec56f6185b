"""Bytes that are not those that were committed: rejected by name, an older checkpoint used, or a clear error; never step 0 in silence."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.scenario import FOREIGN, check_content, copy_of, prepare, put_foreign, save, snapshot_at
from spotguard.checkpoint import CheckpointId
from spotguard.checkpoint.records import FORMAT, Manifest, _canonical
from spotguard.errors import (
    CheckpointDamagedError,
    FormatTooNewError,
    NoUsableCheckpointError,
    SpotguardError,
    StoreError,
)
from spotguard.events import CheckpointCommitted, Event
from spotguard.pipeline.checkpoint_store import CheckpointStore, LocalCheckpointStore
from spotguard.pipeline.history import claim_attempt, open_run, read_history
from spotguard.pipeline.resolver import Resolution, resolve
from spotguard.pipeline.rollback import roll_back
from spotguard.pipeline.writer import Writer
from spotguard.policies import KeepNewest
from spotguard.stores import LocalObjectStore
from spotguard.testing.faults import Unsynced

NEWEST, BEFORE, OLDEST = CheckpointId(2, 30), CheckpointId(2, 20), CheckpointId(1, 10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 10, 20 and 30."""
    root = tmp_path_factory.mktemp("base") / "run"
    prepare(root)
    return root


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return copy_of(base, tmp_path / "run")


def positions(size: int, seed: int) -> Iterator[tuple[int, int]]:
    """Byte and bit: both ends, and many in between."""
    draw = random.Random(seed)
    places = {0, 1, size // 2, size - 2, size - 1, *(draw.randrange(size) for _ in range(40))}
    return ((place, draw.randrange(8)) for place in sorted(places) if 0 <= place < size)


def flip(path: Path, place: int, bit: int) -> bytes:
    """Flip one bit of a file; returns what it was."""
    before = path.read_bytes()
    path.write_bytes(before[:place] + bytes([before[place] ^ (1 << bit)]) + before[place + 1 :])
    return before


def resolved(root: Path) -> Resolution:
    """With the state, as the guard does it."""
    store = LocalObjectStore(root)
    return resolve(store, run_id=open_run(store).run_id, load=True)


def assert_older_is_used(root: Path, key: str) -> None:
    """The newest is rejected, with its id and the object at fault, and the one before is whole."""
    resolution = resolved(root)
    (rejected,) = resolution.rejected
    assert rejected.id == str(NEWEST)
    assert key in rejected.reason
    checkpoint = resolution.require()
    assert checkpoint is not None
    assert checkpoint.id == str(BEFORE)
    check_content(resolution, 20)


@pytest.mark.parametrize("name", ["model", "rank-00000"])
def test_a_flipped_bit_in_any_shard_is_rejected_by_name(run: Path, name: str) -> None:
    path = run / NEWEST.shard_key(name)
    for place, bit in positions(path.stat().st_size, seed=1):
        before = flip(path, place, bit)
        assert_older_is_used(run, NEWEST.shard_key(name))
        path.write_bytes(before)


def test_a_flipped_bit_in_a_manifest_is_rejected_by_name(run: Path) -> None:
    path = run / NEWEST.manifest_key
    for place, bit in positions(path.stat().st_size, seed=2):
        before = flip(path, place, bit)
        assert_older_is_used(run, NEWEST.manifest_key)
        path.write_bytes(before)


def test_a_flipped_bit_in_a_shard_that_every_checkpoint_names_is_an_error_that_names_them_all(run: Path) -> None:
    flip(run / OLDEST.shard_key("backbone"), 999, 3)
    with pytest.raises(NoUsableCheckpointError) as caught:
        resolved(run).require()
    for text in (NEWEST, BEFORE, OLDEST, OLDEST.shard_key("backbone")):
        assert str(text) in str(caught.value)


def test_a_flipped_bit_in_the_newest_claim_is_told_and_changes_nothing_that_is_known(run: Path) -> None:
    path = run / "attempts/0002.json"
    for place, bit in positions(path.stat().st_size, seed=3):
        before = flip(path, place, bit)
        resolution = resolved(run)
        assert any("attempts/0002.json" in text for text in resolution.damaged)
        checkpoint = resolution.require()
        assert checkpoint is not None
        assert checkpoint.step == 30  # its own checkpoints are of its own history
        path.write_bytes(before)


@pytest.mark.parametrize("harm", ["cut", "delete"])
@pytest.mark.parametrize("attempt", [2, 3, 4])
def test_claims_of_starts_that_committed_nothing_are_not_needed_for_the_way_back(
    run: Path, attempt: int, harm: str
) -> None:
    store = LocalObjectStore(run, fs=Unsynced())
    for path in (run / "manifests").glob("0002-*.json"):
        path.unlink()
    for _ in range(2):
        claim_attempt(store)
    path = run / f"attempts/000{attempt}.json"
    path.unlink() if harm == "delete" else path.write_bytes(path.read_bytes()[:-9])
    checkpoint = resolve(store).require()
    assert checkpoint is not None
    assert checkpoint.step == 10
    assert claim_attempt(store).parent_max_step == 10


@pytest.mark.parametrize("harm", ["cut", "delete"])
@pytest.mark.parametrize("what", ["claim", "manifest"])
def test_a_rollback_of_which_one_half_is_lost_stays_in_force(run: Path, what: str, harm: str) -> None:
    """Attempt 3 is a rollback, attempt 4 continues it and has no checkpoint yet."""
    store = LocalObjectStore(run, fs=Unsynced())
    again = roll_back(store, OLDEST)
    claim_attempt(store)
    path = run / ("attempts/0003.json" if what == "claim" else again.manifest.id.manifest_key)
    path.unlink() if harm == "delete" else path.write_bytes(path.read_bytes()[:-9])
    resolution = resolve(store, load=True)
    checkpoint = resolution.require()
    assert checkpoint is not None
    assert checkpoint.id == (again.id if what == "claim" else str(OLDEST))
    check_content(resolution, 10)
    assert claim_attempt(store).parent_max_step == 10


def test_nothing_is_swept_while_a_claim_may_be_a_rollback_that_has_not_committed(run: Path) -> None:
    store = LocalObjectStore(run, fs=Unsynced())
    claim_attempt(store)
    path = run / "attempts/0003.json"
    path.write_bytes(path.read_bytes()[:-9])
    before = sorted(run.rglob("*"))
    plan = LocalCheckpointStore(run).prune(1)
    assert (plan.drop, plan.objects, plan.kept) == ((), (), (OLDEST, BEFORE, NEWEST))
    assert sorted(run.rglob("*")) == before
    save(store, 50, keep=1)
    assert [identity.step for identity in read_history(store).manifests] == [50]


def test_a_deleted_claim_of_the_newest_attempt_is_told(run: Path) -> None:
    (run / "attempts/0002.json").unlink()
    resolution = resolved(run)
    assert any("attempts/0002.json is missing" in text for text in resolution.damaged)
    assert resolution.checkpoint is not None
    assert resolution.checkpoint.step == 30


def test_a_run_whose_manifests_are_all_gone_does_not_start_from_zero(run: Path) -> None:
    for path in (run / "manifests").iterdir():
        path.unlink()
    for _ in range(2):
        with pytest.raises(NoUsableCheckpointError, match=r"0002\.json continues a checkpoint of step 10"):
            resolved(run).require()
        claim_attempt(LocalObjectStore(run))


@pytest.mark.parametrize("key", [NEWEST.shard_key("model"), NEWEST.manifest_key])
@pytest.mark.parametrize("harm", ["shorter", "longer", "empty", "zeros"])
def test_a_file_of_another_length_or_full_of_zeros_is_rejected_by_name(run: Path, key: str, harm: str) -> None:
    data = (run / key).read_bytes()
    (run / key).write_bytes(
        {"shorter": data[:-1], "longer": data + b"\0", "empty": b"", "zeros": bytes(len(data))}[harm]
    )
    assert_older_is_used(run, key)


def test_a_deleted_shard_is_rejected_by_name(run: Path) -> None:
    (run / NEWEST.shard_key("model")).unlink()
    assert_older_is_used(run, NEWEST.shard_key("model"))


def test_a_directory_in_place_of_a_shard_is_rejected_by_name(run: Path) -> None:
    (run / NEWEST.shard_key("model")).unlink()
    (run / NEWEST.shard_key("model")).mkdir()
    assert_older_is_used(run, NEWEST.shard_key("model"))


def test_the_manifest_of_another_checkpoint_is_rejected_by_name(run: Path) -> None:
    (run / NEWEST.manifest_key).write_bytes((run / OLDEST.manifest_key).read_bytes())
    assert_older_is_used(run, NEWEST.manifest_key)


def test_the_manifest_of_another_run_is_rejected_by_name(run: Path, base: Path) -> None:
    manifest = Manifest.from_bytes((base / NEWEST.manifest_key).read_bytes(), key="")
    (run / NEWEST.manifest_key).write_bytes(manifest.model_copy(update={"run_id": "another"}).to_bytes())
    assert_older_is_used(run, NEWEST.manifest_key)


@pytest.mark.parametrize("key", [NEWEST.manifest_key, "attempts/0002.json", "run.json"])
def test_a_record_of_a_newer_format_is_refused_and_nothing_older_is_taken_in_its_place(run: Path, key: str) -> None:
    import hashlib

    fields = json.loads((run / key).read_bytes())
    del fields["sha256"]
    fields |= {"format": FORMAT + 1, "something": "new"}
    (run / key).write_bytes(_canonical({**fields, "sha256": hashlib.sha256(_canonical(fields)).hexdigest()}))
    with pytest.raises(FormatTooNewError, match=Path(key).name):
        resolved(run)


def test_a_flipped_bit_in_the_run_record_is_an_error_that_names_it(run: Path) -> None:
    path = run / "run.json"
    for place, bit in positions(path.stat().st_size, seed=4):
        before = flip(path, place, bit)
        with pytest.raises(CheckpointDamagedError, match=r"run\.json"):
            CheckpointStore(LocalObjectStore(run)).save({"model": {}}, step=40)
        path.write_bytes(before)


def test_a_deleted_run_record_is_an_error_that_names_it(run: Path) -> None:
    (run / "run.json").unlink()
    with pytest.raises(StoreError, match=r"run\.json"):
        LocalCheckpointStore(run).save({"model": {}}, step=40)
    assert not (run / "run.json").exists()


def test_an_empty_directory_is_a_new_run(tmp_path: Path) -> None:
    assert LocalCheckpointStore(tmp_path).latest() is None
    assert not list(tmp_path.iterdir())


def test_a_directory_full_of_other_peoples_files_is_a_new_run_and_they_stay(tmp_path: Path) -> None:
    put_foreign(tmp_path)
    more = {
        "manifests/0001-10.json": b"[" * 100_000,
        "manifests/0001-0000000010.json~": b"\xff\xfe",
        "checkpoints/0001-0000000010/mine.safetensors": b"1",
        "checkpoints/epoch=3-step=1200.ckpt": b"2",
        "attempts/first": b"",
    }
    for name, data in more.items():
        (tmp_path / name).write_bytes(data)
    assert LocalCheckpointStore(tmp_path).latest() is None
    save(LocalObjectStore(tmp_path, fs=Unsynced()), 10, 20, 30, keep=1)
    assert LocalCheckpointStore(tmp_path).latest() is not None
    for name, data in (FOREIGN | more).items():
        assert (tmp_path / name).read_bytes() == data
    assert (tmp_path / "plots/today").is_dir()


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff", b"null", b"1e999", b'{"format":1e400}', b"{}", b'"\\ud800"'])
def test_anything_at_all_in_place_of_a_manifest_is_rejected_by_name(run: Path, text: bytes) -> None:
    (run / NEWEST.manifest_key).write_bytes(text)
    assert_older_is_used(run, NEWEST.manifest_key)


def test_retention_deletes_nothing_when_the_newest_checkpoint_is_damaged(run: Path) -> None:
    flip(run / NEWEST.shard_key("model"), 100, 0)
    before = sorted(run.rglob("*"))
    with pytest.raises(SpotguardError, match="model"):
        LocalCheckpointStore(run).prune(1)
    assert sorted(run.rglob("*")) == before


def test_after_a_shard_was_found_damaged_the_next_save_writes_every_shard_anew(tmp_path: Path) -> None:
    """And does not name the damaged one again because its digest, as it was meant to be, has not changed."""
    store = LocalObjectStore(tmp_path, fs=Unsynced())
    run, claim = open_run(store), claim_attempt(store)

    def damage(event: Event) -> None:
        if isinstance(event, CheckpointCommitted) and event.step == 20:
            flip(tmp_path / CheckpointId(1, 10).shard_key("backbone"), 500, 0)

    writer = Writer(store, run_id=run.run_id, attempt=claim.attempt, retention=KeepNewest(1), publish=damage)
    for step in (10, 20, 30):
        writer.submit(snapshot_at(step), {})
        writer.drain()
    writer.close()
    assert [(item.id, item.verdict) for item in resolve(store).candidates] == [("0001-0000000030", "chosen")]


def test_somebodys_file_beside_the_shards_of_a_kept_checkpoint_stays(run: Path) -> None:
    mine = run / "checkpoints" / str(NEWEST) / "averaged.pt"
    mine.write_bytes(b"mine")
    save(LocalObjectStore(run, fs=Unsynced()), 50)
    assert mine.read_bytes() == b"mine"


def test_a_metric_that_is_not_a_number_is_recorded(tmp_path: Path) -> None:
    store = LocalCheckpointStore(tmp_path)
    store.save({"model": {}}, step=1, metrics={"loss": float("nan"), "bound": float("-inf")})
    checkpoint = store.latest()
    assert checkpoint is not None
    assert str(checkpoint.metrics) == "{'bound': -inf, 'loss': nan}"
