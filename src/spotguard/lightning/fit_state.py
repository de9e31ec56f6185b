"""Everything a fit consists of that a Lightning checkpoint leaves out, and the comparison that proves that the rest came back."""

import copy
import importlib
import time
from typing import Any

import torch

from spotguard.lightning.metrics import capture_logged, capture_metrics, restore_logged, restore_metrics
from spotguard.state.compare import first_difference
from spotguard.state.gradients import capture_gradients, restore_gradients
from spotguard.state.modes import capture_modes, restore_modes
from spotguard.state.rng import capture_rng, restore_rng

__all__ = ["FitState"]

_SAVED_AT = (
    "_last_global_step_saved",
    "_last_checkpoint_saved",
)  # by these a ModelCheckpoint does not save one step twice
Plain = (bool, int, float, str, type(None), torch.Tensor)


class FitState:
    """Takes and gives back the state of one fit.

    Args:
        trainer: Its trainer.
        host: Name of the package that the trainer belongs to.
    """

    def __init__(self, trainer: Any, host: str) -> None:
        self._trainer, self._host = trainer, host
        self._call = importlib.import_module(f"{host}.trainer.call")
        self._overridden = importlib.import_module(f"{host}.utilities.model_helpers").is_overridden
        self._reference: dict[str, Any] | None = None
        bare = importlib.import_module(host).LightningModule()
        self._known = {*vars(bare), "_hparams", "_hparams_initial", "_hparams_name"}
        self._at_start = copy.deepcopy(self._attributes())

    def checkpoint(self) -> dict[str, Any]:
        """What ``trainer.save_checkpoint`` would write, live."""
        saved: dict[str, Any] = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        return saved

    def local(self) -> dict[str, Any]:
        """The rest, live."""
        trainer, module, epoch_loop = self._trainer, self._trainer.lightning_module, self._trainer.fit_loop.epoch_loop
        now = time.monotonic()
        return {
            "rng": capture_rng(),
            "gradients": capture_gradients(self._members()) if self._gradients_count() else {},
            "modes": capture_modes({"module": module}),
            "logged": capture_logged(trainer),
            "metrics": capture_metrics(module),
            "attributes": {
                name: value
                for name, value in self._attributes().items()
                if name not in self._at_start or first_difference(value, self._at_start[name]) is not None
            },
            "trainer": {
                "saved_at": [[getattr(callback, name, None) for name in _SAVED_AT] for callback in self._checkpoints()],
                "should_stop": trainer.should_stop,
                "accumulate": trainer.accumulate_grad_batches,
                "validated": dict(epoch_loop.val_loop._seen_batches_per_dataloader),
                **({"since_validation": now - trainer._last_val_time} if self._by_time() else {}),
                **({"reloaded": self._reloaded()} if trainer.reload_dataloaders_every_n_epochs else {}),
                "validation_workers": [place for place, loader in enumerate(self._validation()) if _runs(loader)],
            },
        }

    def remember(self, checkpoint: dict[str, Any]) -> list[str]:
        """Lightning has just restored a checkpoint: keep what it made of it, and return what is not what had been saved, in words.

        Hooks may save and restore something else on purpose: an average of the weights in the place of the weights.
        """
        module, callbacks = self._trainer.lightning_module, self._trainer.callbacks
        hooks = [(module, "on_load_checkpoint"), *((callback, "on_load_checkpoint") for callback in callbacks)]
        changed = any(self._overridden(name, owner, self._parent(owner)) for owner, name in hooks)
        here, inexact = self._live(), []
        self._reference = {}
        for name, (what, saved) in self._saved(checkpoint).items():
            difference = first_difference(saved, here[name])
            if difference is not None and not changed:  # it was given to a model that has another precision by now
                self._give(name, saved)
                here = self._live()
                difference = first_difference(saved, here[name])
            self._reference[name] = saved if difference is None else copy.deepcopy(here[name])
            if difference is not None and not changed:
                inexact.append(f"{what} did not come back as saved: {difference}")
        return inexact

    def restore_early(self, local: dict[str, Any]) -> None:
        """What decides whether there is anything left to train."""
        self._trainer.should_stop = local["trainer"]["should_stop"]

    def restore(self, checkpoint: dict[str, Any], local: dict[str, Any]) -> list[str]:
        """Put everything back that is not as it was; returns what could not be, in words. Generators come last.

        Lightning has restored the checkpoint a while ago. Hooks that ran since (``on_train_start``, say) may have changed the state, or
        begun afresh what had been restored.
        """
        inexact = self._prove(checkpoint)
        self._start_workers(local["trainer"]["validation_workers"])
        trainer, module, epoch_loop = self._trainer, self._trainer.lightning_module, self._trainer.fit_loop.epoch_loop
        restore_modes({"module": module}, local["modes"])
        restore_gradients(self._members(), local["gradients"])
        restore_logged(trainer, self._host, local["logged"])
        inexact += restore_metrics(module, local["metrics"])
        for name, value in local["attributes"].items():
            setattr(module, name, copy.deepcopy(value))
        for callback, values in zip(self._checkpoints(), local["trainer"]["saved_at"], strict=False):
            for name, value in zip(_SAVED_AT, values, strict=True):
                setattr(callback, name, value)
        self.restore_early(local)
        saved = local["trainer"]
        trainer.accumulate_grad_batches = saved["accumulate"]
        epoch_loop.val_loop._seen_batches_per_dataloader.update(saved["validated"])
        if self._by_time() and "since_validation" in saved:
            trainer._last_val_time = time.monotonic() - saved["since_validation"]
        if "reloaded" in saved:
            trainer.fit_loop._last_train_dl_reload_epoch, epoch_loop.val_loop._last_val_dl_reload_epoch = saved[
                "reloaded"
            ]
        return inexact + restore_rng(local["rng"])

    def _prove(self, checkpoint: dict[str, Any]) -> list[str]:
        """Compare what there is with what was restored, and give once more what differs; returns what then still does, in words."""
        assert self._reference is not None, "remembered"
        inexact = []
        for name, reference in self._reference.items():
            if first_difference(reference, self._live()[name]) is not None:
                self._give(name, reference)
                if (difference := first_difference(reference, self._live()[name])) is not None:
                    inexact.append(
                        f"{name}: changed on the way to the checkpoint, and not to be put back: {difference}"
                    )
        self._reference = None  # release memory
        for optimizer in self._trainer.optimizers:
            # Schedulers warn when they step before their optimizer did; this one has stepped, in an earlier process.
            optimizer._opt_called = True
        return inexact + self._prove_callbacks(checkpoint["callbacks"])

    def _give(self, name: str, saved: Any) -> None:
        """Load one part of what `_saved` names."""
        strategy, strict, saved = (
            self._trainer.strategy,
            self._trainer.lightning_module.strict_loading,
            copy.deepcopy(saved),
        )
        if name == "model":
            strategy.load_model_state_dict({"state_dict": saved}, strict=strict)
        elif name == "optimizers":
            strategy.load_optimizer_state_dict({"optimizer_states": saved})
        else:
            for config, state in zip(self._trainer.lr_scheduler_configs, saved, strict=True):
                config.scheduler.load_state_dict(state)

    def _prove_callbacks(self, states: dict[str, Any]) -> list[str]:
        by_key = {callback.state_key: callback for callback in self._trainer.callbacks}
        inexact = []
        for key, saved in states.items():
            callback = by_key.get(key)
            if callback is None:
                inexact.append(f"the callback {key} of the checkpoint is not there any more")
                continue
            if not self._overridden("state_dict", callback, self._parent(callback)):
                continue
            if _tells_time(callback):
                continue
            if first_difference(saved, callback.state_dict()) is not None:
                callback.load_state_dict(copy.deepcopy(saved))
            here = callback.state_dict()
            if here.get("dirpath") != saved.get("dirpath"):
                inexact.append(
                    f"{type(callback).__name__} begins afresh, for its folder was {saved.get('dirpath')} and is {here.get('dirpath')}. "
                    "Give it a dirpath, or the logger a version, that is the same at every start"
                )
                continue
            for name, value in saved.items():  # some of Lightning's own tell more than they take back
                if name in vars(callback) and first_difference(value, here.get(name)) is not None:
                    setattr(callback, name, copy.deepcopy(value))
            if (difference := first_difference(saved, callback.state_dict())) is not None:
                inexact.append(f"the callback {key} did not come back as it was saved: {difference}")
        return inexact

    def _saved(self, checkpoint: dict[str, Any]) -> dict[str, tuple[str, Any]]:
        return {
            "model": ("the model", checkpoint["state_dict"]),
            "optimizers": ("the optimizers", checkpoint["optimizer_states"]),
            "schedulers": ("the learning rate schedules", checkpoint["lr_schedulers"]),
        }

    def _live(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "model": trainer.strategy.lightning_module_state_dict(),
            "optimizers": [trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }

    def _parent(self, owner: Any) -> Any:
        package = importlib.import_module(self._host)
        return package.LightningModule if owner is self._trainer.lightning_module else package.Callback

    def _members(self) -> dict[str, Any]:
        return {
            "module": self._trainer.lightning_module,
            **{f"optimizer{number}": optimizer for number, optimizer in enumerate(self._trainer.optimizers)},
        }

    def _gradients_count(self) -> bool:
        """Whether gradients outlive the boundary: not where Lightning is about to clear them itself."""
        module = self._trainer.lightning_module
        clears = module.automatic_optimization and not self._overridden("optimizer_zero_grad", module)
        epoch_loop = self._trainer.fit_loop.epoch_loop
        over = epoch_loop._accumulated_batches_reached() or epoch_loop._num_ready_batches_reached()
        return not (clears and over)

    def _reloaded(self) -> list[float]:
        fit_loop = self._trainer.fit_loop
        return [fit_loop._last_train_dl_reload_epoch, fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch]

    def _by_time(self) -> bool:
        """Whether validation is due by the clock (Lightning 2.6 and later)."""
        return getattr(self._trainer, "_val_check_time_interval", None) is not None

    def _checkpoints(self) -> list[Any]:
        return [callback for callback in self._trainer.checkpoint_callbacks if hasattr(callback, _SAVED_AT[0])]

    def _validation(self) -> list[Any]:
        combined = self._trainer.fit_loop.epoch_loop.val_loop._combined_loader
        return list(combined.flattened) if combined is not None else []

    def _start_workers(self, running: list[int]) -> None:
        """Persistent workers of validation draw a seed when they start, and never again: have them running as they were."""
        if running and not self._validation():
            self._trainer.validating = True
            self._trainer.fit_loop.epoch_loop.val_loop.setup_data()
            self._trainer.training = True
        for place, loader in enumerate(self._validation()):
            if place in running and not _runs(loader):
                iter(loader)

    def _attributes(self) -> dict[str, Any]:
        """Attributes of the LightningModule that are plain data: ``self.outputs = []``, a counter."""
        found = vars(self._trainer.lightning_module)
        return {name: value for name, value in found.items() if name not in self._known and _is_plain(value)}


def _runs(loader: Any) -> bool:
    """Whether it has persistent workers, and they are running."""
    return bool(getattr(loader, "persistent_workers", False)) and loader._iterator is not None


def _tells_time(callback: Any) -> bool:
    """Whether the state of a callback is never twice the same, as that of a `Timer`."""
    timer = any(base.__name__ == "Timer" for base in type(callback).__mro__)
    return timer or first_difference(callback.state_dict(), callback.state_dict()) is not None


def _is_plain(value: Any, depth: int = 0) -> bool:
    if depth > 4:
        return False
    if type(value) in (list, tuple):
        return all(_is_plain(item, depth + 1) for item in value)
    if type(value) is dict:
        return all(isinstance(key, (str, int)) and _is_plain(item, depth + 1) for key, item in value.items())
    return type(value) in Plain
