"""The plan of a rehearsal, and the verdict over what came of it."""

import dataclasses
import itertools
import re
from typing import Any

import pytest

from spotguard.errors import ConfigError
from spotguard.rehearse.outcome import Compared
from spotguard.rehearse.plan import Interruption, plan_interruptions, save_interval
from spotguard.rehearse.record import Start, Strike, account
from spotguard.rehearse.recorder import Recorder
from spotguard.rehearse.report import judge

SHARDS = ("model", "optimizer", "rank-00000")


@pytest.mark.parametrize("seed", range(50))
def test_interruptions_are_spread_over_the_run_each_at_a_step_of_its_own(seed: int) -> None:
    plan = plan_interruptions(600, seed=seed, sigterm=3, sigkill=3, shards=SHARDS)
    assert sorted(item.kind for item in plan) == ["SIGKILL"] * 3 + ["SIGTERM"] * 3
    assert all(low.step < high.step for low, high in itertools.pairwise(plan))
    assert [item.step * 6 // 600 for item in plan] == list(range(6))


@pytest.mark.parametrize("seed", range(20))
def test_kills_take_turns_between_boundaries_half_written_and_unpublished_objects(seed: int) -> None:
    plan = plan_interruptions(600, seed=seed, sigterm=3, sigkill=3, shards=SHARDS)
    assert {item.place for item in plan if item.kind == "SIGKILL"} == {"boundary", "write", "publish"}
    assert {item.place for item in plan if item.kind == "SIGTERM"} == {"boundary"}
    assert all(item.target in (*SHARDS, "manifest") for item in plan if item.place != "boundary")


def test_the_same_seed_gives_the_same_plan_and_another_seed_another_one() -> None:
    plans = [plan_interruptions(600, seed=seed, sigterm=3, sigkill=3, shards=SHARDS) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_as_many_interruptions_as_a_run_has_boundaries_before_its_last_is_the_most() -> None:
    assert [item.step for item in plan_interruptions(7, seed=0, sigterm=3, sigkill=3)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match="7 steps, too few for 7 interruptions"):
        plan_interruptions(7, seed=0, sigterm=4, sigkill=3)
    with pytest.raises(ConfigError, match="proves nothing"):
        plan_interruptions(7, seed=0, sigterm=0, sigkill=0)


def test_the_interrupted_run_saves_twelve_times_unless_told_otherwise() -> None:
    assert [save_interval(steps, None) for steps in (1, 12, 540)] == [1, 1, 45]
    assert save_interval(540, 7) == 7


def test_a_boundary_is_struck_at_its_step_or_at_the_first_one_after_it() -> None:
    due = Interruption("SIGTERM", 10)
    assert not due.strikes({"at": "boundary", "step": 9})
    assert due.strikes({"at": "boundary", "step": 10})
    assert due.strikes({"at": "boundary", "step": 12})
    assert not due.strikes({"at": "write", "key": "checkpoints/0001-0000000012/model.pt"})


def test_a_save_is_struck_in_the_chosen_object_or_in_the_manifest_when_that_one_is_not_written() -> None:
    due = Interruption("SIGKILL", 10, "publish", "model")
    assert not due.strikes({"at": "publish", "key": "checkpoints/0001-0000000009/model.pt"})
    assert not due.strikes({"at": "publish", "key": "checkpoints/0001-0000000011/optimizer.pt"})
    assert not due.strikes({"at": "write", "key": "checkpoints/0001-0000000011/model.pt"})
    assert due.strikes({"at": "publish", "key": "checkpoints/0001-0000000011/model.pt"})
    assert due.strikes({"at": "publish", "key": "manifests/0001-0000000011.json"})


def _recorded(number: int, messages: list[tuple[float, dict[str, Any]]], **end: Any) -> Start:
    recorder = Recorder(number, messages[0][0] - 1.0)
    for now, message in messages:
        recorder.heard(message, now)
    return recorder.result(**{"ended": messages[-1][0] + 1.0, "exit_code": 0, "timed_out": False, "log": "log", **end})


def test_every_second_of_a_start_is_accounted_for_once() -> None:
    killed: list[tuple[float, dict[str, Any]]] = [
        (1.0, {"at": "hello", "uri": "runs/1"}),
        (2.0, {"at": "fresh", "rng": {}}),
        (3.0, {"at": "boundary", "step": 1}),
        (4.0, {"at": "boundary", "step": 2}),
        (4.5, {"at": "snapshot", "step": 2, "stall": 0.5, "size": 8}),
        (5.0, {"at": "published", "key": "manifests/0001-0000000002.json"}),
        (6.0, {"at": "boundary", "step": 3}),
        (7.0, {"at": "boundary", "step": 4}),
    ]
    following: list[tuple[float, dict[str, Any]]] = [
        (9.0, {"at": "hello", "uri": "runs/1"}),
        (9.5, {"at": "resumed", "step": 2, "checkpoint": "0001-0000000002", "seconds": 0.4}),
        (10.0, {"at": "finished", "step": 2}),
    ]
    first, second = account([_recorded(1, killed, ended=7.0, exit_code=-9), _recorded(2, following)])
    assert first.lost_steps == 2
    assert dataclasses.asdict(first.spent) == {
        "startup": 1.0,
        "restore": 1.0,
        "training": 2.0,
        "stall": 0.5,
        "lost": 2.5,
    }
    assert [(part.kind, part.begin) for part in first.segments] == [
        ("startup", 0.0),
        ("restore", 1.0),
        ("training", 2.0),
        ("stall", 4.0),
        ("lost", 4.5),
    ]
    assert second.lost_steps == 0
    assert first.commits == ((5.0, 2),)


def _start(number: int = 1, **fields: Any) -> Start:
    given = {
        "opened": 1.0,
        "uri": "runs/1",
        "last_step": 9,
        "finished": True,
        "exit_code": 0,
        "fresh": {"torch": "a", "numpy": "b"},
    }
    return Start(number=number, began=0.0, ended=9.0, **{**given, **fields})


SAME, OTHER = Compared("model", identical=True), Compared("model", identical=False, difference="['w']: 1 and 2")
TERM = Interruption("SIGTERM", 5)
STOPPED: dict[str, Any] = {
    "strikes": (Strike(TERM, 4.0, 5, "boundary"),),
    "stopped": 143,
    "exit_code": 143,
    "finished": False,
}


def test_expected_exit_codes_and_equal_states_are_safe() -> None:
    assert judge(_start(), [_start(**STOPPED), _start(2)], [TERM], [SAME]) == ("safe", (), ())
    kill = Strike(Interruption("SIGKILL", 5), 4.0, 5, "boundary")
    killed = {**STOPPED, "strikes": (kill,), "stopped": None}
    for code in (-9, 137):  # 137: from a shell in between
        assert judge(_start(), [_start(**{**killed, "exit_code": code}), _start(2)], [TERM], [SAME])[0] == "safe"


@pytest.mark.parametrize(
    ("starts", "members", "reason"),
    [
        ([_start(**{**STOPPED, "exit_code": 0})], [], "a scheduler would take the work for done"),
        ([_start(**{**STOPPED, "exit_code": 1})], [], "143 was expected: a scheduler would take it for a failure"),
        (
            [_start(**{**STOPPED, "stopped": None, "finished": True, "exit_code": 0})],
            [SAME],
            "a signal handler of its own",
        ),
        ([_start(**STOPPED), _start(2, timed_out=True, exit_code=-9)], [], "start 2: it did not end"),
        ([_start(**STOPPED), _start(2, finished=False, exit_code=1)], [], "exit status 1 at step 9"),
        ([_start(**STOPPED), _start(2, exit_code=1)], [SAME], "exit status 1 after the end of training"),
        ([_start(**STOPPED), _start(2, uri="runs/2")], [SAME], "Give SpotGuard the same place at every start"),
        ([_start(**STOPPED), _start(2, last_step=8)], [SAME], "took 9 steps, the interrupted one 8"),
        ([_start()], [SAME], "1 of 1 interruptions did not come to pass"),
        ([_start(**STOPPED), _start(2)], [OTHER], re.escape("first model: ['w']: 1 and 2")),
    ],
)
def test_whatever_a_scheduler_could_not_make_good_is_unsafe(
    starts: list[Start], members: list[Compared], reason: str
) -> None:
    verdict, reasons, _ = judge(_start(), starts, [TERM], members)
    assert verdict == "unsafe"
    assert re.search(reason, "\n".join(reasons))


def test_a_generator_that_the_script_does_not_seed_is_told_with_the_remedy() -> None:
    unlike = {"torch": "a", "numpy": "other"}
    starts = [_start(**STOPPED, fresh=unlike), _start(2, fresh=None)]
    verdict, _, notes = judge(_start(), starts, [TERM], [SAME])
    assert verdict == "safe"
    assert "numpy.random.seed(0)" in notes[0]
    verdict, reasons, _ = judge(_start(), starts, [TERM], [OTHER])
    assert verdict == "inconclusive"
    assert "numpy.random.seed(0)" in reasons[-1]
    unused = Compared("random generators: numpy", identical=None, unused=True)
    assert judge(_start(), starts, [TERM], [SAME, unused]) == ("safe", (), ())
    assert judge(_start(), starts, [TERM], [OTHER, unused])[0] == "unsafe", "it cannot be the reason"
