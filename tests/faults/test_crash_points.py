"""The process dies before, after and in the middle of every system call of a save and of the sweep behind it."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.scenario import (
    check_goes_on,
    check_resolves,
    check_tidy,
    check_visible,
    copy_of,
    faulty,
    in_child,
    kill_when_announced,
    prepare,
    save,
)
from spotguard.pipeline.history import claim_attempt, open_run, read_history
from spotguard.pipeline.sweeper import sweep
from spotguard.policies import KeepNewest
from spotguard.stores import LocalObjectStore
from spotguard.stores.posix import Posix
from spotguard.testing.faults import Announce, Dying, Intercepting, Unsynced, exit_at_once, without_links

Record = Callable[[str, object], None]
Start = Callable[[LocalObjectStore], object]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints and leftovers. The save of step 50 makes the sweep behind it delete two of them."""
    root = tmp_path_factory.mktemp("base") / "run"
    prepare(root)
    return root


def points_of(base: Path, place: Path, start: Start, disk: Posix) -> list[tuple[int, str]]:
    """Number of each system call of an untouched run, with each way to die there."""
    fs = Intercepting(disk)
    start(faulty(copy_of(base, place), fs))
    whens = {"write": ("before", "half", "after")}
    return [(call.number, when) for call in fs.calls for when in whens.get(call.name, ("before", "after"))]


def crash_everywhere(base: Path, place: Path, start: Start, *, links: bool = True) -> Iterator[Path]:
    """The directory as a process left it that died by `os._exit`, for each point of death."""
    disk = Unsynced() if links else without_links(Unsynced())
    for at, when in points_of(base, place, start, disk):
        root = copy_of(base, place)
        fs = Dying(at, when, inner=disk)
        assert in_child(lambda root=root, fs=fs: start(faulty(root, fs))) == 137, (at, when)  # type: ignore[misc]
        yield root


def kill_everywhere(base: Path, place: Path, start: Start) -> Iterator[Path]:
    """The same by SIGKILL from outside: the process says where it is and is killed there."""
    for at, when in points_of(base, place, start, Unsynced()):
        root = copy_of(base, place)

        def run(pipe: int, root: Path = root, at: int = at, when: str = when) -> object:
            return start(faulty(root, Dying(at, when, death=Announce(pipe), inner=Unsynced())))

        assert kill_when_announced(run), (at, when)
        yield root


def save_and_sweep(store: LocalObjectStore) -> None:
    save(store, 50)


@pytest.mark.parametrize("kill", [crash_everywhere, kill_everywhere], ids=["exit", "sigkill"])
def test_death_at_any_system_call_of_a_save_leaves_the_old_or_the_new_checkpoint(
    base: Path, tmp_path: Path, record_property: Record, kill: Callable[[Path, Path, Start], Iterator[Path]]
) -> None:
    steps = []
    for root in kill(base, tmp_path / "run", save_and_sweep):
        check_visible(root)
        steps.append(check_resolves(root, [30, 50]))
        check_goes_on(root, 60)
    assert set(steps) == {30, 50}  # points on both sides of the commit
    assert len(steps) > 100
    record_property("crash points", len(steps))


def test_an_untouched_save_and_sweep_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    root = copy_of(base, tmp_path / "run")
    assert in_child(lambda: save_and_sweep(LocalObjectStore(root))) == 0
    check_tidy(root)
    check_resolves(root, [50])
    assert [identity.step for identity in read_history(LocalObjectStore(root)).manifests] == [30, 50]


def test_death_at_any_system_call_of_a_prune_leaves_the_newest_checkpoint(
    base: Path, tmp_path: Path, record_property: Record
) -> None:
    points = 0
    for root in crash_everywhere(base, tmp_path / "run", lambda store: sweep(store, KeepNewest(1))):
        check_visible(root)
        check_resolves(root, [30])
        check_goes_on(root, 60)
        points += 1
    assert points > 10
    record_property("crash points", points)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_death_at_any_system_call_of_the_very_first_start_does_not_wedge_the_run(
    tmp_path: Path, record_property: Record, *, links: bool
) -> None:
    def start(store: LocalObjectStore) -> None:
        open_run(store)
        claim_attempt(store)

    points = 0
    for root in crash_everywhere(tmp_path / "nothing", tmp_path / "run", start, links=links):
        check_resolves(root, [0])
        again = faulty(root, Dying(inner=None if links else without_links()))
        known = read_history(again).newest_attempt
        assert known in (0, 1)
        save(again, 10)
        check_visible(root)
        check_resolves(root, [10])
        assert len({open_run(again).run_id for _ in range(3)}) == 1
        check_goes_on(root, 20, foreign=False) if links else save(again, 20)
        points += 1
    assert points > 15
    record_property("crash points", points)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_death_at_any_system_call_of_a_claim_leaves_the_number_taken_or_free(
    base: Path, tmp_path: Path, record_property: Record, *, links: bool
) -> None:
    points = 0
    for root in crash_everywhere(base, tmp_path / "run", claim_attempt, links=links):
        store = faulty(root, Dying(inner=None if links else without_links()))
        taken = read_history(store).newest_attempt
        assert taken in (2, 3)
        assert claim_attempt(store).attempt > taken
        check_resolves(root, [30])
        check_goes_on(root, 60)
        points += 1
    assert points > 10
    record_property("crash points", points)


def test_death_at_any_system_call_of_a_save_without_hard_links_leaves_the_old_or_the_new_checkpoint(
    base: Path, tmp_path: Path, record_property: Record
) -> None:
    steps = []
    for root in crash_everywhere(base, tmp_path / "run", save_and_sweep, links=False):
        check_visible(root)
        steps.append(check_resolves(root, [30, 50]))
        save(faulty(root, without_links()), 60)
        check_resolves(root, [60])
        check_tidy(root)
    assert set(steps) == {30, 50}
    record_property("crash points", len(steps))


def test_a_process_that_dies_three_times_in_a_row_still_goes_on(base: Path, tmp_path: Path) -> None:
    """Leftovers of one death must not be in the way of the next save, which dies later."""
    for first, second, third in [(5, 17, 22), (22, 17, 5), (20, 20, 20), (24, 3, 12)]:
        root = copy_of(base, tmp_path / "run")
        for at in (first, second, third):  # each in the save, before its commit
            assert in_child(lambda root=root, at=at: save(faulty(root, Dying(at)), 50)) == 137  # type: ignore[misc]
            check_visible(root)
            check_resolves(root, [30, 50])
        check_goes_on(root, 60)


def test_the_faults_are_what_they_say(tmp_path: Path) -> None:
    """A test of the tests: 137 for a death, and links that are refused are really tried."""
    assert in_child(exit_at_once) == 137
    fs = without_links()
    store = faulty(tmp_path, fs)
    with store.create("a", exclusive=True) as writer:
        writer.write(b"1")
    assert (fs.failed, fs.errno) == (1, errno.EPERM)
    assert (tmp_path / "a").read_bytes() == b"1"
