"""Trying again must not touch the random numbers of the training."""

import random
import types

import pytest

from spotguard._retry import FullJitter, draw_apart
from spotguard.errors import TransientStoreError
from spotguard.pipeline.objects import retried


def test_a_retry_draws_nothing_from_the_generator_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    before, tries = random.getstate(), iter(range(3))

    def fail() -> str:
        if next(tries) < 2:
            raise TransientStoreError("busy")
        return "done"

    assert retried(fail) == "done"
    assert random.getstate() == before


def test_what_a_store_has_retried_with_patience_is_not_retried_again() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        error = TransientStoreError("busy")
        error.exhausted = True
        raise error

    with pytest.raises(TransientStoreError):
        retried(fail)
    assert len(calls) == 1


def test_somebody_elses_jitter_is_drawn_apart() -> None:
    module = types.ModuleType("theirs")
    exec(
        "import random\ndef jitter(): return random.random() + random.uniform(0, 1) + random.randint(1, 2)",
        vars(module),
    )
    before = random.getstate()
    draw_apart(module)
    draw_apart(module)
    assert module.jitter() >= 1
    assert random.getstate() == before


def test_full_jitter_lies_between_zero_and_a_bound_that_doubles() -> None:
    wait = FullJitter(0.5, longest=3.0)
    for number, bound in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 3.0), (9, 3.0), (2000, 3.0)):
        state = types.SimpleNamespace(attempt_number=number)
        drawn = [wait(state) for _ in range(200)]  # type: ignore[arg-type]
        assert 0 <= min(drawn) <= max(drawn) <= bound
        assert max(drawn) > bound / 2
