"""What the callback for Lightning refuses, in words that help."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelPruning, StochasticWeightAveraging
from pytorch_lightning.strategies import DeepSpeedStrategy, SingleDeviceStrategy

from spotguard import SpotGuard, TrainState
from spotguard.errors import ConfigError, MissingExtraError, StateMismatchError
from spotguard.lightning import SpotGuardCallback
from spotguard.lightning._host import check_release, host_of
from spotguard.lightning.fit import check_trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(**{**quiet, **options})


NEITHER = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
import spotguard.lightning
"""


def test_without_lightning_the_extra_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", NEITHER], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("spotguard.errors.MissingExtraError: neither lightning nor pytorch_lightning is installed")
    assert last.endswith("pip install 'spotguard[lightning]'")


@pytest.mark.parametrize("version", ["1.9.5", "2.1.4", "2.7.0", "2.7.0.dev20260101", "3.0"])
def test_a_release_that_is_not_known_is_refused_with_the_range(version: str) -> None:
    wanted = re.escape(f"pytorch_lightning {version} is installed, spotguard.lightning needs >=2.2,<2.7")
    with pytest.raises(MissingExtraError, match=wanted):
        check_release("pytorch_lightning", version)


@pytest.mark.parametrize("version", ["2.2.0", "2.5.1.post0", "2.6.6", "2.6.0rc1"])
def test_a_release_in_the_range_passes(version: str) -> None:
    check_release("pytorch_lightning", version)


def test_something_that_is_no_trainer_is_told_apart() -> None:
    with pytest.raises(TypeError, match="object is no Trainer of Lightning"):
        host_of(object())


def test_a_trainer_of_the_users_own_class_belongs_to_its_host() -> None:
    class Mine(pl.Trainer):
        pass

    assert host_of(Mine(accelerator="cpu", logger=False)) == "pytorch_lightning"


def test_several_devices_are_refused(tmp_path: Path) -> None:
    several = trainer(devices=2, strategy="ddp")
    with pytest.raises(ConfigError, match=r"2 ranks: this release guards a single process.*Use Trainer\(devices=1\)"):
        SpotGuardCallback(tmp_path).setup(several, pl.LightningModule(), "fit")
    assert list(tmp_path.iterdir()) == []


def test_one_of_several_ranks_is_refused_before_it_claims_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 ranks: this release guards a single process"):
        SpotGuardCallback(tmp_path).resume_path()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("callback", "remedy"),
    [
        (StochasticWeightAveraging(1e-2), "StochasticWeightAveraging .* Use WeightAveraging"),
        (ModelPruning("l1_unstructured", amount=0.5), "ModelPruning saves a model without its masks"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_callbacks_that_cannot_be_brought_back_are_refused(callback: Any, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=remedy):
        SpotGuardCallback(tmp_path).setup(trainer(callbacks=[callback]), pl.LightningModule(), "fit")
    assert list(tmp_path.iterdir()) == []


class Sharded(SingleDeviceStrategy):
    """Has checkpoints of its own kind, as DeepSpeed and FSDP do."""

    load_checkpoint = DeepSpeedStrategy.load_checkpoint


def test_strategies_with_checkpoints_of_their_own_are_refused() -> None:
    with pytest.raises(ConfigError, match="Sharded writes checkpoints of its own kind"):
        check_trainer(trainer(strategy=Sharded(device="cpu")), pl.strategies.Strategy)


def test_checkpoints_of_a_plain_loop_are_not_taken_for_those_of_a_fit(tmp_path: Path) -> None:
    with SpotGuard(tmp_path, TrainState(model=pl.LightningModule())) as guard:
        list(guard.steps(2))
    with pytest.raises(StateMismatchError, match=r"was not saved by a SpotGuardCallback of Lightning.*URI of its own"):
        SpotGuardCallback(tmp_path).resume_path()
    with SpotGuard(tmp_path, TrainState(model=pl.LightningModule())) as guard:  # the refused one has let go of it
        assert list(guard.steps(3)) == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"every": "often"}, "often"),
        ({"keep": 0}, "keep=0"),
        ({"exit_code": 0}, "exit_code=0"),
        ({"notices": [1]}, "notice source"),
    ],
    ids=str,
)
def test_arguments_are_checked_when_the_callback_is_made(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        SpotGuardCallback(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_held_by_one_callback_until_it_is_closed(tmp_path: Path) -> None:
    first = SpotGuardCallback(tmp_path)
    assert first.resume_path() is None
    with pytest.raises(ConfigError, match="is guarded by another"):
        SpotGuardCallback(tmp_path).resume_path()
    first.close()
    first.close()
    second = SpotGuardCallback(tmp_path)
    assert second.resume_path() is None
    second.close()


def test_a_save_cannot_be_asked_for_outside_of_a_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"while Trainer.fit runs only"):
        SpotGuardCallback(tmp_path).save_now()
