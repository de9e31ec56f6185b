"""The adapter for Lightning Fabric: what it takes, what it refuses, and what it leaves in a checkpoint."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.strategies.single_device import SingleDeviceStrategy
from lightning_fabric.strategies.strategy import _Sharded
from torch.utils.data import DataLoader, Sampler

import spotguard
from spotguard import CheckpointStore, Preempted, TrainState
from spotguard.errors import ConfigError
from spotguard.fabric import SpotGuard


def make_fabric(**options: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **options)


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)


def test_without_fabric_the_import_says_what_to_install() -> None:
    ended = python(
        "import sys; sys.modules['lightning_fabric'] = sys.modules['lightning'] = None; import spotguard.fabric"
    )
    assert ended.returncode == 1
    assert "MissingExtraError: lightning_fabric is not installed: pip install 'spotguard[lightning]'" in ended.stderr


@pytest.mark.parametrize("name", ["lightning_fabric", "lightning.fabric"])
@pytest.mark.parametrize("version", ["2.1.4", "2.7.0", "3.0.0rc1"])
def test_a_release_that_is_not_known_is_refused_by_name_and_number(name: str, version: str) -> None:
    ended = python(
        f"import sys, types; module = types.ModuleType({name!r}); module.__version__ = {version!r}; "
        f"sys.modules[{name!r}] = module; import spotguard.fabric"
    )
    assert ended.returncode == 1
    assert (
        f"MissingExtraError: {name} {version} is installed, spotguard.fabric needs >=2.2,<2.7: pip install "
        "'spotguard[lightning]'" in ended.stderr
    )


@pytest.mark.parametrize("version", ["2.2.0", "2.6.6.post1", "2.6.0dev20260101"])
def test_every_release_from_2_2_to_2_6_is_taken(version: str) -> None:
    ended = python(
        "import sys, types; sys.modules['lightning_fabric'] = module = types.ModuleType('lightning_fabric'); "
        f"module.__version__ = {version!r}; import spotguard.fabric"
    )
    assert ended.returncode == 0, ended.stderr


def test_the_fabric_of_either_package_is_taken_where_both_are_loaded() -> None:
    pytest.importorskip("lightning", reason="the other distribution")
    ended = python(
        """
import lightning_fabric, torch, spotguard.fabric
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricDataLoader
from spotguard import TrainState
fabric = Fabric(accelerator="cpu", devices=1)
model, optimizer = fabric.setup(model := torch.nn.Linear(1, 1), torch.optim.SGD(model.parameters(), lr=0.1))
loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(torch.ones(3, 1)))
assert isinstance(loader, _FabricDataLoader)
with spotguard.fabric.SpotGuard(fabric, "memory://either", TrainState(model=model, optimizer=optimizer)) as guard:
    for _ in guard.epochs(1):
        for x in guard.batches(loader):
            fabric.backward(model(x).sum())
assert guard.step == 3
assert list(guard.checkpoint.load()["model"]) == ["weight", "bias"]
"""
    )
    assert ended.returncode == 0, ended.stderr


def test_what_is_no_fabric_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SpotGuard\(Linear, ...\): the Fabric comes first"):
        SpotGuard(torch.nn.Linear(1, 1), "memory://no-fabric", TrainState(model=torch.nn.Linear(1, 1)))


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(ConfigError, match="state=Linear"):
        SpotGuard(make_fabric(), "memory://no-state", torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_several_ranks_are_refused_on_entering(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = SpotGuard(make_fabric(), "memory://ranks", TrainState(model=torch.nn.Linear(1, 1)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 ranks"), guard:
        pass


def test_a_fabric_for_several_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="DDPStrategy and 2 ranks"):
        SpotGuard(Fabric(accelerator="cpu", devices=2), "memory://ranks", TrainState(model=torch.nn.Linear(1, 1)))


def test_a_model_that_is_spread_out_is_refused() -> None:
    class Spread(SingleDeviceStrategy, _Sharded):
        def module_sharded_context(self) -> Any:
            raise NotImplementedError

    with pytest.raises(ConfigError, match="Spread and 1 ranks"):
        SpotGuard(Fabric(strategy=Spread()), "memory://spread", TrainState(model=torch.nn.Linear(1, 1)))


def test_the_plain_guard_sends_the_user_of_a_fabric_loader_here() -> None:
    loader = make_fabric().setup_dataloaders(DataLoader(torch.ones(3, 1)))  # type: ignore[arg-type]
    with (
        pytest.raises(ConfigError, match=r"use SpotGuard from spotguard\.fabric"),
        spotguard.SpotGuard("memory://plain", TrainState(model=torch.nn.Linear(1, 1))) as guard,
    ):
        next(iter(guard.batches(loader)))


@pytest.mark.parametrize("around", ["fabric", "compiled, then fabric", "fabric, then compiled", "nothing"])
def test_a_model_is_saved_under_the_names_of_the_original(around: str, tmp_path: Path) -> None:
    def make() -> Any:
        return torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.BatchNorm1d(2))

    fabric, original = make_fabric(), make()
    model: Any = torch.compile(original, backend="eager") if around.startswith("compiled") else original
    wrapped = fabric.setup(model)
    given = {"fabric, then compiled": torch.compile(wrapped, backend="eager"), "nothing": original}.get(around, wrapped)
    with SpotGuard(fabric, tmp_path, TrainState(model=given)) as guard:
        for _ in guard.steps(1):
            fabric.backward(original(torch.ones(2, 1)).sum())
    assert guard.checkpoint is not None
    shard = torch.load(next(tmp_path.glob("checkpoints/*/model.pt")), weights_only=True)
    assert list(shard) == list(original.state_dict())
    make().load_state_dict(shard)
    local = torch.load(next(tmp_path.glob("checkpoints/*/rank-00000.pt")), weights_only=True)
    assert set(local["gradients"]) == {f"model.{name}" for name, _ in original.named_parameters()}


def test_modes_come_back_for_the_wrapper_and_for_what_is_inside(tmp_path: Path) -> None:
    for start in range(2):
        fabric = make_fabric()
        model = fabric.setup(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout()))
        with SpotGuard(fabric, tmp_path, TrainState(model=model)) as guard:
            if start == 0:
                model.eval()
                model.module.train()
                model.module[1].eval()
                for _ in guard.steps(1):
                    pass
        modes = [part.training for part in (model, model.module, model.module[0], model.module[1])]
        assert modes == [False, True, True, False]


@pytest.mark.parametrize("side", ["the original", "the wrapper"])
def test_a_scheduler_knows_that_its_optimizer_has_stepped_before(side: str, tmp_path: Path) -> None:
    for start in range(2):
        fabric, model = make_fabric(), torch.nn.Linear(1, 1)
        original = torch.optim.SGD(model.parameters(), lr=0.1)
        early = torch.optim.lr_scheduler.StepLR(original, 1)
        wrapped, optimizer = fabric.setup(model, original)
        scheduler = early if side == "the original" else torch.optim.lr_scheduler.StepLR(optimizer, 1)
        with SpotGuard(fabric, tmp_path, TrainState(model=wrapped, optimizer=optimizer, scheduler=scheduler)) as guard:
            for _ in guard.steps(1 + start):
                if start == 0:
                    fabric.backward(wrapped(torch.ones(1, 1)).sum())
                    optimizer.step()
                else:
                    scheduler.step()  # warns, as an error here, where no optimizer has stepped
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_model_of_fabric_inside_another_one_is_refused() -> None:
    class Holder(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

    fabric = make_fabric()
    model = fabric.setup(torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"average=.*Make it from the original"):
        SpotGuard(fabric, "memory://nested", TrainState(average=Holder(model)))
    SpotGuard(fabric, "memory://nested", TrainState(average=torch.optim.swa_utils.AveragedModel(model.module)))


def test_the_loss_scale_is_a_member_of_its_own_name() -> None:
    scaler = torch.amp.GradScaler("cpu")
    fabric = make_fabric(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    model = fabric.setup(torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="precision plugin"):
        SpotGuard(fabric, "memory://scale", TrainState(precision=model))
    with SpotGuard(fabric, "memory://scale", TrainState(model=model)) as guard:
        for _ in guard.steps(1):
            pass
    assert guard.checkpoint is not None
    assert guard.checkpoint.load()["precision"] == scaler.state_dict()


class Sent:
    """A batch that notes where it was sent."""

    def __init__(self, samples: list[torch.Tensor]) -> None:
        self.samples, self.device = samples, "nowhere"

    def to(self, device: Any) -> "Sent":
        self.device = str(device)
        return self


@pytest.mark.parametrize(("move", "device"), [(True, "cpu"), (False, "nowhere")])
def test_batches_are_sent_to_the_device_as_fabric_sends_them(move: bool, device: str, tmp_path: Path) -> None:
    fabric = make_fabric()
    plain: Any = DataLoader(torch.ones(3, 1), collate_fn=Sent)  # type: ignore[arg-type]
    loader = fabric.setup_dataloaders(plain, move_to_device=move)
    with SpotGuard(fabric, tmp_path, TrainState(model=fabric.setup(torch.nn.Linear(1, 1)))) as guard:
        batches = guard.batches(loader)
        assert len(batches) == 3
        assert [batch.device for batch in batches] == [device] * 3


class Counted(Sampler[int]):
    """Starts at another sample in each pass, by its number."""

    def __init__(self) -> None:
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[int]:
        return iter([10 * self.epoch + place for place in range(4)])


def passes(fabric: Fabric, run: Path | None, stop_at: int = -1) -> list[list[int]]:
    """Two passes over one loader and one over another that looks the same, in each of two epochs; the batches of this start."""

    def make() -> Any:
        return fabric.setup_dataloaders(DataLoader(range(1000), batch_size=2, sampler=Counted()))  # type: ignore[arg-type]

    one, other = make(), make()
    seen: list[list[int]] = []
    if run is None:
        for _ in range(2):
            for loader in (one, other, one):
                seen += [batch.tolist() for batch in loader]
        return seen
    try:
        with SpotGuard(fabric, run, TrainState(model=fabric.setup(torch.nn.Linear(1, 1))), every=1000) as guard:
            for _ in guard.epochs(2):
                for loader in (one, other, one):
                    for batch in guard.batches(loader):
                        seen.append(batch.tolist())
                        if guard.step == stop_at:
                            os.kill(os.getpid(), signal.SIGTERM)
    except Preempted:
        pass
    return seen


@pytest.mark.parametrize("stop_at", range(12))
def test_passes_are_counted_for_set_epoch_as_fabric_counts_them(stop_at: int, tmp_path: Path) -> None:
    whole = passes(make_fabric(), None)
    assert whole[2] == [0, 1]
    assert whole[-1] == [32, 33]
    first = passes(make_fabric(), tmp_path, stop_at)
    rest = passes(make_fabric(), tmp_path)
    assert first + rest == whole


def test_a_run_of_the_plain_guard_goes_on_with_fabric(tmp_path: Path) -> None:
    for start in range(2):
        model = torch.nn.Linear(1, 1)
        loader: Any = DataLoader(range(4))  # type: ignore[arg-type]
        fabric = make_fabric()
        with (
            SpotGuard(fabric, tmp_path, TrainState(model=fabric.setup(model)))
            if start
            else spotguard.SpotGuard(tmp_path, TrainState(model=model))
        ) as guard:
            for _ in guard.epochs(1 + start):
                assert [int(x) for x in guard.batches(fabric.setup_dataloaders(loader) if start else loader)] == [
                    0,
                    1,
                    2,
                    3,
                ]
    assert guard.step == 8
    assert CheckpointStore(tmp_path).list()


def test_a_pass_that_is_left_by_break_counts_its_last_step(tmp_path: Path) -> None:
    fabric = make_fabric()
    loader = fabric.setup_dataloaders(DataLoader(range(4)))  # type: ignore[arg-type]
    with SpotGuard(fabric, tmp_path, TrainState(model=fabric.setup(torch.nn.Linear(1, 1)))) as guard:
        for _ in guard.epochs(2):
            for batch in guard.batches(loader):
                if int(batch) == 1:
                    break
    assert guard.step == 4
