"""The transformers that is installed, and the `Trainer` that calls."""

import importlib
import inspect
import re
from collections.abc import Iterator
from types import FrameType
from typing import Any

from spotguard.errors import ConfigError, MissingExtraError

__all__ = ["base_class", "check_release", "local_of", "trainer_of_caller"]

_OLDEST = (4, 44)


def check_release(version: str) -> None:
    """Refuse a release whose `Trainer` is not known.

    Raises:
        MissingExtraError: Names the range.
    """
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST:
        raise MissingExtraError.of(
            "transformers", f"transformers {version} is installed, spotguard.transformers needs >=4.44"
        )


def base_class() -> Any:
    """The class `TrainerCallback`.

    Raises:
        MissingExtraError: It is not there, or too old.
    """
    try:
        module = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError.of("transformers", "transformers is not installed") from error
    check_release(module.__version__)
    return module.TrainerCallback


def trainer_of_caller() -> Any:
    """The `Trainer` that has called one of our hooks.

    It tells its callbacks everything but who it is, and what it keeps of the loss since the last line of the log is in none of what it
    tells.

    Raises:
        ConfigError: Nobody up the stack is one.
    """
    trainer_class = importlib.import_module("transformers").Trainer
    for frame in _callers():
        if isinstance(caller := frame.f_locals.get("self"), trainer_class):
            return caller
    raise ConfigError("SpotGuardTrainerCallback works in a transformers.Trainer only: Trainer(..., callbacks=[guard])")


def local_of(trainer: Any, name: str) -> Any:
    """A local variable of the method of the `Trainer` that has called one of our hooks; None when there is none of that name."""
    for frame in _callers():
        if frame.f_locals.get("self") is trainer and name in frame.f_locals:
            return frame.f_locals[name]
    return None


def _callers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
