"""A small training that can be killed at any tick, in a forked child, and what it leaves behind."""

import contextlib
import json
import os
import random
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import awscrt.checksums  # noqa: F401 - loaded here once, not in every forked child
import numpy as np
import tenacity  # noqa: F401
import torch
import torch._dynamo  # optimizers import it when they are made: one second and more for every child
import torchdata.stateful_dataloader  # noqa: F401
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, WeightedRandomSampler

from spotguard import CheckpointStore, SpotGuard, TrainState
from spotguard.state.compare import first_difference

EPOCHS, SAMPLES, BATCH, EVERY = 3, 22, 4, 4
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Case:
    """One way to train: the loader by name, workers, accumulation."""

    loader: str
    workers: int = 0
    accumulate: int = 1

    def __str__(self) -> str:
        return f"{self.loader}-workers{self.workers}-accumulate{self.accumulate}"


class Noisy(Dataset[Any]):
    """Samples with random augmentation from all three global generators."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        noise = torch.randn(4) + random.random() + float(np.random.rand())
        return index, torch.full((4,), float(index)) / SAMPLES + 0.1 * noise, torch.ones(2) * (index % 3)


class PythonShuffle(Sampler[int]):
    """A user's sampler: shuffles with python's generator in __iter__."""

    def __iter__(self) -> Iterator[int]:
        order = list(range(SAMPLES))
        random.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return SAMPLES


def make_loader(case: Case) -> Any:
    data, workers = Noisy(), case.workers
    plain: dict[str, Any] = {"batch_size": BATCH, "num_workers": workers}
    generator = torch.Generator().manual_seed(11)
    if case.loader == "shuffle":
        return DataLoader(data, shuffle=True, **plain)
    if case.loader == "persistent":
        return DataLoader(data, shuffle=True, persistent_workers=True, **plain)
    if case.loader == "generator":
        return DataLoader(data, shuffle=True, generator=generator, drop_last=True, **plain)
    if case.loader == "replacement":
        return DataLoader(
            data, sampler=RandomSampler(data, replacement=True, num_samples=70, generator=generator), **plain
        )
    if case.loader == "weighted":
        return DataLoader(data, sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES, generator=generator), **plain)
    if case.loader == "batch_sampler":
        return DataLoader(
            data, batch_sampler=BatchSampler(PythonShuffle(), BATCH, drop_last=False), num_workers=workers
        )
    if case.loader == "unbatched":
        return DataLoader(data, batch_size=None, sampler=PythonShuffle(), num_workers=workers)
    if case.loader == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(data, shuffle=True, **plain)
    raise AssertionError(case.loader)


def place_of(folder: Path) -> str:
    """Where the run of this folder is kept: in it, unless a file `place` names somewhere else."""
    named = folder / "place"
    return named.read_text() if named.exists() else str(folder / "run")


def await_last_save(guard: SpotGuard) -> None:
    """Halfway to the next save, the last one is done. Else a loop as fast as this would mostly be killed before it has saved anything."""
    if guard.step % EVERY == EVERY // 2:
        assert guard._session is not None
        assert guard._session.writer is not None
        assert guard._session.writer.drain(PATIENCE_S)


def resumed_from(folder: Path) -> int:
    """Step from which the last start went on; 0 for a fresh start."""
    said = re.findall(r"fresh start|resumed from .*: step (\d+)", (folder / "stderr.txt").read_text())
    return int(said[-1] or 0)


def train(case: Case, run: str, tick: Callable[[], None], ledger: Callable[[int, list[int]], None]) -> None:
    """The user's script."""
    torch.manual_seed(3)
    random.seed(5)
    np.random.seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    loader = make_loader(case)
    state = TrainState(model=model, optimizer=optimizer, scheduler=scheduler)
    with SpotGuard(run, state, every=EVERY, keep=2) as guard:
        for _ in guard.epochs(EPOCHS):
            for index, x, y in guard.batches(loader):
                await_last_save(guard)
                tick()
                ledger(guard.step, index.tolist() if isinstance(index, torch.Tensor) else [index])
                x, y = x.reshape(-1, 4), y.reshape(-1, 2)
                model.train(len(x) > 1)
                loss = torch.nn.functional.mse_loss(model(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                if (guard.batch + 1) % case.accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                tick()
            scheduler.step()
            tick()


def run_once(case: Case, folder: Path, *, kill_at: int | None = None, number: signal.Signals = signal.SIGKILL) -> int:
    """One start of the script in a forked child; returns its exit status, negative for a signal."""
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        descriptor = os.open(folder / "stderr.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
        torch.set_num_threads(1)
        book = os.open(folder / "ledger.jsonl", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        ticks = 0

        def tick() -> None:
            nonlocal ticks
            if ticks == kill_at:
                os.kill(os.getpid(), number)
            ticks += 1

        train(case, place_of(folder), tick, lambda step, ids: (os.write(book, f"[{step}, {ids}]\n".encode()), None)[1])
        (folder / "ticks").write_text(str(ticks))
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:  # noqa: BLE001 - the child must end here, whatever happened
        traceback.print_exc()
    finally:
        _end_workers()
        os._exit(status)


def _end_workers() -> None:
    import multiprocessing

    for process in multiprocessing.active_children():
        with contextlib.suppress(Exception):
            process.kill()


def outcome(folder: Path) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """Final checkpoint, and which samples each step used; asserts that a step that was done twice used the same ones."""
    ledger: dict[int, list[int]] = {}
    for line in (folder / "ledger.jsonl").read_text().splitlines():
        step, ids = json.loads(line)
        assert ledger.setdefault(step, ids) == ids, f"step {step} was redone with other samples"
    checkpoint = CheckpointStore(place_of(folder)).latest()
    assert checkpoint is not None
    assert checkpoint.manifest.finished
    return checkpoint.load(), ledger


def assert_same(untouched: Path, interrupted: Path, what: str) -> None:
    """Weights, optimizer, schedule, generators, data state, and the samples in order: equal bit for bit."""
    (state, ledger), (other, other_ledger) = outcome(untouched), outcome(interrupted)
    assert list(ledger.items()) == list(other_ledger.items()), what
    assert (difference := first_difference(state, other)) is None, f"{what}: {difference}"
