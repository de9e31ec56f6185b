"""What else people use in a fit: it goes on working, and a run that is stopped in the middle ends as if it had not been."""

import datetime as dt
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    Callback,
    DeviceStatsMonitor,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader, IterableDataset

from integration.fits import Model, Told, at, child, fit, sigterm, steps, weights
from spotguard import CheckpointStore
from spotguard.errors import InexactResumeWarning
from spotguard.guard.saver import RANK
from spotguard.state.compare import first_difference


class ReturnsNone(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class TakesTheIterator(Model):
    """Two batches a step."""

    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        (first, *_), (second, *_) = next(dataloader_iter), next(dataloader_iter)
        return self.loss(first) + self.loss(second)


class NoOptimizer(Model):
    def configure_optimizers(self) -> Any:
        return None


class NoValidation(Model):
    validation_step = pl.LightningModule.validation_step  # type: ignore[assignment]
    val_dataloader = pl.LightningModule.val_dataloader


class Draws(Model):
    """Random numbers in hooks."""

    def on_train_start(self) -> None:
        torch.randn(5)

    def on_train_epoch_start(self) -> None:
        self.noise = torch.randn(3)
        self.log("noise", self.noise.sum())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.randn(1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad += 0.01 * torch.randn_like(parameter.grad) + 0.01 * self.noise[0]

    def on_validation_epoch_end(self) -> None:
        torch.randn(2)


class StopsItself(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 5:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, apart = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(first, 8, apart):
            yield torch.full((4,), index / 8), torch.ones(2) * (index % 3)


class Streams(Model):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=2, num_workers=2)


class Saves(Model):
    """Hooks that put something into the checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"steps": self.global_step}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["mine"]["steps"] > 0


class LineSearch(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Thaws(BaseFinetuning):
    """Adds a group of parameters to the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.01)


class Frozen(Model):
    def configure_optimizers(self) -> Any:
        wanted = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(wanted, lr=0.05, momentum=0.9)


BARE = dict.fromkeys(
    ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger", "log_every_n_steps")
)

FEATURES: dict[str, dict[str, Any]] = {
    "training_step that returns None": {"model": ReturnsNone},
    "training_step that takes the iterator": {"model": TakesTheIterator, "stops": (1, 2)},
    "no optimizer": {"model": NoOptimizer},
    "no validation": {"model": NoValidation},
    "limit_val_batches=0": {"limit_val_batches": 0},
    "random numbers in hooks": {"model": Draws},
    "should_stop": {"model": StopsItself},
    "should_stop before min_epochs": {"model": StopsItself, "min_epochs": 2},
    "an iterable dataset with workers": {"model": Streams, "skips": True},
    "on_save_checkpoint of the module": {"model": Saves},
    "LBFGS": {"model": LineSearch},
    "double precision": {"precision": "64-true"},
    "half precision": {"precision": "bf16-true"},
    "overfit_batches": {"overfit_batches": 2, "stops": (1, 2)},
    "detect_anomaly and a profiler": {"detect_anomaly": True, "profiler": "simple"},
    "barebones": {"barebones": True, **BARE},
    "max_time": {"max_time": "00:01:00:00"},
    "Timer": {"callbacks": lambda _: [Timer(dt.timedelta(hours=1), interval="epoch")]},
    "monitors": {"callbacks": lambda _: [LearningRateMonitor(), DeviceStatsMonitor()], "logger": True},
    "OnExceptionCheckpoint": {
        "callbacks": lambda folder: [OnExceptionCheckpoint(folder)],
        "enable_checkpointing": True,
    },
    "a callback that thaws": {"model": Frozen, "callbacks": lambda _: [Thaws()]},
    "TQDMProgressBar": {"callbacks": lambda _: [TQDMProgressBar()], "enable_progress_bar": True},
    "RichProgressBar": {"callbacks": lambda _: [RichProgressBar()], "enable_progress_bar": True},
    "log_metrics": {"log_metrics": True, "logger": True},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_fit_that_is_stopped_in_both_epochs_ends_the_same_with(feature: str, tmp_path: Path) -> None:
    options = {**FEATURES[feature]}
    model: Any = options.pop("model", Model)
    callbacks: Callable[[Path], list[Any]] = options.pop("callbacks", lambda _: [])
    stops, skips = options.pop("stops", (1, 4)), options.pop("skips", False)
    guard = {"log_metrics": options.pop("log_metrics", False)}

    def script(folder: Path, *extra: Any) -> None:
        if skips:
            import warnings

            warnings.simplefilter("ignore", InexactResumeWarning)
        fit(folder, *callbacks(folder), *extra, model=model(), guard=guard, **options)

    untouched, stopped = tmp_path / "untouched", tmp_path / "stopped"
    whole = child(untouched, lambda _: script(untouched))
    assert whole.status == 0, whole.said
    done = 0
    for stop in stops:  # counted over all starts
        nth = stop - done
        left = child(stopped, lambda _, nth=nth: script(stopped, at("on_train_batch_start", sigterm, nth)))  # type: ignore[misc]
        assert left.status == 143, left.said
        done = stop + 1
    left = child(stopped, lambda _: script(stopped))
    assert left.status == 0, left.said
    assert steps(stopped)[-1] == steps(untouched)[-1]
    assert first_difference(final(untouched), final(stopped)) is None


def final(folder: Path) -> dict[str, Any]:
    """All of a Lightning checkpoint that does not tell the time or the folder."""
    checkpoint = CheckpointStore(folder / "run").latest()
    assert checkpoint is not None
    assert checkpoint.manifest.finished
    payload = checkpoint.load()
    told = {name: value for name, value in payload["model.ckpt"].items() if name != "callbacks"}
    return {**told, "rng": payload[RANK]["rng"]}


def test_a_timer_goes_on_counting_and_stays_a_timer(tmp_path: Path) -> None:
    def script(told: Told, *extra: Any) -> None:
        timer = Timer(dt.timedelta(hours=1))
        fit(tmp_path, timer, *extra)
        told["elapsed"] = timer.time_elapsed("train")

    def pause() -> None:
        import time

        time.sleep(0.3)
        sigterm()

    assert child(tmp_path, lambda told: script(told, at("on_train_batch_start", pause, 1))).status == 143
    left = child(tmp_path, script)
    assert left.status == 0, left.said
    assert left.told["elapsed"] > 0.3


@pytest.mark.parametrize("asked", [False, True], ids=["without log_metrics", "with log_metrics"])
def test_how_safe_the_run_is_gets_into_the_log_where_that_is_asked_for(asked: bool, tmp_path: Path) -> None:
    def work(_: Told) -> None:
        logger = pl.loggers.CSVLogger(tmp_path / "log", version=0)
        fit(tmp_path, guard={"log_metrics": asked, "every": 3}, logger=logger)

    left = child(tmp_path, work)
    assert left.status == 0, left.said
    header = (tmp_path / "log" / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    ours = {"spotguard/stall_s", "spotguard/last_durable_age_s", "spotguard/lost_steps"}
    assert ours & set(header) == (ours if asked else set())
    plain = tmp_path / "plain"
    assert child(plain, lambda _: fit(plain)).status == 0
    assert first_difference(weights(plain), weights(tmp_path)) is None


def test_an_asynchronous_plugin_goes_on_writing_the_users_own_checkpoints(tmp_path: Path) -> None:
    def work(told: Told) -> None:
        own = ModelCheckpoint(tmp_path / "own", save_top_k=-1, every_n_train_steps=3)
        fit(tmp_path, own, plugins=[AsyncCheckpointIO()], enable_checkpointing=True)

    left = child(tmp_path, work)
    assert left.status == 0, left.said
    assert len(list((tmp_path / "own").iterdir())) == 2
    assert steps(tmp_path) == [8]


def test_a_run_that_began_at_a_checkpoint_of_lightnings_own_ends_the_same_when_it_is_stopped(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.ckpt"

    def makes(_: Told) -> None:
        from integration.fits import trainer

        own = ModelCheckpoint(tmp_path, filename="theirs", every_n_train_steps=3)
        trainer(own, max_epochs=1, enable_checkpointing=True).fit(Model())

    def script(folder: Path, *extra: Any) -> None:
        from integration.fits import trainer
        from spotguard.lightning import SpotGuardCallback

        pl.seed_everything(3, verbose=False)
        guard = SpotGuardCallback(folder / "run")
        trainer(guard, *extra).fit(Model(), ckpt_path=guard.resume_path() or str(theirs))

    assert child(tmp_path, makes).status == 0
    untouched, stopped = tmp_path / "untouched", tmp_path / "stopped"
    assert child(untouched, lambda _: script(untouched)).status == 0
    for stop in (0, 1):
        left = child(stopped, lambda _, stop=stop: script(stopped, at("on_train_batch_start", sigterm, stop)))  # type: ignore[misc]
        assert left.status == 143, left.said
    left = child(stopped, lambda _: script(stopped))
    assert left.status == 0, left.said
    assert first_difference(final(untouched), final(stopped)) is None


HOSTS = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
{imports}
import torch
from spotguard.lightning import SpotGuardCallback

class Stop(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2 and sys.argv[2] == "stop":
            os.kill(os.getpid(), signal.SIGTERM)

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)
    def training_step(self, batch, batch_idx):
        return self.net(batch + torch.randn(4)).square().mean()
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2, shuffle=True)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def start(what, uri, stop):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.argv[2] = stop
    status = 1
    try:
        pl.seed_everything(1, verbose=False)
        guard = SpotGuardCallback(uri, every=100)
        assert isinstance(guard, pl.Callback)
        trainer = pl.Trainer(
            callbacks=[guard, Stop()], accelerator="cpu", logger=False, max_epochs=2, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )
        trainer.fit(Model(), ckpt_path=guard.resume_path())
        status = 0
    except SystemExit as left:
        status = left.code
    finally:
        sys.stderr.flush()
        os._exit(status)

torch.set_num_threads(1)
folder = sys.argv[1]
print([start(*arguments) for arguments in (
    (0, folder + "/untouched", ""), (1, folder + "/stopped", "stop"), (2, folder + "/stopped", ""))])
print("pytorch_lightning" in sys.modules, "lightning.pytorch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("imports", "loaded"),
    [
        ("import lightning.pytorch as pl", "False True"),
        ("import lightning.pytorch\nimport pytorch_lightning as pl", "True True"),
    ],
    ids=["lightning alone", "both at once"],
)
def test_both_distributions_are_hosts(imports: str, loaded: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOSTS.replace("{imports}", imports), str(tmp_path), ""]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[0, 143, 0]", loaded], done.stderr
    untouched, stopped = (CheckpointStore(tmp_path / name).load()["model.ckpt"] for name in ("untouched", "stopped"))
    assert first_difference(untouched["state_dict"], stopped["state_dict"]) is None


def test_a_second_signal_ends_a_fit_that_is_stuck(tmp_path: Path) -> None:
    class Stuck(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            import threading
            import time

            def again() -> None:
                time.sleep(0.2)
                sigterm()

            sigterm()
            threading.Thread(target=again, daemon=True).start()
            signal.pause()
            threading.Event().wait()

    os.environ["SPOTGUARD_REPEAT_S"] = "0"
    try:
        left = child(tmp_path, lambda _: fit(tmp_path, Stuck()))
    finally:
        del os.environ["SPOTGUARD_REPEAT_S"]
    assert left.status == 128 + signal.SIGTERM, left.said
    assert "leaving at once" in left.said


def test_a_search_for_the_learning_rate_at_the_start_of_a_fit_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    class Searched(Model):
        lr = 0.1

    def script(folder: Path, *extra: Any) -> None:
        searches = [] if (folder / "run").exists() else [LearningRateFinder(num_training_steps=10, attr_name="lr")]
        fit(folder, *searches, *extra, model=Searched())

    untouched, stopped = tmp_path / "untouched", tmp_path / "stopped"
    assert child(untouched, lambda _: script(untouched)).status == 0
    assert child(stopped, lambda _: script(stopped, at("on_train_batch_start", sigterm, 2))).status == 143
    left = child(stopped, lambda _: script(stopped))
    assert left.status == 0, left.said
    assert first_difference(final(untouched), final(stopped)) is None
