"""The callback: two lines in a script, and everything they stand for."""

import datetime as dt
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from spotguard.errors import ConfigError
from spotguard.events import EventHook
from spotguard.guard.options import Notices, RunPlaces, read_options, refuse_several_ranks
from spotguard.guard.session import Loaded, Session
from spotguard.pipeline.checkpoint import Checkpoint
from spotguard.policies import RetentionPolicy, SavePolicy, metrics_of
from spotguard.transformers._host import base_class, trainer_of_caller
from spotguard.transformers.training import GuardedTraining, check_payload, check_trainer

if TYPE_CHECKING:
    TrainerCallback: Any = object
else:
    TrainerCallback = base_class()

__all__ = ["SpotGuardTrainerCallback"]

_SCHEME = "spotguard:"


class SpotGuardTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Makes ``Trainer.train`` survive whatever kills the process, and go on bit for bit.

    Args:
        uri: Where the run is kept: a path, a URI or a store, or a list of these, fastest first: tiers. The same at every start.
        every: When to save: ``"10m"``, ``500`` optimizer steps, ``"1 epoch"``, ``"auto"``, or a policy such as
            ``EverySteps(500) | EverySeconds(600)``. Default: ``SPOTGUARD_EVERY``, else ``"10m"``.
        keep: What to keep: a number of newest checkpoints, or a policy. One that goes by a metric, such as
            ``KeepBest(3, "eval_loss") | KeepNewest(2)``, also has a checkpoint saved after each evaluation that gives the metric.
            Default: ``SPOTGUARD_KEEP``, else 3.
        notices: ``"auto"``, ``"none"``, or a list of sources; as for `SpotGuard`.
        grace: How long the platform leaves us after a signal; as for `SpotGuard`.
        exit_code: Exit status after a stop. Default: ``SPOTGUARD_EXIT_CODE``, else 143, and 0 after a SIGTERM of SageMaker.
        on_event: Called with every event, in a thread of its own.

    Raises:
        ConfigError: An argument is wrong; the message says what to do.

    Example:
        >>> guard = SpotGuardTrainerCallback("memory://doc-trainer-callback", every=500, keep=2)
        >>> path = guard.resume_path()  # trainer.train(resume_from_checkpoint=guard.resume_path())
        >>> path is None, guard.checkpoint is None
        (True, True)
        >>> guard.close()
    """

    def __init__(
        self,
        uri: RunPlaces,
        *,
        every: SavePolicy | int | str | dt.timedelta | None = None,
        keep: RetentionPolicy | int | None = None,
        notices: Notices | None = None,
        grace: str | float | dt.timedelta | None = None,
        exit_code: int | None = None,
        on_event: EventHook | None = None,
    ) -> None:
        super().__init__()
        self._options = read_options(uri, every=every, keep=keep, notices=notices, grace=grace, exit_code=exit_code)
        self._on_event = on_event
        self._wanted = metrics_of(self._options.retention)
        self._session: Session | None = None
        self._loaded: Loaded | None = None
        self._training: GuardedTraining | None = None
        self._last: Checkpoint | None = None

    def resume_path(self) -> str | None:
        """Where ``Trainer.train(resume_from_checkpoint=...)`` has to begin: the newest whole checkpoint, by a name that only we can read.

        Claims the next attempt at the run, verifies the checkpoint and reads it.

        Returns:
            None when the run is new.

        Raises:
            NoUsableCheckpointError: There are checkpoints, and none is whole.
        """
        if self._session is None:
            refuse_several_ranks()
            session = Session(self._options, on_event=self._on_event, trees=self._trees, place=self._place)
            try:
                session.open()
                self._loaded = session.load()
                if self._loaded is not None:
                    check_payload(self._loaded, session.uri)
                    self._last = self._loaded.checkpoint
            except BaseException as error:
                session.failed(error)
                session.close()
                raise
            self._session = session
        return None if self._loaded is None else f"{_SCHEME}{self._loaded.manifest.id}"

    def save_now(self, metrics: Mapping[str, float] | None = None) -> None:
        """Ask for a checkpoint before the next step, with these metrics."""
        if self._training is None or self._session is None:
            raise ConfigError("save_now() works while Trainer.train runs only")
        asked = {str(name): float(value) for name, value in dict(metrics or {}).items()}
        self._session.saver.requested = {**(self._session.saver.requested or {}), **asked}
        self._session.raise_alert()

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest committed checkpoint of this run, or None; also after the training."""
        newest = self._session.checkpoint if self._session is not None else None
        return newest or self._last

    def close(self) -> None:
        """Let go of the run, where no training is going to do it. May be called again."""
        self._close(drain=False)

    # hooks of the Trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Put ourselves around ``train()``: no hook is called on an exception, and none sees what the Trainer was to resume from."""
        trainer = trainer_of_caller()
        trainer.train = functools.wraps(trainer.train)(functools.partial(self._train, trainer, trainer.train))

    def on_train_begin(self, args: Any, state: Any, control: Any, **hook: Any) -> None:  # noqa: ARG002
        """Everything is built: put it back to the state of the checkpoint."""
        if self._training is None:
            raise ConfigError(
                "SpotGuardTrainerCallback came too late by add_callback(): give it to Trainer(..., callbacks=[guard])"
            )
        self._training.begin(hook.get("train_dataloader"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Everything of the step before is done, its logging, evaluation and saving included: a boundary."""
        if self._training is not None:
            self._training.boundary()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """A notice breaks an evaluation off; its step is trained again after the resume, and the evaluation run whole."""
        if self._training is not None:
            self._training.in_evaluation()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Have metrics saved that retention goes by."""
        if self._training is not None and self._wanted and self._wanted <= set(metrics or {}):
            self.save_now({name: metrics[name] for name in self._wanted})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Save as finished."""
        if self._training is not None:
            self._training.end()

    # around train()

    def _train(self, trainer: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._training is not None:
            raise ConfigError("this guard is in use by a training that has not ended; make one for each Trainer")
        bound = inspect.signature(inner).bind(*args, **kwargs)
        try:
            check_trainer(trainer, bound.arguments.get("trial"))
            path, asked = self.resume_path(), bound.arguments.get("resume_from_checkpoint")
            session, loaded = self._session, self._loaded
            assert session is not None, "resume_path() opened it"
            if path is not None and asked != path:
                raise ConfigError(
                    f"the run at {session.uri} has checkpoint {str(path).removeprefix(_SCHEME)}, and this training would not begin "
                    "there. Pass it on: trainer.train(resume_from_checkpoint=guard.resume_path()). To begin anew, use another URI"
                )
            if path is None and str(asked).startswith(_SCHEME):
                raise ConfigError(f"resume_from_checkpoint={asked!r} was made by another guard; pass this one's")
            session.listen()
            self._training = GuardedTraining(trainer, session, loaded)
            self._loaded = None  # the training lets go of what was read once it is back in place
            with self._training.guarding() as folder:
                if folder is not None:
                    bound.arguments["resume_from_checkpoint"] = folder
                result = inner(*bound.args, **bound.kwargs)
        except BaseException as error:
            if self._session is not None:
                self._session.failed(error)
            # In an exception the loop may be anywhere inside a step: live state is not saved.
            self._close(drain=True)
            raise
        stopped = session.stopped
        self._close(drain=False)
        if stopped is not None:
            raise stopped  # an `except` on the way took it; the run is stopped all the same, not finished
        return result

    def _close(self, *, drain: bool) -> None:
        session, self._session, self._loaded, self._training = self._session, None, None, None
        if session is not None:
            try:
                session.close(drain=drain)
            finally:
                self._last = session.checkpoint or self._last

    def _trees(self) -> Mapping[str, Any]:
        assert self._training is not None, "train() comes first"
        return self._training.trees()

    def _place(self) -> Any:
        assert self._training is not None, "train() comes first"
        return self._training.place()
