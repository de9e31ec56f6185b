"""What a module knows and its ``state_dict()`` leaves out: which parts are in evaluation mode, and which parameters are frozen."""

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["capture_modes", "restore_modes"]

Modes = dict[str, dict[str, list[str]]]


def capture_modes(members: Mapping[str, Any]) -> Modes:
    """For each module among the members: names of submodules in evaluation mode, and of parameters without gradient.

    Example:
        >>> capture_modes({"model": torch.nn.Linear(1, 1).eval().requires_grad_(False)})
        {'model': {'eval': [''], 'frozen': ['weight', 'bias']}}
    """
    return {
        member: {
            "eval": [name for name, module in value.named_modules() if not module.training],
            "frozen": [name for name, parameter in value.named_parameters() if not parameter.requires_grad],
        }
        for member, value in members.items()
        if isinstance(value, torch.nn.Module)
    }


def restore_modes(members: Mapping[str, Any], saved: Modes) -> None:
    """Put every submodule and every parameter back into the mode it was in."""
    for member, modes in saved.items():
        module = members[member]
        resting, frozen = set(modes["eval"]), set(modes["frozen"])
        for name, part in module.named_modules():
            part.training = name not in resting
        for name, parameter in module.named_parameters():
            if parameter.requires_grad == (name in frozen):
                parameter.requires_grad_(name not in frozen)
