"""The Lightning that the user imported: ``lightning.pytorch``, ``pytorch_lightning``, or both."""

import importlib
import re
import sys
from types import ModuleType
from typing import Any

from spotguard.errors import MissingExtraError

__all__ = ["base_class", "host_of"]

_NAMES = ("lightning.pytorch", "pytorch_lightning")  # two distributions with two sets of classes
_OLDEST, _BELOW = (2, 2), (2, 7)


def _hosts() -> list[ModuleType]:
    """Those that are loaded already; where none is, the first that is installed."""
    loaded = [module for module in map(sys.modules.get, _NAMES) if module is not None]
    for name in () if loaded else _NAMES:
        try:
            loaded = [importlib.import_module(name)]
        except ImportError:
            continue
        break
    if not loaded:
        raise MissingExtraError.of("lightning", "neither lightning nor pytorch_lightning is installed")
    for module in loaded:
        check_release(module.__name__, module.__version__)
    return loaded


def check_release(name: str, version: str) -> None:
    """Refuse a release whose loops are not known.

    Raises:
        MissingExtraError: Names the range.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not _OLDEST <= found < _BELOW:
        raise MissingExtraError.of("lightning", f"{name} {version} is installed, spotguard.lightning needs >=2.2,<2.7")


def base_class() -> Any:
    """A `Callback` that every loaded Lightning takes for its own."""
    return type("Callback", tuple(module.Callback for module in _hosts()), {})


def host_of(trainer: Any) -> str:
    """Name of the package that this trainer belongs to."""
    for base in type(trainer).__mro__:
        for name in _NAMES:
            if base.__module__ == f"{name}.trainer.trainer":
                return name
    raise TypeError(f"{type(trainer).__name__} is no Trainer of Lightning")
