"""Small fits with Lightning in forked children: Lightning is imported once, and each start is a process of its own."""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import awscrt.checksums  # noqa: F401 - loaded here once, not in every forked child
import pytorch_lightning as pl
import tenacity  # noqa: F401
import torch
import torch._dynamo
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader, Dataset

from spotguard import CheckpointStore
from spotguard.errors import InexactResumeWarning
from spotguard.lightning import SpotGuardCallback

Told = dict[str, Any]


class Samples(Dataset[Any]):
    """Eight samples with random augmentation."""

    def __init__(self, count: int = 8) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((4,), index / 8) + 0.1 * torch.randn(4), torch.ones(2) * (index % 3)


class Model(pl.LightningModule):
    """Four batches an epoch."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 2))

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])

    def train_dataloader(self) -> Any:
        return DataLoader(Samples(), batch_size=2, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Samples(4), batch_size=2)

    test_dataloader = predict_dataloader = val_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    """A quiet one, for two epochs."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(
    folder: Path, *callbacks: Any, model: Any = None, guard: dict[str, Any] | None = None, **options: Any
) -> tuple[SpotGuardCallback, pl.Trainer]:
    """The user's script: seed, guard, fit."""
    pl.seed_everything(3, verbose=False)
    guarded = SpotGuardCallback(folder / "run", **{"every": 10**9, **(guard or {})})
    model = model or Model()
    trains = trainer(guarded, *callbacks, default_root_dir=folder, **options)
    trains.fit(model, ckpt_path=guarded.resume_path())
    return guarded, trains


def at(hook: str, action: Callable[[], Any], number: int = 0) -> Callback:
    """A callback of the user's that does something when a hook is called for the `number`-th time, counted from 0."""
    calls = itertools.count()

    def called(*_: Any, **__: Any) -> None:
        if next(calls) == number:
            action()

    made: Callback = type("At", (Callback,), {hook: called})()
    return made


def sigterm() -> None:
    """As a platform sends it."""
    os.kill(os.getpid(), signal.SIGTERM)


class Left(NamedTuple):
    """How a child has ended.

    Attributes:
        status: Exit status, negative for a signal.
        said: Standard error.
        told: What it wanted to tell.
    """

    status: int
    said: str
    told: Told


def child(folder: Path, work: Callable[[Told], Any], *, group: bool = False) -> Left:
    """One process.

    Args:
        folder: Where it can leave files.
        work: What it does; it is given a dictionary to tell things with.
        group: Whether it leads a process group of its own.
    """
    folder.mkdir(exist_ok=True)
    said, told = folder / "stderr.txt", folder / "told.pt"
    said.unlink(missing_ok=True)
    told.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return Left(status, said.read_text(), torch.load(told, weights_only=False) if told.exists() else {})
    status = 1
    try:
        if group:
            os.setsid()
        descriptor = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stderr, sys.stdout = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (2, 1))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", InexactResumeWarning)
        torch.set_num_threads(1)
        tells: Told = {}
        try:
            work(tells)
            status = 0
        finally:
            torch.save(tells, told)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:  # noqa: BLE001 - the child must end here, whatever happened
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            for process in multiprocessing.active_children():
                process.kill()
        os._exit(status)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints there are."""
    return [checkpoint.step for checkpoint in CheckpointStore(folder / "run").list()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint."""
    checkpoint = CheckpointStore(folder / "run").latest()
    assert checkpoint is not None
    state: dict[str, torch.Tensor] = checkpoint.load()["model.ckpt"]["state_dict"]
    return state


def logged(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Events of a kind, over all attempts."""
    lines: Iterator[str] = (
        line for path in sorted((folder / "run" / "events").iterdir()) for line in path.read_text().splitlines()
    )
    return [fields for fields in map(json.loads, lines) if fields["event"] == kind]
