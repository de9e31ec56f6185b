"""A loop that is left by break: the step that was under way is done, and is not done again when the run is continued."""

from pathlib import Path

import pytest
import torch

from spotguard import SpotGuard, TrainState


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
