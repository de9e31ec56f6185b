"""One fit under guard: its boundaries, its state, and the way back to the place of a checkpoint.

A fit passes three kinds of places at which everything that belongs to the batches before is done, and nothing of the next one has begun::

    fit loop    for each epoch:                         <- "epoch": behind the last epoch, with its hooks, schedulers and logging
    epoch loop      for each batch:                     <- "batch": behind the last batch, with its validation, if any
                        fetch, train, log
                        validate, if that is due        <- "validation": between the batch and its validation

At each of them all loops hold consistent counters, so that Lightning's own repair of counters on a restart, which differs from release to
release, is not needed: the loops go on as if they had never been left.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from spotguard.errors import ConfigError, StateMismatchError
from spotguard.guard.saver import RANK, Place
from spotguard.guard.session import Loaded, Session
from spotguard.lightning.fit_state import FitState
from spotguard.lightning.loaders import TrainingData
from spotguard.notices import PreemptionNotice
from spotguard.state.codec import check_loadable
from spotguard.state.rng import restore_rng

__all__ = ["MODEL", "GuardedFit"]

MODEL = "model.ckpt"
"""Name of the shard that is a Lightning checkpoint."""

_REFUSED = {
    "StochasticWeightAveraging": "exchanges schedulers and rewrites loops while it runs, and cannot be brought back to the middle of that. "
    "Use WeightAveraging (Lightning 2.6 and later) or an average of your own, which can",
    "ModelPruning": "saves a model without its masks, and has no way back to them: a run that goes on would train what was pruned. "
    "Prune behind the training, or with masks that are buffers of the model",
}


class GuardedFit:
    """Follows one fit.

    Args:
        trainer: Its trainer.
        host: Name of the package that the trainer belongs to.
        wanted: Metrics that retention goes by.

    Attributes:
        active: The fit is running under guard.
        arriving: Where it has to go on: ``"batch"``, ``"validation"`` or ``"epoch"``; None once it is there.
        data: Where it is in its training data.
        just_arrived: The place of the checkpoint has been reached, and no batch been trained since.
        measures: Names of the metrics that there have been.
    """

    def __init__(self, trainer: Any, host: str, wanted: frozenset[str]) -> None:
        self._trainer, self._host, self._wanted = trainer, host, wanted
        self.active = self.just_arrived = False
        self.arriving: str | None = None
        self.session: Session | None = None
        self._loaded: Loaded | None = None
        self._state: FitState | None = None
        self._inexact: list[str] = []
        self._boundaries = 0
        self._kind = "epoch"
        self._epoch_over = self._told = self._validated = False
        self._seen: dict[str, Any] = {}
        self.measures: set[str] = set()
        self.data = TrainingData(lambda: self._epoch_loop.batch_progress.total.ready, self._fetched_ahead)

    @property
    def _epoch_loop(self) -> Any:
        return self._trainer.fit_loop.epoch_loop

    @property
    def within_epoch(self) -> bool:
        """Whether the place to come to is within an epoch, whose head was passed in an earlier process."""
        return self.arriving in ("batch", "validation")

    def begin(self, session: Session, loaded: Loaded | None, previous: Mapping[int, Any]) -> None:
        """The fit loop is about to run.

        Args:
            session: The attempt.
            loaded: What Lightning has been given to restore, or None.
            previous: Signal handlers that were there before Lightning set its own.

        Raises:
            Preempted: A notice has come already.
        """
        self.session, self._loaded = session, loaded
        session.listen(previous)
        if self._trainer.received_sigterm:  # Lightning heard it while it was setting up
            session.heed(PreemptionNotice(source="signal", kind="signal", detail="SIGTERM"))
        self._state = FitState(self._trainer, self._host)
        if loaded is not None:
            local = loaded.payload[RANK]
            if (step := self._epoch_loop.batch_progress.total.ready) != loaded.manifest.step:
                raise ConfigError(
                    f"checkpoint {loaded.manifest.id} was restored and then undone: training would go on from step {step}. Callbacks that "
                    "train and put back what was there before do this (LearningRateFinder, BatchSizeFinder): leave them out where "
                    "guard.resume_path() is not None"
                )
            self._inexact = self._state.remember(loaded.payload[MODEL])
            self._state.restore_early(local)
            self.arriving = local["progress"]["kind"]
            self.data.load(local["data"])
            # Lightning would repair its counters now, as for a checkpoint of its own. Ours need no repair.
            for loop in self._loops():
                loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
        self.active = True
        session.begin(loaded.manifest if loaded is not None else None)

    def started(self) -> None:
        """Hooks have set up what they need: see now, and not at the first save, whether it can be saved.

        Raises:
            ConfigError: Something in the checkpoint could not be read back.
            Preempted: A notice has come, and nothing has been trained yet.
        """
        assert self._state is not None, "begun"
        _check_readable(self._state.checkpoint())
        assert self.session is not None, "begun"
        self.session.turn_back()

    def end(self) -> None:
        """The fit loop has come to its end."""
        assert self.session is not None, "begun"
        nothing_left = self._loaded is not None and not self._told
        if nothing_left:
            self.arrive()
        self._kind = "epoch"
        self._boundaries += 1
        self.data.new_epoch()
        self.session.finish(save=not nothing_left)

    def close(self, *, drain: bool) -> None:
        """The fit loop has been left, one way or another."""
        self.active = False
        if self.session is not None:
            self.session.close(drain=drain)

    def arrive(self, fetcher: Any = None) -> str:
        """The loops have come to the place of the checkpoint; returns its kind.

        Args:
            fetcher: Gets the batches, where the place is within an epoch.
        """
        assert self.session is not None, "begun"
        assert self._state is not None, "begun"
        assert self._loaded is not None, "there is a place to come to"
        kind, self.arriving = self.arriving or "epoch", None
        payload = self._loaded.payload
        local = payload[RANK]
        inexact = self._inexact + self._state.restore(payload[MODEL], local)
        self.data.asleep = False
        if fetcher is not None:
            iter(fetcher)
            if fetcher.length is None:  # it has fetched a batch, which may have drawn: that was before the checkpoint
                restore_rng(local["rng"])
            else:  # Lightning is about to add what it has trained, and a step may have taken several batches
                fetcher.fetched = local["progress"]["fetched"] - self._epoch_loop.batch_progress.current.ready
        self._seen = dict(self._trainer._logger_connector._callback_metrics)
        self._told = True
        self.session.resumed(self._loaded, inexact)
        self._loaded = self._loaded._replace(payload={})  # release memory
        return kind

    def boundary(self, kind: str) -> None:
        """A place where the fit may be saved, and may stop."""
        assert self.session is not None, "begun"
        self._kind = kind
        self._boundaries += 1
        self.session.boundary()

    def before_validation(self) -> None:
        """The batch is done, its validation is not: a validation that is broken off by a notice is run again, whole, after the resume."""
        assert self.session is not None, "begun"
        self.boundary("validation")
        self.session.saver.hold(self._place())

    def in_validation(self) -> None:
        """Between two batches of a validation."""
        session = self.session
        if session is None or not self.active or not session.alert or session.saver.held is None:
            return
        if (notice := session.notice()) is not None:
            session.answer(notice)

    def after_validation(self) -> None:
        """The validation is over."""
        assert self.session is not None, "begun"
        self.session.saver.release()
        self._validated = True
        self.measured()

    def epoch_over(self) -> None:
        """An epoch, with all that belongs to it, is over."""
        self._epoch_over = True
        self.data.new_epoch()
        self.measured()
        missing = self._wanted - self.measures
        if missing and (self._validated or not self._trainer.enable_validation):
            self.measures |= missing  # told once
            warnings.warn(
                f"keep= goes by {', '.join(sorted(missing))}, which nothing has logged so far: checkpoints without it are never among "
                f"the best. There is {', '.join(sorted(self._seen)) or 'no metric at all'}",
                stacklevel=2,
            )

    def next_epoch(self) -> None:
        """The head of an epoch."""
        if self.arriving == "epoch":
            self.arrive()
        elif self._epoch_over:
            self._epoch_over = False
            self.boundary("epoch")

    def measured(self) -> None:
        """Have the next boundary saved, where a metric that retention goes by is new."""
        assert self.session is not None, "begun"
        found = dict(self._trainer.callback_metrics) if self._wanted else {}
        fresh = {name: value for name, value in found.items() if value is not self._seen.get(name)}
        self._seen = found
        self.measures |= found.keys()
        if self._wanted & fresh.keys():
            numbers = {name: float(value) for name, value in fresh.items() if value.numel() == 1}
            self.session.saver.requested = {**(self.session.saver.requested or {}), **numbers}
            self.session.raise_alert()

    def trees(self) -> dict[str, Any]:
        """Everything that is saved, live."""
        assert self._state is not None, "begun"
        place = self._place()
        fetcher = self._trainer.fit_loop._data_fetcher
        progress = {"step": place.step, "epoch": place.epoch, "batch": place.batch, "kind": self._kind}
        progress["fetched"] = 0 if fetcher is None else fetcher.fetched
        return {
            MODEL: self._state.checkpoint(),
            RANK: {**self._state.local(), "data": self.data.state(), "progress": progress},
        }

    def _place(self) -> Place:
        batches, epochs = self._epoch_loop.batch_progress, self._trainer.fit_loop.epoch_progress
        batch = 0 if self._kind == "epoch" else batches.current.ready
        return Place(batches.total.ready, epochs.current.processed, batch, self._boundaries)

    place = _place

    def _fetched_ahead(self) -> int | None:
        fetcher = self._trainer.fit_loop._data_fetcher
        return None if fetcher is None or fetcher.length is not None else len(getattr(fetcher, "batches", ()))

    def _loops(self) -> list[Any]:
        epoch_loop = self._epoch_loop
        inner = (epoch_loop.val_loop, epoch_loop.automatic_optimization, epoch_loop.manual_optimization)
        return [self._trainer.fit_loop, epoch_loop, *inner]


def _check_readable(checkpoint: dict[str, Any]) -> None:
    """Refuse, before training, what could not be read back: code has no place in a checkpoint."""
    try:
        check_loadable(MODEL, checkpoint)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. Hyperparameters are the usual place: leave them out, save_hyperparameters(ignore=[...]), or, where such an object "
            "is harmless, let it pass: torch.serialization.add_safe_globals([...])"
        ) from error


def check_payload(loaded: Loaded, uri: str) -> None:
    """Refuse a checkpoint that another kind of guard has written.

    Raises:
        StateMismatchError: Says which.
    """
    if MODEL not in loaded.payload or RANK not in loaded.payload:
        raise StateMismatchError(
            f"checkpoint {loaded.manifest.id} of {uri} was not saved by a SpotGuardCallback of Lightning. Give this run a URI of its own"
        )


def check_trainer(trainer: Any, strategy_class: Any) -> None:
    """Refuse what this release cannot bring back.

    Raises:
        ConfigError: Several devices, or a strategy that has checkpoints of its own kind.
    """
    if trainer.world_size > 1:
        raise ConfigError(
            f"{trainer.world_size} ranks: this release guards a single process; ranks that do not agree on a step would lose the run. "
            "Use Trainer(devices=1)"
        )
    for callback in trainer.callbacks:
        for base in type(callback).__mro__:
            if base.__name__ in _REFUSED:
                raise ConfigError(f"{base.__name__} {_REFUSED[base.__name__]}")
    if type(trainer.strategy).load_checkpoint is not strategy_class.load_checkpoint:
        raise ConfigError(
            f"{type(trainer.strategy).__name__} writes checkpoints of its own kind, which this release cannot guard. Use Trainer(devices=1)"
        )
