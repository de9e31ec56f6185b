"""Defaults from the environment: ``SPOTGUARD_*``. An argument given in code wins, and the setting it hides is warned about."""

import difflib
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from spotguard.errors import ConfigError

__all__ = ["Settings", "load_settings"]

_T = TypeVar("_T")


class Settings(BaseSettings):
    """What the environment may set.

    Attributes:
        every: When to save: ``"10m"``, or a number of steps such as ``"500"``.
        keep: How many of the newest checkpoints retention keeps.
        exit_code: Exit status of `Preempted`; 0 would tell a scheduler that the work is done.
        notices: ``"auto"`` to ask the metadata service of the cloud we are on, ``"none"`` not to.
        grace: How long the platform leaves us after a signal or a notice that does not say it, such as ``"30s"``.
        azure_endpoint: Another address of Azure's metadata service; those of the other clouds have variables of their own for that.
        dmi: Where the kernel shows what the firmware says of the machine; set by ``spotguard rehearse --platform``.
        max_failures: Failed saves in a row after which training stops with an error.
        poll_s: Seconds between looks at the ``stop`` object of the run. Default: 1 on this machine, 5 across a network.
        repeat_s: Seconds in which a repeated signal counts as the same one (launchers often deliver it twice).
        rehearsal: Set by ``spotguard rehearse`` for the processes it starts.

    Example:
        >>> Settings(every="5m").every
        '5m'
    """

    model_config = SettingsConfigDict(env_prefix="SPOTGUARD_", extra="ignore", frozen=True)

    every: str = "10m"
    keep: int = Field(default=3, ge=1)
    exit_code: int = Field(default=143, ge=1, le=255)
    notices: Literal["auto", "none"] = "auto"
    grace: str | None = None
    azure_endpoint: str | None = None
    dmi: str | None = None
    max_failures: int = Field(default=3, ge=1)
    poll_s: float | None = Field(default=None, gt=0, le=86400)
    repeat_s: float = Field(default=1.0, ge=0)
    rehearsal: str | None = None

    def choose(self, name: str, given: _T | None, parse: Callable[[Any], Any] = lambda value: value) -> Any:
        """The argument if one was given, else the setting, parsed; warns about a setting that is hidden by an argument.

        Raises:
            ConfigError: From `parse`; where it is the setting that is wrong, the message names its variable.
        """
        if given is None:
            value = getattr(self, name)
            try:
                return parse(value)
            except ConfigError as error:
                raise ConfigError(f"environment variable SPOTGUARD_{name.upper()}={value!r}: {error}") from error
        if name in self.model_fields_set:
            warnings.warn(
                f"SPOTGUARD_{name.upper()}={getattr(self, name)} is ignored: the script sets {name}={given!r}",
                UserWarning,
                stacklevel=4,  # the script, past read_options and SpotGuard
            )
        return parse(given)


def load_settings() -> Settings:
    """Read the environment.

    Raises:
        ConfigError: A variable has a value that makes no sense; the message names it.
    """
    known = [name.upper() for name in Settings.model_fields]
    for variable in sorted(os.environ):
        name = variable.upper().removeprefix("SPOTGUARD_")
        if variable.upper() == name or name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"is SPOTGUARD_{near[0]} meant?" if near else f"there are SPOTGUARD_{{{', '.join(known)}}}"
        warnings.warn(
            f"environment variable {variable} is ignored, no setting has that name; {hint}", UserWarning, stacklevel=4
        )
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "SPOTGUARD_" + "_".join(str(part) for part in first["loc"]).upper()
        raise ConfigError(f"environment variable {name}={first['input']!r}: {first['msg']}") from error
