"""Random number generators come back where they were, from a file that runs no code."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from spotguard.errors import ConfigError
from spotguard.state.codec import decode
from spotguard.state.rng import capture_rng, decode_generator, encode_generator, is_generator, restore_rng
from spotguard.state.snapshot import HostBuffers
from spotguard.state.train_state import TrainState


def through_a_file(state: Any) -> Any:
    """Written and read with ``weights_only=True``."""
    return decode(HostBuffers().capture("rng", state), key="rng")


def draws() -> list[Any]:
    """Of every global generator; gauss and normal keep a second number back."""
    return [
        *(random.random(), random.gauss(0, 1), random.getrandbits(100), random.sample(range(100), 5)),
        *(np.random.rand(), np.random.randn(), np.random.randint(10**9), np.random.permutation(5).tolist()),
        *(torch.rand(3).tolist(), torch.randn(3).tolist(), torch.randn(1).tolist(), torch.randperm(5).tolist()),
    ]


@pytest.mark.parametrize("before", range(4), ids=lambda count: f"after {count} rounds")
def test_the_global_generators_come_back(before: int) -> None:
    for _ in range(before):
        draws()
    random.gauss(0, 1)
    np.random.randn()
    saved = through_a_file(capture_rng())
    expected = [draws() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert restore_rng(saved) == []
    assert [draws() for _ in range(3)] == expected


def test_capturing_draws_nothing() -> None:
    saved = capture_rng()
    expected = draws()
    restore_rng(saved)
    capture_rng()
    assert draws() == expected


GENERATORS: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any]]] = {
    "random": (random.Random, lambda generator: (generator.random(), generator.gauss(0, 1), generator.getrandbits(99))),
    "torch": (
        lambda seed: torch.Generator().manual_seed(seed),
        lambda generator: (torch.rand(5, generator=generator).tolist(), torch.randn(1, generator=generator).tolist()),
    ),
    "RandomState": (
        np.random.RandomState,
        lambda generator: (generator.rand(3).tolist(), generator.randn(), generator.randint(99)),
    ),
    **{
        kind.__name__: (
            lambda seed, kind=kind: np.random.Generator(kind(seed)),  # type: ignore[misc]
            lambda generator: (
                generator.random(3).tolist(),
                generator.standard_normal(),
                int(generator.integers(2**32, dtype=np.uint32)),
                generator.permutation(6).tolist(),
            ),
        )
        for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
    },
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_object_comes_back(kind: str) -> None:
    make, draw = GENERATORS[kind]
    generator = make(7)
    assert is_generator(generator)
    for rounds in range(3):
        for _ in range(rounds):
            draw(generator)
        saved = through_a_file(encode_generator(generator))
        expected = [draw(generator) for _ in range(5)]
        for other in (generator, make(8)):
            decode_generator(other, saved)
            assert [draw(other) for _ in range(5)] == expected


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_may_be_a_member(kind: str) -> None:
    make, draw = GENERATORS[kind]
    state = TrainState(noise=make(3))
    state.check()
    saved = through_a_file(state.state_dicts()["noise"])
    expected = draw(state.members["noise"])
    assert state.load_members({"noise": saved}) == []
    assert draw(state.members["noise"]) == expected


def test_what_is_no_generator_is_not_taken_for_one() -> None:
    for value in (random, torch, np.random, None, 1, torch.nn.Linear(1, 1), random.Random, np.random.PCG64()):
        assert not is_generator(value)


def test_a_generator_of_the_operating_system_has_no_state_to_save_and_is_refused() -> None:
    with pytest.raises(ConfigError, match="noise"):
        TrainState(noise=random.SystemRandom()).check()


def test_the_global_generators_can_be_restored_without_what_was_not_there() -> None:
    saved = capture_rng()
    del saved["numpy"]
    assert restore_rng(saved) == []
