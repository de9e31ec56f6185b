"""One call of ``Trainer.train`` under guard: its boundaries, its state, and the way back to the place of a checkpoint.

::

    train()             fetch the batches of a step       <- (and one more, to know which is the last)
                        on_step_begin                     <- boundary
                        forward, backward, optimizer, scheduler
                        on_step_end, log, evaluate, save

`on_step_end` would be too early: what is logged and evaluated there belongs to the step, and would be lost. At `on_step_begin` it is all
done, but batches of the next step have been fetched, and random numbers been drawn for them; `data` knows how to fetch them again.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spotguard.errors import ConfigError, StateMismatchError
from spotguard.guard.console import say
from spotguard.guard.saver import RANK, Place
from spotguard.guard.session import Loaded, Session
from spotguard.state.train_state import TrainState
from spotguard.transformers._host import local_of
from spotguard.transformers.data import TrainingBatches, shield_workers
from spotguard.transformers.record import TrainerRecord

__all__ = ["GuardedTraining", "check_payload", "check_trainer"]

_PAST_THE_END = 10**40  # steps; more than any number of epochs has


class GuardedTraining:
    """Follows one training.

    Args:
        trainer: Its trainer.
        session: The attempt.
        loaded: What there is to resume from.
    """

    def __init__(self, trainer: Any, session: Session, loaded: Loaded | None) -> None:
        self._trainer, self._session, self._loaded = trainer, session, loaded
        self._record = TrainerRecord(trainer)
        self._data: TrainingBatches | None = None
        self._state: TrainState | None = None
        self._finished = loaded is not None and loaded.manifest.finished and not self._asks_for_more(loaded)
        self._arrived = False

    @contextlib.contextmanager
    def guarding(self) -> Iterator[str | None]:
        """Around ``train()``; gives the directory that the Trainer is to resume from, or None.

        All that is in there is where the run stands. State is put back by us: checked, compared, and without a second copy on a disk.
        """
        trainer, loaded = self._trainer, self._loaded
        evaluates_first = trainer.args.eval_on_start
        with contextlib.ExitStack() as undo:
            undo.callback(setattr, trainer.args, "eval_on_start", evaluates_first)
            undo.callback(self._let_go)
            shield_workers(trainer, undo)
            if loaded is None:
                yield None
                return
            folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="spotguard-"))
            standing = self._record.to_resume_from(loaded.payload["trainer"], loaded.payload[RANK]["clocks"])
            if self._finished:
                standing["global_step"] = _PAST_THE_END  # or it would train a step more than it was asked for
            Path(folder, "trainer_state.json").write_text(json.dumps(standing), encoding="utf-8")
            trainer.args.eval_on_start = False  # that was done at the first start
            self._skip_loading(folder, undo)
            yield folder

    def begin(self, loader: Any) -> None:
        """Model, optimizer and loader are built, and no batch has been fetched."""
        trainer, session, loaded = self._trainer, self._session, self._loaded
        scaler = getattr(trainer.accelerator, "scaler", None)
        self._state = state = TrainState(
            model=trainer.model,
            optimizer=trainer.optimizer,
            scheduler=trainer.lr_scheduler,
            scaler=scaler,
            trainer=self._record,
        )
        state.check()
        self._data = TrainingBatches(loader, trainer.args.gradient_accumulation_steps)
        self._check_epoch()
        if loaded is not None:
            local = loaded.payload[RANK]
            members = {name: tree for name, tree in loaded.payload.items() if name != RANK}
            inexact = state.load_members(members)
            self._record.set_clocks(local["clocks"])
            inexact += self._record.not_restored()
            inexact += self._data.load(local["data"], local["progress"]["batch"])
            self._loaded = loaded._replace(payload={RANK: local})
            session.resumed(loaded, inexact)
            self._check_room()
        session.begin(loaded.manifest if loaded is not None else None)
        if self._finished:
            say(
                f"this run finished at step {trainer.state.global_step}; to train on, ask for more by max_steps or num_train_epochs, "
                "or use another URI"
            )

    def boundary(self) -> None:
        """Everything of the step before is done, and the batches of the next one have been fetched."""
        session = self._session
        if self._arrived:
            session.saver.release()
            session.boundary()
        else:
            self._arrive()
        if self._evaluates_after_this_step() and self._trainer.state.global_step > 0:
            session.saver.hold(self.place())

    def in_evaluation(self) -> None:
        """A place to leave an evaluation at, if there is a snapshot of the boundary before its step."""
        session = self._session
        if self._arrived and session.saver.held is not None and (notice := session.notice()) is not None:
            session.answer(notice)

    def end(self) -> None:
        """The training has come to its end."""
        if self._finished:
            self._record.undo_summary()
        elif self._data is not None:
            self._record.settle()
            if self.place().batch == 0:
                self._data.close_pass()
            self._session.saver.release()
        self._session.finish(save=not self._finished)

    def place(self) -> Place:
        """Where the training is."""
        state = self._trainer.state
        epoch = int(state.epoch or 0)
        batch = round(((state.epoch or 0) - epoch) * self._batches_in_epoch())
        return Place(state.global_step, epoch, batch, state.global_step)

    def trees(self) -> dict[str, Any]:
        """Everything that is saved, live."""
        assert self._state is not None, "begin() comes first"
        assert self._data is not None, "begin() comes first"
        place, args = self.place(), self._trainer.args
        progress = {
            "step": place.step,
            "epoch": place.epoch,
            "batch": place.batch,
            "max_steps": args.max_steps,
            "num_train_epochs": args.num_train_epochs,
        }
        return {
            **self._state.state_dicts(),
            RANK: {
                **self._state.local(),
                "data": self._data.state(place.batch),
                "progress": progress,
                "clocks": self._record.clocks(),
            },
        }

    def _arrive(self) -> None:
        """The first step of this attempt is about to begin: the generators go to where they were."""
        self._arrived = True
        if self._loaded is not None and self._state is not None:
            local = self._loaded.payload[RANK]
            self._record.restore_callbacks()
            self._state.load_local(local)
            self._loaded = None
        self._session.turn_back()

    def _evaluates_after_this_step(self) -> bool:
        args, state = self._trainer.args, self._trainer.state
        strategy, following = str(getattr(args.eval_strategy, "value", args.eval_strategy)), state.global_step + 1
        if strategy == "steps":
            due = following % state.eval_steps == 0 or following >= state.max_steps
            return bool(due and args.eval_delay <= following)
        if strategy == "epoch":
            return bool(self.place().batch + args.gradient_accumulation_steps >= self._batches_in_epoch())
        return False

    def _batches_in_epoch(self) -> int:
        batches = self._data.count if self._data is not None else None
        return batches or self._trainer.state.max_steps * self._trainer.args.gradient_accumulation_steps

    def _asks_for_more(self, loaded: Loaded) -> bool:
        """Whether a finished run is asked to go on."""
        args, then = self._trainer.args, loaded.payload[RANK]["progress"]
        if args.max_steps > 0:
            return bool(args.max_steps > loaded.manifest.step)
        return bool(then["max_steps"] <= 0 and args.num_train_epochs > then["num_train_epochs"])

    def _check_epoch(self) -> None:
        """Releases around 4.44 take the last step of an epoch for none where it has fewer batches, and come back to a wrong place."""
        batches, accumulation = self._batches_in_epoch(), self._trainer.args.gradient_accumulation_steps
        steps = local_of(self._trainer, "num_update_steps_per_epoch")
        if steps is not None and batches % accumulation and steps * accumulation < batches:
            raise ConfigError(
                f"an epoch of {batches} batches is no multiple of gradient_accumulation_steps={accumulation}, which this release of "
                "transformers miscounts on a resume. Upgrade transformers, or choose numbers that divide"
            )

    def _check_room(self) -> None:
        state = self._trainer.state
        if not self._finished and state.global_step >= state.max_steps:
            raise ConfigError(
                f"the run stands at step {state.global_step}, and max_steps or num_train_epochs ask for {state.max_steps}: the Trainer "
                "would train one step more. Ask for more, or use another URI"
            )

    def _skip_loading(self, folder: str, undo: contextlib.ExitStack) -> None:
        """Have the Trainer leave the weights to us when it is to read them from our directory."""
        trainer, load = self._trainer, self._trainer._load_from_checkpoint  # noqa: SLF001

        def load_from_checkpoint(path: Any, *args: Any, **kwargs: Any) -> Any:
            return None if path == folder else load(path, *args, **kwargs)

        trainer._load_from_checkpoint = load_from_checkpoint  # noqa: SLF001
        undo.callback(delattr, trainer, "_load_from_checkpoint")

    def _let_go(self) -> None:
        if self._data is not None:
            self._data.let_go()


def check_payload(loaded: Loaded, uri: str) -> None:
    """Refuse a checkpoint that is not of a training by the `Trainer`.

    Raises:
        StateMismatchError: Says whose it is.
    """
    if "trainer" not in loaded.payload or "clocks" not in loaded.payload.get(RANK, {}):
        raise StateMismatchError(
            f"checkpoint {loaded.manifest.id} of {uri} was not saved by SpotGuardTrainerCallback. Give this training a URI of its own"
        )


def check_trainer(trainer: Any, trial: Any) -> None:
    """Refuse what could not be brought back exactly, or would get in the way.

    Raises:
        ConfigError: Names the first such thing, and what to do.
    """
    args = trainer.args
    if trial is not None:
        raise ConfigError("hyperparameter_search(): its trials are many runs; leave the guard out of this Trainer")
    for name, why in (
        ("ignore_data_skip", "the epoch would begin again at each resume; leave it out, the position costs no reading"),
        ("auto_find_batch_size", "steps of another size cannot be resumed from; set the batch size"),
        ("enable_jit_checkpoint", "two would answer one SIGTERM; leave it out, the guard saves on it"),
    ):
        if getattr(args, name, False):
            raise ConfigError(f"TrainingArguments({name}=True): {why}")
    if "layerwise" in str(getattr(args.optim, "value", args.optim)):
        raise ConfigError(
            f"TrainingArguments(optim={args.optim!r}): layerwise optimizers keep their state in hooks of the model, "
            "where nobody can save it; use one that is not layerwise"
        )
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        if getattr(trainer, name, False):
            raise ConfigError(f"{name[3:-8]}: this release guards a model that is whole in one process")
    if getattr(getattr(trainer.accelerator, "dataloader_config", None), "use_stateful_dataloader", False):
        raise ConfigError(
            "accelerator_config use_stateful_dataloader=True: the guard finds the position by index, and the Trainer does not save the "
            "state of such a loader; leave it out"
        )
    if args.device.type == "xla":
        raise ConfigError("XLA: this release guards the CPU and CUDA only")
