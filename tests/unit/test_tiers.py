"""Several places for one run: what is accepted, and what the session makes of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spotguard import CheckpointStore, SpotGuard, TrainState
from spotguard.errors import ConfigError
from spotguard.events import AttemptClaimed, CheckpointCommitted, Event, TierUnreachable
from spotguard.guard.options import read_options
from spotguard.pipeline.tiers import Tiers
from spotguard.stores import LocalObjectStore, MemoryObjectStore, ObjectStore


def stores_of(uri: Any) -> list[str]:
    options = read_options(uri, every=None, keep=None, notices=(), exit_code=None)
    return [store.uri for store in options.stores]


def test_a_place_is_a_path_a_uri_a_store_or_a_checkpoint_store(tmp_path: Path) -> None:
    store = MemoryObjectStore("options-place")
    assert stores_of(tmp_path) == stores_of(str(tmp_path)) == [str(tmp_path)]
    assert stores_of(store) == ["memory://options-place"]
    assert stores_of(CheckpointStore(store)) == ["memory://options-place"]
    assert stores_of([tmp_path / "a", "memory://options-b", store, CheckpointStore(tmp_path / "c")]) == [
        str(tmp_path / "a"),
        "memory://options-b",
        "memory://options-place",
        str(tmp_path / "c"),
    ]


def test_a_place_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for places in (
        [tmp_path / "run", f"file://{tmp_path}/run"],
        [tmp_path / "run", CheckpointStore(tmp_path / "run")],
        [tmp_path / "run", tmp_path / "link"],
        ["memory://options-twice", "memory://options-other", "memory://options-twice/"],
    ):
        with pytest.raises(ConfigError, match="named twice"):
            stores_of(places)


@pytest.mark.parametrize("uri", [[None], [3, "a"], {"a"}, {}, [b"a"]], ids=repr)
def test_anything_else_is_refused_with_what_to_give(uri: Any) -> None:
    with pytest.raises(ConfigError, match="fastest first"):
        stores_of(uri)


def test_what_outlives_the_machine_is_anything_but_a_directory_and_memory(tmp_path: Path) -> None:
    def surviving(*stores: ObjectStore) -> list[bool]:
        return [tier.surviving for tier in Tiers(stores).all]

    class Away:
        uri = "away://run"
        create = open = stat = list = delete = discard_partials = None

    away: Any = Away()
    assert surviving(LocalObjectStore(tmp_path), away) == [False, True]
    assert surviving(away, MemoryObjectStore(), Away()) == [True, False, True]  # type: ignore[arg-type]
    assert surviving(LocalObjectStore(tmp_path), MemoryObjectStore()) == [True, True]
    assert surviving(LocalObjectStore(tmp_path)) == [True]
    assert Tiers([LocalObjectStore(tmp_path), away]).home is away


def train(uri: Any, epochs: int, events: list[Event]) -> tuple[SpotGuard, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    data = torch.utils.data.TensorDataset(torch.randn(12, 3), torch.randn(12, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    with SpotGuard(uri, TrainState(model=model, optimizer=optimizer), every=1, on_event=events.append) as guard:
        for _ in guard.epochs(epochs):
            for x, y in guard.batches(loader):
                optimizer.zero_grad()
                loss: Any = torch.nn.functional.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
    return guard, model.weight.detach().clone()


def test_a_guard_over_two_places_goes_on_from_either_bit_for_bit(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    events: list[Event] = []
    _, whole = train([tmp_path / "whole-a", tmp_path / "whole-b"], 4, events)
    assert {event.tier for event in events if isinstance(event, CheckpointCommitted)} == {
        str(tmp_path / "whole-a"),
        str(tmp_path / "whole-b"),
    }
    train([a, b], 2, [])
    first, _ = train([a, b], 3, [])
    assert first.checkpoint is not None
    assert first.checkpoint.id == "0002-0000000009"
    (a / first.checkpoint.id).mkdir()  # other people's
    for path in (a / "checkpoints").rglob("model.pt"):
        path.write_bytes(b"")
    guard, weight = train([a, b], 4, [])
    assert guard.step == 12
    assert torch.equal(weight, whole)
    for place in (a, b):
        latest = CheckpointStore(place).latest()
        assert latest is not None
        assert latest.step == 12
        assert torch.equal(latest.load()["model"]["weight"], whole)


def test_a_tier_that_cannot_be_reached_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train([tmp_path / "a", tmp_path / "b"], 1, [])
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "a").write_text("in the way")
    events: list[Event] = []
    capsys.readouterr()
    guard, _ = train([tmp_path / "a", tmp_path / "b"], 2, events)
    assert guard.checkpoint is not None
    assert guard.checkpoint.store.uri == str(tmp_path / "b")
    assert capsys.readouterr().err.count("cannot be reached") == 1
    (unreachable,) = [event for event in events if isinstance(event, TierUnreachable)]
    assert unreachable.tier == str(tmp_path / "a")
    (claimed,) = [event for event in events if isinstance(event, AttemptClaimed)]
    assert claimed.uri == str(tmp_path / "b")
    assert list((tmp_path / "b/events").iterdir())


def test_two_guards_of_one_process_do_not_share_a_tier(tmp_path: Path) -> None:
    state = TrainState(model=torch.nn.Linear(1, 1))
    with (
        SpotGuard([tmp_path / "a", tmp_path / "b"], state),
        pytest.raises(ConfigError, match="another SpotGuard"),
        SpotGuard([tmp_path / "c", tmp_path / "b"], state),
    ):
        pass


def lightning_callback(uri: Any) -> Any:
    from spotguard.lightning import SpotGuardCallback

    return SpotGuardCallback(uri)


def trainer_callback(uri: Any) -> Any:
    from spotguard.transformers import SpotGuardTrainerCallback

    return SpotGuardTrainerCallback(uri)


@pytest.mark.parametrize("adapter", [lightning_callback, trainer_callback])
def test_the_adapters_take_several_places_too(tmp_path: Path, adapter: Any) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        adapter([tmp_path / "a", tmp_path / "a"])
    guard = adapter([CheckpointStore(tmp_path / "a"), tmp_path / "b"])
    assert guard.resume_path() is None
    guard.close()
    for name in ("a", "b"):
        assert (tmp_path / name / "attempts/0001.json").exists()
    assert (tmp_path / "a/run.json").read_bytes() == (tmp_path / "b/run.json").read_bytes()


def test_fabric_takes_several_places_too(tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    from spotguard.fabric import SpotGuard as FabricGuard

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model = fabric.setup(torch.nn.Linear(2, 1))
    with FabricGuard(fabric, [tmp_path / "a", tmp_path / "b"], TrainState(model=model)) as guard:
        for _ in range(2):
            guard.step_done()
    for name in ("a", "b"):
        latest = CheckpointStore(tmp_path / name).latest()
        assert latest is not None
        assert latest.step == 2
