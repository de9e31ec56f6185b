"""Random numbers for each sample of its own, so that what a worker draws does not depend on which worker, or on what it did before."""

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

__all__ = ["IndexStream", "Sample", "StatefulIndexStream", "sample_seed", "seeded_dataset"]

_MASK = (1 << 64) - 1


class Sample(NamedTuple):
    """What travels to a worker in place of an index."""

    index: Any
    seed: int


def sample_seed(epoch_seed: int, position: int) -> int:
    """Seed of the sample at one position of an epoch: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (epoch_seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed & 0xFFFFFFFF)


class _SeededDataset:
    """The user's dataset, seeding the global generators of the worker before each sample."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, sample: Sample) -> Any:
        _seed_everything(sample.seed)
        return self.dataset[sample.index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _SeededBatchDataset(_SeededDataset):
    """The same for a dataset that fetches whole batches: one seed, that of the first sample, for the batch."""

    def __getitems__(self, samples: list[Sample]) -> Any:
        if samples:
            _seed_everything(samples[0].seed)
        return self.dataset.__getitems__([sample.index for sample in samples])


def seeded_dataset(dataset: Any) -> Any:
    """Wrap a map-style dataset; it is then indexed by `Sample`."""
    return (_SeededBatchDataset if getattr(dataset, "__getitems__", None) else _SeededDataset)(dataset)


class IndexStream:
    """The user's batch sampler, or sampler, from a given batch on, with a seed for each sample where there are workers.

    Args:
        inner: The user's sampler.
        batched: Whether it yields batches of indices.
        epoch_seed: Seeds are made from it; None for none, and then indices are handed on as they are.
        skip: So many draws are made and thrown away first: of indices, never of data.
        begun: Called before the first draw of all.
        skipped: Called after the draws that do not count, before the first one that does.
    """

    def __init__(
        self,
        inner: Any,
        *,
        batched: bool,
        epoch_seed: int | None,
        skip: int = 0,
        begun: Callable[[], None] | None = None,
        skipped: Callable[[], None] | None = None,
    ) -> None:
        self._inner, self._batched, self._epoch_seed = inner, batched, epoch_seed
        self._skip, self._begun, self._skipped = skip, begun, skipped

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        # iter() here and now: a sampler may draw its permutation in __iter__, before the loader draws the seed of its workers.
        return self._draw(iter(self._inner))

    def _draw(self, draws: Iterator[Any]) -> Iterator[Any]:
        position = 0
        if self._begun is not None:
            self._begun()
        for _ in range(self._skip):
            try:
                drawn = next(draws)
            except StopIteration:
                break
            position += sum(1 for _ in drawn) if self._batched else 1
        if self._skipped is not None:
            self._skipped()
        if self._epoch_seed is None:
            yield from draws
            return
        for drawn in draws:
            samples, position = self.with_seeds(drawn, self._epoch_seed, position)
            yield samples

    def with_seeds(self, drawn: Any, epoch_seed: int, position: int) -> tuple[Any, int]:
        """What to send to the worker for a draw that begins at `position`, and the position behind it."""
        if not self._batched:
            return Sample(drawn, sample_seed(epoch_seed, position)), position + 1
        samples = [Sample(index, sample_seed(epoch_seed, position + place)) for place, index in enumerate(drawn)]
        return samples, position + len(samples)


class StatefulIndexStream(IndexStream):
    """The same for a loader that asks its sampler for a ``state_dict``, such as torchdata's StatefulDataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return _StatefulDraws(self, iter(self._inner), self._epoch_seed or 0)


class _StatefulDraws(Iterator[Any]):
    def __init__(self, stream: StatefulIndexStream, draws: Any, epoch_seed: int) -> None:
        self._stream, self._draws = stream, draws
        self._state = {"epoch_seed": epoch_seed, "position": 0, "yielded": 0}

    def __next__(self) -> Any:
        state = self._state
        drawn = next(self._draws)
        samples, state["position"] = self._stream.with_seeds(drawn, state["epoch_seed"], state["position"])
        state["yielded"] += 1
        return samples

    def state_dict(self) -> dict[str, Any]:
        inner = self._draws.state_dict() if hasattr(self._draws, "state_dict") else None
        return {**self._state, "inner": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = {name: state[name] for name in self._state}
        if state["inner"] is not None:
            self._draws.load_state_dict(state["inner"])
        else:
            for _ in range(state["yielded"]):
                next(self._draws)
