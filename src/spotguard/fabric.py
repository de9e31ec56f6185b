"""Lightning Fabric: the guard around a loop that is written with it.

The Fabric object comes first, everything else is as in `spotguard.SpotGuard`::

    fabric.launch()
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)
    with SpotGuard(fabric, uri, TrainState(model=model, optimizer=optimizer)) as guard:
        for epoch in guard.epochs(10):
            for x, y in guard.batches(loader):
                ...

Fabric hands out wrappers. A model is taken out of its wrapper, so that its shard has the names of the original; a loader is followed
inside its wrapper, and its batches are moved to the device as Fabric moves them. What Fabric knows besides is saved as well: the loss scale
of ``16-mixed`` as the member ``precision``, and how many passes over a loader it has counted for ``set_epoch()``.
"""

import contextlib
import datetime as dt
import importlib
import re
import sys
import weakref
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import torch
from torch._dynamo import OptimizedModule

from spotguard.errors import ConfigError, MissingExtraError
from spotguard.events import EventHook
from spotguard.guard.options import Notices, RunPlaces
from spotguard.guard.spot_guard import SpotGuard as Guard
from spotguard.policies import RetentionPolicy, SavePolicy
from spotguard.state.loaders import describe_loader
from spotguard.state.train_state import TrainState

__all__ = ["SpotGuard"]

_NAMES = ("lightning_fabric", "lightning.fabric")  # two distributions with two sets of classes
_OLDEST, _BELOW = (2, 2), (2, 7)
_PARTS = (
    ("wrappers", "_FabricModule"),
    ("wrappers", "_FabricDataLoader"),
    ("strategies.strategy", "_Sharded"),
    ("utilities.data", "_set_sampler_epoch"),
    ("utilities.apply_func", "move_data_to_device"),
)


def _check_release(name: str) -> None:
    version = sys.modules[name].__version__
    if not _OLDEST <= tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _BELOW:
        raise MissingExtraError.of("lightning", f"{name} {version} is installed, spotguard.fabric needs >=2.2,<2.7")


def _require() -> None:
    loaded = [name for name in _NAMES if sys.modules.get(name) is not None]
    for name in () if loaded else _NAMES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            loaded = [name]
            break
    if not loaded:
        raise MissingExtraError.of("lightning", "lightning_fabric is not installed")
    for name in loaded:
        _check_release(name)


_require()


class _Parts(NamedTuple):
    """What we need of one of the packages and it does not show."""

    module: Any
    loader: Any
    sharded: Any
    set_epoch: Any
    move: Any


def _parts_of(fabric: Any) -> _Parts:
    """Those of the package that this Fabric comes from: the user may have imported either, or both."""
    for base in type(fabric).__mro__:
        for package in _NAMES:
            if base.__module__ == f"{package}.fabric" and base.__name__ == "Fabric":
                _check_release(package)
                homes = [importlib.import_module(f"{package}.{home}") for home, _ in _PARTS]
                return _Parts(*(getattr(home, name) for home, (_, name) in zip(homes, _PARTS, strict=True)))
    raise ConfigError(
        f"SpotGuard({type(fabric).__name__}, ...): the Fabric comes first, as in SpotGuard(fabric, uri, state)"
    )


class SpotGuard(Guard):
    """`spotguard.SpotGuard` for a loop that is written with Fabric. Make it when models and optimizers have been set up.

    Args:
        fabric: The Fabric, launched.
        uri: As there, like everything that follows.
        state: What is saved. Members may be what `Fabric.setup` returned, or what it was given.
        every: When to save.
        keep: What to keep.
        notices: ``"auto"``, ``"none"``, or a list of sources; as for `SpotGuard`.
        grace: How long the platform leaves us after a signal; as for `SpotGuard`.
        exit_code: Exit status after a stop.
        on_event: Called with every event.

    Raises:
        ConfigError: An argument is wrong, or the model is spread over several processes; the message says what to do.

    Example:
        >>> import torch
        >>> from lightning_fabric import Fabric
        >>> fabric = Fabric(accelerator="cpu", devices=1)
        >>> model = torch.nn.Linear(2, 1)
        >>> model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> data = torch.utils.data.TensorDataset(torch.ones(8, 2), torch.ones(8, 1))
        >>> loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
        >>> with SpotGuard(fabric, "memory://doc-fabric", TrainState(model=model, optimizer=optimizer)) as guard:
        ...     for epoch in guard.epochs(2):
        ...         for x, y in guard.batches(loader):
        ...             optimizer.zero_grad()
        ...             fabric.backward(torch.nn.functional.mse_loss(model(x), y))
        ...             _ = optimizer.step()
        >>> guard.step, list(guard.checkpoint.load()["model"])
        (4, ['weight', 'bias'])
    """

    def __init__(
        self,
        fabric: Any,
        uri: RunPlaces,
        state: TrainState,
        *,
        every: SavePolicy | int | str | dt.timedelta | None = None,
        keep: RetentionPolicy | int | None = None,
        notices: Notices | None = None,
        grace: str | float | dt.timedelta | None = None,
        exit_code: int | None = None,
        on_event: EventHook | None = None,
    ) -> None:
        self._parts = _parts_of(fabric)
        given: Any = state  # refused below, where it is no TrainState
        self._fabric_state = _FabricState(fabric, self._parts, state) if isinstance(given, TrainState) else given
        super().__init__(
            uri,
            self._fabric_state,
            every=every,
            keep=keep,
            notices=notices,
            grace=grace,
            exit_code=exit_code,
            on_event=on_event,
        )

    def _batches(
        self, loader: Any, itself: "list[weakref.ref[Generator[Any, None, None]]]"
    ) -> Generator[Any, None, None]:
        if not isinstance(loader, self._parts.loader):
            yield from super()._batches(loader, itself)
            return
        inner = loader._dataloader  # noqa: SLF001 - everything that can be resumed is inside
        self._parts.set_epoch(inner, self._fabric_state.count_pass(loader, again=self._tracker.resuming))
        with contextlib.closing(super()._batches(inner, itself)) as batches:
            for batch in batches:
                yield batch if loader.device is None else self._parts.move(batch, loader.device)


class _FabricState(TrainState):
    """The user's members, taken out of Fabric's wrappers, and what Fabric itself knows."""

    def __init__(self, fabric: Any, parts: _Parts, state: TrainState) -> None:
        strategy, wrapper = fabric.strategy, parts.module
        if fabric.world_size > 1 or isinstance(strategy, parts.sharded):
            raise ConfigError(
                f"Fabric with {type(strategy).__name__} and {fabric.world_size} ranks: this release guards a single process that holds the "
                "whole model; write Fabric(devices=1) without a sharding strategy"
            )
        members = dict(state.members)
        self._shells: dict[str, list[torch.nn.Module]] = {}
        for name, value in state.members.items():
            if not isinstance(value, torch.nn.Module):
                continue
            members[name] = module = _original(value, wrapper)
            inside = set(module.modules())
            if any(isinstance(part, wrapper) for part in inside):
                raise ConfigError(
                    f"TrainState({name}=...): {type(module).__name__} holds a model that Fabric has set up, whose names differ on the way "
                    "out and in. Make it from the original, as in AveragedModel(model.module)"
                )
            self._shells[name] = [part for part in value.modules() if part not in inside]
        if strategy.precision.state_dict():
            if "precision" in members:
                raise ConfigError(
                    "TrainState(precision=...): under this name the precision plugin of Fabric is saved, without your doing; rename yours"
                )
            members["precision"] = strategy.precision
        super().__init__(**members)
        self._counted: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._passes: dict[str, int] = {}  # of loaders that this process has not come to yet

    def count_pass(self, loader: Any, *, again: bool) -> int:
        """The number of the pass over a loader that begins now, counted where Fabric counts.

        Args:
            loader: Fabric's.
            again: The loop is on its way to the place of a checkpoint: this pass had begun before, and is counted in it.
        """
        counter = vars(loader)
        if loader not in self._counted:
            look = describe_loader(loader._dataloader)  # noqa: SLF001
            look.pop("workers", None)
            taken = set(self._counted.values())
            key = next(key for number in range(len(taken) + 1) if (key := f"{look} {number}") not in taken)
            self._counted[loader] = key
            counter["_num_iter_calls"] = self._passes.pop(key, counter["_num_iter_calls"])
        number = max(0, int(counter["_num_iter_calls"]) - again)
        counter["_num_iter_calls"] = number + 1
        return number

    def local(self) -> dict[str, Any]:
        """The same, and the modes of the wrappers and the passes that Fabric has counted."""
        shells = {name: [shell.training for shell in shells] for name, shells in self._shells.items()}
        passes = {key: vars(loader)["_num_iter_calls"] for loader, key in self._counted.items()}
        return {**super().local(), "fabric": {"shells": shells, "passes": {**self._passes, **passes}}}

    def load_members(self, saved: Mapping[str, Any], *, compare: bool = True) -> list[str]:
        """The same, for schedulers too that hold another side of the optimizer than the one that is a member."""
        inexact = super().load_members(saved, compare=compare)
        for member in self.members.values():
            if isinstance(member, torch.optim.lr_scheduler.LRScheduler):
                member.optimizer._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001
        return inexact

    def load_local(self, saved: Mapping[str, Any]) -> list[str]:
        """The same; a checkpoint of the plain guard fits too, it says nothing of Fabric."""
        ours = saved.get("fabric", {"shells": {}, "passes": {}})
        for name, modes in ours["shells"].items():
            for shell, training in zip(self._shells.get(name, ()), modes, strict=False):  # compiled now, and not then
                shell.training = training  # the outermost one passes it on to the original, whose own modes come next
        here = set(self._counted.values())
        self._passes = {key: count for key, count in ours["passes"].items() if key not in here}
        return super().load_local(saved)


def _original(module: Any, wrapper: Any) -> torch.nn.Module:
    """The user's own module, without what Fabric and `torch.compile` have put around it."""
    while isinstance(module, (wrapper, OptimizedModule)):
        module = module.module if isinstance(module, wrapper) else module._orig_mod  # noqa: SLF001
    return module  # type: ignore[no-any-return]
