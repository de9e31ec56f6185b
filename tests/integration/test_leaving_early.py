"""A process that must not go on: told to stop before it began, or fenced off by another."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from spotguard import CheckpointStore, Preempted, SpotGuard, TrainState
from spotguard.errors import FencedError, StateMismatchError
from spotguard.pipeline.history import claim_attempt
from spotguard.stores import open_store


class Interrupted:
    """A member that is told to stop while it is being restored."""

    def state_dict(self) -> dict[str, int]:
        return {"value": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def steps(uri: Path, total: int, member: Any = None) -> list[int]:
    with SpotGuard(uri, TrainState(model=torch.nn.Linear(1, 1), extra=member)) as guard:
        return list(guard.steps(total))


def test_a_signal_during_the_restore_stops_before_the_first_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert steps(tmp_path, 3, Interrupted()) == [0, 1, 2]
    with pytest.raises(Preempted) as stopped:
        steps(tmp_path, 5, Interrupted())
    assert stopped.value.checkpoint == "0001-0000000003"
    assert stopped.value.code == 143
    assert [checkpoint.step for checkpoint in CheckpointStore(tmp_path).list()] == [3]
    assert "stopped by SIGTERM" in capfd.readouterr().err


def test_a_signal_during_a_fresh_start_says_that_there_is_no_checkpoint(tmp_path: Path) -> None:
    class Early(Interrupted):
        def state_dict(self) -> dict[str, int]:
            os.kill(os.getpid(), signal.SIGTERM)
            return {"value": 1}

    with pytest.raises(Preempted, match="no checkpoint is committed"):
        steps(tmp_path, 5, Early())


@pytest.mark.parametrize("leave", ["by a signal", "by the end of the loop", "at a save"])
def test_a_process_that_was_taken_over_leaves_with_an_error_and_not_as_if_to_be_started_again(
    tmp_path: Path, leave: str
) -> None:
    with (
        pytest.raises(FencedError, match=r"attempt 2 has taken over"),
        SpotGuard(tmp_path, TrainState(model=torch.nn.Linear(1, 1))) as guard,
    ):
        for step in guard.steps(4):
            if step == 1:
                claim_attempt(open_store(tmp_path))
                if leave == "by a signal":
                    os.kill(os.getpid(), signal.SIGTERM)
                if leave == "at a save":
                    guard.save()
            if step == 2 and leave == "at a save":
                guard.save()


def test_a_run_that_was_moved_away_is_not_begun_again_in_its_old_place(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    with (
        pytest.raises(FencedError, match=r"claim of this attempt.*is gone"),
        SpotGuard(run, TrainState(model=torch.nn.Linear(1, 1))) as guard,
    ):
        for step in guard.steps(4):
            if step == 1:
                shutil.move(run, moved)
    assert CheckpointStore(run).latest() is None


def test_checkpoints_of_a_script_with_its_own_loop_are_not_taken_for_those_of_a_guard(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save({"model": torch.nn.Linear(1, 1).state_dict()}, step=5)
    with pytest.raises(StateMismatchError, match=r"saved by CheckpointStore.save\(\).*new URI"):
        steps(tmp_path, 9)
