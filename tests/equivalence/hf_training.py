"""Small trainings with the `Trainer` of transformers that can be killed at any tick, in a forked child, and what they leave behind."""

import json
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import awscrt.checksums  # noqa: F401 - loaded here once, not in every forked child
import numpy as np
import tenacity  # noqa: F401
import torch
import torch._dynamo  # optimizers import it when they are made
import transformers
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from equivalence.training import _end_workers
from spotguard import CheckpointStore
from spotguard.state.compare import first_difference
from spotguard.transformers import SpotGuardTrainerCallback

SAMPLES, BATCH = 22, 4

Tick = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One way to train."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    stop_early: bool = False
    every: int = 1

    def __str__(self) -> str:
        return self.name


class Samples(Dataset[Any]):
    """Samples with random augmentation from all three global generators."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.count:
            raise IndexError(index)
        noise = torch.randn(4) + random.random() + float(np.random.rand())
        x = torch.full((4,), float(index)) / SAMPLES + 0.1 * noise
        return {"input_ids": [index] * (index % 5 + 1), "x": x, "labels": torch.ones(2) * (index % 3)}


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "index": torch.tensor([sample["input_ids"][0] for sample in samples]),
        "x": torch.stack([sample["x"] for sample in samples]),
        "labels": torch.stack([sample["labels"] for sample in samples]),
    }


class Net(torch.nn.Module):
    """With dropout, and a buffer."""

    def __init__(self, tick: Tick, ledger: Callable[[list[int]], None]) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2)
        )
        self.calls = torch.nn.Buffer(torch.zeros((), dtype=torch.int64))
        self._tick, self._ledger = tick, ledger

    def forward(self, index: torch.Tensor, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self._tick()
        if self.training:
            self.calls.add_(1)
            self._ledger(index.tolist())
        logits = self.layers(x)
        return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}


class Ticker(TrainerCallback):
    """Places of the loop outside of the model."""

    def __init__(self, tick: Tick) -> None:
        self._tick = tick

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._tick()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._tick()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._tick()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self._tick()


guards: list[SpotGuardTrainerCallback] = []


def train(case: Case, folder: Path, tick: Tick, ledger: Callable[[int, list[int]], None]) -> Any:
    """The user's script."""
    transformers.set_seed(7)
    model = Net(tick, lambda ids: ledger(trainer.state.global_step, ids))
    plain: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    guard = SpotGuardTrainerCallback(folder / "run", every=case.every, keep=2)
    guards.append(guard)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**plain, **case.arguments}),
        train_dataset=Samples(SAMPLES),
        eval_dataset=Samples(6),
        data_collator=collate,
        callbacks=[guard, Ticker(tick), *([EarlyStoppingCallback(2)] if case.stop_early else [])],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=guard.resume_path())
    return trainer


def settle() -> None:
    """Let the save under way be finished: the step that it was made for is the one to go on from."""
    session = guards[-1]._session
    if session is not None and session.writer is not None:
        session.writer.drain()


def kill_group(number: signal.Signals) -> None:
    """As a scheduler does: from another process, for workers obey the one that made them."""
    group, other = os.getpgid(0), os.fork()
    if other == 0:
        os.setpgid(0, 0)
        os.killpg(group, number)
        os._exit(0)
    os.waitpid(other, 0)


def run_once(
    case: Case,
    folder: Path,
    *,
    kill_at: int | None = None,
    number: signal.Signals = signal.SIGKILL,
    group: bool = False,
) -> int:
    """One start of the script in a forked child; returns its exit status, negative for a signal.

    Args:
        group: Kill the whole process group, workers included.
    """
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        os.setpgid(0, 0)
        descriptor = os.open(folder / "stderr.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        warnings.simplefilter("error")
        # The Trainer deletes its best checkpoint for a better one, which is then made once more.
        warnings.filterwarnings("ignore", "the Trainer's own checkpoint checkpoint-")
        torch.set_num_threads(1)
        book = os.open(folder / "ledger.jsonl", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.write(book, b"[-1, []]\n")
        ticks = 0

        def tick() -> None:
            nonlocal ticks
            if ticks == kill_at:
                settle()
                kill_group(number) if group else os.kill(os.getpid(), number)
            ticks += 1

        trainer = train(case, folder, tick, lambda step, ids: (os.write(book, f"[{step}, {ids}]\n".encode()), None)[1])
        (folder / "ticks").write_text(str(ticks))
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
        torch.save({name: value.clone() for name, value in trainer.model.state_dict().items()}, folder / "model.pt")
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:  # noqa: BLE001 - the child must end here, whatever happened
        traceback.print_exc()
    finally:
        _end_workers()
        os._exit(status)


def outcome(folder: Path) -> tuple[dict[str, Any], dict[int, list[list[int]]], Any]:
    """Final checkpoint, which samples each step used in its last attempt, and the model that the script was left with."""
    ledger: dict[int, list[list[int]]] = {}
    last = -1
    for line in (folder / "ledger.jsonl").read_text().splitlines():
        step, ids = json.loads(line)
        if step != last and step >= 0:
            ledger[step] = []
        if step >= 0:  # else the mark of a new start
            ledger[step].append(ids)
        last = step
    checkpoint = CheckpointStore(folder / "run").latest()
    assert checkpoint is not None
    assert checkpoint.manifest.finished
    state = checkpoint.load()
    state["rank-00000"] = {name: value for name, value in state["rank-00000"].items() if name != "clocks"}
    return state, ledger, torch.load(folder / "model.pt", weights_only=True)


def assert_same(untouched: Path, interrupted: Path, what: str) -> None:
    """Weights, optimizer, schedule, generators, the Trainer's own state, and the samples in order: equal bit for bit."""
    (state, ledger, model), (other, other_ledger, other_model) = outcome(untouched), outcome(interrupted)
    assert ledger == other_ledger, what
    assert (difference := first_difference(state, other)) is None, f"{what}: {difference}"
    assert first_difference(model, other_model) is None, what
