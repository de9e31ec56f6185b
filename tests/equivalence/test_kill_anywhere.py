"""A run that is killed, at any place and any number of times, ends exactly like one that never was."""

import random
import signal
from pathlib import Path

import pytest

from equivalence.training import Case, assert_same, resumed_from, run_once

GRID = [
    Case(loader, workers, accumulate)
    for loader in ("shuffle", "generator", "stateful")
    for workers in (0, 2)
    for accumulate in (1, 4)
]
MORE = [
    Case("persistent", 2, 4),
    Case("replacement", 0, 4),
    Case("replacement", 2),
    Case("weighted", 0),
    Case("batch_sampler", 0, 4),
    Case("batch_sampler", 2),
    Case("unbatched", 0),
    Case("unbatched", 2),
]


def untouched_run(case: Case, folder: Path) -> tuple[Path, int]:
    """Where it left its results, and how many ticks it had."""
    folder = folder / "untouched"
    assert run_once(case, folder) == 0, (folder / "stderr.txt").read_text()
    return folder, int((folder / "ticks").read_text())


def finish(case: Case, folder: Path) -> None:
    status = run_once(case, folder)
    assert status == 0, (folder / "stderr.txt").read_text()


def kill_and_finish(case: Case, untouched: Path, folder: Path, tick: int) -> int:
    """SIGKILL at that tick, and the next start; returns the step from which that one went on."""
    assert run_once(case, folder, kill_at=tick) == -signal.SIGKILL, (folder / "stderr.txt").read_text()
    finish(case, folder)
    assert_same(untouched, folder, f"SIGKILL at tick {tick}")
    return resumed_from(folder)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_sigkill_at_every_boundary(case: Case, tmp_path: Path) -> None:
    """Two cases that differ in the accumulation only share the boundaries."""
    untouched, ticks = untouched_run(case, tmp_path)
    killed_at = range(int(case.accumulate == 4), ticks, 2)
    steps = [kill_and_finish(case, untouched, tmp_path / f"kill-{tick}", tick) for tick in killed_at]
    assert len(set(steps)) >= 4, f"the second start went on from {steps}"


@pytest.mark.parametrize("case", [case for case in GRID if case.accumulate == 4], ids=str)
def test_sigterm_at_every_boundary(case: Case, tmp_path: Path) -> None:
    untouched, ticks = untouched_run(case, tmp_path)
    for tick in range(0, ticks - 1, 2):
        folder = tmp_path / f"term-{tick}"
        status = run_once(case, folder, kill_at=tick, number=signal.SIGTERM)
        assert status in (143, 0), (folder / "stderr.txt").read_text()  # 0: the notice came at the very end
        if status == 143:
            finish(case, folder)
        assert_same(untouched, folder, f"SIGTERM at tick {tick}")


@pytest.mark.parametrize("case", [*GRID, *MORE], ids=str)
def test_three_kills_in_one_run(case: Case, tmp_path: Path) -> None:
    untouched, ticks = untouched_run(case, tmp_path)
    draw = random.Random(str(case))
    for attempt in range(2):
        folder = tmp_path / f"run-{attempt}"
        kills = [(draw.randrange(2, ticks // 4), draw.choice([signal.SIGKILL, signal.SIGTERM])) for _ in range(3)]
        for tick, number in kills:
            assert run_once(case, folder, kill_at=tick, number=number) in (-signal.SIGKILL, 143), (
                folder / "stderr.txt"
            ).read_text()
        finish(case, folder)
        assert_same(untouched, folder, f"three kills {kills}")


@pytest.mark.parametrize("case", MORE, ids=str)
def test_sigkill_at_sampled_boundaries_of_further_loaders(case: Case, tmp_path: Path) -> None:
    untouched, ticks = untouched_run(case, tmp_path)
    steps = [
        kill_and_finish(case, untouched, tmp_path / f"kill-{tick}", tick)
        for tick in range(1, ticks, max(5, ticks // 8))
    ]
    assert len(set(steps)) >= 3, f"the second start went on from {steps}"
