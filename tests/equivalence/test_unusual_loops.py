"""Loops as people write them: several loaders, loaders made anew, loops without epochs, parameters that are thawed."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from spotguard import CheckpointStore, Preempted, SpotGuard, TrainState
from spotguard.errors import ConfigError, InexactResumeWarning
from spotguard.state.compare import first_difference

Tick = Callable[[SpotGuard, Any], None]


class Numbers(Dataset[Any]):
    """Each sample is its index, as a number to train on."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), index / self.length)


class Counter(Sampler[int]):
    """Counts its passes, and shuffles by that count."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(torch.randperm(10, generator=seeded(self.passes)).tolist())


class Script:
    """A model that learns from whatever it is given, and a guard around it."""

    def __init__(self, uri: Path, stop_at: int | None) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.2), torch.nn.Linear(3, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.guard = SpotGuard(uri, TrainState(model=self.model, optimizer=self.optimizer), every="1h")
        self.stop_at, self.seen = stop_at, 0

    def step(self, batch: torch.Tensor) -> None:
        if self.seen == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.seen += 1
        self.optimizer.zero_grad()
        self.model(batch).square().mean().backward()
        self.optimizer.step()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loader(seed: int, length: int = 10) -> DataLoader[Any]:
    return DataLoader(Numbers(length), 4, shuffle=True, generator=seeded(seed))


def alternating(script: Script) -> None:
    loaders = [loader(5), loader(6)]
    for epoch in script.guard.epochs(4):
        for batch in script.guard.batches(loaders[epoch % 2]):
            script.step(batch)


def made_anew(script: Script) -> None:
    for epoch in script.guard.epochs(4):
        for batch in script.guard.batches(loader(epoch)):
            script.step(batch)


def one_after_the_other(script: Script) -> None:
    first, second = loader(5), loader(5)
    for _ in script.guard.epochs(3):
        for each in (first, second):
            for batch in script.guard.batches(each):
                script.step(batch)
            script.optimizer.step()  # changes the moments in place, also on the way to a checkpoint


def passes_of_one_batch(script: Script) -> None:
    data = loader(5, length=4)
    for _ in range(8):
        for batch in script.guard.batches(data):
            script.step(batch)


def iterator_begun_again(script: Script) -> None:
    data = loader(5)
    batches = iter(script.guard.batches(data))
    for _ in script.guard.steps(11):
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(script.guard.batches(data))
            batch = next(batches)
        script.step(batch)


def iterator_left_by_break(script: Script) -> None:
    data = loader(5)
    for _ in script.guard.epochs(4):
        batches = iter(script.guard.batches(data))
        for batch in batches:
            script.step(batch)
            if script.guard.batch == 1:
                break


def thawed(script: Script) -> None:
    data = loader(5)
    script.model[0].requires_grad_(requires_grad=False)
    for epoch in script.guard.epochs(3):
        if epoch == 1:
            script.model[0].requires_grad_()
            script.model.eval()
        for batch in script.guard.batches(data):
            script.step(batch)


def swallowing(script: Script) -> None:
    data = loader(5)
    try:
        for _ in script.guard.epochs(2):
            for batch in script.guard.batches(data):
                script.step(batch)
    except BaseException:  # noqa: BLE001 - what is shown here
        pass


LOOPS = [
    alternating,
    made_anew,
    one_after_the_other,
    passes_of_one_batch,
    iterator_begun_again,
    iterator_left_by_break,
    thawed,
    swallowing,
]


def start(loop: Callable[[Script], None], uri: Path, stop_at: int | None = None) -> tuple[int, bool]:
    """One start; returns how many steps it did, and whether it was stopped."""
    script = Script(uri, stop_at)
    try:
        with script.guard:
            loop(script)
    except Preempted:
        return script.seen, True
    return script.seen, False


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: str(loop.__name__))
@pytest.mark.filterwarnings("ignore:the generator of a DataLoader began in another state")
def test_a_stop_in_any_step_changes_nothing(loop: Callable[[Script], None], tmp_path: Path) -> None:
    steps, _ = start(loop, tmp_path / "untouched")
    expected = final_state(tmp_path / "untouched")
    for step in range(steps - 1):
        uri = tmp_path / f"stop-{step}"
        done, stopped = start(loop, uri, stop_at=step)
        assert stopped, f"the notice in step {step} was not heard"
        rest, _ = start(loop, uri)
        assert done + rest == steps
        assert (difference := first_difference(expected, final_state(uri))) is None, f"step {step}: {difference}"


def final_state(uri: Path) -> dict[str, Any]:
    checkpoint = CheckpointStore(uri).latest()
    assert checkpoint is not None
    assert checkpoint.manifest.finished
    return {name: tree for name, tree in checkpoint.load().items() if not name.startswith("rank")}


def test_another_number_of_workers_draws_the_same_indices(tmp_path: Path) -> None:
    def train(uri: Path, workers: int, stop_at: int | None) -> list[list[float]]:
        torch.manual_seed(1)
        data = Numbers(160)
        sampler = RandomSampler(data, replacement=True, num_samples=160, generator=seeded(2))
        seen = []
        with SpotGuard(uri, TrainState(model=torch.nn.Linear(1, 1)), every="1h") as guard:
            for _ in guard.epochs(2):
                for batch in guard.batches(DataLoader(data, 4, sampler=sampler, num_workers=workers)):
                    seen.append(batch[:, 0].tolist())
                    if len(seen) == stop_at:
                        os.kill(os.getpid(), signal.SIGTERM)
        return seen

    untouched = train(tmp_path / "untouched", 1, None)
    with pytest.raises(Preempted):
        train(tmp_path / "run", 1, 5)
    assert train(tmp_path / "run", 2, None) == untouched[5:]


def test_steps_cannot_be_counted_by_hand_inside_of_epochs(tmp_path: Path) -> None:
    script = Script(tmp_path, None)
    with script.guard as guard:
        for _ in guard.epochs(2):
            with pytest.raises(ConfigError, match="step_done"):
                guard.step_done()


class Masking:
    """Collates with a generator of its own."""

    def __init__(self) -> None:
        self.parts = [{"generator": seeded(1)}]

    def __call__(self, samples: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(samples)


def closing_over() -> Callable[[list[torch.Tensor]], torch.Tensor]:
    generator = seeded(1)
    return lambda samples: torch.stack(samples) + torch.rand(1, generator=generator)


@pytest.mark.parametrize("collate", [Masking(), closing_over()], ids=["object", "closure"])
def test_a_generator_in_the_collate_function_is_named(collate: Any, tmp_path: Path) -> None:
    script = Script(tmp_path, None)
    with pytest.warns(InexactResumeWarning, match="collate_fn.*generator"), script.guard:
        for _ in script.guard.batches(DataLoader(Numbers(), 4, collate_fn=collate)):
            pass


@pytest.mark.parametrize("stop_at", [3, 5], ids=["behind-an-epoch", "inside-an-epoch"])
def test_a_sampler_that_counts_for_itself_is_named(tmp_path: Path, stop_at: int) -> None:
    def loop(script: Script) -> None:
        data = DataLoader(Numbers(), 4, sampler=Counter())
        for _ in script.guard.epochs(3):
            for batch in script.guard.batches(data):
                script.step(batch)

    start(loop, tmp_path, stop_at=stop_at - 1)
    with pytest.warns(InexactResumeWarning, match="Counter.passes"):
        start(loop, tmp_path)


@pytest.mark.parametrize("shared", [True, False], ids=["shared-generator", "generator-made-anew"])
@pytest.mark.parametrize("stop_at", [1, 3, 4, 5, 6, 8, 9])
def test_a_loader_made_anew_in_each_epoch_from_one_seed(tmp_path: Path, shared: bool, stop_at: int) -> None:
    def loop(script: Script) -> None:
        generator = seeded(5)
        for _ in script.guard.epochs(4):
            data = DataLoader(Numbers(), 4, shuffle=True, generator=generator if shared else seeded(5))
            for batch in script.guard.batches(data):
                script.step(batch)

    start(loop, tmp_path / "untouched")
    assert start(loop, tmp_path / "run", stop_at)[1]
    start(loop, tmp_path / "run")
    assert first_difference(final_state(tmp_path / "untouched"), final_state(tmp_path / "run")) is None


def test_loaders_made_anew_are_let_go_of(tmp_path: Path) -> None:
    script = Script(tmp_path, None)
    with script.guard as guard:
        for _ in guard.epochs(6):
            for batch in guard.batches(loader(5)):
                script.step(batch)
        assert len(guard._tracker.state()["loaders"]) <= 1
        assert len(guard._tracker._births) <= 2
