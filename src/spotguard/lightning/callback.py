"""The callback: two lines in a script, and everything they stand for."""

import contextlib
import copy
import datetime as dt
import importlib
import signal
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from spotguard._time import utc_now
from spotguard.errors import ConfigError, Preempted
from spotguard.events import EventHook
from spotguard.guard.console import say
from spotguard.guard.options import Notices, RunPlaces, read_options, refuse_several_ranks
from spotguard.guard.session import Loaded, Session
from spotguard.lightning._host import base_class, host_of
from spotguard.lightning.fit import MODEL, GuardedFit, check_payload, check_trainer
from spotguard.lightning.loops import guard_loops
from spotguard.pipeline.checkpoint import Checkpoint
from spotguard.policies import RetentionPolicy, SavePolicy, metrics_of

if TYPE_CHECKING:
    Callback: Any = object
else:
    Callback = base_class()

__all__ = ["SpotGuardCallback"]

_SCHEME = "spotguard:"


class SpotGuardCallback(Callback):  # type: ignore[misc]
    """Makes ``Trainer.fit`` survive whatever kills the process, and go on bit for bit.

    Args:
        uri: Where the run is kept: a path, a URI or a store, or a list of these, fastest first: tiers. The same at every start.
        every: When to save: ``"10m"``, ``500`` batches, ``"1 epoch"``, ``"auto"``, or a policy such as
            ``EverySteps(500) | EverySeconds(600)``. Default: ``SPOTGUARD_EVERY``, else ``"10m"``.
        keep: What to keep: a number of newest checkpoints, or a policy. One that goes by a metric, such as
            ``KeepBest(3, "val_loss") | KeepNewest(2)``, also has a checkpoint saved after each validation that logs the metric.
            Default: ``SPOTGUARD_KEEP``, else 3.
        notices: ``"auto"``, ``"none"``, or a list of sources; as for `SpotGuard`.
        grace: How long the platform leaves us after a signal; as for `SpotGuard`.
        exit_code: Exit status after a stop. Default: ``SPOTGUARD_EXIT_CODE``, else 143, and 0 after a SIGTERM of SageMaker.
        on_event: Called with every event, in a thread of its own.
        log_metrics: Log ``spotguard/stall_s`` (seconds the last save stopped training), ``spotguard/last_durable_age_s`` (seconds since the
            last commit) and ``spotguard/lost_steps`` (batches that would have to be trained again) to progress bar and loggers.

    Raises:
        ConfigError: An argument is wrong; the message says what to do.

    Example:
        >>> guard = SpotGuardCallback("memory://doc-callback", every=500, keep=2)
        >>> path = guard.resume_path()  # Trainer(callbacks=[guard]).fit(model, data, ckpt_path=guard.resume_path())
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
        log_metrics: bool = False,
    ) -> None:
        super().__init__()
        self._options = read_options(uri, every=every, keep=keep, notices=notices, grace=grace, exit_code=exit_code)
        self._on_event, self._log_metrics = on_event, log_metrics
        self._session: Session | None = None
        self._loaded: Loaded | None = None
        self._fit: GuardedFit | None = None
        self._handed = self._over = False
        self._handlers: dict[int, Any] = {}

    def resume_path(self) -> str | None:
        """Where ``Trainer.fit(ckpt_path=...)`` has to begin: the newest whole checkpoint, by a name that only this callback can read.

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
            except BaseException as error:
                session.failed(error)
                session.close()
                raise
            self._session = session
        return None if self._loaded is None else f"{_SCHEME}{self._loaded.manifest.id}"

    def save_now(self, metrics: Mapping[str, float] | None = None) -> None:
        """Ask for a checkpoint at the next boundary, with these metrics."""
        if self._fit is None or self._session is None or not self._fit.active:
            raise ConfigError("save_now() works while Trainer.fit runs only")
        asked = {str(name): float(value) for name, value in dict(metrics or {}).items()}
        self._fit.measures |= asked.keys()
        self._session.saver.requested = {**(self._session.saver.requested or {}), **asked}
        self._session.raise_alert()

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest committed checkpoint of this run, or None; also after the fit."""
        if self._session is None:
            return None
        if self._session.checkpoint is None and self._loaded is not None:
            return self._loaded.checkpoint
        return self._session.checkpoint

    def close(self) -> None:
        """Let go of the run, where no fit is going to do it. May be called again."""
        if self._session is not None:
            self._session.close()

    # hooks of Lightning

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Before Lightning restores anything: take its loops, and the reading of our checkpoint."""
        if stage != "fit":
            return
        if trainer.fast_dev_run:
            say("fast_dev_run: nothing is saved")
            trainer.strategy.checkpoint_io = _CheckpointIO(trainer.strategy.checkpoint_io, self._read_without_place)
            self.close()
            return
        if self._over:
            raise ConfigError("this SpotGuardCallback has guarded a fit before; make a new one for each fit")
        host = host_of(trainer)
        check_trainer(trainer, importlib.import_module(f"{host}.strategies").Strategy)
        self.resume_path()
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self._fit = GuardedFit(trainer, host, metrics_of(self._options.retention))
        guard_loops(trainer, self._fit, self)
        trainer.strategy.checkpoint_io = _CheckpointIO(trainer.strategy.checkpoint_io, self._read)

    def on_validation_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        """A notice breaks a validation off; it is run again, whole, after the resume."""
        if self._fit is not None and not trainer.sanity_checking:
            self._fit.in_validation()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002
        """Log how safe the run is, where that was asked for."""
        if not self._log_metrics or self._fit is None or not self._fit.active or self._session is None:
            return
        place, last = self._fit.place(), self.checkpoint
        since = (utc_now() - last.manifest.created_at).total_seconds() if last else float("nan")
        values = {
            "spotguard/stall_s": self._session.saver.stall_s,
            "spotguard/last_durable_age_s": since,
            "spotguard/lost_steps": float(place.step - (last.step if last else 0)),
        }
        pl_module.log_dict(values, prog_bar=True, logger=True, on_step=True, on_epoch=False, batch_size=1)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """After a stop, have the teardown hooks called that Lightning leaves out when it is left by an exception."""
        if self._fit is None or not isinstance(exception, Preempted):
            if self._session is not None:
                self._session.failed(exception)
            self.close()
            return
        call = importlib.import_module(f"{host_of(trainer)}.trainer.call")
        teardown = trainer._teardown

        def teardown_with_hooks() -> None:
            del trainer._teardown
            teardown()
            if trainer.datamodule is not None:
                call._call_lightning_datamodule_hook(trainer, "teardown", stage="fit")
            call._call_callback_hooks(trainer, "teardown", stage="fit")
            call._call_lightning_module_hook(trainer, "teardown", stage="fit")

        trainer._teardown = teardown_with_hooks

    # for the loops

    @contextlib.contextmanager
    def guarding(self, fit: GuardedFit) -> Iterator[None]:
        """Around the fit loop."""
        session, loaded = self._session, self._loaded
        assert session is not None, "setup() comes first"
        self._over = True
        whole = False
        try:
            if loaded is not None and not self._handed:
                raise ConfigError(
                    f"the run at {session.uri} has checkpoint {loaded.manifest.id}, and this fit would not begin there. "
                    "Pass it on: trainer.fit(..., ckpt_path=guard.resume_path()). To begin anew, use another URI"
                )
            fit.begin(session, loaded, self._handlers)
            self._loaded = loaded._replace(payload={}) if loaded is not None else None
            yield
            fit.end()
            whole = True
        except BaseException as error:
            session.failed(error)
            raise
        finally:
            fit.close(drain=not whole)

    def _read(self, path: Any) -> dict[str, Any] | None:
        """The checkpoint behind one of our names; None for any other path."""
        if not str(path).startswith(_SCHEME):
            return None
        if self._loaded is None or path != self.resume_path():
            raise ConfigError(f"ckpt_path={path!r} was made by another callback; pass guard.resume_path() of this one")
        self._handed = True
        # A copy: optimizers take over the very tensors they are given, and hooks may change what they are shown.
        return copy.deepcopy(self._loaded.payload[MODEL])  # type: ignore[no-any-return]

    def _read_without_place(self, path: Any) -> dict[str, Any] | None:
        """For a single batch the model will do: behind the place of the checkpoint there may be none left."""
        found = self._read(path)
        return None if found is None else {name: value for name, value in found.items() if name != "loops"}

    def _trees(self) -> Mapping[str, Any]:
        assert self._fit is not None, "setup() comes first"
        return self._fit.trees()

    def _place(self) -> Any:
        assert self._fit is not None, "setup() comes first"
        return self._fit.place()


class _CheckpointIO:
    """Reads our checkpoints, and leaves everything else to what was there before."""

    def __init__(self, inner: Any, read: Any) -> None:
        self._inner, self._read = inner, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        found = self._read(path)
        return self._inner.load_checkpoint(path, *args, **kwargs) if found is None else found
