"""A run in a bucket that is killed, at any place and any number of times, ends exactly like one that never was, and in a directory."""

import itertools
import random
import secrets
import signal
from pathlib import Path

import pytest

from equivalence.test_kill_anywhere import GRID, MORE, finish, kill_and_finish, untouched_run
from equivalence.training import Case, assert_same, resumed_from, run_once
from servers import S3Server

CASES = [Case("shuffle", 0, 4), Case("generator", 2, 1), Case("stateful", 0, 1)]


@pytest.fixture(autouse=True)
def bucket(seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    seaweedfs.use(monkeypatch)
    monkeypatch.setattr("spotguard.stores.s3.preflight._said", {(seaweedfs.plain, "versions")})  # the warning
    return f"s3://{seaweedfs.versioned}/{secrets.token_hex(8)}"


def folder_in(bucket: str, folder: Path) -> Path:
    """A folder whose run is kept in the bucket."""
    folder.mkdir()
    (folder / "place").write_text(f"{bucket}/{folder.name}")
    return folder


@pytest.mark.parametrize(
    ("case", "first", "every"),
    [*((CASES[0], first, 3) for first in range(3)), *((case, 1, 6) for case in CASES[1:])],
    ids=str,
)
def test_sigkill_at_boundaries_of_a_run_in_a_bucket(
    case: Case, first: int, every: int, tmp_path: Path, bucket: str
) -> None:
    """At each of them, in the first case."""
    untouched, ticks = untouched_run(case, tmp_path)
    steps = [
        kill_and_finish(case, untouched, folder_in(bucket, tmp_path / f"kill-{tick}"), tick)
        for tick in range(first, ticks, every)
    ]
    assert len(set(steps)) >= 3, f"the second start went on from {steps}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sigterm_at_boundaries_of_a_run_in_a_bucket(case: Case, tmp_path: Path, bucket: str) -> None:
    untouched, ticks = untouched_run(case, tmp_path)
    for tick in range(0, ticks, 4 if case is CASES[0] else 9):
        folder = folder_in(bucket, tmp_path / f"term-{tick}")
        status = run_once(case, folder, kill_at=tick, number=signal.SIGTERM)
        assert status in (143, 0), (folder / "stderr.txt").read_text()  # 0: the notice came at the very end
        if status == 143:
            finish(case, folder)
            assert resumed_from(folder) > 0
        assert_same(untouched, folder, f"SIGTERM at tick {tick}")


@pytest.mark.parametrize(
    ("case", "versions"), list(zip([*GRID, *MORE], itertools.cycle((True, False)), strict=False)), ids=str
)
def test_three_kills_in_one_run_in_a_bucket(
    case: Case, versions: bool, tmp_path: Path, bucket: str, seaweedfs: S3Server
) -> None:
    """Every case of the plain loop, every other in a bucket that keeps no versions."""
    bucket = bucket if versions else bucket.replace(f"//{seaweedfs.versioned}/", f"//{seaweedfs.plain}/")
    untouched, ticks = untouched_run(case, tmp_path)
    draw = random.Random(str(case))
    for attempt in range(2 if case in CASES else 1):
        folder = folder_in(bucket, tmp_path / f"run-{attempt}")
        kills = [(draw.randrange(2, ticks // 4), number) for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM)]
        for tick, number in kills:
            status = run_once(case, folder, kill_at=tick, number=number)
            assert status in (-signal.SIGKILL, 143), (folder / "stderr.txt").read_text()
        finish(case, folder)
        assert_same(untouched, folder, f"three kills {kills}")
