"""The power fails after any system call: whatever had not been synced may be lost, torn or turned around."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.scenario import check_goes_on, check_resolves, check_visible, save, snapshot_at
from spotguard.checkpoint.layout import parse_manifest_key
from spotguard.pipeline.commit import commit
from spotguard.pipeline.history import claim_attempt, open_run
from spotguard.pipeline.resolver import resolve
from spotguard.stores import LocalObjectStore
from spotguard.testing.faults import Dying, Halted, Intercepting, halt
from spotguard.testing.power import PowerCut, PowerCutDisk

Record = Callable[[str, object], None]


def promised(cut: PowerCut) -> list[int]:
    """Steps of which the caller had been told that they are committed."""
    return [int(mark) for mark in cut.marks]


def check(cut: PowerCut, place: Path, *, goes_on: bool) -> int:
    """Write that disk, and see that nothing promised is lost and nothing partial is there; returns the step to resume from."""
    shutil.rmtree(place, ignore_errors=True)
    root = place / "run"
    place.mkdir()
    cut.write_to(place)
    check_visible(root)
    steps = promised(cut)
    step = check_resolves(root, [0, 10, 20, 30] if not steps else [step for step in (10, 20, 30) if step >= max(steps)])
    if goes_on:
        check_goes_on(root, 60, foreign=False)
    return step


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> list[PowerCut]:
    """Every disk that a power cut could leave of a run of three starts with a save each, of which the last sweeps one away."""
    root = tmp_path_factory.mktemp("disk")
    disk = PowerCutDisk(root)
    store = LocalObjectStore(root / "run", fs=disk)
    for step in (10, 20, 30):
        save(store, step)
        disk.mark(str(step))
    return disk.cuts


def test_a_power_cut_after_any_system_call_loses_nothing_that_was_promised(
    cuts: list[PowerCut], tmp_path: Path, record_property: Record
) -> None:
    found = set()
    for number, cut in enumerate(cuts):
        try:
            found.add(check(cut, tmp_path / "disk", goes_on=number % 4 == 0))
        except BaseException as error:
            error.args = (f"{cut}: {error}",)
            raise
    assert found == {0, 10, 20, 30}
    assert len(cuts) > 60
    record_property("power cuts", len(cuts))


def test_the_disk_without_syncs_would_lose_what_was_promised(tmp_path: Path) -> None:
    """A test of the test: skip the syncs, and the same checks fail."""

    class Forgetful(Intercepting):
        def fsync(self, descriptor: int) -> None:
            pass

    disk = PowerCutDisk(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    store = LocalObjectStore(tmp_path / "disk" / "run", fs=Forgetful(disk))
    save(store, 10)
    disk.mark("10")
    wrong = 0
    for cut in disk.cuts:
        try:
            check(cut, tmp_path / "found", goes_on=False)
        except Exception:  # noqa: BLE001 - any complaint will do
            wrong += 1
    assert wrong > 0


def test_a_killed_process_and_then_a_power_cut_lose_nothing_that_the_next_start_promised(
    tmp_path: Path, record_property: Record
) -> None:
    """A start that is killed leaves names that are visible and not synced; the next start builds upon them."""
    tried = 0
    for at in range(1, 60):
        root = tmp_path / f"disk-{at}"
        root.mkdir()
        disk = PowerCutDisk(root)
        try:
            save_all(LocalObjectStore(root / "run", fs=Dying(at, "after", death=halt, inner=disk)))
        except Halted:
            pass
        else:
            break
        disk.cuts.clear()
        save(LocalObjectStore(root / "run", fs=disk), 20)
        disk.mark("20")
        for cut in [cut for cut in disk.cuts if cut.marks]:
            check(cut, tmp_path / "found", goes_on=False)
            tried += 1
        shutil.rmtree(root)
    assert tried > 40
    record_property("kills, then power cuts", tried)


def save_all(store: LocalObjectStore) -> None:
    """A first save without a thread, so that `Halted` comes out here."""
    run = open_run(store)
    commit(store, snapshot_at(10), run_id=run.run_id, attempt=claim_attempt(store).attempt)


def test_whatever_a_power_cut_leaves_belongs_to_one_run(cuts: list[PowerCut], tmp_path: Path) -> None:
    """Manifests without their run record would wedge the run."""
    for cut in cuts:
        manifests = [path for path in cut.tree if parse_manifest_key(path.removeprefix("run/"))]
        assert not manifests or "run/run.json" in cut.tree, cut
        assert not manifests or any(path.startswith("run/attempts/0") for path in cut.tree), cut
    assert resolve(LocalObjectStore(tmp_path)).require() is None
