"""Real signals to real fits: who hears them, what is committed, and how the process leaves."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger
from torch.utils.data import DataLoader

from integration.fits import Model, Samples, Told, at, child, fit, logged, sigterm, steps, weights
from spotguard import CheckpointStore, Preempted
from spotguard.state.compare import first_difference

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def test_a_handler_of_the_users_is_called_and_that_of_lightning_is_not(tmp_path: Path) -> None:
    def work(told: Told) -> None:
        called: list[int] = []

        def mine(number: int, frame: Any) -> None:
            called.append(number)

        def see(trainer: pl.Trainer) -> None:
            told["sigterm seen by Lightning"] = trainer.received_sigterm

        class See(Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if not called:
                    sigterm()
                see(trainer)

        signal.signal(signal.SIGTERM, mine)
        with pytest.raises(Preempted):
            fit(tmp_path, See())
        told["called"], told["put back"] = called, signal.getsignal(signal.SIGTERM) is mine

    left = child(tmp_path, work)
    assert left.status == 0, left.said
    assert left.told == {"sigterm seen by Lightning": False, "called": [signal.SIGTERM], "put back": True}
    assert steps(tmp_path) == [1]


def nothing() -> None:
    """A fit that comes to its end."""


def fails() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("action", "error"),
    [(nothing, None), (sigterm, Preempted), (fails, ZeroDivisionError)],
    ids=["the end", "a stop", "an exception"],
)
def test_handlers_and_wakeup_descriptor_are_put_back_by(
    action: Any, error: type[BaseException] | None, tmp_path: Path
) -> None:
    def work(told: Told) -> None:
        _, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        before = [signal.getsignal(number) for number in signal.valid_signals()]
        with pytest.raises(error) if error else contextlib.nullcontext():
            fit(tmp_path, at("on_train_batch_start", action, 2))
        assert [signal.getsignal(number) for number in signal.valid_signals()] == before
        assert signal.set_wakeup_fd(-1) == writer
        print("all as before", file=sys.stderr)
        sigterm()

    left = child(tmp_path, work)
    assert "all as before" in left.said
    assert left.status == -signal.SIGTERM  # the default effect


@pytest.mark.parametrize(
    "hook", ["on_sanity_check_start", "on_sanity_check_end", "on_train_start", "validation_step of the sanity check"]
)
def test_a_stop_before_the_first_batch_leaves_with_143_and_nothing_trained(hook: str, tmp_path: Path) -> None:
    class Sanity(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.sanity_checking and hook.startswith("validation_step"):
                sigterm()
            super().validation_step(batch, batch_idx)

    def work(told: Told) -> None:
        told["trained"] = []
        fit(tmp_path, at(hook, sigterm), at("on_train_batch_start", lambda: told["trained"].append(1)), model=Sanity())

    left = child(tmp_path, work)
    assert (left.status, left.told) == (143, {"trained": []}), left.said
    assert "stopped by SIGTERM: no checkpoint is committed (exit status 143)" in left.said
    assert steps(tmp_path) == []


def test_a_stop_while_lightning_sets_up_ends_the_process_as_ever(tmp_path: Path) -> None:
    left = child(tmp_path, lambda _: fit(tmp_path, at("setup", sigterm)))
    assert left.status == -signal.SIGTERM
    assert child(tmp_path, lambda _: fit(tmp_path)).status == 0
    assert steps(tmp_path) == [8]


@pytest.mark.parametrize("limits", [{"min_epochs": 2}, {"min_steps": 8}], ids=lambda limits: next(iter(limits)))
def test_a_stop_does_not_wait_for(limits: dict[str, Any], tmp_path: Path) -> None:
    left = child(tmp_path, lambda _: fit(tmp_path, at("on_train_batch_start", sigterm, 1), **limits))
    assert left.status == 143, left.said
    assert steps(tmp_path) == [2]


def test_the_exit_status_can_be_chosen(tmp_path: Path) -> None:
    guard = {"exit_code": 85}
    left = child(tmp_path, lambda _: fit(tmp_path, at("on_train_batch_start", sigterm, 1), guard=guard))
    assert left.status == 85, left.said


def test_ctrl_c_is_a_stop_and_not_a_keyboard_interrupt(tmp_path: Path) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    left = child(tmp_path, lambda _: fit(tmp_path, at("on_train_batch_start", interrupt, 2)))
    assert left.status == 143, left.said
    assert steps(tmp_path) == [3]


class Ledger(Logger):
    """Writes down how it was ended."""

    def __init__(self, book: list[str]) -> None:
        super().__init__()
        self.book = book

    name = version = property(lambda self: "ledger")

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    log_hyperparams = log_metrics

    def finalize(self, status: str) -> None:
        self.book.append(f"logger finalize {status}")


def test_hooks_for_the_end_are_called_once_each_when_the_fit_is_stopped(tmp_path: Path) -> None:
    def work(told: Told) -> None:
        book: list[str] = []

        class Mine(Callback):
            def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
                book.append(f"callback on_exception {type(exception).__name__}")

            def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
                book.append(f"callback teardown {stage}")

        class Module(Model):
            def teardown(self, stage: str) -> None:
                book.append(f"module teardown {stage}")

        class Data(pl.LightningDataModule):
            def train_dataloader(self) -> Any:
                return DataLoader(Samples(), batch_size=2)

            def on_exception(self, exception: BaseException) -> None:
                book.append("datamodule on_exception")

            def teardown(self, stage: str) -> None:
                book.append(f"datamodule teardown {stage}")

        from integration.fits import trainer
        from spotguard.lightning import SpotGuardCallback

        guard = SpotGuardCallback(tmp_path / "run")
        trains = trainer(guard, Mine(), at("on_train_batch_start", sigterm, 1), logger=Ledger(book), profiler="simple")
        with pytest.raises(Preempted):
            trains.fit(Module(), datamodule=Data(), ckpt_path=guard.resume_path())
        told["book"], told["status"], told["stage"] = book, str(trains.state.status.value), trains.state.stage
        assert trains.fit_loop._data_fetcher is None
        told["checkpoint"] = guard.checkpoint.id if guard.checkpoint else None

    left = child(tmp_path, work)
    assert left.told == {
        "book": [
            "callback on_exception Preempted",
            "datamodule on_exception",
            "logger finalize failed",
            "datamodule teardown fit",
            "callback teardown fit",
            "module teardown fit",
        ],
        "status": "interrupted",
        "stage": None,
        "checkpoint": "0001-0000000002",
    }, left.said


class Plateau(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def test_a_stop_during_a_validation_leaves_it_and_it_is_run_again_whole(tmp_path: Path) -> None:
    def script(folder: Path, told: Told, stop_at: int | None) -> None:
        batches: list[Any] = []
        told["batches"] = batches

        class Watch(Callback):
            def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
                batches.append([trainer.current_epoch, batch_idx])
                if len(batches) == stop_at:
                    sigterm()

        _, trains = fit(
            folder,
            Watch(),
            EarlyStopping("val_loss", patience=5),
            ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=-1),
            model=Plateau(),
            guard={"every": 100},
            logger=pl.loggers.CSVLogger(folder / "log", version=0),
            enable_checkpointing=True,
            num_sanity_val_steps=0,
        )
        early = trains.early_stopping_callback
        assert early is not None
        told["wait"], told["lr"] = early.wait_count, trains.optimizers[0].param_groups[0]["lr"]
        told["best"] = sorted(path.name for path in (folder / "best").iterdir())

    untouched, stopped = tmp_path / "untouched", tmp_path / "stopped"
    whole = child(untouched, lambda told: script(untouched, told, None))
    assert whole.told["batches"] == [[0, 0], [0, 1], [1, 0], [1, 1]], whole.said
    first = child(stopped, lambda told: script(stopped, told, 1))
    assert (first.status, first.told["batches"]) == (143, [[0, 0]]), first.said  # not one batch more
    assert steps(stopped) == [4]
    rows = child(stopped, lambda told: script(stopped, told, None))
    assert rows.told["batches"] == whole.told["batches"], rows.said
    assert {name: rows.told[name] for name in ("wait", "lr", "best")} == {
        name: whole.told[name] for name in ("wait", "lr", "best")
    }
    assert first_difference(weights(untouched), weights(stopped)) is None
    log = (stopped / "log" / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = log[0].split(",").index("val_loss")
    assert sum(bool(row.split(",")[column]) for row in log[1:]) == 2


class Torn(torch.optim.SGD):
    """Has something happen when half of its parameters are updated."""

    def __init__(self, parameters: Any, when: int, happens: Any) -> None:
        super().__init__(parameters, lr=0.05)
        self.calls, self.when, self.happens = itertools.count(), when, happens

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for place, parameter in enumerate(self.param_groups[0]["params"]):
            if place == 2 and next(self.calls) == self.when:
                self.happens()
            parameter.data.sub_(0.05 * parameter.grad)
        return loss


def kill_a_worker() -> None:
    workers = multiprocessing.active_children()
    os.kill(workers[0].pid or 0, signal.SIGKILL)
    os.waitid(os.P_PID, workers[0].pid or 0, os.WEXITED | os.WNOWAIT)
    for _ in range(1000):
        torch.zeros(1)  # somewhere here the signal of its death is heard


@pytest.mark.parametrize(
    ("happens", "status", "newest"),
    [
        (fails, 1, (1, 2)),
        (kill_a_worker, 1, (1, 2)),
        (lambda: os.kill(os.getpid(), signal.SIGINT), 143, (3,)),
        (sigterm, 143, (3,)),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -9, (1, 2, None)),
    ],
    ids=["an exception", "a worker that dies", "SIGINT", "SIGTERM", "SIGKILL"],
)
def test_a_half_applied_update_is_never_committed_after(
    happens: Any, status: int, newest: tuple[int | None, ...], tmp_path: Path
) -> None:
    class Tearing(Model):
        when: int

        def train_dataloader(self) -> Any:
            return DataLoader(Samples(), batch_size=2, shuffle=True, num_workers=2)

        def configure_optimizers(self) -> Any:
            return Torn(self.parameters(), self.when, happens)

    class Whole(Tearing):
        when = 10**9

    class Half(Tearing):
        when = 2

    untouched, torn, seen = tmp_path / "untouched", tmp_path / "torn", []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append({name: value.clone() for name, value in module.state_dict().items()})

    def whole(told: Told) -> None:
        fit(untouched, Watch(), model=Whole())
        told["seen"] = seen

    expected = child(untouched, whole).told["seen"]
    left = child(torn, lambda _: fit(torn, model=Half(), guard={"every": 1}))
    assert left.status == status, left.said
    checkpoint = CheckpointStore(torn / "run").latest()
    step = None if checkpoint is None else checkpoint.step
    assert step in newest
    if step is not None:
        assert first_difference(expected[step - 1], weights(torn)) is None
    again = child(torn, lambda _: fit(torn, model=Whole(), guard={"every": 1}))
    assert again.status == 0, again.said
    assert first_difference(weights(untouched), weights(torn)) is None


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("where", ["training", "validation", "validation, before its workers are set up"])
def test_workers_live_through_a_signal_to_the_whole_group(number: signal.Signals, where: str, tmp_path: Path) -> None:
    class Loads(Model):
        def train_dataloader(self) -> Any:
            return DataLoader(Samples(), batch_size=2, shuffle=True, num_workers=2)

        def val_dataloader(self) -> Any:
            return DataLoader(Samples(), batch_size=2, num_workers=2)

    def work(told: Told) -> None:
        def everybody() -> None:
            group, sender = os.getpgrp(), os.fork()  # from outside: workers do obey the process that they belong to
            if not sender:
                os.setsid()
                os.killpg(group, number)
                os._exit(0)
            os.waitpid(sender, 0)

        def look() -> None:
            mine = [worker for worker in multiprocessing.active_children() if worker._parent_pid == os.getpid()]  # type: ignore[attr-defined]
            told["alive"] = sum(worker.is_alive() for worker in mine) >= 2

        hook = "on_train_batch" if where == "training" else "on_validation_batch"
        begin = at("on_validation_start", everybody) if "before" in where else at(f"{hook}_start", everybody, 1)
        end = at("on_validation_start" if "before" in where else f"{hook}_end", look, int("before" not in where))
        fit(tmp_path, begin, end, model=Loads(), num_sanity_val_steps=0)

    left = child(tmp_path, work, group=True)
    assert (left.status, left.told) == (143, {"alive": True}), left.said
    assert steps(tmp_path) == [2 if where == "training" else 4]
    assert child(tmp_path, lambda _: fit(tmp_path, model=Loads(), num_sanity_val_steps=0)).status == 0
    assert [event["detail"] for event in logged(tmp_path, "NoticeReceived")] == [number.name]
