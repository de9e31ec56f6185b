"""Getting back to a place in the data: by index where that is possible, by an honest skip where it is not."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from spotguard import Preempted, SpotGuard, TrainState
from spotguard.errors import InexactResumeWarning
from spotguard.events import Event


class Counting(Dataset[int]):
    """Counts how often it was asked for a sample."""

    def __init__(self, length: int) -> None:
        self.length, self.asked = length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.asked += 1
        return index


class Stream(IterableDataset[int]):
    """The same numbers each time."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(40))


def run(uri: Path, loader: Any, stop_at: int | None = None) -> list[list[int]]:
    """Train an epoch, or up to a stop; returns the batches of this start."""
    torch.manual_seed(0)
    seen = []
    with SpotGuard(uri, TrainState(model=torch.nn.Linear(1, 1)), every="1h") as guard:
        for _ in guard.epochs(1):
            for batch in guard.batches(loader):
                seen.append(batch.tolist())
                if guard.step + 1 == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
    return seen


def test_resuming_at_batch_9000_loads_no_sample_twice(tmp_path: Path) -> None:
    data = Counting(20_000)
    whole = run(tmp_path / "untouched", DataLoader(data, batch_size=2, shuffle=True))
    assert data.asked == 20_000
    with pytest.raises(Preempted):
        run(tmp_path / "run", DataLoader(Counting(20_000), batch_size=2, shuffle=True), stop_at=9_000)
    data = Counting(20_000)
    rest = run(tmp_path / "run", DataLoader(data, batch_size=2, shuffle=True))
    assert rest == whole[9_000:]
    assert data.asked == 2_000


def test_an_iterable_dataset_is_read_again_and_said_to_be(tmp_path: Path) -> None:
    whole = run(tmp_path / "untouched", DataLoader(Stream(), batch_size=4))
    with pytest.raises(Preempted):
        run(tmp_path / "run", DataLoader(Stream(), batch_size=4), stop_at=3)
    with pytest.warns(InexactResumeWarning, match="3 batches are read again"):
        rest = run(tmp_path / "run", DataLoader(Stream(), batch_size=4))
    assert rest == whole[3:]


def test_a_member_that_does_not_come_back_bit_for_bit_is_named(tmp_path: Path) -> None:
    class Forgetful:
        value = 1.0

        def state_dict(self) -> dict[str, float]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.value = round(state["value"])

    events: list[Event] = []
    for start in range(2):
        member = Forgetful()
        warned = pytest.warns(InexactResumeWarning, match=r"'average'.*\['value'\]: 0.75 and 1")
        with (
            warned if start else contextlib.nullcontext(),
            SpotGuard(tmp_path, TrainState(average=member), on_event=events.append) as guard,
        ):
            for _ in guard.steps(start + 1):
                member.value = 0.75
    assert "InexactResume" in [type(event).__name__ for event in events]
