"""The index stream: what is left of a sampler, and a seed for each sample that depends on its position alone."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spotguard.state.samples import IndexStream, Sample, sample_seed, seeded_dataset

BATCHES = [[3, 1], [4, 1], [5, 9], [2]]


def test_without_a_seed_indices_are_handed_on_as_they_are() -> None:
    assert list(IndexStream(BATCHES, batched=True, epoch_seed=None)) == BATCHES
    assert list(IndexStream(range(4), batched=False, epoch_seed=None)) == [0, 1, 2, 3]


@given(st.integers(0, 6), st.integers(0, 2**64 - 1))
def test_what_is_left_after_a_skip_is_the_tail_with_the_same_seeds(skip: int, seed: int) -> None:
    whole = list(IndexStream(BATCHES, batched=True, epoch_seed=seed))
    assert list(IndexStream(BATCHES, batched=True, epoch_seed=seed, skip=skip)) == whole[skip:]
    indices = [4, 2, 7, 7, 0]
    every = list(IndexStream(indices, batched=False, epoch_seed=seed))
    assert list(IndexStream(indices, batched=False, epoch_seed=seed, skip=skip)) == every[skip:]


def test_seeds_go_by_position_not_by_batch_size_or_index() -> None:
    flat = [sample.seed for batch in IndexStream(BATCHES, batched=True, epoch_seed=5) for sample in batch]
    assert flat == [sample.seed for sample in IndexStream(range(7), batched=False, epoch_seed=5)]
    assert len(set(flat)) == 7


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**9))
def test_a_seed_has_64_bits_and_differs_from_its_neighbours(seed: int, position: int) -> None:
    value = sample_seed(seed, position)
    assert 0 <= value < 2**64
    assert value != sample_seed(seed, position + 1)
    assert value != sample_seed(seed ^ 1, position)


def test_the_seeds_are_splitmix64() -> None:
    assert [sample_seed(1234567, position) for position in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]  # from its authors' reference implementation


def test_the_sampler_begins_to_draw_when_the_stream_is_iterated_and_skips_when_the_first_is_asked_for() -> None:
    order: list[str] = []

    class Sampler:
        def __iter__(self) -> Any:
            order.append("iter")
            return iter([10, 11, 12])

        def __len__(self) -> int:
            return 3

    stream = IndexStream(Sampler(), batched=False, epoch_seed=None, skip=1, skipped=lambda: order.append("skipped"))
    assert len(stream) == 3
    draws = iter(stream)
    assert order == ["iter"]
    assert next(draws) == 11
    assert order == ["iter", "skipped"]
    assert list(draws) == [12]


def test_skipping_past_the_end_leaves_nothing_and_still_tells() -> None:
    told: list[bool] = []
    assert list(IndexStream(BATCHES, batched=True, epoch_seed=1, skip=9, skipped=lambda: told.append(True))) == []
    assert told == [True]


class Noise:
    """Draws from all three global generators."""

    tag = "noise"

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (index, random.random(), float(np.random.rand()), float(torch.rand(())))

    def __len__(self) -> int:
        return 10


class BatchedNoise(Noise):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 12345])
def test_what_a_dataset_draws_depends_on_the_seed_alone(seed: int) -> None:
    data = seeded_dataset(Noise())
    first = data[Sample(3, seed)]
    _ = (random.random(), np.random.rand(), torch.rand(9))
    assert data[Sample(3, seed)] == first
    assert first[0] == 3
    assert data[Sample(3, seed ^ 1)] != first


def test_a_dataset_that_fetches_batches_still_does() -> None:
    data = seeded_dataset(BatchedNoise())
    samples = [Sample(1, 11), Sample(2, 22)]
    first = data.__getitems__(samples)
    assert data.__getitems__(samples) == first
    assert [item[0] for item in first] == [1, 2]
    assert data.__getitems__([]) == []


def test_a_seeded_dataset_is_otherwise_the_dataset() -> None:
    data = seeded_dataset(Noise())
    assert (len(data), data.tag) == (10, "noise")
    assert not hasattr(data, "__getitems__")
    with pytest.raises(AttributeError):
        _ = data.nothing
