"""The guard's arguments, checked and turned into objects; the environment fills in what was not given."""

import dataclasses
import datetime as dt
import os
import sys
from collections.abc import Sequence
from typing import Any

from spotguard.errors import ConfigError
from spotguard.notices import NoticeSource
from spotguard.policies import RetentionPolicy, SavePolicy, as_retention_policy, as_save_policy
from spotguard.settings import Settings, load_settings
from spotguard.stores import ObjectStore, open_store

__all__ = ["Options", "read_options", "refuse_several_ranks"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a guard was asked to do."""

    store: ObjectStore
    policy: SavePolicy
    retention: RetentionPolicy
    sources: tuple[NoticeSource, ...]
    exit_code: int
    settings: Settings


def read_options(
    uri: Any,
    *,
    every: SavePolicy | int | str | dt.timedelta | None,
    keep: RetentionPolicy | int | None,
    notices: Sequence[NoticeSource],
    exit_code: int | None,
) -> Options:
    """Check every argument.

    Raises:
        ConfigError: Names the first one that is wrong, and what to write instead.
    """
    settings = load_settings()
    places = list(uri) if isinstance(uri, Sequence) and not isinstance(uri, str) else [uri]
    if not all(isinstance(place, (str, os.PathLike)) for place in places):
        raise ConfigError(f"uri={uri!r}: give a directory such as 'runs/my-run', or a URI as text")
    if len(places) != 1:
        raise ConfigError(f"uri={uri!r}: this release writes to one place; several tiers are not supported yet")
    code = settings.choose("exit_code", exit_code)
    if type(code) is not int or not 1 <= code <= 255:
        raise ConfigError(f"exit_code={code!r}: must be 1 to 255; 0 would tell the scheduler that the work is done")
    if not isinstance(notices, Sequence):
        raise ConfigError(f"notices={notices!r}: give a list of notice sources")
    for source in notices:
        if not isinstance(source, NoticeSource):
            raise ConfigError(f"notices=[{source!r}]: a notice source has a name and a method watch(emit, stop)")
    return Options(
        store=open_store(places[0]),
        policy=settings.choose("every", every, as_save_policy),
        retention=settings.choose("keep", keep, as_retention_policy),
        sources=tuple(notices),
        exit_code=code,
        settings=settings,
    )


def refuse_several_ranks() -> None:
    """One process only, for now.

    Raises:
        ConfigError: This process is one of several ranks.
    """
    distributed = sys.modules.get("torch.distributed")
    try:
        size = int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        size = 1
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        size = max(size, distributed.get_world_size())
    if size > 1:
        raise ConfigError(
            f"{size} ranks: this release guards a single process; ranks that do not agree on a step would lose the run"
        )
