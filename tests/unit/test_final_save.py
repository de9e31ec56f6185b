"""The plan for the last save: case by case, and over many simulated notices."""

import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

from spotguard.policies import FinalPlan, FinalSave, SaveTimes, p95, plan_final_save, time_left

TIMES = SaveTimes(save_s=8.0, step_s=0.5)


def test_without_a_deadline_the_boundary_is_saved_at_once() -> None:
    assert plan_final_save(None, TIMES, window=True).choice is FinalSave.FRESH
    assert plan_final_save(None, TIMES, window=True).train_s == 0


def test_before_the_first_save_nothing_is_known_and_one_is_tried() -> None:
    assert plan_final_save(1.0, SaveTimes(), window=True) == plan_final_save(None, TIMES)


def test_a_window_begins_with_a_save_and_ends_with_one() -> None:
    first = plan_final_save(100.0, TIMES, window=True)
    later = plan_final_save(50.0, TIMES, window=True, saved=True)
    last = plan_final_save(10.7, TIMES, window=True, saved=True)
    assert (first.save_first, first.choice) == (True, FinalSave.FRESH)
    assert not later.save_first
    assert later.train_s == pytest.approx(50 - 10.25 - 0.5)
    assert (last.train_s, last.choice) == (0.0, FinalSave.FRESH)


def test_where_somebody_waits_nothing_is_trained() -> None:
    assert plan_final_save(100.0, TIMES, window=False).train_s == 0


def test_a_window_of_few_saves_is_not_trained_through() -> None:
    assert plan_final_save(25.0, TIMES, window=True).train_s == 0


@pytest.mark.parametrize(
    ("left", "fast", "survives", "flush", "choice"),
    [
        (20.0, None, False, None, FinalSave.FRESH),
        (20.0, 1.0, True, 2.0, FinalSave.FRESH),
        (6.0, 1.0, True, 2.0, FinalSave.FAST_TIER),
        (6.0, 1.0, False, 2.0, FinalSave.FLUSH),
        (6.0, None, False, 2.0, FinalSave.FLUSH),
        (6.0, 1.0, False, 9.0, FinalSave.FLUSH),  # it may be sooner than expected
        (6.0, 1.0, False, None, FinalSave.FAST_TIER),
        (6.0, None, False, None, FinalSave.NONE),
        (9.0, None, False, None, FinalSave.FRESH),  # it may just be done
        (9.0, None, False, 2.0, FinalSave.FLUSH),
        (9.0, 1.0, True, None, FinalSave.FAST_TIER),
    ],
)
def test_what_does_not_fit_falls_back_to_what_does(
    left: float, fast: float | None, survives: bool, flush: float | None, choice: FinalSave
) -> None:
    times = SaveTimes(save_s=8.0, fast_s=fast, fast_survives=survives, step_s=0.5, flush_s=flush)
    plan = plan_final_save(left, times)
    assert plan.choice is choice
    assert bool(plan.reason) == (choice is not FinalSave.FRESH or left < 10)


@pytest.mark.parametrize("flush", [None, 2.0])
@pytest.mark.parametrize("left", [-3.0, 0.0])
def test_a_deadline_that_has_passed_is_no_reason_to_give_up(left: float, flush: float | None) -> None:
    times = SaveTimes(save_s=8.0, fast_s=1.0, fast_survives=True, step_s=0.5, flush_s=flush)
    assert plan_final_save(left, times, window=True) == FinalPlan(FinalSave.FRESH)


@pytest.mark.parametrize("flush", [None, 2.0])
def test_nor_is_one_that_nobody_has_named(flush: float | None) -> None:
    plan = plan_final_save(3.0, SaveTimes(save_s=8.0, step_s=0.5, flush_s=flush), firm=False)
    assert plan.choice is FinalSave.FRESH
    assert plan.reason


def test_where_nothing_is_known_of_saves_the_first_one_of_a_long_window_tells() -> None:
    first = plan_final_save(110.0, SaveTimes(step_s=0.5), window=True)
    meanwhile = plan_final_save(90.0, SaveTimes(step_s=0.5, flush_s=20.0), window=True, saved=True)
    last = plan_final_save(40.0, SaveTimes(step_s=0.5, flush_s=70.0), window=True, saved=True)
    assert (first.save_first, first.train_s > 0) == (True, True)
    assert (meanwhile.save_first, meanwhile.train_s > 0) == (False, True)
    assert (last.choice, last.train_s) == (FinalSave.FRESH, 0.0), "waits for the one in flight"
    assert plan_final_save(25.0, SaveTimes(step_s=0.5), window=True).train_s == 0, "not enough to find out"


def test_what_is_late_is_not_taken_to_be_done_at_any_moment() -> None:
    assert [time_left(8.0, elapsed) for elapsed in (0.0, 6.0, 8.0, 80.0)] == [8.0, 2.0, 2.0, 20.0]
    assert time_left(None, 5.0) == 5.0


def test_what_is_in_flight_has_to_be_done_before_the_last_save_can_begin() -> None:
    assert plan_final_save(12.0, TIMES).choice is FinalSave.FRESH
    assert plan_final_save(11.0, SaveTimes(save_s=8.0, flush_s=4.0)).choice is FinalSave.FLUSH


def test_the_95th_percentile_of_few_is_the_largest() -> None:
    assert p95([]) is None
    assert p95([2.0, 1.0]) == 2.0
    assert p95(range(1, 101)) == 95


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "deadlines.py"
    spec = importlib.util.spec_from_file_location("simulated_deadlines", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("window", [120.0, 30.0, 15.0])
def test_of_1000_notices_none_loses_its_commit_or_overruns_its_deadline(simulation: ModuleType, window: float) -> None:
    found = simulation.simulate(window)
    assert len(found) == 1000
    assert all(outcome.saved for outcome in found)
    assert not any(outcome.overrun for outcome in found)
    assert sum(outcome.fresh for outcome in found) >= 980
    assert statistics.median(outcome.trained for outcome in found) >= (0.8 if window == 120 else 0.7)


def test_the_table_in_the_documentation_is_what_the_simulation_prints(simulation: ModuleType) -> None:
    page = Path(__file__).parents[2] / "docs" / "explanation" / "deadlines.md"
    assert simulation.table(1000, 0) in page.read_text(encoding="utf-8")
