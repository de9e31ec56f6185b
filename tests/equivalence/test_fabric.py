"""A run written with Lightning Fabric that is killed, at any place, ends exactly like one that never was."""

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric  # here, and not in every forked child
from lightning_fabric.plugins import MixedPrecision
from torch.utils.data import DataLoader, DistributedSampler

from equivalence import training
from equivalence.training import BATCH, Case, Noisy, assert_same, make_loader, run_once
from spotguard import CheckpointStore, TrainState
from spotguard.fabric import SpotGuard
from spotguard.state.compare import first_difference

EPOCHS = 2
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13


@dataclass(frozen=True)
class FabricCase(Case):
    """The same, with a precision."""

    precision: str = "32-true"

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.precision}"


CASES = [
    FabricCase("shuffle"),
    FabricCase("shuffle", workers=2),
    FabricCase("shuffle", accumulate=3),
    FabricCase("stateful"),
    FabricCase("stateful", workers=2),
    FabricCase("distributed"),
    FabricCase("shuffle", precision="bf16-mixed"),
    FabricCase("shuffle", accumulate=2, precision="16-mixed"),
]


def make_fabric(case: FabricCase) -> Fabric:
    if (
        case.precision == "16-mixed"
    ):  # Fabric itself allows it on a GPU only; the scale falls at first, and grows later on
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=2)
        return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    return Fabric(accelerator="cpu", devices=1, precision=case.precision)  # type: ignore[arg-type]


def train(
    case: FabricCase, run: Path | None, tick: Callable[[], None], ledger: Callable[[int, list[int]], None]
) -> Any:
    """The user's script; without a place for the run, as it was before spotguard."""
    fabric = make_fabric(case)
    fabric.launch()
    torch.manual_seed(3)
    random.seed(5)
    np.random.seed(7)
    model: Any = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)
    )
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    if case.loader == "distributed":  # shuffles by the number of the pass, which Fabric sets
        data = Noisy()
        plain: Any = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, 1, 0, seed=3))
    else:
        plain = make_loader(case)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(plain)

    def do(step: int, number: int, index: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        tick()
        ledger(step, index.tolist())
        model.train(len(x) > 2)
        accumulating = (number + 1) % case.accumulate != 0
        with fabric.no_backward_sync(model, enabled=accumulating):
            fabric.backward(torch.nn.functional.mse_loss(model(x), y))
        if not accumulating:
            optimizer.step()
            optimizer.zero_grad()
        tick()

    state = TrainState(model=model, optimizer=optimizer, scheduler=scheduler)
    if run is None:
        for _ in range(EPOCHS):
            for number, batch in enumerate(loader):
                do(0, number, *batch)
            scheduler.step()
        return state.state_dicts()
    with SpotGuard(fabric, run, state, every=4, keep=2) as guard:
        for _ in guard.epochs(EPOCHS):
            for batch in guard.batches(loader):
                training.await_last_save(guard)
                do(guard.step, guard.batch, *batch)
            scheduler.step()
            tick()
    return state.state_dicts()


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `run_once` runs."""
    monkeypatch.setattr(training, "train", train)


def finish(case: FabricCase, folder: Path) -> None:
    assert run_once(case, folder) == 0, (folder / "stderr.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_stop_at_any_tick_leaves_no_trace(case: FabricCase, number: signal.Signals, tmp_path: Path) -> None:
    finish(case, tmp_path / "untouched")
    ticks = int((tmp_path / "untouched" / "ticks").read_text())
    assert ticks == EPOCHS * 13
    steps = []
    for tick in range(int(number == signal.SIGTERM), ticks, 3):
        folder = tmp_path / f"{number.name}-{tick}"
        status = run_once(case, folder, kill_at=tick, number=number)
        allowed = (-signal.SIGKILL,) if number == signal.SIGKILL else (143, 0)  # 0: the notice came at the very end
        assert status in allowed, (folder / "stderr.txt").read_text()
        if status:
            finish(case, folder)
            steps.append(training.resumed_from(folder))
        assert_same(tmp_path / "untouched", folder, f"{number.name} at tick {tick}")
    assert len(set(steps)) >= 3, f"the second start went on from {steps}"


@pytest.mark.parametrize("case", [case for case in CASES if case.workers == 0], ids=str)
def test_without_workers_the_guard_changes_nothing(case: FabricCase, tmp_path: Path) -> None:
    order: dict[str, list[list[int]]] = {"bare": [], "guarded": []}

    def note(which: str) -> Callable[[int, list[int]], None]:
        return lambda _, ids: order[which].append(ids)

    bare = train(case, None, lambda: None, note("bare"))
    guarded = train(case, tmp_path / "run", lambda: None, note("guarded"))
    assert order["bare"] == order["guarded"]
    assert first_difference(bare, guarded) is None
    saved = CheckpointStore(tmp_path / "run").load()
    assert first_difference(bare, {name: saved[name] for name in bare}) is None


def test_the_scale_of_the_grad_scaler_moves_and_is_saved(tmp_path: Path) -> None:
    train(CASES[-1], tmp_path, lambda: None, lambda step, ids: None)
    precision = CheckpointStore(tmp_path).load()["precision"]
    assert precision["growth_interval"] == 2
    assert precision["scale"] != 2.0**17
