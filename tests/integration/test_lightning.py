"""What becomes of a run with Lightning: stopped, finished, begun again, gone wrong. Each start is a process of its own."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from pytorch_lightning.tuner.tuning import Tuner

from integration.fits import Model, Samples, Told, at, child, fit, logged, sigterm, steps, trainer, weights
from spotguard import CheckpointStore, EverySeconds, KeepBest, KeepNewest, SpotGuard, TrainState
from spotguard.errors import ConfigError, StateMismatchError
from spotguard.lightning import SpotGuardCallback
from spotguard.state.compare import first_difference

SCRIPT = """
import pytorch_lightning as pl
import torch

class Model(pl.LightningModule):
    def __init__(self, width: int, name: str = "net"):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(4, width)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""

READS = """
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "spotguard":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
from script import Model

model = Model.load_from_checkpoint(sys.argv[1])
print(dict(model.hparams), model.net.weight.sum().item())
"""


def test_the_shard_is_a_checkpoint_of_lightning_that_needs_no_spotguard(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)

    def work(told: Told) -> None:
        sys.path.insert(0, str(tmp_path))
        from script import Model as Script  # type: ignore[import-not-found]

        model = Script(3, name="mine")
        fit(tmp_path, model=model)
        told["sum"] = model.net.weight.sum().item()

    told = child(tmp_path, work).told
    (shard,) = (tmp_path / "run" / "checkpoints").rglob("model.ckpt")
    command = [sys.executable, "-W", "ignore", "-c", READS, str(shard)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip().split("\n")[-1] == f"{{'width': 3, 'name': 'mine'}} {told['sum']}", done.stderr


def test_a_finished_run_that_is_started_again_does_not_train(tmp_path: Path) -> None:
    def again(told: Told) -> None:
        told["batches"] = 0

        class Count(Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                told["batches"] += 1

        guard, trains = fit(tmp_path, Count())
        told["step"] = guard.checkpoint.step if guard.checkpoint else None
        told["metrics"] = {name: value.item() for name, value in trains.callback_metrics.items()}
        told["place"] = (trains.global_step, trains.current_epoch)

    first, second = child(tmp_path, again), child(tmp_path, again)
    assert (first.status, second.status) == (0, 0), second.said
    assert first.told["batches"] == 8
    assert set(first.told["metrics"]) == {"loss", "val_loss"}
    assert second.told == {**first.told, "batches": 0}
    assert steps(tmp_path) == [8]


@pytest.mark.parametrize("first", [{"max_epochs": 1}, {"max_steps": 4, "max_epochs": -1}], ids=["epochs", "steps"])
def test_a_finished_run_that_is_asked_for_more_ends_like_one_that_had_it_all_in_view(
    first: dict[str, Any], tmp_path: Path
) -> None:
    straight, extended = tmp_path / "straight", tmp_path / "extended"
    assert child(straight, lambda _: fit(straight, max_epochs=3)).status == 0
    assert child(extended, lambda _: fit(extended, **first)).status == 0
    left = child(extended, lambda _: fit(extended, max_epochs=3))
    assert left.status == 0, left.said
    assert steps(extended) == [4, 12]
    assert first_difference(weights(straight), weights(extended)) is None


def test_a_fit_that_would_not_begin_at_the_checkpoint_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    assert child(tmp_path, lambda _: fit(tmp_path, max_epochs=1)).status == 0

    def forgets(_: Told) -> None:
        trainer(SpotGuardCallback(tmp_path / "run")).fit(Model())

    left = child(tmp_path, forgets)
    assert left.status == 1
    assert "Pass it on: trainer.fit(..., ckpt_path=guard.resume_path())" in left.said
    assert steps(tmp_path) == [4]
    assert child(tmp_path, lambda _: fit(tmp_path)).status == 0
    assert steps(tmp_path) == [4, 8]


def test_the_path_of_another_callback_is_refused(tmp_path: Path) -> None:
    def mixes(_: Told) -> None:
        fit(tmp_path, max_epochs=1)
        other = SpotGuardCallback(tmp_path / "run")
        path = other.resume_path()
        other.close()
        trainer(SpotGuardCallback(tmp_path / "elsewhere")).fit(Model(), ckpt_path=path)

    left = child(tmp_path, mixes)
    assert left.status == 1
    assert "was made by another callback; pass guard.resume_path() of this one" in left.said


class Watch(Callback):
    """Notes every batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append([trainer.current_epoch, batch_idx, trainer.global_step])


@pytest.mark.parametrize("when", [{"every_n_epochs": 1}, {"every_n_train_steps": 3}, {"monitor": "val_loss"}], ids=str)
def test_a_new_run_may_begin_at_a_checkpoint_of_lightnings_own(when: dict[str, Any], tmp_path: Path) -> None:
    def work(told: Told) -> None:
        theirs = ModelCheckpoint(tmp_path, filename="theirs", **when)
        trainer(theirs, max_epochs=1, enable_checkpointing=True).fit(Model())
        for name, guards in (("without", []), ("with", [SpotGuardCallback(tmp_path / "run")])):
            watch = Watch()
            trainer(*guards, watch).fit(Model(), ckpt_path=str(tmp_path / "theirs.ckpt"))
            told[name] = watch.seen

    left = child(tmp_path, work)
    assert left.status == 0, left.said
    assert left.told["with"] == left.told["without"] != []
    assert steps(tmp_path) == [8]


def test_checkpoints_of_the_users_own_are_written_and_found_beside_ours(tmp_path: Path) -> None:
    def work(told: Told) -> None:
        own = ModelCheckpoint(tmp_path / "own", monitor="val_loss", save_last=True)
        _, trains = fit(tmp_path, own, enable_checkpointing=True)
        told["best"] = trains.test(ckpt_path="best", verbose=False)
        told["last"] = trains.validate(ckpt_path="last", verbose=False)
        trains.predict(ckpt_path="best")
        told["files"] = sorted(path.name for path in (tmp_path / "own").iterdir())

    left = child(tmp_path, work)
    assert left.status == 0, left.said
    assert "last.ckpt" in left.told["files"]
    assert set(left.told["best"][0]) == {"test_loss"}
    assert steps(tmp_path) == [8]


def test_after_a_rollback_the_run_goes_on_from_there(tmp_path: Path) -> None:
    assert child(tmp_path, lambda _: fit(tmp_path, guard={"every": "1 epoch", "keep": 9})).status == 0
    before = weights(tmp_path)
    CheckpointStore(tmp_path / "run").rollback(step=4)
    left = child(tmp_path, lambda _: fit(tmp_path, guard={"keep": 9}))
    assert left.status == 0, left.said
    assert "resumed from 0002-0000000004" in left.said
    assert first_difference(before, weights(tmp_path)) is None


def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(tmp_path: Path) -> None:
    assert child(tmp_path, lambda _: fit(tmp_path, guard={"every": "1 epoch", "keep": 9})).status == 0
    before = weights(tmp_path)
    (shard,) = (tmp_path / "run" / "checkpoints" / "0001-0000000008").rglob("model.ckpt")
    image = bytearray(shard.read_bytes())
    image[len(image) // 2] ^= 1
    shard.chmod(0o600)
    shard.write_bytes(image)
    left = child(tmp_path, lambda _: fit(tmp_path, guard={"keep": 9}))
    assert left.status == 0, left.said
    assert "checkpoint 0001-0000000008 is passed over" in left.said
    assert "resumed from 0001-0000000004" in left.said
    assert first_difference(before, weights(tmp_path)) is None


def test_checkpoints_of_a_fit_are_not_taken_for_those_of_a_plain_loop(tmp_path: Path) -> None:
    def work(_: Told) -> None:
        fit(tmp_path, max_epochs=1)
        with pytest.raises(StateMismatchError), SpotGuard(tmp_path / "run", TrainState(model=Model())):
            pass

    left = child(tmp_path, work)
    assert left.status == 0, left.said


class Slow(Model):
    """Waits for the save before, so that none is skipped."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SpotGuardCallback) and callback._session is not None:
                assert callback._session.writer is not None
                callback._session.writer.drain()


@pytest.mark.parametrize(
    ("every", "saved"),
    [(3, [3, 6, 8]), ("1 epoch", [4, 8]), (EverySeconds(1e-9), [1, 2, 3, 4, 5, 6, 7, 8]), ("10m", [8])],
    ids=str,
)
def test_it_saves_every(every: Any, saved: list[int], tmp_path: Path) -> None:
    left = child(tmp_path, lambda _: fit(tmp_path, model=Slow(), guard={"every": every, "keep": 99}))
    assert left.status == 0, left.said
    assert sorted(set(steps(tmp_path))) == saved


def test_another_callback_can_ask_for_a_save(tmp_path: Path) -> None:
    def work(_: Told) -> None:
        guard = SpotGuardCallback(tmp_path / "run", every=10**9, keep=9)
        asks = at("on_train_batch_end", lambda: guard.save_now(metrics={"mine": 0.5}), 1)
        with pytest.raises(ConfigError, match=r"while Trainer.fit runs only"):
            guard.save_now()
        trainer(guard, asks).fit(Model(), ckpt_path=guard.resume_path())

    left = child(tmp_path, work)
    assert left.status == 0, left.said
    saved = {checkpoint.step: checkpoint.metrics for checkpoint in CheckpointStore(tmp_path / "run").list()}
    assert saved == {2: {"mine": 0.5}, 8: {}}


def test_the_best_by_a_metric_of_the_validation_stay(tmp_path: Path) -> None:
    values = iter([9.0, 1.0, 2.0, 3.0])

    class Measured(Slow):
        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.log("score", next(values))

    keep = KeepBest(2, "score") | KeepNewest(1)
    left = child(tmp_path, lambda _: fit(tmp_path, model=Measured(), max_epochs=4, guard={"keep": keep, "every": 3}))
    assert left.status == 0, left.said
    kept = {item.step: item.metrics.get("score") for item in CheckpointStore(tmp_path / "run").list()}
    assert kept == {8: 1.0, 12: 2.0, 16: None} or kept == {8: 1.0, 12: 2.0, 16: 3.0}
    committed = {event["step"]: event for event in logged(tmp_path, "Committed")} or None
    assert committed is None or {3, 6, 9} <= set(committed)


@pytest.mark.parametrize("validates", [True, False], ids=["after a validation", "where nothing validates"])
def test_a_metric_that_is_never_logged_is_told_once_with_those_that_are(validates: bool, tmp_path: Path) -> None:
    def work(told: Told) -> None:
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            keep = KeepBest(2, "valloss") | KeepNewest(1)
            fit(tmp_path, guard={"keep": keep}, max_epochs=3, **({} if validates else {"limit_val_batches": 0}))
        told["said"] = [str(item.message) for item in caught if "valloss" in str(item.message)]

    left = child(tmp_path, work)
    assert left.status == 0, left.said
    (said,) = left.told["said"]
    assert said.endswith("There is loss, val_loss" if validates else "There is loss")


def test_a_metric_that_comes_with_save_now_counts_as_logged(tmp_path: Path) -> None:
    def work(told: Told) -> None:
        import warnings

        guard = SpotGuardCallback(tmp_path / "run", keep=KeepBest(1, "mine") | KeepNewest(1))
        asks = at("on_validation_end", lambda: guard.save_now(metrics={"mine": 0.5}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(guard, asks, num_sanity_val_steps=0).fit(Model(), ckpt_path=guard.resume_path())
        told["said"] = [str(item.message) for item in caught if "keep=" in str(item.message)]

    left = child(tmp_path, work)
    assert left.told == {"said": []}, left.said
    assert [item.metrics for item in CheckpointStore(tmp_path / "run").list()] == [{"mine": 0.5}, {}]


def test_fast_dev_run_saves_nothing_and_says_so(tmp_path: Path) -> None:
    def work(told: Told) -> None:
        fit(tmp_path, fast_dev_run=True)
        told["new run"] = steps(tmp_path)
        fit(tmp_path, max_epochs=1)
        fit(tmp_path, fast_dev_run=True)
        told["old run"] = steps(tmp_path)
        fit(tmp_path)

    left = child(tmp_path, work)
    assert left.status == 0, left.said
    assert left.told == {"new run": [], "old run": [4]}
    assert left.said.count("spotguard: fast_dev_run: nothing is saved") == 2
    assert steps(tmp_path) == [4, 8]


def test_validate_test_and_predict_are_not_touched(tmp_path: Path) -> None:
    def work(told: Told) -> None:
        trains, model = trainer(SpotGuardCallback(tmp_path / "run")), Model()
        trains.validate(model, verbose=False)
        trains.test(model, verbose=False)
        trains.predict(model)
        told["run"] = (tmp_path / "run").exists()

    left = child(tmp_path, work)
    assert left.told == {"run": False}, left.said


def test_a_search_for_the_learning_rate_before_the_fit_is_no_part_of_the_run(tmp_path: Path) -> None:
    def work(told: Told) -> None:
        pl.seed_everything(3, verbose=False)
        guard, model = SpotGuardCallback(tmp_path / "run", every=3, keep=9), Slow()
        trains = trainer(guard, default_root_dir=tmp_path)
        Tuner(trains).lr_find(model, num_training=10, attr_name="", update_attr=False)
        told["during"] = steps(tmp_path)
        trains.fit(model, ckpt_path=guard.resume_path())
        told["after"] = trains.global_step

    for _ in range(2):
        left = child(tmp_path, work)
        assert left.status == 0, left.said
    assert left.told == {"during": [3, 6, 8], "after": 8}
    assert steps(tmp_path) == [3, 6, 8]


def test_a_search_that_undoes_the_restore_is_refused(tmp_path: Path) -> None:
    class Searched(Model):
        lr = 0.1

    def work(_: Told) -> None:
        finder = LearningRateFinder(num_training_steps=10, attr_name="lr")
        fit(tmp_path, finder, at("on_train_batch_start", sigterm, 2), model=Searched())

    assert child(tmp_path, work).status == 143
    left = child(tmp_path, work)
    assert left.status == 1
    assert "was restored and then undone" in left.said
    assert "leave them out where guard.resume_path() is not None" in left.said
    assert child(tmp_path, lambda _: fit(tmp_path, model=Searched())).status == 0


def test_one_callback_guards_one_fit_and_another_one_may_follow(tmp_path: Path) -> None:
    def work(told: Told) -> None:
        guard, trains = fit(tmp_path, max_epochs=1)
        with pytest.raises(ConfigError, match="make a new one for each fit"):
            trains.fit(Model(), ckpt_path=guard.resume_path())
        fit(tmp_path)
        told["steps"] = steps(tmp_path)

    left = child(tmp_path, work)
    assert left.told == {"steps": [4, 8]}, left.said


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt], ids=lambda error: error.__name__)
@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start"])
def test_a_fit_that_fails_before_training_lets_go_of_the_run(
    hook: str, error: type[BaseException], tmp_path: Path
) -> None:
    def fails() -> None:
        raise error

    def work(told: Told) -> None:
        with pytest.raises((ZeroDivisionError, SystemExit)):
            fit(tmp_path, at(hook, fails))
        fit(tmp_path)
        told["steps"] = steps(tmp_path)

    left = child(tmp_path, work)
    assert left.told == {"steps": [8]}, left.said


class Collects(Model):
    """Keeps plain data of its own."""

    def __init__(self, threshold: float = 0.5, untouched: str = "as given") -> None:
        super().__init__()
        self.outputs: list[torch.Tensor] = []
        self.seen = 0
        self.threshold, self.untouched = threshold, untouched
        self.table = {"worst": 0.0}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.seen += 1
        self.outputs.append(loss.detach())
        self.table["worst"] = max(self.table["worst"], loss.item())
        self.later = self.seen * 2
        return loss


def test_plain_attributes_of_the_module_come_back_and_those_that_training_leaves_alone_are_the_users(
    tmp_path: Path,
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"

    def script(folder: Path, told: Told, model: Collects, *callbacks: Any) -> None:
        fit(folder, *callbacks, model=model)
        told["attributes"] = {
            "outputs": [value.item() for value in model.outputs],
            **{name: getattr(model, name) for name in ("seen", "table", "later", "threshold", "untouched")},
        }

    whole = child(straight, lambda told: script(straight, told, Collects()))
    first = child(stopped, lambda told: script(stopped, told, Collects(), at("on_train_batch_start", sigterm, 2)))
    assert first.status == 143, first.said
    again = child(stopped, lambda told: script(stopped, told, Collects(0.7, "changed")))
    assert again.status == 0, again.said
    assert again.told["attributes"] == {**whole.told["attributes"], "threshold": 0.7, "untouched": "changed"}


class WithExtra(Model):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameters_that_could_not_be_read_back_are_refused_before_training(tmp_path: Path) -> None:
    def work(told: Told) -> None:
        told["trained"] = 0

        class Count(Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                told["trained"] += 1

        fit(tmp_path, Count(), model=WithExtra(Samples()))

    left = child(tmp_path, work)
    assert (left.status, left.told) == (1, {"trained": 0})
    assert "integration.fits.Samples" in left.said
    assert "torch.serialization.add_safe_globals([...])" in left.said


def test_a_class_that_is_declared_safe_passes_among_the_hyperparameters(tmp_path: Path) -> None:
    def work(_: Told, epochs: int) -> None:
        torch.serialization.add_safe_globals([Samples])
        fit(tmp_path, model=WithExtra(Samples(5)), max_epochs=epochs)

    for epochs in (1, 2):
        left = child(tmp_path, functools.partial(work, epochs=epochs))
        assert left.status == 0, left.said
    assert steps(tmp_path) == [4, 8]


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_batch_end"])
def test_a_failed_fit_says_that_it_has_failed(hook: str, tmp_path: Path) -> None:
    def work(told: Told) -> None:
        def fail() -> None:
            raise ValueError("the loss is NaN")

        with pytest.raises(ValueError, match="NaN"):
            fit(tmp_path, at(hook, fail))
        word = json.loads((tmp_path / "run/exit.json").read_bytes())
        told["word"] = [word["state"], word["detail"]]

    left = child(tmp_path, work)
    assert left.told == {"word": ["failed", "ValueError: the loss is NaN"]}, left.said
