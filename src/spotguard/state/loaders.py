"""A data loader and what has to be remembered about it from pass to pass."""

import copy
import functools
import itertools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from spotguard.errors import InexactResumeWarning, StateMismatchError
from spotguard.state.compare import fingerprint
from spotguard.state.rng import capture_rng, decode_generator, encode_generator, is_generator, restore_rng
from spotguard.state.samples import IndexStream, StatefulIndexStream, seeded_dataset
from spotguard.state.workers import worker_init

__all__ = ["TrackedLoader", "check_loader", "describe_loader", "warn_inexact"]

_LOOKED_AT, _DEPTH, _ITEMS = 1000, 6, 50  # how far generators are searched for


class TrackedLoader:
    """One loader of the user's, with its generators, and with the copy of it that we iterate over.

    Args:
        loader: What the user iterates over.
        known: Generators that are saved anyway, as members of the state.
        births: Every generator that any loader draws from, and its state when it was first seen; added to.

    Attributes:
        births: Those of its own: the same at each start of the same script.
        look: What it looked like when it was first seen, births included, in short.
        fresh: No loader before it drew from its generators.
        number: Number of its latest pass within the epoch.
        indexed: It is a plain loader over a map-style dataset, which can be resumed by index.
        stateful: It keeps its own position, such as torchdata's StatefulDataLoader.
    """

    def __init__(self, loader: Any, known: tuple[Any, ...], births: list[tuple[Any, str]]) -> None:
        try:
            self._reference: Callable[[], Any] = weakref.ref(loader)
        except TypeError:  # a list, say
            self._reference = lambda: loader
        self.stateful = callable(getattr(loader, "state_dict", None)) and callable(
            getattr(loader, "load_state_dict", None)
        )
        plain = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
        self.indexed = plain and not self.stateful and not isinstance(loader.dataset, IterableDataset)
        self.workers = getattr(loader, "num_workers", 0) if isinstance(loader, DataLoader) else 0
        self._persistent = self.workers > 0 and bool(getattr(loader, "persistent_workers", False))
        self._generators = generators_of(loader)
        self._clone: Any = None
        self.number = 0
        seen_before = [generator for generator, _ in births]
        self.fresh = not any(mine is other for mine in self._generators for other in seen_before)
        self.births = [_birth(generator, known, births) for generator in self._generators]
        self.look = fingerprint([describe_loader(loader), self._persistent, self.births])
        hidden = hidden_generators(loader, (*known, *self._generators), known, in_workers=self.workers > 0)
        if hidden:
            warn_inexact(
                f"the data come by generators that nobody saves ({', '.join(hidden)}). Draw from the global "
                "generators, or, with num_workers=0, make the generator a member: TrainState(..., data_rng=generator)"
            )

    @property
    def loader(self) -> Any:
        """The user's loader; None once the user has let go of it."""
        return self._reference()

    def draws_from(self, generator: Any) -> bool:
        """Whether this generator is one of its own."""
        return any(generator is mine for mine in self._generators)

    @property
    def live(self) -> bool:
        """Whether persistent workers are running: the next pass will not draw a seed for them."""
        return self.indexed and self._persistent and self._clone is not None

    @property
    def ahead(self) -> int:
        """Batches whose indices are drawn ahead of time."""
        return self.workers * (getattr(self.loader, "prefetch_factor", None) or 0)

    def generators(self) -> list[Any]:
        """States of the generators that loader and samplers draw from."""
        return [encode_generator(generator) for generator in self._generators]

    def set_generators(self, states: list[Any]) -> None:
        """Put these generators back."""
        for generator, state in zip(self._generators, states, strict=True):
            decode_generator(generator, state)

    def record(self) -> dict[str, Any]:
        """What a later start needs to begin its next pass as this one would."""
        return {
            "loader": describe_loader(self.loader),
            "births": self.births,
            "number": self.number,
            "generators": self.generators(),
            "live": self.live,
            "ahead": self.ahead,
            "values": self.sampler_values(),
        }

    def restore(self, record: dict[str, Any]) -> None:
        """Become what a record tells of."""
        check_loader(self.loader, record["loader"])
        self.warn_of_restart()
        if not hasattr(self.loader.sampler if isinstance(self.loader, DataLoader) else None, "set_epoch"):
            self.compare_samplers(record["values"])
        if record["live"]:
            self.warm_up()
        self.set_generators(record["generators"])

    def warn_of_restart(self) -> None:
        """Say so where workers that should have lived on from pass to pass cannot be brought back as they were."""
        if self._persistent and not self.indexed:
            warn_inexact(
                f"the persistent workers of a {type(self.loader).__name__} start anew, which draws random numbers that a run without a "
                "restart does not draw. No difference with persistent_workers=False, or with a plain DataLoader over a map-style dataset"
            )

    def sampler_values(self) -> dict[str, Any]:
        """Plain attributes of the samplers, such as a count of epochs."""
        holders = [getattr(self.loader, name, None) for name in ("batch_sampler", "sampler")]
        return {
            f"{type(holder).__name__}.{name}": value
            for holder in holders
            for name, value in getattr(holder, "__dict__", {}).items()
            if type(value) in (bool, int, float, str)
        }

    def compare_samplers(self, saved: dict[str, Any]) -> None:
        """Say so where a sampler counts for itself, and does not stand where it stood."""
        here = self.sampler_values()
        if changed := sorted(name for name in set(here) | set(saved) if here.get(name) != saved.get(name)):
            warn_inexact(
                f"{', '.join(changed)} differs from the checkpoint: a sampler that keeps a state of its own does not get it back. Set it "
                "from guard.epoch at the head of each epoch, in a method set_epoch() say"
            )

    def warm_up(self) -> None:
        """Start persistent workers by an empty pass, so that the next pass is not their first; draws nothing that counts."""
        if self.indexed and self._persistent and not self.live:
            rng, generators = capture_rng(), self.generators()
            iter(self.over_indices(epoch_seed=0, empty=True))
            restore_rng(rng)
            self.set_generators(generators)

    def over_indices(
        self,
        *,
        epoch_seed: int,
        skip: int = 0,
        begun: Callable[[], None] | None = None,
        skipped: Callable[[], None] | None = None,
        empty: bool = False,
    ) -> Any:
        """The loader with our index stream in place of its sampler.

        A shallow copy of it: it may be of any subclass, and it shares sampler and dataset with the user's.
        """
        loader = self.loader
        clone = self._clone if self._persistent else None
        if clone is None:
            self._clone = clone = copy.copy(loader)
        batched = loader.batch_sampler is not None
        inner = () if empty else (loader.batch_sampler if batched else loader.sampler)
        seed = epoch_seed if self.workers else None
        stream = IndexStream(inner, batched=batched, epoch_seed=seed, skip=skip, begun=begun, skipped=skipped)
        changes: dict[str, Any] = {"batch_sampler" if batched else "sampler": stream}
        if self.workers and clone.dataset is loader.dataset:
            changes["dataset"] = seeded_dataset(loader.dataset)
            changes["worker_init_fn"] = worker_init(loader.worker_init_fn)
        clone.__dict__.update(changes)  # past DataLoader.__setattr__, which refuses to change these
        if self._persistent and clone._iterator is not None:  # noqa: SLF001 - a running iterator has its own reference
            clone._iterator._index_sampler = stream  # noqa: SLF001
        return clone

    def as_it_is(self, *, epoch_seed: int) -> Any:
        """The loader for a pass that is not by index: with per-sample seeds and shielded workers as far as its kind allows."""
        loader = self.loader
        if not self.workers or (self._persistent and not self.stateful):
            return loader
        if self.stateful and self._clone is not None:
            clone = self._clone
        else:
            clone = copy.copy(loader)
            clone.worker_init_fn = worker_init(loader.worker_init_fn)
        if self.stateful:
            self._clone = clone
            if not isinstance(loader.dataset, IterableDataset):
                batched = loader.batch_sampler is not None
                inner = loader.batch_sampler if batched else loader.sampler
                stream = StatefulIndexStream(inner, batched=batched, epoch_seed=epoch_seed)
                changes = {"batch_sampler" if batched else "sampler": stream}
                if clone.dataset is loader.dataset:
                    changes["dataset"] = seeded_dataset(loader.dataset)
                clone.__dict__.update(changes)
        return clone

    def own_state(self) -> Any:
        """State of a stateful loader, as it tells it."""
        return (self._clone if self._clone is not None else self.loader).state_dict()


def describe_loader(loader: Any) -> dict[str, Any]:
    """What must be the same on resume for a position to mean the same."""
    dataset = getattr(loader, "dataset", None)
    found = {
        "dataset length": _length(dataset) if dataset is not None else _length(loader),
        "batch size": getattr(loader, "batch_size", None),
        "drop_last": getattr(loader, "drop_last", None),
        "batches": _length(loader)
        if isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset)
        else None,
        "workers": getattr(loader, "num_workers", None),
    }
    return {name: value for name, value in found.items() if isinstance(value, (int, bool))}


def check_loader(loader: Any, saved: dict[str, Any]) -> None:
    """Refuse to go on with a loader for which the position would mean something else.

    Raises:
        StateMismatchError: The batch size or the length of the dataset, say, has changed.
    """
    here = describe_loader(loader)
    if changed := differences(loader, saved):
        raise StateMismatchError(
            f"the data loader differs from the one in the checkpoint: {'; '.join(changed)}. A position in one is no position in the other: "
            "restore the old value, or start a new run under another URI"
        )
    if bool(saved.get("workers")) != bool(here.get("workers")):
        warn_inexact(
            f"num_workers was {saved.get('workers')} and is {here.get('workers')}: random augmentations draw from the generators "
            "of the main process without workers and from per-sample ones with workers, so they will differ"
        )


def differences(loader: Any, saved: dict[str, Any]) -> list[str]:
    """What makes a position in this loader another than in the one that was saved, in words."""
    here = describe_loader(loader)
    return [
        f"{name} was {saved.get(name)} and is {here.get(name)}"
        for name in sorted(set(saved) | set(here))
        if name != "workers" and saved.get(name) != here.get(name)
    ]


def warn_inexact(message: str) -> None:
    """Name what cannot be restored bit for bit."""
    warnings.warn(message, InexactResumeWarning, stacklevel=2)


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None


def generators_of(loader: Any) -> list[Any]:
    """Every generator that the loader and its samplers draw from, each once, in a fixed order."""
    found: list[Any] = []
    waiting = [loader, getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)]
    seen: set[int] = set()
    while waiting:
        holder = waiting.pop(0)
        if holder is None or id(holder) in seen or len(seen) > 100:
            continue
        seen.add(id(holder))
        for value in getattr(holder, "__dict__", {}).values():
            if is_generator(value) and all(value is not other for other in found):
                found.append(value)
            elif isinstance(value, torch.utils.data.Sampler):
                waiting.append(value)
    return found


def hidden_generators(loader: Any, saved: tuple[Any, ...], known: tuple[Any, ...], *, in_workers: bool) -> list[str]:
    """Where a loader's dataset and collate function, or whatever else it is, keep generators that nobody saves.

    Args:
        loader: Looked into: attributes, containers (their first items), functions and what they close over.
        saved: Generators that are saved as long as the main process draws from them.
        known: Those of them that are members of the state.
        in_workers: Dataset and collate function live in workers, whose generators nobody can save.
    """
    parts = ("dataset", "collate_fn") if isinstance(loader, DataLoader) else ("",)
    waiting = [(part, getattr(loader, part) if part else loader, 0) for part in parts]
    fine = () if in_workers else (saved if parts != ("",) else known)
    found: list[str] = []
    seen: set[int] = set()
    while waiting and len(seen) < _LOOKED_AT:
        path, value, depth = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if is_generator(value):
            if all(value is not other for other in fine):
                found.append(path or type(value).__name__)
        elif depth < _DEPTH:
            waiting += [(f"{path}{name}".lstrip("."), inner, depth + 1) for name, inner in _inside(value)]
    return found


def _inside(value: Any) -> list[tuple[str, Any]]:
    if value is None or isinstance(value, (type, torch.Tensor, str, bytes, int, float, types.ModuleType)):
        return []
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in itertools.islice(value.items(), _ITEMS)]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", item) for index, item in enumerate(value[:_ITEMS])]
    if isinstance(value, functools.partial):
        return [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    if isinstance(value, types.MethodType):
        return [("", value.__self__)]
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return [(f".{name}", cell.cell_contents) for name, cell in cells if not _empty(cell)]
    return [(f".{name}", item) for name, item in list(getattr(value, "__dict__", {}).items())]


def _empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is _empty
    except ValueError:
        return True


def _birth(generator: Any, known: tuple[Any, ...], births: list[tuple[Any, str]]) -> str:
    """The state a generator was in when it was first seen, in short; nothing for a member, which is in the state it was restored to."""
    if any(generator is other for other in known):
        return ""
    for other, birth in births:
        if other is generator:
            return birth
    births.append((generator, fingerprint(encode_generator(generator))))
    return births[-1][1]
