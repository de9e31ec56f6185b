"""Small fits with Lightning that can be killed at any tick, in a forked child, and what they leave behind."""

import contextlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import awscrt.checksums  # noqa: F401 - loaded here once, not in every forked child
import pytorch_lightning as pl
import tenacity  # noqa: F401
import torch
import torch._dynamo
import torchmetrics
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from pytorch_lightning.loggers.logger import Logger
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from equivalence.training import _end_workers
from spotguard import CheckpointStore
from spotguard.errors import InexactResumeWarning
from spotguard.lightning import SpotGuardCallback
from spotguard.state.compare import first_difference

EPOCHS, SAMPLES, BATCH = 3, 14, 4

Tick = Callable[[str], None]


class Samples(Dataset[Any]):
    """A few samples with random augmentation."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return index, torch.full((4,), index / SAMPLES) + 0.1 * torch.randn(4), torch.ones(2) * (index % 3)


class Quiet(Samples):
    """The same without noise."""

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return index, torch.full((4,), index / SAMPLES), torch.ones(2) * (index % 3)


class Stream(IterableDataset[Any]):
    """The same without a length, always in the same order."""

    def __init__(self, count: int = SAMPLES) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.count):
            yield index, torch.full((4,), index / SAMPLES), torch.ones(2) * (index % 3)


class StatefulStream(Stream):
    """That keeps its position."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.at, self.count):
            self.at = index + 1
            yield index, torch.full((4,), index / SAMPLES), torch.ones(2) * (index % 3)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Model(pl.LightningModule):
    """What the user wrote. Subclasses differ in one thing each."""

    def __init__(self, tick: Tick, note: Callable[[str, Any], None]) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)
        )
        self.accuracy = torchmetrics.MeanMetric()
        self.outputs: list[torch.Tensor] = []
        self.tick, self.note = tick, note

    def loss(self, batch: Any) -> torch.Tensor:
        _, x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.tick("train")
        self.note("train", [self.current_epoch, batch_idx, self.global_step, batch[0].tolist()])
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.accuracy(loss.detach())
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        if batch_idx == 0:
            self.log("first", loss, on_step=False, on_epoch=True)
        self.outputs.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("total", torch.stack(self.outputs).sum())
        self.outputs.clear()
        self.tick("epoch")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.tick("validate")
        self.note("validate", [self.current_epoch, self.global_step, dataloader_idx, batch[0].tolist()])
        self.log("val_loss", self.loss(batch), on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class ByStep(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class ByEpoch(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class ByMetric(Model):
    interval = "epoch"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "monitor": "val_loss" if self.interval == "epoch" else "loss",
                "interval": self.interval,
            },
        }


class ByMetricOfTheStep(ByMetric):
    interval = "step"


class Manual(Model):
    """Two optimizers, taken in turns."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False
        self.turns = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, other = self.optimizers()  # type: ignore[attr-defined]
        loss = super().training_step(batch, batch_idx)
        self.turns += 1
        optimizer = one if self.turns % 3 else other
        self.toggle_optimizer(optimizer)
        self.manual_backward(loss)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.05), torch.optim.AdamW(self.net[3].parameters(), lr=0.01)


class Two(Model):
    """Two training loaders at a time."""

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch["a"]) + super().loss(batch["b"]) if isinstance(batch, dict) else super().loss(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("second", [self.current_epoch, batch_idx, self.global_step, batch["b"][0].tolist()])
        self.tick("train")
        return self.loss(batch)

    def on_train_epoch_end(self) -> None:
        pass


class EarlyEnd(Model):
    """Ends its epochs ahead of time."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


class Ema(Callback):
    """An average of the weights as people write it: made anew in on_train_start, swapped in for validation."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.average = {name: value.clone() for name, value in pl_module.net.state_dict().items()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for name, value in pl_module.net.state_dict().items():
            self.average[name] = 0.9 * self.average[name] + 0.1 * value if value.is_floating_point() else value.clone()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.kept = {name: value.clone() for name, value in pl_module.net.state_dict().items()}
            pl_module.net.load_state_dict(self.average)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            pl_module.net.load_state_dict(self.kept)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]


class Data(pl.LightningDataModule):
    """A datamodule with a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs = 0

    def train_dataloader(self) -> Any:
        return DataLoader(Samples(), batch_size=BATCH, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Samples(), batch_size=8)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["epochs"]


class Case:
    """One way to fit.

    Args:
        feature: What it shows, in the words of the matrix.
        model: The module.
        train: Makes the training loader, or loaders, or the datamodule.
        validation: Makes the validation loader, or None.
        callbacks: Makes callbacks, given the folder of the run.
        trainer: Further arguments of the trainer.
    """

    def __init__(
        self,
        feature: str,
        *,
        model: type[Model] = Model,
        train: Callable[[], Any] | None = None,
        validation: Callable[[], Any] | None = None,
        callbacks: Callable[[Path], list[Any]] = lambda _: [],
        **trainer: Any,
    ) -> None:
        self.feature, self.model, self.callbacks, self.trainer = feature, model, callbacks, trainer
        self.train = train or (lambda: DataLoader(Samples(), batch_size=BATCH, shuffle=True))
        self.validation = validation or (lambda: DataLoader(Samples(), batch_size=8))


def shuffled(kind: Any = DataLoader, **options: Any) -> Callable[[], Any]:
    return lambda: kind(Samples(), batch_size=BATCH, shuffle=True, **options)


CASES = [
    Case("`DataLoader(shuffle=True)`, dropout, `self.log` by step and epoch, torchmetrics"),
    Case("worker processes", train=shuffled(num_workers=2), validation=shuffled(num_workers=1)),
    Case(
        "persistent workers",
        train=shuffled(num_workers=1, persistent_workers=True),
        validation=lambda: DataLoader(Quiet(), batch_size=8, num_workers=1, persistent_workers=True),
    ),
    Case("`StatefulDataLoader`", train=shuffled(StatefulDataLoader)),
    Case("`StatefulDataLoader` with workers", train=shuffled(StatefulDataLoader, num_workers=1)),
    Case("`LightningDataModule`", train=Data),
    Case("`accumulate_grad_batches=3`", accumulate_grad_batches=3),
    Case("`GradientAccumulationScheduler`", callbacks=lambda _: [GradientAccumulationScheduler({0: 1, 1: 3, 2: 2})]),
    Case("gradient clipping", gradient_clip_val=0.1, accumulate_grad_batches=2),
    Case("manual optimization, two optimizers", model=Manual),
    Case("learning rate schedule by step", model=ByStep, accumulate_grad_batches=2),
    Case("learning rate schedule by epoch", model=ByEpoch),
    Case("learning rate schedule by metric, each epoch", model=ByMetric, val_check_interval=2),
    Case("learning rate schedule by metric, each step", model=ByMetricOfTheStep),
    Case("an average of weights in a callback", callbacks=lambda _: [Ema()], val_check_interval=2),
    *(
        [Case("`WeightAveraging`", callbacks=lambda _: [pl.callbacks.WeightAveraging()])]
        if hasattr(pl.callbacks, "WeightAveraging")  # from 2.6 on
        else []
    ),
    Case(
        "`EarlyStopping` and `ModelCheckpoint`",
        callbacks=lambda folder: [
            EarlyStopping("val_loss", patience=0, min_delta=0.0, mode="max"),
            ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=2, enable_version_counter=False),
            ModelCheckpoint(
                folder / "steps", every_n_train_steps=2, save_top_k=-1, enable_version_counter=False, save_last=True
            ),
        ],
        min_epochs=1,
    ),
    Case("`check_val_every_n_epoch=2`", check_val_every_n_epoch=2),
    Case("`val_check_interval` within the epoch", val_check_interval=2),
    Case("`val_check_interval` across epochs", val_check_interval=3, check_val_every_n_epoch=None),
    Case("`limit_train_batches`", limit_train_batches=3),
    Case("`max_steps` within an epoch", max_epochs=-1, max_steps=8),
    Case("`min_epochs`", min_epochs=3),
    Case("a loader without a length", train=lambda: DataLoader(Stream(), batch_size=BATCH)),
    Case(
        "a loader without a length that keeps its position",
        train=lambda: StatefulDataLoader(StatefulStream(), batch_size=BATCH),
    ),
    Case("bf16 mixed precision", precision="bf16-mixed"),
    Case("an epoch that ends early (`on_train_batch_start` returns -1)", model=EarlyEnd),
    Case(
        "several training loaders",
        model=Two,
        train=lambda: {
            "a": DataLoader(Samples(), batch_size=BATCH, shuffle=True),
            "b": DataLoader(Samples(), batch_size=7, shuffle=True),
        },
    ),
    Case(
        "several validation loaders, `reload_dataloaders_every_n_epochs`",
        validation=lambda: [DataLoader(Samples(), batch_size=8), DataLoader(Samples(), batch_size=9)],
        reload_dataloaders_every_n_epochs=1,
    ),
]
SKIPS_BY_READING = {"a loader without a length"}


class Book(Logger):
    """A logger that writes every row to a file, over all attempts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    @property
    def name(self) -> str:
        return "book"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        os.write(self.descriptor, (json.dumps(["log", [step, metrics]]) + "\n").encode())

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def settle(guard: Any) -> None:
    """Let the save under way be finished."""
    session = getattr(guard, "_session", None)
    if session is not None and session.writer is not None:
        assert session.writer.drain(60.0)


def fit(
    case: Case, folder: Path, tick: Tick, guarded_by: Callable[..., Any] = SpotGuardCallback, **guard_options: Any
) -> pl.Trainer:
    """The user's script; returns its trainer."""
    book = Book(folder / "book.jsonl")
    pl.seed_everything(3)
    guard = guarded_by(folder / "run", **{"every": 3, "keep": 2, **guard_options})
    active = [False]

    def note(what: str, entry: Any) -> None:
        if active[0]:
            os.write(book.descriptor, (json.dumps([what, entry]) + "\n").encode())

    class Watch(Callback):
        def on_train_start(self, *_: Any) -> None:
            active[0] = True

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            if number % 2:  # else a fit as fast as this would mostly be killed before it has saved anything
                settle(guard)

        def on_train_batch_end(self, *_: Any) -> None:
            tick("end of batch")

    model = case.model(lambda kind: tick(kind) if active[0] else None, note)
    options: dict[str, Any] = {"max_epochs": EPOCHS, "log_every_n_steps": 1, **case.trainer}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=book,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(case.callbacks(folder)) or isinstance(guard, ModelCheckpoint),
        callbacks=[guard, *case.callbacks(folder), Watch()],
        default_root_dir=folder,
        **options,
    )
    train = case.train()
    if isinstance(train, pl.LightningDataModule):
        trainer.fit(model, datamodule=train, ckpt_path=guard.resume_path())
    else:
        trainer.fit(model, train, case.validation(), ckpt_path=guard.resume_path())
    return trainer


def run_fit(
    case: Case,
    folder: Path,
    *,
    kill_at: int | None = None,
    kinds: tuple[str, ...] = ("train",),
    number: signal.Signals = signal.SIGKILL,
    **options: Any,
) -> int:
    """One start of the script in a forked child; returns its exit status, negative for a signal.

    Args:
        case: How to fit.
        folder: Where.
        kill_at: Number of the tick at which the signal comes.
        kinds: Which ticks count.
        number: The signal.
        options: Of the guard.
    """
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        descriptor = os.open(folder / "stderr.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        warnings.simplefilter("ignore")
        warnings.simplefilter("ignore" if case.feature in SKIPS_BY_READING else "error", InexactResumeWarning)
        torch.set_num_threads(1)
        ticks = 0

        def tick(kind: str) -> None:
            nonlocal ticks
            if kind in kinds:
                if ticks == kill_at:
                    os.kill(os.getpid(), number)
                ticks += 1

        fit(case, folder, tick, **options)
        (folder / "ticks").write_text(str(ticks))
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:  # noqa: BLE001 - the child must end here, whatever happened
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            _end_workers()
        os._exit(status)


def outcome(folder: Path, *, once: bool) -> tuple[Any, dict[str, Any]]:
    """Final checkpoint, and what was trained, validated and logged.

    Args:
        folder: Where it ran.
        once: Whether everything must have been done once only, as after stops in good order.
    """
    book: dict[str, Any] = {}
    for line in (folder / "book.jsonl").read_text().splitlines():
        what, entry = json.loads(line)
        key = json.dumps([what, entry[:3] if what != "log" else [entry[0], sorted(entry[1])]])
        if what == "validate":
            key = json.dumps([what, entry])
        if once and "val" not in key:  # batches of a validation that was broken off come again
            assert key not in book, f"{key} was done twice"
        if "val_loss_step" in key:  # counted anew by Lightning when loaders are made anew
            key += str(entry[1])
        assert book.setdefault(key, entry) == entry, f"{key} was redone otherwise"
    checkpoint = CheckpointStore(folder / "run").latest()
    assert checkpoint is not None
    assert checkpoint.manifest.finished
    return _without(checkpoint.load(), str(folder)), book


def _without(tree: Any, folder: str) -> Any:
    """The folder's name says nothing about the run."""
    if isinstance(tree, dict):
        return {_without(key, folder): _without(value, folder) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_without(item, folder) for item in tree]
    return tree.replace(folder, "") if isinstance(tree, str) else tree


def assert_same_fit(untouched: Path, interrupted: Path, what: str, *, once: bool) -> None:
    """Weights, optimizer, schedule, callbacks, loops, generators, metrics, samples and everything logged: equal bit for bit."""
    (state, book), (other, other_book) = outcome(untouched, once=True), outcome(interrupted, once=once)
    assert book == other_book, f"{what}: {sorted(set(map(str, book.items())) ^ set(map(str, other_book.items())))}"
    assert (difference := first_difference(state, other)) is None, f"{what}: {difference}"
