"""`SpotGuardTrainerCallback` from the outside: what it refuses, what it leaves behind, and a rehearsal of the example."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from typer.testing import CliRunner

from spotguard import CheckpointStore, KeepBest, KeepNewest, Preempted, SpotGuard, TrainState
from spotguard.cli.app import app
from spotguard.errors import ConfigError, InexactResumeWarning, MissingExtraError, StateMismatchError
from spotguard.transformers import SpotGuardTrainerCallback
from spotguard.transformers._host import check_release

ROOT = Path(__file__).parents[2]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(torch.nn.functional.dropout(x, 0.2, self.training))
        return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}


DATA = [{"x": torch.tensor([value / 16]), "labels": torch.tensor([value / 8])} for value in range(16)]


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.action()


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise RuntimeError("the disk is purple")


def make_trainer(folder: Path, guard: Any, *others: Any, data: Any = DATA, **arguments: Any) -> Trainer:
    plain = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    callbacks = [*([guard] if guard is not None else []), *others]
    return Trainer(
        model=Net(),
        args=TrainingArguments(**{**plain, **arguments}),
        train_dataset=data,
        eval_dataset=DATA,
        callbacks=callbacks,
    )


def weight_of(trainer: Trainer) -> torch.Tensor:
    assert isinstance(trainer.model, torch.nn.Module)
    weight: torch.Tensor = trainer.model.state_dict()["layer.weight"]
    return weight.clone()


def stop_at_step_3(folder: Path, **arguments: Any) -> None:
    """Leave a run with a checkpoint at step 3."""
    guard = SpotGuardTrainerCallback(folder / "run")
    trainer = make_trainer(folder, guard, At(3, sigterm), **arguments)
    with pytest.raises(Preempted):
        trainer.train(resume_from_checkpoint=guard.resume_path())


def test_a_notice_ends_in_a_checkpoint_and_exit_status_143(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    guard = SpotGuardTrainerCallback(tmp_path / "run")
    trainer = make_trainer(tmp_path, guard, At(3, sigterm))
    with pytest.raises(Preempted) as stop:
        trainer.train(resume_from_checkpoint=guard.resume_path())
    assert stop.value.code == 143
    assert guard.checkpoint is not None
    assert (guard.checkpoint.id, guard.checkpoint.step) == ("0001-0000000003", 3)
    assert signal.getsignal(signal.SIGTERM) is before
    shard = next((tmp_path / "run" / "checkpoints" / guard.checkpoint.id).glob("model*"))
    assert set(torch.load(shard, weights_only=True)) == {"layer.weight", "layer.bias"}, "read without spotguard"


def test_training_goes_on_in_the_same_process_with_another_guard(tmp_path: Path) -> None:
    stop_at_step_3(tmp_path)
    guard = SpotGuardTrainerCallback(tmp_path / "run")
    trainer = make_trainer(tmp_path, guard)
    path = guard.resume_path()
    assert path == "spotguard:0001-0000000003"
    assert trainer.train(resume_from_checkpoint=path).global_step == 8
    assert guard.checkpoint is not None
    assert guard.checkpoint.manifest.finished


def test_forgetting_the_resume_path_is_an_error_that_says_what_to_write(tmp_path: Path) -> None:
    stop_at_step_3(tmp_path)
    for asked in (None, False):
        trainer = make_trainer(tmp_path, SpotGuardTrainerCallback(tmp_path / "run"))
        with pytest.raises(ConfigError, match=r"trainer\.train\(resume_from_checkpoint=guard\.resume_path\(\)\)"):
            trainer.train(resume_from_checkpoint=asked)


def test_a_new_run_needs_no_resume_path(tmp_path: Path) -> None:
    guard = SpotGuardTrainerCallback(tmp_path / "run")
    assert make_trainer(tmp_path, guard).train().global_step == 8


def test_a_path_of_another_guard_is_refused(tmp_path: Path) -> None:
    stop_at_step_3(tmp_path)
    other = SpotGuardTrainerCallback(tmp_path / "run")
    path = other.resume_path()
    other.close()
    trainer = make_trainer(tmp_path, SpotGuardTrainerCallback(tmp_path / "another"))
    with pytest.raises(ConfigError, match="made by another guard"):
        trainer.train(resume_from_checkpoint=path)


def test_a_trainer_without_the_guard_does_not_take_its_path(tmp_path: Path) -> None:
    stop_at_step_3(tmp_path)
    guard = SpotGuardTrainerCallback(tmp_path / "run")
    path = guard.resume_path()
    guard.close()
    with pytest.raises(ValueError, match=f"valid checkpoint at {path}"):
        make_trainer(tmp_path, None).train(resume_from_checkpoint=path)


def test_a_guard_that_is_added_later_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, None)
    trainer.add_callback(SpotGuardTrainerCallback(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"callbacks=\[guard\]"):
        trainer.train()


def test_an_error_in_the_training_puts_everything_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    guard = SpotGuardTrainerCallback(tmp_path / "run", every=1)
    trainer = make_trainer(tmp_path, guard, At(3, fail))
    with pytest.raises(RuntimeError, match="the disk is purple"):
        trainer.train(resume_from_checkpoint=guard.resume_path())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert guard.checkpoint is not None
    assert guard.checkpoint.step < 3, "a state in the midst of a step is never saved"
    assert "get_eval_dataloader" not in vars(trainer)
    assert "_load_from_checkpoint" not in vars(trainer)


def test_a_failed_training_says_that_it_has_failed(tmp_path: Path) -> None:
    guard = SpotGuardTrainerCallback(tmp_path / "run", every=10**9)
    trainer = make_trainer(tmp_path, guard, At(3, fail))
    with pytest.raises(RuntimeError, match="the disk is purple"):
        trainer.train(resume_from_checkpoint=guard.resume_path())
    word = json.loads((tmp_path / "run/exit.json").read_bytes())
    assert (word["state"], word["detail"]) == ("failed", "RuntimeError: the disk is purple")


@pytest.mark.parametrize("name", ["ignore_data_skip", "auto_find_batch_size", "enable_jit_checkpoint"])
def test_an_argument_that_would_break_the_promise_is_refused_by_name(tmp_path: Path, name: str) -> None:
    trainer = make_trainer(tmp_path, SpotGuardTrainerCallback(tmp_path / "run"))
    setattr(trainer.args, name, True)  # afterwards, for a Trainer that saves on SIGTERM sets a handler when it is made
    with pytest.raises(ConfigError, match=name):
        trainer.train()
    assert not (tmp_path / "run").exists(), "nothing was claimed"


def test_several_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = SpotGuardTrainerCallback(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 ranks"):
        guard.resume_path()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size was 4 and is 2|batches was 4 and is 8"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        ({"data": DATA[:12]}, "dataset length was 16 and is 12"),
    ],
)
def test_steps_that_have_become_other_steps_are_refused(tmp_path: Path, arguments: Any, what: str) -> None:
    stop_at_step_3(tmp_path)
    guard = SpotGuardTrainerCallback(tmp_path / "run")
    trainer = make_trainer(tmp_path, guard, **arguments)
    with pytest.raises(StateMismatchError, match=what):
        trainer.train(resume_from_checkpoint=guard.resume_path())


def test_asking_for_less_than_is_done_is_refused(tmp_path: Path) -> None:
    stop_at_step_3(tmp_path)
    guard = SpotGuardTrainerCallback(tmp_path / "run")
    trainer = make_trainer(tmp_path, guard, max_steps=3)
    with pytest.raises(ConfigError, match="stands at step 3"):
        trainer.train(resume_from_checkpoint=guard.resume_path())


def test_a_finished_run_goes_on_when_more_is_asked_for(tmp_path: Path) -> None:
    for epochs in (1, 2):
        guard = SpotGuardTrainerCallback(tmp_path / "run")
        trainer = make_trainer(tmp_path, guard, num_train_epochs=epochs)
        assert trainer.train(resume_from_checkpoint=guard.resume_path()).global_step == 4 * epochs
    assert [line["step"] for line in trainer.state.log_history] == [2, 4, 4, 6, 8, 8]


def test_a_checkpoint_of_the_plain_guard_is_refused(tmp_path: Path) -> None:
    with SpotGuard(tmp_path / "run", TrainState(model=torch.nn.Linear(1, 1))) as plain:
        for _ in plain.steps(1):
            pass
    with pytest.raises(StateMismatchError, match="was not saved by SpotGuardTrainerCallback"):
        SpotGuardTrainerCallback(tmp_path / "run").resume_path()


def test_an_iterable_dataset_is_named_at_the_start(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(DATA)

    guard = SpotGuardTrainerCallback(tmp_path / "run")
    trainer = make_trainer(tmp_path, guard, data=Stream(), max_steps=4)
    with pytest.warns(InexactResumeWarning, match="cannot be resumed by index"):
        trainer.train(resume_from_checkpoint=guard.resume_path())


def test_a_generator_that_nobody_saves_is_named_at_the_start(tmp_path: Path) -> None:
    class Own(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.generator = torch.Generator()

        def __len__(self) -> int:
            return len(DATA)

        def __getitem__(self, index: int) -> Any:
            return {**DATA[index], "x": DATA[index]["x"] + torch.rand(1, generator=self.generator)}

    guard = SpotGuardTrainerCallback(tmp_path / "run")
    trainer = make_trainer(tmp_path, guard, data=Own())
    with pytest.warns(InexactResumeWarning, match=r"generators that nobody saves \(dataset\.generator\)"):
        trainer.train(resume_from_checkpoint=guard.resume_path())


def test_metrics_that_retention_goes_by_are_saved_with_a_checkpoint(tmp_path: Path) -> None:
    guard = SpotGuardTrainerCallback(tmp_path / "run", keep=KeepBest(9, "eval_loss") | KeepNewest(1))
    trainer = make_trainer(tmp_path, guard, eval_strategy="steps", eval_steps=3)
    trainer.train(resume_from_checkpoint=guard.resume_path())
    saved = {item.step: item.manifest.metrics for item in CheckpointStore(tmp_path / "run").list()}
    logged = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    assert {step: metrics["eval_loss"] for step, metrics in saved.items() if metrics} == logged
    assert set(logged) >= {3, 6}


def test_the_checkpoints_of_the_trainer_itself_go_on_working(tmp_path: Path) -> None:
    stop_at_step_3(tmp_path, save_strategy="steps", save_steps=2)
    guard = SpotGuardTrainerCallback(tmp_path / "run")
    trainer = make_trainer(tmp_path, guard, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=guard.resume_path())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    weights = weight_of(trainer)
    again = make_trainer(tmp_path, None)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert torch.equal(weight_of(again), weights), "resumed from by the Trainer alone, without spotguard"


def test_without_transformers_the_import_says_what_to_install() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['transformers'] = None; import spotguard.transformers"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "MissingExtraError: transformers is not installed: pip install 'spotguard[transformers]'" in ended.stderr, (
        ended.stderr
    )


def test_a_release_that_is_too_old_is_refused_by_number() -> None:
    for release in ("4.44.0", "4.57.1", "5.0.0.dev0", "5.23.0"):
        check_release(release)
    for release in ("4.43.9", "3.5.1"):
        with pytest.raises(MissingExtraError, match=f"transformers {release} is installed, .* needs >=4.44"):
            check_release(release)


def test_the_example_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = str(ROOT / "examples" / "huggingface" / "train.py")
    options = ["rehearse", "--seed", "1", "--sigterm", "1", "--sigkill", "1", "--json"]
    result = CliRunner().invoke(app, [*options, "--", sys.executable, script, "--epochs", "1"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["verdict"], report["reasons"]) == ("safe", [])
    assert {"model", "optimizer", "scheduler", "trainer"} <= {member["name"] for member in report["members"]}
