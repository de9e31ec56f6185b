"""Everything a training run consists of, by name."""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from spotguard.checkpoint.layout import check_member_name
from spotguard.errors import ConfigError, InexactResumeWarning, StateMismatchError
from spotguard.state.codec import check_loadable
from spotguard.state.compare import first_difference
from spotguard.state.gradients import capture_gradients, restore_gradients
from spotguard.state.modes import capture_modes, restore_modes
from spotguard.state.rng import (
    capture_rng,
    decode_generator,
    encode_generator,
    is_generator,
    restore_rng,
    unsaved_device,
)

__all__ = ["Stateful", "TrainState"]


@runtime_checkable
class Stateful(Protocol):
    """What a member must offer: modules, optimizers, schedulers, scalers and averaged models all do."""

    def state_dict(self) -> Any:
        """The whole state as tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take it back."""
        ...


class _Generator:
    """Makes a random number generator a member."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def state_dict(self) -> Any:
        return encode_generator(self.generator)

    def load_state_dict(self, state_dict: Any, /) -> None:
        decode_generator(self.generator, state_dict)


class TrainState:
    """Named members, plus the random number generators and the accumulated gradients, which need no naming.

    A member is anything with ``state_dict()`` and ``load_state_dict()``, or a generator of python, numpy or torch. The name of a member
    is the name of its shard, so it has to stay the same for the life of the run.

    Args:
        members: The members, by keyword. None is left out, so that an optional scheduler needs no special case.

    Raises:
        ConfigError: A member has no ``state_dict``, or its name cannot name a shard.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainState(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), scheduler=None)
        >>> list(state.members)
        ['model', 'optimizer']
    """

    def __init__(self, *unnamed: Any, **members: Any) -> None:
        if unnamed:
            raise ConfigError(
                "TrainState(model, ...): members have names, as in TrainState(model=model, optimizer=optimizer)"
            )
        self.members: dict[str, Any] = {}
        self._stateful: dict[str, Stateful] = {}
        for name, value in members.items():
            if value is None:
                continue
            check_member_name(name)
            if isinstance(value, type) or not (isinstance(value, Stateful) or is_generator(value)):
                raise ConfigError(
                    f"TrainState({name}=...): {type(value).__name__} has no state_dict() and load_state_dict(). "
                    "Pass the object that has them, or give your class these two methods"
                )
            self.members[name] = value
            self._stateful[name] = _Generator(value) if is_generator(value) else value
        if not self.members:
            raise ConfigError("TrainState() has no members; write TrainState(model=model, optimizer=optimizer)")

    def state_dicts(self) -> dict[str, Any]:
        """State of each member, live: to be copied before the next step."""
        return {name: member.state_dict() for name, member in self._stateful.items()}

    def check(self) -> None:
        """Refuse members whose state could not be read back.

        Raises:
            ConfigError: The first such member, by name.
        """
        for name, tree in self.state_dicts().items():
            check_loadable(name, tree)
        if (device := unsaved_device()) is not None:
            warnings.warn(
                f"the generator of the {device} device is not saved: what is drawn there will differ after a resume",
                InexactResumeWarning,
                stacklevel=5,
            )

    def local(self) -> dict[str, Any]:
        """What belongs to this rank alone: generators, gradients and the modes of modules, live."""
        return {
            "rng": capture_rng(),
            "gradients": capture_gradients(self.members),
            "modes": capture_modes(self.members),
        }

    def check_names(self, saved: set[str]) -> None:
        """Refuse to resume with other members than were saved.

        Raises:
            StateMismatchError: A member was added, removed or renamed.
        """
        here = set(self.members)
        if here == saved:
            return
        parts = []
        if missing := sorted(saved - here):
            parts.append(f"the checkpoint holds {missing}, which TrainState does not have")
        if added := sorted(here - saved):
            parts.append(f"TrainState has {added}, which the checkpoint does not hold")
        raise StateMismatchError(
            "members differ: "
            + "; ".join(parts)
            + ". Give members the names they had, or start a new run under another URI"
        )

    def load_members(self, saved: Mapping[str, Any], *, compare: bool = True) -> list[str]:
        """Put every member back.

        Args:
            saved: State of each.
            compare: Read each state back, and see whether it is the one that was given.

        Returns:
            What did not come back bit for bit, in words; empty when everything did.

        Raises:
            StateMismatchError: A member refuses its state, because the model has changed shape, say.
        """
        self.check_names(set(saved))
        inexact = []
        for name, member in self._stateful.items():
            try:
                member.load_state_dict(saved[name])
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise StateMismatchError(
                    f"member {name!r} does not take back what was saved: {error}. "
                    "Restore the code that built it, or start a new run under another URI"
                ) from error
            if isinstance(member, torch.optim.Optimizer):
                # Schedulers warn when they step before their optimizer did; this one has stepped, in an earlier process.
                member._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001
            if compare and (difference := first_difference(saved[name], member.state_dict())) is not None:
                inexact.append(f"member {name!r} changed its state on load_state_dict(): {difference}")
        return inexact

    def load_local(self, saved: Mapping[str, Any]) -> list[str]:
        """Put modes, gradients and, last of all, the generators back; returns what could not be, in words."""
        restore_modes(self.members, saved["modes"])
        restore_gradients(self.members, saved["gradients"])
        return restore_rng(saved["rng"])
