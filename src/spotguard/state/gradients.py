"""Accumulated gradients: part of the state whenever the loop stops between two optimizer steps."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["capture_gradients", "restore_gradients"]


def capture_gradients(members: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The gradients that exist now, by parameter. Empty right after ``zero_grad()``, which sets them to None."""
    return {name: parameter.grad for name, parameter in _parameters(members) if parameter.grad is not None}


def restore_gradients(members: Mapping[str, Any], saved: Mapping[str, torch.Tensor]) -> None:
    """Give every parameter the gradient it had, or none."""
    for name, parameter in _parameters(members):
        gradient = saved.get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)


def _parameters(members: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of the modules among the members, then those that only an optimizer knows; each once."""
    seen: set[int] = set()
    for member, value in members.items():
        if isinstance(value, torch.nn.Module):
            for name, parameter in value.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{member}.{name}", parameter
    for member, value in members.items():
        if isinstance(value, torch.optim.Optimizer):
            for index, group in enumerate(value.param_groups):
                for place, parameter in enumerate(group["params"]):
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield f"{member}[{index}][{place}]", parameter
