"""The batches of a training: which samples they hold, and the random numbers that are drawn on the way to them.

The Trainer comes back to its place by drawing from the batch sampler and throwing away what it had before; no sample is loaded. That gives
the same batches if the sampler draws the same again, and the same samples if whatever is random in them does. Both are seen to here, at
the one place that every batch passes: between the batch sampler and the loader.

- The generators are put back to where they were when the pass began, and again before each batch that the checkpoint found fetched and not
  trained: those of the step to come, and one more, by which accelerate tells the last one.
- Workers start anew with each process: they draw from seeds made for each sample, see `spotguard.state.data`.
"""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from spotguard.errors import StateMismatchError
from spotguard.state.compare import fingerprint
from spotguard.state.loaders import TrackedLoader, check_loader, describe_loader, warn_inexact
from spotguard.state.rng import capture_rng, restore_rng
from spotguard.state.samples import IndexStream, seeded_dataset
from spotguard.state.workers import worker_init

__all__ = ["TrainingBatches", "shield_workers"]


class TrainingBatches:
    """Follows the training loader.

    Args:
        loader: The loader, as the Trainer iterates over it.
        accumulation: Batches of one optimizer step.

    Attributes:
        count: Batches in an epoch; None where the loader does not tell.
    """

    def __init__(self, loader: Any, accumulation: int) -> None:
        self._accumulation = accumulation
        self._base = getattr(loader, "base_dataloader", loader)  # accelerate wraps loaders; before 1.0, it copied them
        self._tracked = TrackedLoader(self._base, (), [])
        self._stream: _Stream | None = None
        self._before: dict[str, Any] = {}
        try:
            self.count: int | None = len(loader)
        except TypeError:
            self.count = None
        if _by_index(self._base, self._tracked):
            self._take()
        else:
            warn_inexact(
                f"a {type(self._base).__name__} over {type(getattr(self._base, 'dataset', None)).__name__} cannot be resumed by index: the "
                "Trainer reads it again from its start and throws away what was trained. That is exact only if it yields the same data "
                "each time and draws no random numbers. A map-style dataset has neither limit"
            )

    def load(self, saved: dict[str, Any], batch: int) -> list[str]:
        """Take what a checkpoint says; the next pass comes to that place.

        Args:
            saved: What `state` gave.
            batch: Batches that the Trainer will throw away.

        Returns:
            What cannot be brought back, in words.

        Raises:
            StateMismatchError: The loader is not the one in the checkpoint.
        """
        here = self._look()
        check_loader(self._base, saved["loader"])
        if changed := sorted(name for name, value in saved["look"].items() if here[name] != value):
            raise StateMismatchError(
                "; ".join(f"{name} was {saved['look'][name]} and is {here[name]}" for name in changed)
                + ". A step of one is no step of the other: restore the old value, or start a new run under another URI"
            )
        if self._stream is None:
            return [f"{batch} batches are read again and thrown away"] if batch else []
        self._stream.target = saved["open"]
        return []

    def state(self, batch: int) -> dict[str, Any]:
        """Where the training is.

        Args:
            batch: Batches of the epoch that have been trained.
        """
        opened = self._stream.state(batch) if self._stream is not None else None
        return {"loader": describe_loader(self._base), "look": self._look(), "open": opened}

    def close_pass(self) -> None:
        """The pass under way is complete."""
        if self._stream is not None:
            self._stream.close()

    def let_go(self) -> None:
        """Leave the loader as it was found."""
        self._base.__dict__.update(self._before)

    def _take(self) -> None:
        base = self._base
        persistent = base.num_workers > 0 and base.persistent_workers
        self._stream = _Stream(base.batch_sampler, self._tracked, persistent=persistent, keep=self._accumulation + 2)
        changes: dict[str, Any] = {"batch_sampler": self._stream}
        if base.num_workers:
            changes["dataset"] = seeded_dataset(base.dataset)
            changes["worker_init_fn"] = worker_init(base.worker_init_fn)
        self._before = {name: base.__dict__[name] for name in changes}
        base.__dict__.update(changes)  # past DataLoader.__setattr__, which refuses to change these

    def _look(self) -> dict[str, Any]:
        sampler = getattr(self._base, "batch_sampler", None)
        return {
            "per_device_train_batch_size": getattr(sampler, "batch_size", None) if sampler is not None else None,
            "gradient_accumulation_steps": self._accumulation,
        }


def _by_index(base: Any, tracked: TrackedLoader) -> bool:
    """Whether batches of this loader are told by its batch sampler, and by nothing else."""
    if getattr(base, "batch_sampler", None) is None:
        return False
    copied = isinstance(base, DataLoader) and type(base).__module__ == "accelerate.data_loader" and not tracked.stateful
    return tracked.indexed or (copied and not isinstance(base.dataset, IterableDataset))


class _Stream(IndexStream):
    """The batch sampler, with an eye on the generators; for everything else it is the batch sampler."""

    def __init__(self, inner: Any, tracked: TrackedLoader, *, persistent: bool, keep: int) -> None:
        super().__init__(inner, batched=True, epoch_seed=None)
        self.target: dict[str, Any] | None = None
        self._tracked, self._persistent = tracked, persistent
        self._began_at: dict[str, Any] | None = None
        self._pass: dict[str, Any] | None = None
        self._fetched: collections.deque[tuple[int, Any]] = collections.deque(maxlen=keep)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)  # the Trainer tells samplers the number of the epoch

    def __iter__(self) -> Iterator[Any]:
        target, tracked = self.target, self._tracked
        if target is not None:
            restore_rng(target["start"]["rng"])
            tracked.set_generators(target["start"]["generators"])
            _put_values(self._inner, target["start"]["values"])
        # A loader with workers asks twice when it makes them, and draws a seed for them in between.
        if self._began_at is None or not self._persistent:
            self._began_at = {
                "rng": capture_rng(),
                "generators": tracked.generators(),
                "values": _values(self._inner),
            }
        # iter() here and now: a sampler may draw its permutation in __iter__, before the loader draws the seed of its workers.
        return self._draw_from(iter(self._inner))

    def state(self, batch: int) -> dict[str, Any] | None:
        """The pass under way, of which so many batches have been trained; None between two passes."""
        if self._pass is None:
            return None
        return {**self._pass, "fetched": {number: rng for number, rng in self._fetched if number >= batch}}

    def close(self) -> None:
        """The pass under way is complete."""
        self._pass = None

    def _draw_from(self, draws: Iterator[Any]) -> Iterator[Any]:
        target, self.target = self.target, None
        start, self._began_at = self._began_at, None
        assert start is not None, "__iter__ comes first"
        tracked = self._tracked
        if target is not None:
            # On the way here the loader has drawn a seed for its workers, or the Trainer's loader that skips has drawn it too early.
            rng, generators = target["start"]["drawing"]
            restore_rng(rng)
            tracked.set_generators(generators)
        elif self._persistent:
            # Workers that live on draw their seed in the first pass of a process only: in any other pass it must not count.
            restore_rng(start["rng"])
            tracked.set_generators(start["generators"])
        start["drawing"] = [capture_rng(), tracked.generators()]
        self._pass = {"start": start}
        self._fetched.clear()
        again = target["fetched"] if target is not None else {}
        seed = int(fingerprint([start["rng"]["torch"], start["generators"], start["values"]])[:16], 16)
        position = 0
        for number, drawn in enumerate(draws):
            if tracked.workers:
                samples, position = self.with_seeds(drawn, seed, position)
                yield samples
                continue
            if number in again:
                restore_rng(again[number])
            self._fetched.append((number, capture_rng()))
            yield drawn


def _chain(sampler: Any) -> Iterator[tuple[str, Any]]:
    """A batch sampler and the samplers in it, with a name for each."""
    for depth in range(4):
        if sampler is None:
            return
        yield f"{depth} {type(sampler).__name__}", sampler
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


def _values(sampler: Any) -> dict[str, Any]:
    """Numbers that samplers keep, such as a seed, or a count of epochs."""
    return {
        name: {key: value for key, value in vars(part).items() if type(value) in (bool, int, float)}
        for name, part in _chain(sampler)
        if hasattr(part, "__dict__")
    }


def _put_values(sampler: Any, saved: dict[str, Any]) -> None:
    for name, part in _chain(sampler):
        for key, value in saved.get(name, {}).items():
            setattr(part, key, value)


def shield_workers(trainer: Any, undo: contextlib.ExitStack) -> None:
    """Have the workers of evaluations, too, live through a signal to the process group."""
    make = trainer.get_eval_dataloader

    def get_eval_dataloader(*args: Any, **kwargs: Any) -> Any:
        loader = make(*args, **kwargs)
        base = getattr(loader, "base_dataloader", loader)
        if getattr(base, "num_workers", 0) and not isinstance(base.worker_init_fn, worker_init):
            base.worker_init_fn = worker_init(base.worker_init_fn)
        return loader

    trainer.get_eval_dataloader = get_eval_dataloader
    undo.callback(delattr, trainer, "get_eval_dataloader")
