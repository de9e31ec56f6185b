"""Where in its data a run is, and how to get there again without reading what was read before.

A plain `DataLoader` over a map-style dataset is resumed at the level of indices: the generators are put back to where they were when the
pass began, the sampler draws again and its first batches are thrown away, then the generators are put forward to the step of the
checkpoint. No sample is loaded twice. Loaders with a ``state_dict`` of their own are resumed through it. Everything else is read again
from the start and skipped, and what is not exact about that is said.

**What this changes for the user**: with ``num_workers > 0`` the global generators of a worker (python, numpy, torch) are seeded before each
sample, from the state of torch's generators at the start of the pass and the position of the sample, so that random augmentations do not
depend on the number of workers or on a restart. They draw other numbers than without spotguard; between runs with it they are the same.
With ``num_workers=0`` nothing changes.
"""

from collections.abc import Callable, Iterator
from typing import Any

from spotguard.errors import ConfigError
from spotguard.state.compare import fingerprint
from spotguard.state.loaders import TrackedLoader, check_loader, differences, warn_inexact
from spotguard.state.rng import capture_rng, restore_rng

__all__ = ["DataState", "DataTracker"]

DataState = dict[str, Any]
"""``passes``: passes begun in this epoch. ``loaders``: a record of each. ``open``: the pass that was under way, or None."""

_END = object()


class DataTracker:
    """Follows the loop through its loaders: which pass of the epoch it is in, and which batch of the pass.

    Args:
        known: Generators that are saved anyway, as members of the state.

    Attributes:
        batch: Batches of the pass under way, or of the last one, that are done.
        behind: State of a stateful loader as it was when these were done, where more than these have been fetched; None otherwise.
    """

    def __init__(self, known: tuple[Any, ...] = ()) -> None:
        self.batch = 0
        self.behind: Any = None
        self._known = known
        self._passes = 0
        self._loaders: dict[int, TrackedLoader] = {}  # by the place of its record
        self._births: list[tuple[Any, str]] = []
        self._saved: dict[int, dict[str, Any]] = {}
        self._next = 0
        self._gone: set[str] = set()  # looks of loaders that the user has let go of
        self._remade: set[str] = set()  # looks of loaders that are made anew, generators and all, from time to time
        self._target: dict[str, Any] | None = None
        self._open: int | None = None
        self._start: dict[str, Any] = {}

    @property
    def resuming(self) -> bool:
        """Whether the loop still has to come to the pass that was under way in the checkpoint."""
        return self._target is not None

    @property
    def under_way(self) -> bool:
        """Whether a pass has begun and is not over."""
        return self._open is not None

    def own_state(self) -> Any:
        """What the loader of the pass under way says of itself; None for one that says nothing."""
        tracked = self._loaders[self._open] if self._open is not None else None
        return tracked.own_state() if tracked is not None and tracked.stateful else None

    def load(self, saved: DataState) -> None:
        """Take what a checkpoint says; the loop comes to that place by calling `iterate`."""
        self._saved, self._target = dict(enumerate(saved["loaders"])), saved["open"]
        self._next, self._remade = len(self._saved), set(saved["remade"])
        self._passes = 0 if self._target is not None else saved["passes"]

    def new_epoch(self) -> None:
        """The loop asks for its next epoch."""
        self._passes, self._open, self.batch, self.behind = 0, None, 0, None

    def iterate(
        self, loader: Any, *, step: int, restore: Callable[[], None], seek: bool = False
    ) -> Iterator[Any] | None:
        """Begin a pass, or come back to one.

        Args:
            loader: What to iterate over.
            step: Step boundaries passed.
            restore: Puts members and generators to the state of the checkpoint; called when its place is reached. Without it, generators
                are left as they were found.
            seek: The loop counts steps and not passes: with one loader, its first pass is the one that was under way.

        Returns:
            The batches that are left; None for a pass that was complete at the checkpoint.

        Raises:
            ConfigError: Another pass is under way.
            StateMismatchError: The loader is not the one in the checkpoint.
        """
        if self._open is not None:
            raise ConfigError(
                "batches(): another pass over a loader is under way, and one position cannot stand for two. "
                "Put both datasets into one loader (torch.utils.data.StackDataset, ConcatDataset), or iterate over one of them only"
            )
        if seek and self._target is not None and len(self._saved) == 1:
            self._passes = self._target["pass"]
        self._forget_dead()
        index = self._index_of(loader)
        number, self._passes = self._passes, self._passes + 1
        if self._target is not None:
            if number < self._target["pass"]:
                return None
            target, self._target = self._target, None
            self._open = index
            return self._resume(self._loaders[index], target, restore)
        self._open = index
        self.batch = 0
        return self._begin(self._loaders[index], step)

    def end(self) -> None:
        """The pass under way is over."""
        self._open = self.behind = None

    def state(self) -> DataState:
        """Where the loop is, seen at a step boundary."""
        self._forget_dead()
        places = sorted({*self._saved, *self._loaders})
        opened = None
        if self._open is not None:
            tracked = self._loaders[self._open]
            opened = {
                "pass": self._passes - 1,
                "index": places.index(self._open),
                "batch": self.batch,
                "start": self._start,
                **tracked.record(),
            }
            if tracked.stateful:
                opened["state"] = tracked.own_state() if self.behind is None else self.behind
        records = [self._loaders[place].record() if place in self._loaders else self._saved[place] for place in places]
        return {"passes": self._passes, "loaders": records, "open": opened, "remade": sorted(self._remade)}

    def _forget_dead(self) -> None:
        """Let go of loaders that the user has let go of: a loop that makes one in each epoch must not keep them all, or their workers."""
        for index in [index for index, tracked in self._loaders.items() if tracked.loader is None]:
            tracked = self._loaders.pop(index)
            self._saved.pop(index, None)
            self._gone.add(tracked.look)
            if tracked.look in self._remade:
                self._births[:] = [item for item in self._births if not tracked.draws_from(item[0])]

    def _index_of(self, loader: Any) -> int:
        for index, tracked in self._loaders.items():
            if tracked.loader is loader:
                tracked.number = self._passes
                return index
        tracked = TrackedLoader(loader, self._known, self._births)
        tracked.number = self._passes
        if tracked.fresh and tracked.look in self._gone:
            self._remade.add(tracked.look)
        arriving = self._target is not None and self._passes == self._target["pass"]
        index = self._target["index"] if self._target and arriving else self._recognize(tracked)
        self._loaders[index] = tracked
        return index

    def _recognize(self, tracked: TrackedLoader) -> int:
        """Which of the recorded loaders this one is; it becomes what the record tells of. A place behind them for a new one.

        The order of first use does not tell: the epoch that goes on may begin with another loader than the first epoch did. What does is
        what the loader looks like and where its generators began, which the same script makes the same at each start.
        """
        place, self._next = self._next, self._next + 1
        if tracked.look in self._remade:
            return place  # it begins as it is made, whatever became of the one before it
        free = [index for index in self._saved if index not in self._loaders]
        alike = [index for index in free if not differences(tracked.loader, self._saved[index]["loader"])]
        if not free:
            return place
        if not alike:
            check_loader(tracked.loader, self._saved[free[0]]["loader"])
        same = [index for index in alike if self._saved[index]["births"] == tracked.births]
        if not same:
            if len({str(self._saved[index]["births"]) for index in alike}) == 1:
                warn_inexact(
                    f"the generator of a {type(tracked.loader).__name__} began in another state than at the start before. It is left as it "
                    "is, which is right for a loader that is made anew in each epoch. If it is made once, seed it with a fixed number"
                )
            return place
        same = [index for index in same if self._saved[index]["number"] == tracked.number] or same
        if len({fingerprint([self._saved[index]["generators"], self._saved[index]["live"]]) for index in same}) > 1:
            warn_inexact(
                f"{len(same)} loaders of the checkpoint look the same and began with generators in the same state; which of them this one "
                "is cannot be told, the first is taken. Seed their generators differently"
            )
        tracked.restore(self._saved[same[0]])
        return same[0]

    def _begin(self, tracked: TrackedLoader, step: int) -> Iterator[Any]:
        self._start = {
            "rng": capture_rng(),
            "generators": tracked.generators(),
            "values": tracked.sampler_values(),
            "live": tracked.live,
            "step": step,
            "drawing": None,
        }
        if tracked.indexed:

            def drawing() -> None:  # without workers, only inside the first next(): more may have been drawn in between
                start["drawing"] = [capture_rng(), tracked.generators()]

            start = self._start
            begun = None if tracked.workers else drawing
            return iter(tracked.over_indices(epoch_seed=self._epoch_seed(tracked), begun=begun))
        return iter(tracked.as_it_is(epoch_seed=self._epoch_seed(tracked)))

    def _resume(self, tracked: TrackedLoader, target: dict[str, Any], restore: Callable[[], None]) -> Iterator[Any]:
        check_loader(tracked.loader, target["loader"])
        tracked.warn_of_restart()
        tracked.compare_samplers(target["start"]["values"])
        self.batch, self._start = target["batch"], target["start"]
        if self._start["live"]:
            tracked.warm_up()
        found: dict[str, Any] = {}  # the generators as they are here, off the way

        def depart(rng: dict[str, Any], generators: list[Any]) -> None:
            found.update(capture_rng())
            restore_rng(rng)
            tracked.set_generators(generators)

        def arrive() -> None:
            # Workers are sent indices ahead of time. Where that is another number of batches than before, the draws just made count.
            ahead = tracked.workers and target["ahead"] != tracked.ahead
            generators = tracked.generators() if ahead else target["generators"]
            restore_rng(found)
            restore()
            tracked.set_generators(generators)

        depart(self._start["rng"], self._start["generators"])
        if not tracked.indexed:
            batches = self._reread(tracked, target)
            arrive()
        elif tracked.workers:
            batches = iter(tracked.over_indices(epoch_seed=self._epoch_seed(tracked), skip=self.batch))
            arrive()  # by now the indices of the batches to prefetch have been drawn, as they had been at the checkpoint
        else:  # the sampler draws inside the first next(): go there just then, and arrive behind the draws that are thrown away
            there = self._start["drawing"] or [self._start["rng"], self._start["generators"]]
            batches = iter(
                tracked.over_indices(epoch_seed=0, skip=self.batch, begun=lambda: depart(*there), skipped=arrive)
            )
            restore_rng(found)
        return batches

    def _reread(self, tracked: TrackedLoader, target: dict[str, Any]) -> Iterator[Any]:
        if tracked.stateful:
            loader = tracked.as_it_is(epoch_seed=0)  # the seed comes with the state
            loader.load_state_dict(target["state"])
            return iter(loader)
        if self.batch:
            warn_inexact(
                f"{type(tracked.loader).__name__} cannot be resumed by index: {self.batch} batches are read again and thrown away. That is "
                "exact only if it yields the same data each time it is iterated over; random numbers drawn in its workers start over. "
                "A map-style dataset, or a loader with state_dict() such as torchdata's StatefulDataLoader, has neither limit"
            )
        batches: Iterator[Any] = iter(tracked.as_it_is(epoch_seed=0))
        for _ in range(self.batch):
            if next(batches, _END) is _END:
                break
        return batches

    def _epoch_seed(self, tracked: TrackedLoader) -> int:
        """Seed for the samples of this pass, from torch's generator and the loader's own at its start, as torch does; draws nothing."""
        if not tracked.workers:
            return 0
        start = self._start
        return int(fingerprint([self._passes, start["step"], start["rng"]["torch"], start["generators"]])[:16], 16)
