"""Everything a fit consists of that a Lightning checkpoint leaves out, and the comparison that proves that the rest came back."""

import copy
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

from spotguard.lightning.metrics import capture_logged, capture_metrics, restore_logged, restore_metrics
from spotguard.state.compare import first_difference
from spotguard.state.gradients import capture_gradients, restore_gradients
from spotguard.state.modes import capture_modes, restore_modes
from spotguard.state.rng import capture_rng, restore_rng

__all__ = ["FitState"]

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
                "should_stop": trainer.should_stop,
                "accumulate": trainer.accumulate_grad_batches,
                "validated": dict(epoch_loop.val_loop._seen_batches_per_dataloader),
                "since_validation": now - getattr(trainer, "_last_val_time", now),
                "reloaded": [
                    trainer.fit_loop._last_train_dl_reload_epoch,
                    epoch_loop.val_loop._last_val_dl_reload_epoch,
                ],
                "validation_workers": [getattr(loader, "_iterator", None) is not None for loader in self._validation()],
            },
        }

    def restore_early(self, local: dict[str, Any]) -> None:
        """What decides whether there is anything left to train."""
        self._trainer.should_stop = local["trainer"]["should_stop"]
        self._trainer.accumulate_grad_batches = local["trainer"]["accumulate"]

    def restore(self, checkpoint: dict[str, Any], local: dict[str, Any]) -> list[str]:
        """Put everything back that is not as it was; returns what could not be, in words. Generators come last.

        Lightning has restored the checkpoint a while ago. Hooks that ran since (``on_train_start``, say) may have changed the state, or begun
        afresh what had been restored.
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
        self.restore_early(local)
        saved = local["trainer"]
        epoch_loop.val_loop._seen_batches_per_dataloader.update(saved["validated"])
        trainer._last_val_time = time.monotonic() - saved["since_validation"]
        trainer.fit_loop._last_train_dl_reload_epoch, epoch_loop.val_loop._last_val_dl_reload_epoch = saved["reloaded"]
        return inexact + restore_rng(local["rng"])

    def _prove(self, checkpoint: dict[str, Any]) -> list[str]:
        """Compare what there is with what was saved, give once more what differs, and name what then still does."""
        trainer, strategy = self._trainer, self._trainer.strategy
        inexact = []

        def prove(what: str, saved: Any, read: Callable[[], Any], give: Callable[[Any], Any]) -> None:
            if first_difference(saved, read()) is not None:
                give(copy.deepcopy(saved))
                if (difference := first_difference(saved, read())) is not None:
                    inexact.append(f"{what} did not come back as it was saved: {difference}")

        strict = trainer.lightning_module.strict_loading
        prove(
            "the model",
            checkpoint["state_dict"],
            strategy.lightning_module_state_dict,
            lambda saved: strategy.load_model_state_dict({"state_dict": saved}, strict=strict),
        )
        prove(
            "the optimizers",
            checkpoint["optimizer_states"],
            lambda: [strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers],
            lambda saved: strategy.load_optimizer_state_dict({"optimizer_states": saved}),
        )
        for optimizer in trainer.optimizers:
            # Schedulers warn when they step before their optimizer did; this one has stepped, in an earlier process.
            optimizer._opt_called = True
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for number, (scheduler, saved) in enumerate(zip(schedulers, checkpoint["lr_schedulers"], strict=True)):
            prove(f"scheduler {number}", saved, scheduler.state_dict, scheduler.load_state_dict)
        by_key = {callback.state_key: callback for callback in trainer.callbacks}
        for key, saved in checkpoint["callbacks"].items():
            callback = by_key.get(key)
            if callback is None:
                inexact.append(f"the callback {key} of the checkpoint is not there any more")
            elif self._overridden("state_dict", callback, importlib.import_module(self._host).Callback):
                prove(f"the callback {key}", saved, callback.state_dict, callback.load_state_dict)
        return inexact

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

    def _validation(self) -> list[Any]:
        combined = self._trainer.fit_loop.epoch_loop.val_loop._combined_loader
        return list(combined.flattened) if combined is not None else []

    def _start_workers(self, were_running: list[bool]) -> None:
        """Persistent workers of validation draw a seed when they start, and never again: have them running as they were."""
        for loader, running in zip(self._validation(), were_running, strict=False):
            if running and getattr(loader, "persistent_workers", False) and loader._iterator is None:
                iter(loader)

    def _attributes(self) -> dict[str, Any]:
        """Attributes of the LightningModule that are plain data: ``self.outputs = []``, a counter."""
        found = vars(self._trainer.lightning_module)
        return {name: value for name, value in found.items() if name not in self._known and _is_plain(value)}


def _is_plain(value: Any, depth: int = 0) -> bool:
    if depth > 4:
        return False
    if type(value) in (list, tuple):
        return all(_is_plain(item, depth + 1) for item in value)
    if type(value) is dict:
        return all(isinstance(key, (str, int)) and _is_plain(item, depth + 1) for key, item in value.items())
    return type(value) in Plain
