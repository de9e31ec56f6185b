"""Of several starts of one run, the last one counts: whatever the others do, it is never part of the history."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.scenario import WHEN, check_content, end_child, fork, save, snapshot_at, write
from spotguard import SpotGuard, TrainState
from spotguard.checkpoint import CheckpointId, Claim, Manifest, ShardRecord
from spotguard.checkpoint.layout import ATTEMPTS, CHECKPOINTS, MANIFESTS
from spotguard.errors import CheckpointNotFoundError, FencedError, NoUsableCheckpointError
from spotguard.pipeline.checkpoint_store import CheckpointStore
from spotguard.pipeline.commit import commit
from spotguard.pipeline.history import (
    History,
    claim_and_look,
    claim_attempt,
    lineage,
    list_claims,
    open_run,
    read_history,
)
from spotguard.pipeline.resolver import resolve
from spotguard.pipeline.rollback import roll_back
from spotguard.pipeline.sweeper import plan_sweep, sweep
from spotguard.policies import KeepNewest
from spotguard.stores import LocalObjectStore, MemoryObjectStore, ObjectInfo, ObjectReader, ObjectRef, ObjectWriter
from spotguard.testing.faults import Intercepting, Unsynced


def test_an_older_attempt_is_fenced_off_by_a_newer_claim(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path, fs=Unsynced())
    save(store, 10)
    claim_attempt(store)
    run = open_run(store)
    writer = write(store, run.run_id, 1, None, 20, expect=False)
    assert isinstance(writer.fenced, FencedError)
    assert "attempt 2" in str(writer.fenced)
    assert [str(item) for item in read_history(store).manifests] == ["0001-0000000010"]


def test_a_commit_that_was_past_the_fence_is_off_the_history_once_the_newer_attempt_has_committed(
    tmp_path: Path,
) -> None:
    class ClaimBeforeLink(Intercepting):
        def link(self, source: Path, target: Path) -> None:
            if target.parent.name == "manifests":
                claim_attempt(LocalObjectStore(tmp_path, fs=Unsynced()))
            super().link(source, target)

    store = LocalObjectStore(tmp_path, fs=Unsynced())
    first = save(store, 10)
    run_id = open_run(store).run_id
    zombie = LocalObjectStore(tmp_path, fs=ClaimBeforeLink(Unsynced()))
    manifest, _ = commit(zombie, snapshot_at(20), run_id=run_id, attempt=1, previous=first.last)
    assert manifest.id in read_history(store).manifests
    write(store, run_id, 2, first.last, 15)
    resolution = resolve(store)
    assert [(item.id, item.verdict) for item in resolution.candidates] == [
        ("0002-0000000015", "chosen"),
        ("0001-0000000010", "older"),
        ("0001-0000000020", "off lineage"),
    ]


def test_another_commit_of_a_zombie_at_the_very_step_at_which_it_was_taken_over_is_off_the_history(
    tmp_path: Path,
) -> None:
    store = LocalObjectStore(tmp_path, fs=Unsynced())
    first = save(store, 10)
    run_id = open_run(store).run_id
    writer = write(store, run_id, claim_attempt(store).attempt, first.last, 20)
    with store.create(CheckpointId(1, 10, 1).manifest_key, exclusive=True) as late:  # it was past the fence
        assert first.last is not None
        late.write(first.last.model_copy(update={"sequence": 1}).to_bytes())
    assert [str(item) for item in read_history(store).lineage] == ["0002-0000000020", "0001-0000000010"]
    (store.root / CheckpointId(2, 20).shard_key("model")).unlink()
    assert writer.last is not None
    checkpoint = resolve(store).require()
    assert checkpoint is not None
    assert checkpoint.id == "0001-0000000010"


def test_several_commits_at_the_step_of_the_take_over_stay_in_the_history(tmp_path: Path) -> None:
    """Also where the next attempt commits at that step once more, whose sequence counts anew."""
    store = LocalObjectStore(tmp_path, fs=Unsynced())
    save(store, 10, 10, 10, keep=9)
    save(store, 10, keep=9)
    claim = claim_attempt(store)
    assert (claim.parent, claim.parent_max_step, claim.parent_max_sequence) == (2, 10, 0)
    line = ["0002-0000000010", "0001-0000000010.2", "0001-0000000010.1", "0001-0000000010"]
    assert [str(item) for item in read_history(store).lineage] == line


def test_what_was_committed_while_a_start_claimed_outlives_the_death_of_that_start(tmp_path: Path) -> None:
    """It looked, step 20 was committed and step 10 swept away, it claimed to continue from step 10, and it was killed."""
    store = LocalObjectStore(tmp_path, fs=Unsynced())
    old = save(store, 10)
    run_id = open_run(store).run_id

    class CommitThenDie(Intercepting):
        def link(self, source: Path, target: Path) -> None:
            write(store, run_id, 1, old.last, 20, keep=1)
            super().link(source, target)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        claim_attempt(LocalObjectStore(tmp_path, fs=CommitThenDie(Unsynced())))
    assert (read_history(store).claims[2].parent_max_step, resolve(store).require().step) == (10, 20)  # type: ignore[union-attr]
    assert (claim := claim_attempt(store)).attempt == 3
    assert (claim.parent, claim.parent_max_step) == (1, 20)


def test_a_rollback_is_never_passed_over_though_nothing_was_saved_after_it(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path, fs=Unsynced())
    writer = save(store, 10, 20)

    class RollbackBeforeLink(Intercepting):
        def link(self, source: Path, target: Path) -> None:
            if target.parent.name == "manifests":
                roll_back(store, CheckpointId(1, 10))
                claim_attempt(store)
            super().link(source, target)

    zombie = LocalObjectStore(tmp_path, fs=RollbackBeforeLink(Unsynced()))
    commit(zombie, snapshot_at(30), run_id=open_run(store).run_id, attempt=1, previous=writer.last)
    claim = claim_attempt(store)
    assert (claim.attempt, claim.parent, claim.parent_max_step) == (4, 2, 10)
    assert [str(item) for item in read_history(store).lineage] == ["0002-0000000010", "0001-0000000010"]


def test_a_rollback_names_the_shards_that_are_there_and_writes_none(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path, fs=Unsynced())
    save(store, 10, 20)
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    checkpoint = CheckpointStore(store).rollback(step=10)
    assert (checkpoint.id, checkpoint.manifest.parent) == ("0002-0000000010", "0001-0000000010")
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before
    save(store, 30, keep=1)  # which sweeps 1 away, and 2, whose shards go only now
    assert [str(item) for item in read_history(store).manifests] == ["0003-0000000030"]
    assert resolve(store, load=True).require() is not None


class DuringDeletes(MemoryObjectStore):
    """Calls something before each deletion, which names what is to be deleted."""

    def __init__(self, inner: MemoryObjectStore, before: Callable[[set[str]], None]) -> None:
        self.__dict__.update(inner.__dict__)
        self._before = before

    def delete(self, refs: Iterable[ObjectRef]) -> None:
        wanted = list(refs)
        self._before({ref.key for ref in wanted})
        super().delete(wanted)


@pytest.mark.parametrize("what", [MANIFESTS, CHECKPOINTS], ids=["manifests", "shards"])
def test_a_rollback_to_what_a_sweep_is_about_to_delete_is_kept_or_refused(what: str) -> None:
    store = MemoryObjectStore()
    save(store, 10, 20, 30, keep=9)
    done: list[str] = []

    def roll_back_meanwhile(keys: set[str]) -> None:
        if any(key.startswith(what) for key in keys):
            done.append(CheckpointStore(store).rollback(step=10).id)

    def prune() -> None:
        sweep(DuringDeletes(store, roll_back_meanwhile), KeepNewest(1))

    if what == MANIFESTS:
        prune()
        assert done == ["0002-0000000010"]
        resolution = resolve(store, load=True, history=claim_and_look(store)[1])
        assert resolution.checkpoint is not None
        assert resolution.checkpoint.id == "0002-0000000010"
        check_content(resolution, 10)
    else:
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint 10"):
            prune()
        assert CheckpointStore(store).resolve().checkpoint is not None


def test_a_rollback_whose_target_is_swept_between_its_look_and_its_claim_is_refused_and_changes_nothing() -> None:
    class SweepBeforeClaim(MemoryObjectStore):
        @contextlib.contextmanager
        def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[ObjectWriter]:
            if key.startswith(ATTEMPTS):
                sweep(store, KeepNewest(1))
            with super().create(key, exclusive=exclusive, deadline=deadline) as writer:
                yield writer

    store = MemoryObjectStore()
    save(store, 10, 20, 30, keep=9)
    late = SweepBeforeClaim()
    late.__dict__.update(store.__dict__)
    with pytest.raises(CheckpointNotFoundError, match="deleted by retention a moment ago"):
        CheckpointStore(late).rollback(step=10)
    checkpoint = resolve(store, history=claim_and_look(store)[1]).require()
    assert checkpoint is not None
    assert checkpoint.step == 30


def test_a_rollback_that_another_start_overtakes_says_so() -> None:
    class StartBeforeManifest(MemoryObjectStore):
        @contextlib.contextmanager
        def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[ObjectWriter]:
            if key.startswith(MANIFESTS):
                save(store, 40)
            with super().create(key, exclusive=exclusive, deadline=deadline) as writer:
                yield writer

    store = MemoryObjectStore()
    save(store, 10, 20, 30, keep=9)
    late = StartBeforeManifest()
    late.__dict__.update(store.__dict__)
    with pytest.raises(FencedError, match=r"attempt 3 .*at the same time"):
        CheckpointStore(late).rollback(step=10)
    checkpoint = resolve(store).require()
    assert checkpoint is not None
    assert checkpoint.step == 40


def test_a_start_that_claims_and_commits_while_the_claims_are_listed_is_no_damage(tmp_path: Path) -> None:
    class SaveAfterClaims(LocalObjectStore):
        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            found = list(super().list(prefix))
            if prefix == ATTEMPTS:
                save(LocalObjectStore(tmp_path, fs=Unsynced()), 20)
            return iter(found)

    save(LocalObjectStore(tmp_path, fs=Unsynced()), 10)
    history = read_history(SaveAfterClaims(tmp_path, fs=Unsynced()))
    assert not history.damaged
    assert [str(item) for item in history.lineage] == ["0002-0000000020", "0001-0000000010"]


def test_a_commit_and_a_sweep_between_the_listing_and_the_claim_are_not_lost(tmp_path: Path) -> None:
    """The old process commits step 20 and sweeps step 10 away while the new one is about to continue from step 10."""
    store = LocalObjectStore(tmp_path, fs=Unsynced())
    old = save(store, 10)
    run_id = open_run(store).run_id
    busy = True

    class CommitBeforeLink(Intercepting):
        def link(self, source: Path, target: Path) -> None:
            nonlocal busy
            if busy and target.parent.name == "attempts":
                busy = False
                write(store, run_id, 1, old.last, 20, keep=1)
            super().link(source, target)

    claim = claim_attempt(LocalObjectStore(tmp_path, fs=CommitBeforeLink(Unsynced())))
    assert (claim.parent, claim.parent_max_step) == (1, 20)
    checkpoint = resolve(store).require()
    assert checkpoint is not None
    assert checkpoint.step == 20


def test_a_start_that_is_overtaken_while_it_reads_says_so() -> None:
    class Overtaken(MemoryObjectStore):
        def open(self, key: str, *, version: str | None = None) -> ObjectReader:
            if key.startswith(CHECKPOINTS) and set(list_claims(self)) == {1, 2}:
                claim_attempt(self)  # it reads as well, commits, and its sweep takes away what is older
                self.delete([info.ref for info in self.list(CHECKPOINTS)])
            return super().open(key, version=version)

    store = Overtaken()
    save(store, 10)
    with (
        pytest.raises(FencedError, match="attempt 3 has taken over"),
        SpotGuard(store, TrainState(model=torch.nn.Linear(2, 2)), notices="none"),
    ):
        pass


@pytest.mark.parametrize("gone", [("attempts",), ("attempts", "manifests"), ("attempts", "manifests", "run.json")])
def test_a_start_into_a_run_that_is_being_moved_away_is_refused_and_says_so(gone: tuple[str, ...]) -> None:
    class Going(MemoryObjectStore):
        def open(self, key: str, *, version: str | None = None) -> ObjectReader:
            if key.startswith(ATTEMPTS):
                for other in [other for other in self._objects if other.split("/")[0] in gone]:
                    self._objects.pop(other, None)
            return super().open(key, version=version)

    inner = MemoryObjectStore()
    save(inner, 10)
    save(inner, 20)
    store = Going()
    store.__dict__.update(inner.__dict__)
    before = {key for key in inner._objects if key.startswith(MANIFESTS)}
    with pytest.raises((NoUsableCheckpointError, FencedError), match=r"moved or deleted"):
        CheckpointStore(store).save({"model": {"step": 30}}, step=30)
    assert {key for key in inner._objects if key.startswith(MANIFESTS)} <= before


def test_eight_claims_at_once_give_eight_numbers(tmp_path: Path) -> None:
    """Of eight processes that wait for the same gate."""
    root = tmp_path / "run"
    gate, answers = os.pipe(), os.pipe()
    children = []
    for _ in range(8):
        if (pid := fork()) == 0:

            def claim() -> None:
                os.close(gate[1])
                os.read(gate[0], 1)  # returns when the parent closes the gate
                store = LocalObjectStore(root)
                open_run(store)
                os.write(answers[1], b"%d %s\n" % (claim_attempt(store).attempt, open_run(store).run_id.encode()))

            end_child(claim)
        children.append(pid)
    for descriptor in (*gate, answers[1]):
        os.close(descriptor)
    with os.fdopen(answers[0]) as file:
        lines = [line.split() for line in file]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 8
    assert len({number for number, _ in lines}) == 8
    assert len({run_id for _, run_id in lines}) == 1


def test_a_second_writer_of_the_store_alone_fences_off_the_first() -> None:
    objects = MemoryObjectStore()
    first, second = CheckpointStore(objects), CheckpointStore(objects)
    first.save({"model": {"step": 10}}, step=10)
    second.save({"model": {"step": 20}}, step=20)
    with pytest.raises(FencedError, match="attempt 2"):
        first.save({"model": {"step": 30}}, step=30)
    assert [checkpoint.step for checkpoint in second.list()] == [10, 20]


# -- properties --------------------------------------------------------------------------------------------------------------------

IDS = st.builds(CheckpointId, st.integers(1, 6), st.integers(0, 9), st.integers(0, 1))


@st.composite
def claims_of(draw: st.DrawFn) -> dict[int, Claim]:
    """A run with up to six starts; each continues any earlier one, up to any step."""
    claims = {}
    for attempt in range(1, draw(st.integers(0, 6)) + 1):
        parent = draw(st.none() | st.integers(1, attempt - 1)) if attempt > 1 else None
        step, sequence = (draw(st.integers(0, 9)), draw(st.none() | st.integers(0, 1))) if parent else (None, None)
        claims[attempt] = Claim(
            attempt=attempt, parent=parent, parent_max_step=step, parent_max_sequence=sequence, created_at=WHEN
        )
    return claims


@given(claims_of(), st.sets(IDS))
def test_a_lineage_is_newest_first_within_its_bounds_and_changes_only_by_its_own_attempts(
    claims: dict[int, Claim], manifests: set[CheckpointId]
) -> None:
    line = lineage(claims, manifests, max(claims, default=0))
    assert len(set(line)) == len(line)
    assert set(line) <= manifests
    assert line == sorted(line, reverse=True)
    expected, attempt, bound = set[CheckpointId](), max(claims, default=0), float("inf")
    last = (bound, bound)  # step and sequence of the attempt that is looked at
    while attempt:
        own = {item for item in manifests if item.attempt == attempt and item.step <= bound}
        expected |= {item for item in own if item.step != last[0] or item.sequence <= last[1]}
        child = claims[attempt]
        if child.parent_max_step is not None:
            bound = min(bound, child.parent_max_step)
            sequence = child.parent_max_sequence
            last = (child.parent_max_step, float("inf") if sequence is None else sequence)
        attempt = child.parent or 0
    assert set(line) == expected


@given(claims_of(), st.sets(IDS), IDS)
def test_a_zombies_commit_beyond_the_step_at_which_it_was_taken_over_is_never_in_the_lineage(
    claims: dict[int, Claim], manifests: set[CheckpointId], late: CheckpointId
) -> None:
    newest = max(claims, default=0) + 1
    line = lineage(claims, manifests, newest - 1)
    if not line:
        return
    parent, step, sequence = line[0]
    claims[newest] = Claim(
        attempt=newest, parent=parent, parent_max_step=step, parent_max_sequence=sequence, created_at=WHEN
    )
    late_of_the_parent = late.attempt == parent and (late.step, late.sequence) > (step, sequence)
    if late_of_the_parent or (late.attempt < newest and late.step > step):
        assert late not in lineage(claims, manifests | {late}, newest)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_sweep_never_takes_what_a_checkpoint_that_stays_needs(data: Any) -> None:
    claims = data.draw(claims_of())
    ids = sorted(data.draw(st.sets(IDS)))
    names = [identity.shard_key("model") for identity in ids] + [CheckpointId(1, 0).shard_key("frozen")]
    manifests = {}
    for identity in ids:
        earlier = [name for name, owner in zip(names, [*ids, CheckpointId(1, 0)], strict=True) if owner <= identity]
        keys = {identity.shard_key("model"), *data.draw(st.lists(st.sampled_from(earlier), max_size=2))}
        shards = tuple(
            ShardRecord(name=f"m{i}", key=key, size=1, digest="crc64nvme:0") for i, key in enumerate(sorted(keys))
        )
        manifests[identity] = Manifest(
            run_id="r",
            attempt=identity.attempt,
            step=identity.step,
            sequence=identity.sequence,
            created_at=WHEN,
            shards=shards,
        )
    unread = data.draw(st.sets(st.sampled_from(ids))) if ids else set()
    readable = {identity: manifest for identity, manifest in manifests.items() if identity not in unread}
    history = History(claims, tuple(ids))
    line = history.lineage
    orphan = CheckpointId(data.draw(st.integers(1, 7)), 99)
    stored = [ObjectInfo(key, 1) for key in {*names, orphan.shard_key("model")}]
    limit = data.draw(st.integers(0, 7))
    plan = plan_sweep(
        history, readable, stored, KeepNewest(data.draw(st.integers(1, 3))),
        orphans_up_to=limit, protect=frozenset(line[:1]), now=WHEN,
    )  # fmt: skip
    gone = {info.key for info in plan.objects}
    assert not gone & {shard.key for identity in plan.kept for shard in manifests[identity].shards}
    assert set(plan.kept) | set(plan.drop) == set(ids)
    assert not set(plan.kept) & set(plan.drop)
    assert set(line[:1]) | unread <= set(plan.kept)
    assert (orphan.shard_key("model") in gone) == (
        orphan.attempt <= limit and not any(orphan <= item for item in unread)
    )
