"""A fit with Lightning, killed anywhere, ends as if it had never been touched."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from equivalence.fitting import CASES, Case, assert_same_fit, run_fit
from equivalence.training import resumed_from

Record = Callable[[str, object], None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.feature)
def test_a_fit_that_is_killed_anywhere_ends_the_same(
    case: Case, tmp_path: Path, record_property: Record, request: pytest.FixtureRequest
) -> None:
    """For the page in every batch; else in every third one, in turns with the next features."""
    record_property("feature", [CASES.index(case), case.feature])
    record_property("column", "SIGKILL in every batch")
    untouched = tmp_path / "untouched"
    assert run_fit(case, untouched) == 0, (untouched / "stderr.txt").read_text()
    steps, all_of_them = [], request.config.getoption("--matrix") is not None
    first, apart = (0, 1) if all_of_them else (CASES.index(case) % 3, 3)
    for tick in range(first, int((untouched / "ticks").read_text()), apart):
        folder = tmp_path / f"kill-{tick}"
        assert run_fit(case, folder, kill_at=tick) == -signal.SIGKILL
        assert run_fit(case, folder) == 0, (folder / "stderr.txt").read_text()
        assert_same_fit(untouched, folder, f"SIGKILL at tick {tick}", once=False)
        steps.append(resumed_from(folder))
    assert len(set(steps)) >= 2, f"the second start went on from {steps}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.feature)
def test_a_fit_that_is_stopped_at_every_batch_ends_the_same_and_does_nothing_twice(
    case: Case, tmp_path: Path, record_property: Record
) -> None:
    record_property("feature", [CASES.index(case), case.feature])
    record_property("column", "SIGTERM in every batch")
    untouched, folder = tmp_path / "untouched", tmp_path / "stopped"
    assert run_fit(case, untouched) == 0, (untouched / "stderr.txt").read_text()
    starts, anywhere = 0, ("train", "end of batch", "validate", "epoch")
    # Every second stop comes as early as can be, in a validation that has just begun again, say; the others let the run get on.
    while (
        status := run_fit(case, folder, kill_at=0, kinds=(anywhere, ("train",))[starts % 2], number=signal.SIGTERM)
    ) == 143:
        starts += 1
        assert starts < 60, (folder / "stderr.txt").read_text()
    assert status == 0, (folder / "stderr.txt").read_text()
    assert starts >= 7
    assert_same_fit(untouched, folder, f"SIGTERM {starts} times", once=True)


def test_the_matrix_in_the_documentation_has_these_features_and_no_others() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/lightning.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows == [case.feature for case in CASES]
    assert "**no**" not in page
    assert "?" not in page
