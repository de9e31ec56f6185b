"""What the Trainer itself remembers: where it stands, what it has logged, the loss since then, and its callbacks."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from spotguard.transformers._host import local_of

__all__ = ["TrainerRecord"]

# Of this start, not of the run.
_OF_THIS_START = {"max_steps", "num_train_epochs", "is_local_process_zero", "is_world_process_zero"}
_OF_THIS_START |= {"is_hyper_param_search", "trial_name", "trial_params"}
_KEPT_APART = {"log_history", "stateful_callbacks", "best_model_checkpoint"}
_COUNTERS = ("_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step", "current_flos")


class TrainerRecord:
    """Makes the memory of a Trainer a member of the state.

    What clocks and memory meters gave is kept apart: it is no part of what two runs can have in common.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._callbacks: dict[str, Any] = {}
        self._lost: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values and one tensor."""
        trainer = self._trainer
        counters = {name: getattr(trainer, name) for name in _COUNTERS if hasattr(trainer, name)}
        loss = self._loss()
        return {
            "state": {**_plain(self._fields()), "log_history": [_timeless(line) for line in self._log()]},
            "best": self._best(),
            "counters": _plain(counters),
            "loss": None if loss is None else loss.detach(),
            "callbacks": _plain(self._exported()),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it back, where the trainer of this release keeps it."""
        trainer, state = self._trainer, self._trainer.state
        for name, value in saved["state"].items():
            if hasattr(state, name):
                setattr(state, name, value)
        state.best_model_checkpoint = self._found(saved["best"])
        self._lost = saved["best"] if state.best_model_checkpoint is None else None
        state.log_history = [dict(line) for line in saved["state"]["log_history"]]
        loss = self._loss()
        if loss is not None and saved["loss"] is not None:
            loss.copy_(saved["loss"])
            for name, value in saved["counters"].items():
                setattr(trainer, name, value)
        else:
            trainer._globalstep_last_logged = state.global_step  # noqa: SLF001 - so that the mean is one of what is known
        self._callbacks = saved["callbacks"]
        control = trainer.control  # the Trainer looks for it when it saves; its flags are those of this start
        state.stateful_callbacks = {
            **json.loads(json.dumps(saved["callbacks"])),
            type(control).__name__: control.state(),
        }
        self.restore_callbacks()

    def restore_callbacks(self) -> None:
        """Give callbacks that tell their state, such as `EarlyStoppingCallback`, the state they had."""
        waiting = {name: list(_listed(states)) for name, states in self._callbacks.items()}
        for callback in self._tellers():
            if states := waiting.get(type(callback).__name__):
                for name, value in states.pop(0).get("attributes", {}).items():
                    setattr(callback, name, value)

    def not_restored(self) -> list[str]:
        """What does not come back, in words."""
        found = []
        if self._lost is not None:
            found.append(
                f"the Trainer's own checkpoint {self._lost}, the best one so far, is not in output_dir any more: load_best_model_at_end "
                "cannot go back to it. No harm is done if a better one is still to come"
            )
        if self._loss() is None:
            found.append(
                "the next 'loss' in log_history, and 'train_loss' at the end, are means over the steps since this resume"
            )
        return found

    def clocks(self) -> list[dict[str, Any]]:
        """What each line of the log says of time and memory."""
        return [{name: value for name, value in line.items() if _is_clock(name)} for line in self._log()]

    def set_clocks(self, clocks: list[dict[str, Any]]) -> None:
        """Put it back into the lines."""
        for line, values in zip(self._trainer.state.log_history, clocks, strict=True):
            line.update(values)

    def to_resume_from(self, saved: Mapping[str, Any], clocks: list[dict[str, Any]]) -> dict[str, Any]:
        """What ``trainer_state.json`` has to say for the Trainer to begin where the checkpoint was made."""
        lines = [{**line, **values} for line, values in zip(saved["state"]["log_history"], clocks, strict=True)]
        best, callbacks = self._found(saved["best"]), saved["callbacks"]
        return {
            **saved["state"],
            "log_history": lines,
            "stateful_callbacks": callbacks,
            "best_model_checkpoint": best,
        }

    def settle(self) -> None:
        """The Trainer has counted the last part of the loss into the total: it must not be counted once more."""
        if (loss := self._loss()) is not None:
            loss.zero_()

    def undo_summary(self) -> None:
        """A finished run was started again: it has one summary, the one from its end."""
        del self._trainer.state.log_history[-1:]

    def _loss(self) -> torch.Tensor | None:
        """The loss since the last line of the log, live: an attribute, or before transformers 5 a local variable of the loop."""
        loss = getattr(self._trainer, "_tr_loss", None)
        if loss is None:
            loss = local_of(self._trainer, "tr_loss")
        return loss if isinstance(loss, torch.Tensor) else None

    def _fields(self) -> dict[str, Any]:
        fields = {field.name for field in dataclasses.fields(self._trainer.state)} - _OF_THIS_START - _KEPT_APART
        return {name: getattr(self._trainer.state, name) for name in sorted(fields)}

    def _best(self) -> str | None:
        """The Trainer's own best checkpoint, seen from its output directory, which may have another name at the next start."""
        best = self._trainer.state.best_model_checkpoint
        return self._lost if best is None else os.path.relpath(best, self._trainer.args.output_dir)

    def _found(self, best: str | None) -> str | None:
        path = None if best is None else Path(self._trainer.args.output_dir, best)
        return str(path) if path is not None and path.is_dir() else None

    def _log(self) -> list[dict[str, Any]]:
        return self._trainer.state.log_history or []

    def _tellers(self) -> Iterator[Any]:
        """Callbacks that are `ExportableState`; other things with a method ``state`` are not asked."""
        for callback in self._trainer.callback_handler.callbacks:
            if callable(getattr(callback, "state", None)) and hasattr(type(callback), "from_state"):
                yield callback

    def _exported(self) -> dict[str, Any]:
        """In the form of ``TrainerState.stateful_callbacks``."""
        found: dict[str, Any] = {}
        for teller in self._tellers():
            name, told = type(teller).__name__, teller.state()
            found[name] = [*_listed(found[name]), told] if name in found else told
        return found


def _listed(states: Any) -> list[Any]:
    return states if isinstance(states, list) else [states]


def _is_clock(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second")) or "_mem_" in name


def _timeless(line: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): None if _is_clock(name) else value for name, value in _plain(dict(line)).items()}


def _plain(tree: Any) -> Any:
    """As it would come back from the JSON that the Trainer writes."""
    return json.loads(json.dumps(tree, default=lambda value: value.item() if hasattr(value, "item") else str(value)))
