"""A loop that is left by break: the step that was under way is done, and is not done again when the run is continued."""

import os
import signal
from pathlib import Path

import pytest
import torch

from spotguard import CheckpointStore, Preempted, SpotGuard, TrainState


def train(uri: Path, total: int, leave_at: int | None) -> tuple[list[int], float]:
    """Counts its steps in the model; returns the steps of this start, and the model's count."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    steps = []
    with SpotGuard(uri, TrainState(model=model)) as guard:
        for step in guard.steps(total):
            steps.append(step)
            with torch.no_grad():
                model.weight += 1
            if step == leave_at:
                break
    return steps, model.weight.item()


@pytest.mark.parametrize("leave_at", [0, 1, 3])
def test_the_last_step_is_not_done_again(tmp_path: Path, leave_at: int) -> None:
    assert train(tmp_path, 5, leave_at) == (list(range(leave_at + 1)), leave_at + 1)
    assert train(tmp_path, 5, None) == ([], leave_at + 1)  # finished
    assert train(tmp_path, 10, None) == (list(range(leave_at + 1, 10)), 10)


def test_steps_may_be_counted_again_after_a_loop_was_left(tmp_path: Path) -> None:
    with SpotGuard(tmp_path, TrainState(model=torch.nn.Linear(1, 1))) as guard:
        for _ in guard.steps(10):
            break
        assert list(guard.steps(3)) == [1, 2]


def run_epochs(uri: Path, *, stop_in_step: int | None) -> tuple[list[int], int]:
    """A script whose code behind the inner loop uses a variable of it, as scripts do; the steps it did, and those it told of."""
    model = torch.nn.Linear(1, 1)
    steps, told = [], 0
    with SpotGuard(uri, TrainState(model=model), every=1) as guard:
        for _ in guard.epochs(3):
            for batch in guard.batches(["a", "b"]):
                loss = len(batch)
                steps.append(guard.step)
                if guard.step == stop_in_step:
                    os.kill(os.getpid(), signal.SIGTERM)
            told += loss
    return steps, told


@pytest.mark.filterwarnings("ignore:list cannot be resumed by index")
@pytest.mark.parametrize("step", range(6))
def test_code_behind_the_inner_loop_may_use_its_variables_after_any_stop(tmp_path: Path, step: int) -> None:
    with pytest.raises(
        Preempted
    ):  # in the very last step, too: the run is finished, and what comes behind it is left to the next start
        run_epochs(tmp_path, stop_in_step=step)
    steps, _ = run_epochs(tmp_path, stop_in_step=None)
    assert steps == list(range(step + 1, 6))


def test_no_checkpoint_stands_between_the_last_batch_and_the_end_of_its_epoch(tmp_path: Path) -> None:
    run_epochs(tmp_path, stop_in_step=None)
    batches = [
        (checkpoint.manifest.epoch, checkpoint.manifest.batch) for checkpoint in CheckpointStore(tmp_path).list()
    ]
    assert batches
    assert all(batch < 2 for _, batch in batches), batches


def test_a_run_left_by_break_in_its_first_step_is_recorded_as_finished(tmp_path: Path) -> None:
    for _ in range(2):
        with SpotGuard(tmp_path, TrainState(model=torch.nn.Linear(1, 1))) as guard:
            for _ in guard.batches(["a", "b"]):
                break
    assert guard.step == 1
    assert guard.checkpoint is not None
    assert guard.checkpoint.manifest.finished


def test_a_forked_child_that_leaves_the_block_leaves_the_run_to_its_parent(tmp_path: Path) -> None:
    with SpotGuard(tmp_path, TrainState(model=torch.nn.Linear(1, 1))) as guard:
        for step in guard.steps(2):
            if step == 0:
                guard.save()
            elif (child := os.fork()) == 0:
                guard.__exit__(None, None, None)
                os._exit(17)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    assert [checkpoint.step for checkpoint in CheckpointStore(tmp_path).list()] == [1, 2]


def test_a_request_to_stop_that_came_too_late_does_not_stop_the_next_start(tmp_path: Path) -> None:
    with SpotGuard(tmp_path, TrainState(model=torch.nn.Linear(1, 1))) as guard:
        for step in guard.steps(1):
            assert step == 0
            (tmp_path / "stop").touch()
    assert not (tmp_path / "stop").exists()
    with SpotGuard(tmp_path, TrainState(model=torch.nn.Linear(1, 1))) as guard:
        assert list(guard.steps(3)) == [1, 2]
