"""Lightning's loops, with our places in them.

The classes of loops that exist already are exchanged for subclasses: callback hooks come before the logging of a batch, or after the next
batch has been fetched, and neither is a place to go on from.
"""

from typing import TYPE_CHECKING, Any

from spotguard.lightning.fit import GuardedFit
from spotguard.lightning.loaders import shield_workers, starting_workers

__all__ = ["guard_loops"]

if TYPE_CHECKING:
    Loop: Any = object  # the class of the loop that is being guarded comes behind ours when they are joined
else:
    Loop = object


class _FitLoop(Loop):  # type: ignore[misc]
    def run(self) -> Any:
        callback = self._callback
        if callback not in self.trainer.callbacks:  # a search for the learning rate, say, which is no part of the run
            return super().run()
        with callback.guarding(self._guard):
            self._combined_loader: Any = None  # such a search may have set up loaders, which are not followed
            return super().run()

    def on_run_start(self) -> None:
        super().on_run_start()
        if self._guard.active:
            self._guard.started()

    @property
    def done(self) -> bool:
        # The last batch of all may still have its validation before it, and the end of its epoch.
        return False if self._guard.within_epoch else super().done

    def on_advance_start(self) -> None:
        guard = self._guard
        if guard.within_epoch:  # the head of this epoch was passed in an earlier process
            self.setup_data()
            guard.data.set_epoch(self.epoch_progress.current.processed)
            return
        if guard.active:
            guard.next_epoch()
        super().on_advance_start()

    def on_advance_end(self) -> None:
        super().on_advance_end()
        if self._guard.active:
            self._guard.epoch_over()

    def on_save_checkpoint(self) -> dict[str, Any]:
        guarded = (
            self._guard.session is not None
        )  # what loaders say of themselves is one batch ahead where batches are fetched ahead
        return {} if guarded else super().on_save_checkpoint()

    def _load_combined_loader_states(self) -> None:
        # Called once the loaders are set up, and before they are iterated over. Our checkpoints hold none of these states; one of
        # Lightning's own, which a new run begins at, may.
        super()._load_combined_loader_states()
        if not self._guard.active:
            return
        self._combined_loader_states_to_load: list[Any] = []
        self._combined_loader.flattened = self._guard.data.guard(self._combined_loader.flattened)


class _EpochLoop(Loop):  # type: ignore[misc]
    def reset(self) -> None:
        if self._guard.arriving is None:
            super().reset()

    def on_run_start(self, data_fetcher: Any) -> None:
        guard = self._guard
        if guard.arriving is None:
            super().on_run_start(data_fetcher)
            return
        kind = guard.arrive(data_fetcher)
        self._restarting = True  # the iterator is there
        super().on_run_start(data_fetcher)
        self._restarting = False
        if kind == "validation":
            self.on_advance_end(data_fetcher)
        else:
            guard.just_arrived = True

    def advance(self, data_fetcher: Any) -> None:
        guard = self._guard
        if guard.active and self.batch_progress.current.ready and not guard.just_arrived:
            guard.boundary("batch")
        guard.just_arrived = False
        super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: Any) -> None:
        guard = self._guard
        validates = guard.active and self._should_check_val_fx(data_fetcher)
        if validates:
            guard.before_validation()
        super().on_advance_end(data_fetcher)
        if validates:
            guard.after_validation()


class _ValidationLoop(Loop):  # type: ignore[misc]
    def run(self) -> Any:
        try:
            return super().run()
        except SystemExit:
            # Lightning leaves a sanity check on SIGTERM with exit status 0. The fit loop is about to see the signal, and leaves as it must.
            if self.trainer.sanity_checking and self.trainer.received_sigterm:
                return []
            raise

    def setup_data(self) -> None:
        super().setup_data()
        if self._combined_loader is not None:
            shield_workers(self._combined_loader.flattened)

    def reset(self) -> None:
        with starting_workers(self._combined_loader.flattened):
            super().reset()


def guard_loops(trainer: Any, guard: GuardedFit, callback: Any) -> None:
    """Put our places into the loops of a trainer."""
    fit_loop = trainer.fit_loop
    for loop, ours in (
        (fit_loop, _FitLoop),
        (fit_loop.epoch_loop, _EpochLoop),
        (fit_loop.epoch_loop.val_loop, _ValidationLoop),
    ):
        if not isinstance(loop, ours):
            loop.__class__ = type(f"Guarded{type(loop).__name__.lstrip('_')}", (ours, type(loop)), {})
        loop._guard, loop._callback = guard, callback
