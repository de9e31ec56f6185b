"""A run in several places goes on when one of them is lost, late, damaged or behind, and each place tells the run by itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.places import JOBS, Job, Outside, save, start
from faults.scenario import check_content, check_resolves, check_visible, copy_of, in_child, snapshot_at
from spotguard.checkpoint import CheckpointId
from spotguard.errors import ConfigError, FencedError, StoreError
from spotguard.events import CheckpointCommitted, SaveFailed, TierFailed
from spotguard.pipeline.history import claim_attempt, open_run, read_history
from spotguard.pipeline.resolver import resolve
from spotguard.pipeline.tiers import Tiers
from spotguard.stores import LocalObjectStore, ObjectStore
from spotguard.testing.faults import Dying, Intercepting, Unsynced


@pytest.fixture(autouse=True)
def _end_what_was_started() -> Iterator[None]:
    yield
    while JOBS:
        JOBS.pop().writer.close()


def fast(root: Path) -> LocalObjectStore:
    """A disk that goes with the machine."""
    return LocalObjectStore(root / "fast", fs=Unsynced())


def eu(root: Path) -> Outside:
    return Outside(root / "eu")


def us(root: Path) -> Outside:
    return Outside(root / "us")


def steps_in(store: ObjectStore) -> list[int]:
    return [identity.step for identity in read_history(store).manifests]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def resumed_from(job: Job) -> tuple[int, str]:
    """Step, and the name of the tier that was read; the content is that of the step, bit for bit."""
    checkpoint = job.resolution.require()
    assert checkpoint is not None
    check_content(job.resolution, checkpoint.step)
    return checkpoint.step, Path(checkpoint.store.uri).name


def test_each_tier_is_a_whole_run_by_itself(tmp_path: Path) -> None:
    job = save([fast(tmp_path), eu(tmp_path), us(tmp_path)], 10, 20, 30)
    save([fast(tmp_path), eu(tmp_path), us(tmp_path)], 40)
    told = sorted((event.step, event.tier) for event in job.told(CheckpointCommitted))  # type: ignore[attr-defined]
    assert told == [(step, str(tmp_path / name)) for step in (10, 20, 30) for name in ("eu", "fast", "us")]
    files = [(tmp_path / name / "run.json").read_bytes() for name in ("fast", "eu", "us")]
    assert len(set(files)) == 1
    for name in ("fast", "eu", "us"):
        root = tmp_path / name
        check_visible(root)
        check_resolves(root, [40])
        assert steps_in(LocalObjectStore(root)) == [30, 40]
        for claim in ("0001", "0002"):
            assert (root / f"attempts/{claim}.json").read_bytes() == (
                tmp_path / f"eu/attempts/{claim}.json"
            ).read_bytes()


def test_shards_that_have_not_changed_are_named_again_in_each_tier_from_that_tier(tmp_path: Path) -> None:
    save([fast(tmp_path), eu(tmp_path)], 10)
    save([fast(tmp_path), eu(tmp_path)], 20)
    for name in ("fast", "eu"):
        assert [path.parent.name for path in (tmp_path / name).rglob("backbone.pt")] == ["0001-0000000010"]


def test_a_new_machine_goes_on_from_the_other_tier_and_fills_its_own(tmp_path: Path) -> None:
    save([fast(tmp_path), eu(tmp_path)], 10, 20)
    shutil.rmtree(tmp_path / "fast")
    job = save([fast(tmp_path), eu(tmp_path)], 30)
    assert resumed_from(job) == (20, "eu")
    check_resolves(tmp_path / "fast", [30])
    check_resolves(tmp_path / "eu", [30])
    assert sorted(path.name for path in (tmp_path / "fast/attempts").iterdir()) == ["0001.json", "0002.json"]
    assert resumed_from(start(fast(tmp_path), eu(tmp_path))) == (30, "fast")


def test_a_tier_that_is_down_at_the_start_is_admitted_when_it_is_back(tmp_path: Path) -> None:
    save([eu(tmp_path), us(tmp_path)], 10)
    first = eu(tmp_path)
    first.down = True
    job = start(first, us(tmp_path))
    assert resumed_from(job) == (10, "us")
    assert [tier.store.uri for tier in job.tiers.unreachable] == [first.uri]
    assert job.tiers.home.uri == str(tmp_path / "us")
    job.save(20, 30)
    assert job.writer.failures == 0
    assert [(event.tier, event.step, event.in_a_row) for event in job.told(TierFailed)] == [  # type: ignore[attr-defined]
        (first.uri, 20, 1),
        (first.uri, 30, 2),
    ]
    assert not job.told(SaveFailed)
    first.down = False
    job.save(40)
    assert job.writer.error is None
    check_resolves(tmp_path / "eu", [40])
    check_resolves(tmp_path / "us", [40])
    assert (tmp_path / "eu/attempts/0002.json").read_bytes() == (tmp_path / "us/attempts/0002.json").read_bytes()


def test_a_tier_that_was_empty_and_down_at_the_start_gets_the_whole_history_when_it_is_back(tmp_path: Path) -> None:
    save([us(tmp_path)], 10)
    save([us(tmp_path)], 20)
    first = eu(tmp_path)
    first.down = True
    job = start(us(tmp_path), first)
    first.down = False
    job.save(30)
    assert sorted(path.name for path in (tmp_path / "eu/attempts").iterdir()) == ["0001.json", "0002.json", "0003.json"]
    check_resolves(tmp_path / "eu", [30])
    assert not resolve(LocalObjectStore(tmp_path / "eu")).damaged


def test_where_nothing_that_outlives_the_machine_can_be_reached_there_is_no_start(tmp_path: Path) -> None:
    save([fast(tmp_path), eu(tmp_path)], 10)
    away = eu(tmp_path)
    away.down = True
    with pytest.raises(StoreError, match="does not answer"):
        start(fast(tmp_path), away)
    assert read_history(fast(tmp_path)).newest_attempt == 1


@pytest.mark.parametrize("known", [False, True], ids=["empty", "claimed"])
def test_a_run_is_not_begun_anew_while_a_tier_that_may_hold_it_is_down(tmp_path: Path, *, known: bool) -> None:
    save([eu(tmp_path), us(tmp_path)] if known else [eu(tmp_path)], 10)
    for path in (tmp_path / "us").glob("manifests/*"):
        path.unlink()
    before = sorted(path for path in tmp_path.rglob("*"))
    away = eu(tmp_path)
    away.down = True
    with pytest.raises(StoreError, match=r"eu cannot be: .*does not answer"):
        start(us(tmp_path), away)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    away.down = False
    assert resumed_from(start(us(tmp_path), away)) == (10, "eu")


def test_the_newest_checkpoint_of_all_tiers_counts_wherever_it_is(tmp_path: Path) -> None:
    save([fast(tmp_path), eu(tmp_path)], 10)
    job = start(fast(tmp_path), eu(tmp_path))
    job.save(20, tiers="fastest")
    again = start(fast(tmp_path), eu(tmp_path))
    assert resumed_from(again) == (20, "fast")
    assert again.writer.last is not None
    assert again.writer.last.step == 10  # what another machine would resume from
    away = eu(tmp_path)
    away.refuses = "manifests/"
    job = start(fast(tmp_path), away)
    job.save(30)
    assert job.writer.failures == 1
    shutil.rmtree(tmp_path / "fast")
    job = save([fast(tmp_path), eu(tmp_path)], 15)
    assert resumed_from(job) == (10, "eu")
    assert resumed_from(start(fast(tmp_path), eu(tmp_path))) == (15, "fast")


def test_a_damaged_copy_is_told_and_the_other_tiers_copy_is_taken_before_an_older_checkpoint(tmp_path: Path) -> None:
    save([fast(tmp_path), eu(tmp_path)], 10, 20)
    newest = CheckpointId(1, 20)
    flip(tmp_path / "fast" / newest.shard_key("model"))
    job = start(fast(tmp_path), eu(tmp_path))
    assert resumed_from(job) == (20, "eu")
    (rejected,) = job.resolution.rejected
    assert (rejected.id, rejected.tier) == (str(newest), str(tmp_path / "fast"))
    assert str(tmp_path / "fast" / newest.shard_key("model")) in rejected.reason
    assert "read from" in job.resolution.candidates[1].reason
    job.save(30)
    assert job.writer.error is None
    check_resolves(tmp_path / "fast", [30])  # nothing of the damaged copy is named again
    assert job.writer.checkpoint is not None
    assert job.writer.checkpoint.store.uri == str(tmp_path / "eu")


def test_what_is_damaged_in_every_tier_is_rejected_and_an_older_checkpoint_is_taken(tmp_path: Path) -> None:
    save([fast(tmp_path), eu(tmp_path)], 10, 20)
    for name in ("fast", "eu"):
        flip(tmp_path / name / CheckpointId(1, 20).shard_key("model"))
    job = start(fast(tmp_path), eu(tmp_path))
    assert resumed_from(job) == (10, "fast")
    assert [item.tier for item in job.resolution.rejected] == [str(tmp_path / "fast"), str(tmp_path / "eu")]


@pytest.mark.parametrize("other", ["whole", "damaged", "without"])
def test_a_tier_that_stops_answering_while_it_is_read_is_no_reason_for_an_older_checkpoint(
    tmp_path: Path, other: str
) -> None:
    save([eu(tmp_path), us(tmp_path)], 10, 20)
    if other == "damaged":
        flip(tmp_path / "us" / CheckpointId(1, 20).shard_key("model"))
    if other == "without":
        (tmp_path / "us" / CheckpointId(1, 20).manifest_key).unlink()

    class GoesAway(Outside):
        def open(self, key: str, *, version: str | None = None):  # type: ignore[no-untyped-def]
            self.down = self.down or key.endswith(".pt")
            return super().open(key, version=version)

    if other == "whole":
        assert resumed_from(start(GoesAway(tmp_path / "eu"), us(tmp_path))) == (20, "us")
    else:
        with pytest.raises(StoreError, match="does not answer"):
            start(GoesAway(tmp_path / "eu"), us(tmp_path))


def test_a_claim_that_is_damaged_in_one_tier_is_read_from_the_other(tmp_path: Path) -> None:
    save([eu(tmp_path), us(tmp_path)], 10)
    save([eu(tmp_path), us(tmp_path)])
    flip(tmp_path / "eu/attempts/0002.json")
    (tmp_path / "us/attempts/0001.json").unlink()
    job = start(eu(tmp_path), us(tmp_path))
    assert resumed_from(job) == (10, "eu")
    assert not job.resolution.damaged
    flip(tmp_path / "us/attempts/0003.json")
    flip(tmp_path / "eu/attempts/0003.json")
    job = start(eu(tmp_path), us(tmp_path))
    assert resumed_from(job) == (10, "eu")  # it has committed nothing
    assert any("0003" in text for text in job.resolution.damaged)


def test_tiers_of_different_runs_are_refused_and_both_are_named(tmp_path: Path) -> None:
    save([eu(tmp_path)], 10)
    save([us(tmp_path)], 10)
    ids = [open_run(store).run_id for store in (eu(tmp_path), us(tmp_path))]
    with pytest.raises(ConfigError) as caught:
        start(eu(tmp_path), us(tmp_path))
    for text in (*ids, str(tmp_path / "eu"), str(tmp_path / "us")):
        assert text in str(caught.value)


def test_a_tier_that_turns_out_to_be_another_run_when_it_is_back_gets_nothing(tmp_path: Path) -> None:
    save([eu(tmp_path)], 10)
    save([us(tmp_path)], 10)
    away = us(tmp_path)
    away.down = True
    job = start(eu(tmp_path), away)
    away.down = False
    before = sorted(path for path in (tmp_path / "us").rglob("*"))
    job.save(20)
    assert [event.tier for event in job.told(TierFailed)] == [away.uri]  # type: ignore[attr-defined]
    assert sorted(path for path in (tmp_path / "us").rglob("*")) == before


def test_a_run_record_that_is_gone_from_one_tier_is_given_back_from_the_other(tmp_path: Path) -> None:
    save([eu(tmp_path), us(tmp_path)], 10)
    (tmp_path / "us/run.json").unlink()
    save([eu(tmp_path), us(tmp_path)], 20)
    assert (tmp_path / "us/run.json").read_bytes() == (tmp_path / "eu/run.json").read_bytes()
    for name in ("eu", "us"):
        (tmp_path / name / "run.json").unlink()
    with pytest.raises(StoreError, match=r"run\.json"):
        start(eu(tmp_path), us(tmp_path))


def test_a_process_that_was_taken_over_in_any_tier_is_fenced_off(tmp_path: Path) -> None:
    job = start(fast(tmp_path), eu(tmp_path), us(tmp_path))
    job.save(10)
    claim_attempt(us(tmp_path))  # of somebody who sees that one only
    job.save(20)
    assert isinstance(job.writer.fenced, FencedError)
    assert "attempt 2" in str(job.writer.fenced)
    assert [steps_in(store) for store in (fast(tmp_path), eu(tmp_path), us(tmp_path))] == [[10], [10], [10]]


def test_a_process_whose_number_is_taken_in_a_tier_that_comes_back_is_fenced_off(tmp_path: Path) -> None:
    save([eu(tmp_path), us(tmp_path)], 10)
    away = us(tmp_path)
    away.down = True
    job = start(eu(tmp_path), away)
    assert claim_attempt(us(tmp_path)).attempt == job.attempt  # the two do not see each other
    away.down = False
    job.save(20)
    assert isinstance(job.writer.fenced, FencedError)
    assert "could not see" in str(job.writer.fenced)
    assert steps_in(us(tmp_path)) == [10]
    again = start(eu(tmp_path), us(tmp_path))
    assert again.attempt == job.attempt + 1
    assert resumed_from(again) == (20, "eu")


def test_of_two_starts_at_once_each_gets_a_number_of_its_own_whatever_tier_is_first_in_its_list(tmp_path: Path) -> None:
    class ClaimFirst(Outside):
        """Somebody else claims just before our claim gets here."""

        busy = True

        def create(self, key: str, **options):  # type: ignore[no-untyped-def]
            if self.busy and key.startswith("attempts/"):
                self.busy = False
                others.append(start(eu(tmp_path), us(tmp_path)).attempt)
            return super().create(key, **options)

    others: list[int] = []
    save([eu(tmp_path), us(tmp_path)], 10)
    job = start(ClaimFirst(tmp_path / "eu"), us(tmp_path))
    assert (others, job.attempt) == ([2], 3)
    others.clear()
    job = start(eu(tmp_path), ClaimFirst(tmp_path / "us"))
    assert len({*others, job.attempt}) == 2
    assert resumed_from(job)[0] == 10


def test_a_save_fails_only_where_no_tier_that_outlives_the_machine_has_it(tmp_path: Path) -> None:
    first, second = eu(tmp_path), us(tmp_path)
    job = start(fast(tmp_path), first, second)
    job.save(10)
    first.refuses = "manifests/"
    job.save(20)
    assert (job.writer.failures, job.writer.error) == (0, None)
    assert len(job.told(TierFailed)) == 1
    assert job.writer.checkpoint is not None
    assert (job.writer.checkpoint.step, job.writer.checkpoint.store.uri) == (20, second.uri)
    second.refuses = "checkpoints/"
    job.save(30)
    assert job.writer.failures == 1
    assert "eu" in str(job.writer.error)
    assert "us" in str(job.writer.error)
    (failed,) = job.told(SaveFailed)
    assert failed.step == 30  # type: ignore[attr-defined]
    assert job.writer.last is not None
    assert job.writer.last.step == 20
    assert steps_in(fast(tmp_path)) == [20, 30]
    first.refuses = second.refuses = ""
    job.save(40)
    assert (job.writer.failures, job.writer.error) == (0, None)
    for name in ("fast", "eu", "us"):
        check_visible(tmp_path / name)
        check_resolves(tmp_path / name, [40])


def test_a_fast_tier_that_fails_or_is_wiped_does_not_fail_the_save(tmp_path: Path) -> None:
    """And is filled anew."""
    job = start(fast(tmp_path), eu(tmp_path))
    job.save(10)
    shutil.rmtree(tmp_path / "fast")
    job.save(20)
    assert job.writer.fenced is None
    assert job.writer.error is None
    assert not job.told(TierFailed)
    check_resolves(tmp_path / "fast", [20])
    job.save(30)
    check_resolves(tmp_path / "fast", [30])
    assert (tmp_path / "fast/run.json").read_bytes() == (tmp_path / "eu/run.json").read_bytes()


def test_a_run_that_is_taken_away_from_every_tier_that_outlives_the_machine_is_not_written_again(
    tmp_path: Path,
) -> None:
    job = start(fast(tmp_path), eu(tmp_path), us(tmp_path))
    job.save(10)
    for name in ("eu", "us"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    job.save(20)
    assert isinstance(job.writer.fenced, FencedError)
    assert not (tmp_path / "eu/run.json").exists()


def test_a_commit_to_the_fastest_tier_alone_is_no_checkpoint_that_outlives_the_machine(tmp_path: Path) -> None:
    job = start(fast(tmp_path), eu(tmp_path))
    job.save(10)
    job.save(20, tiers="fastest")
    assert job.writer.error is None
    assert job.writer.last is not None
    assert job.writer.last.step == 10
    assert (steps_in(fast(tmp_path)), steps_in(eu(tmp_path))) == ([10, 20], [10])
    job.save(20)  # the same boundary once more, to all of them
    assert job.writer.last.sequence == 1
    assert str(job.writer.last.id) in {str(item) for item in read_history(fast(tmp_path)).manifests}
    with pytest.raises(ConfigError, match="fastest"):
        job.writer.submit(snapshot_at(30), {}, tiers="slowest")


def test_directories_alone_are_all_taken_to_outlive_the_machine(tmp_path: Path) -> None:
    stores = [LocalObjectStore(tmp_path / name, fs=Unsynced()) for name in ("a", "b")]
    assert [tier.surviving for tier in Tiers(stores).all] == [True, True]
    job = start(*stores)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").write_text("in the way")
    job.save(10)
    assert job.writer.failures == 0
    assert job.writer.checkpoint is not None
    assert job.writer.checkpoint.store.uri == str(tmp_path / "b")


def test_a_mirror_that_is_damaged_when_it_is_read_back_is_written_anew(tmp_path: Path) -> None:
    job = start(eu(tmp_path), us(tmp_path), keep=1)
    job.save(10)
    flip(tmp_path / "eu" / CheckpointId(1, 10).shard_key("backbone"))
    job.save(20)  # names it again, and finds out before it deletes
    assert job.writer.failures == 0
    assert [event.tier for event in job.told(TierFailed)] == [str(tmp_path / "eu")]  # type: ignore[attr-defined]
    assert job.writer.checkpoint is not None
    assert job.writer.checkpoint.store.uri == str(tmp_path / "us")
    job.save(30)
    check_visible(tmp_path / "eu")
    check_resolves(tmp_path / "eu", [30])


def test_a_fast_tier_on_a_new_machine_gets_the_checkpoint_while_it_is_read(tmp_path: Path) -> None:
    save([fast(tmp_path), eu(tmp_path)], 10, 20)
    shutil.rmtree(tmp_path / "fast")
    job = start(fast(tmp_path), eu(tmp_path))
    assert resumed_from(job) == (20, "eu")
    check_visible(tmp_path / "fast")
    check_resolves(tmp_path / "fast", [20])
    assert resumed_from(start(fast(tmp_path), eu(tmp_path))) == (20, "fast")
    job = start(fast(tmp_path), eu(tmp_path))
    job.save(30)
    written = {event.tier: event.written for event in job.told(CheckpointCommitted)}  # type: ignore[attr-defined]
    assert (
        written[str(tmp_path / "fast")] == written[str(tmp_path / "eu")]
    )  # what has not changed is named again in both


def test_a_fast_tier_that_cannot_be_filled_does_not_hold_back_the_start(tmp_path: Path) -> None:
    save([fast(tmp_path), eu(tmp_path)], 10, 20)
    shutil.rmtree(tmp_path / "fast")
    full = Outside(tmp_path / "fast")
    full.refuses = "checkpoints/"
    job = start(full, eu(tmp_path))
    assert resumed_from(job) == (20, "eu")
    assert not list((tmp_path / "fast/manifests").glob("*"))


# -- death -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiers with three checkpoints, so that the next save makes each sweep delete some."""
    root = tmp_path_factory.mktemp("base") / "places"
    save([fast(root), eu(root)], 10, keep=9)
    save([fast(root), eu(root)], 20, 30, keep=9)
    return root


def crash_points(base: Path, place: Path) -> Iterator[tuple[Path, int]]:
    """The places as a process left them that died before one system call of a start, a save and a sweep."""
    probe = Intercepting(Unsynced())
    save([LocalObjectStore(copy_of(base, place) / "fast", fs=probe), Outside(place / "eu", fs=probe)], 50)
    for number in range(1, len(probe.calls) + 1):
        root = copy_of(base, place)
        fs = Dying(number, "before", inner=Unsynced())

        def run(root: Path = root, fs: Dying = fs) -> object:
            return save([LocalObjectStore(root / "fast", fs=fs), Outside(root / "eu", fs=fs)], 50)

        assert in_child(run) == 137, number
        yield root, number


def test_death_at_any_system_call_of_a_save_to_two_tiers_leaves_the_old_or_the_new_checkpoint(
    base: Path, tmp_path: Path
) -> None:
    seen = set()
    for root, number in crash_points(base, tmp_path / "places"):
        alone = [check_resolves(root / name, [30, 50]) for name in ("fast", "eu")]
        for name in ("fast", "eu"):
            check_visible(root / name)
        job = start(fast(root), eu(root))
        assert resumed_from(job)[0] == max(alone)
        if number % 4 == 0:
            job.save(60)
            assert job.writer.error is None
            assert [check_resolves(root / name, [60]) for name in ("fast", "eu")] == [60, 60]
        job.writer.close()
        seen.add(tuple(alone))
    assert {(30, 30), (50, 50)} < seen  # and one before the other: the tiers do not wait for each other


def test_death_at_any_system_call_of_a_start_on_a_new_machine_leaves_no_half_copy(base: Path, tmp_path: Path) -> None:
    def new_machine() -> Path:
        root = copy_of(base, tmp_path / "places")
        shutil.rmtree(root / "fast")
        return root

    probe = Intercepting(Unsynced())
    root = new_machine()
    start(LocalObjectStore(root / "fast", fs=probe), eu(root))
    outcomes = set()
    for number in range(1, len(probe.calls) + 1):
        root = new_machine()
        fs = Dying(number, inner=Unsynced())

        def run(root: Path = root, fs: Dying = fs) -> object:
            return start(LocalObjectStore(root / "fast", fs=fs), eu(root))

        assert in_child(run) == 137, number
        if (root / "fast/manifests").exists():
            check_visible(root / "fast")
        step, name = resumed_from(start(fast(root), eu(root)))
        assert step == 30
        outcomes.add(name)
    assert outcomes == {"fast", "eu"}


def test_death_at_any_system_call_of_the_first_start_of_two_tiers_leaves_one_identity(tmp_path: Path) -> None:
    place = tmp_path / "places"
    probe = Intercepting(Unsynced())
    save([LocalObjectStore(place / "fast", fs=probe), Outside(place / "eu", fs=probe)])
    for number in range(1, len(probe.calls) + 1):
        root = copy_of(tmp_path / "nothing", place)
        fs = Dying(number, inner=Unsynced())

        def run(fs: Dying = fs) -> object:
            return save([LocalObjectStore(place / "fast", fs=fs), Outside(place / "eu", fs=fs)])

        assert in_child(run) == 137, number
        save([fast(root), eu(root)], 10)
        assert len({open_run(store).run_id for store in (fast(root), eu(root))}) == 1
        assert [check_resolves(root / name, [10]) for name in ("fast", "eu")] == [10, 10]
