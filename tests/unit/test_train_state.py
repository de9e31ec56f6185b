"""Members by name, and the gradients that belong to them."""

import random
from typing import Any

import pytest
import torch

from spotguard.errors import ConfigError, StateMismatchError
from spotguard.state.compare import first_difference
from spotguard.state.gradients import capture_gradients, restore_gradients
from spotguard.state.train_state import TrainState


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_members_come_back_bit_for_bit() -> None:
    model, optimizer = trained()
    saved = {"model": {k: v.clone() for k, v in model.state_dict().items()}, "optimizer": optimizer.state_dict()}
    other, other_optimizer = trained()
    state = TrainState(model=other, optimizer=other_optimizer)
    assert state.load_members(saved) == []
    assert first_difference(state.state_dicts(), saved) is None


def test_none_is_left_out() -> None:
    assert list(TrainState(model=torch.nn.Linear(1, 1), scheduler=None).members) == ["model"]


@pytest.mark.parametrize(
    "value",
    [3, "model", [], {}, object(), torch.nn.Linear, lambda: None, torch.ones(2)],
    ids=lambda v: type(v).__name__,
)
def test_a_member_without_state_dict_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"TrainState\(ema=\.\.\.\).*state_dict"):
        TrainState(ema=value)


def test_half_a_member_is_refused() -> None:
    class Saves:
        def state_dict(self) -> dict[str, int]:
            return {}

    with pytest.raises(ConfigError, match="load_state_dict"):
        TrainState(half=Saves())


def test_no_members_is_refused() -> None:
    for members in ({}, {"model": None}):
        with pytest.raises(ConfigError, match="no members"):
            TrainState(**members)


def test_a_name_that_cannot_name_a_shard_is_refused() -> None:
    with pytest.raises(ConfigError, match="member name"):
        TrainState(**{"my-model": torch.nn.Linear(1, 1)})


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        ({"model"}, r"has \['optimizer'\]"),
        ({"model", "optimizer", "ema"}, r"holds \['ema'\]"),
        ({"net", "optimizer"}, r"\['net'\].*\['model'\]"),
    ],
)
def test_other_members_than_were_saved_are_refused_by_name(saved: set[str], named: str) -> None:
    model, optimizer = trained()
    with pytest.raises(StateMismatchError, match=named):
        TrainState(model=model, optimizer=optimizer).check_names(saved)


def test_a_member_that_refuses_its_state_is_named() -> None:
    with pytest.raises(StateMismatchError, match=r"(?s)member 'model'.*size mismatch"):
        TrainState(model=torch.nn.Linear(2, 2)).load_members({"model": torch.nn.Linear(3, 2).state_dict()})


def test_a_member_that_does_not_come_back_bit_for_bit_is_named() -> None:
    class Rounds:
        value = 0.123456

        def state_dict(self) -> dict[str, float]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.value = round(state["value"], 3)

    (message,) = TrainState(meter=Rounds()).load_members({"meter": {"value": 0.123456}})
    assert "member 'meter'" in message
    assert "0.123456 and 0.123" in message


def test_gradients_come_back_as_they_were_or_not_at_all() -> None:
    model, optimizer = trained()
    loose = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [loose]})
    members = {"model": model, "optimizer": optimizer}
    loose.grad = torch.full((2,), 7.0)
    saved = {name: gradient.clone() for name, gradient in capture_gradients(members).items()}
    assert sorted(saved) == ["model.bias", "model.weight", "optimizer[1][0]"]
    optimizer.zero_grad()
    assert capture_gradients(members) == {}
    model.weight.grad = torch.zeros(2, 3)
    restore_gradients(members, saved)
    assert first_difference(capture_gradients(members), saved) is None
    restore_gradients(members, {})
    assert capture_gradients(members) == {}


def test_a_restored_gradient_is_a_copy() -> None:
    model = torch.nn.Linear(1, 1)
    saved = {"model.weight": torch.ones(1, 1)}
    restore_gradients({"model": model}, saved)
    assert model.weight.grad is not None
    model.weight.grad.zero_()
    assert float(saved["model.weight"]) == 1.0


def test_tied_parameters_are_told_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(2, 2, bias=False)
            self.other = self.one

    model = Tied()
    model.one.weight.grad = torch.ones(2, 2)
    assert list(capture_gradients({"a": model, "b": model})) == ["a.one.weight"]


def test_what_belongs_to_the_rank_comes_back() -> None:
    model, _ = trained()
    state = TrainState(model=model)
    local = state.local()
    expected = random.random(), torch.rand(2).tolist()
    assert state.load_local(local) == []
    assert (random.random(), torch.rand(2).tolist()) == expected
