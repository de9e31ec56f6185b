"""The guard's arguments, checked and turned into objects; the environment fills in what was not given."""

import dataclasses
import datetime as dt
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from spotguard._time import parse_seconds
from spotguard.errors import ConfigError
from spotguard.notices import NoticeSource
from spotguard.notices.platforms import Platform, auto_sources, detect_platform
from spotguard.policies import RetentionPolicy, SavePolicy, as_retention_policy, as_save_policy
from spotguard.settings import Settings, load_settings
from spotguard.stores import LocalObjectStore, ObjectStore, open_store

__all__ = ["Notices", "Options", "RunPlace", "RunPlaces", "read_options", "refuse_several_ranks"]


@runtime_checkable
class HasObjects(Protocol):
    """A `CheckpointStore`, or anything else that stands on an object store."""

    @property
    def objects(self) -> ObjectStore:
        """It."""
        ...


RunPlace = str | os.PathLike[str] | ObjectStore | HasObjects
"""Where a run is kept: a path, a URI, or a store."""

RunPlaces = RunPlace | Sequence[RunPlace]
"""One place, or several: tiers, fastest first."""


Notices = Sequence["NoticeSource | Literal['auto']"] | Literal["auto", "none"]
"""Where notices come from: ``"auto"`` for what fits the cloud we are on, ``"none"``, or a list of sources, ``"auto"`` among them."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a guard was asked to do."""

    stores: tuple[ObjectStore, ...]
    policy: SavePolicy
    retention: RetentionPolicy
    sources: tuple[NoticeSource, ...]
    exit_code: int
    settings: Settings
    platform: Platform
    grace_s: float | None


def read_options(
    uri: Any,
    *,
    every: SavePolicy | int | str | dt.timedelta | None,
    keep: RetentionPolicy | int | None,
    notices: Notices | None,
    exit_code: int | None,
    grace: str | float | dt.timedelta | None = None,
) -> Options:
    """Check every argument.

    Raises:
        ConfigError: Names the first one that is wrong, and what to write instead.
    """
    settings = load_settings()
    stores = _open_stores(uri)
    platform = detect_platform()
    given = "exit_code" in settings.model_fields_set or exit_code is not None
    code = settings.choose("exit_code", exit_code) if given else platform.exit_code
    if given and (type(code) is not int or not 1 <= code <= 255):
        raise ConfigError(f"exit_code={code!r}: must be 1 to 255; 0 would tell the scheduler that the work is done")
    sources = _sources(settings.choose("notices", notices), platform)
    for source in sources:
        if not isinstance(source, NoticeSource):
            raise ConfigError(f"notices=[{source!r}]: a notice source has a name and a method watch(emit, stop)")
    return Options(
        stores=stores,
        policy=settings.choose("every", every, as_save_policy),
        retention=settings.choose("keep", keep, as_retention_policy),
        sources=sources,
        exit_code=code,
        settings=settings,
        platform=platform,
        grace_s=settings.choose("grace", grace, lambda value: value and parse_seconds(value, argument="grace")),
    )


def _sources(notices: Any, platform: Platform) -> tuple[NoticeSource, ...]:
    if notices == "none":
        return ()
    if notices == "auto":
        return auto_sources(platform)
    if isinstance(notices, str) or not isinstance(notices, Sequence):
        raise ConfigError(f"notices={notices!r}: write 'auto', 'none', or give a list of notice sources")
    auto = [one for source in notices for one in (auto_sources(platform) if source == "auto" else (source,))]
    return tuple(auto)


def _open_stores(uri: Any) -> tuple[ObjectStore, ...]:
    several = isinstance(uri, Sequence) and not isinstance(uri, (str, bytes))
    stores: dict[str, ObjectStore] = {}
    for place in uri if several else [uri]:
        if isinstance(place, ObjectStore):
            store = place
        elif isinstance(place, (str, os.PathLike)):
            store = open_store(place)
        elif isinstance(place, HasObjects) and isinstance(place.objects, ObjectStore):
            store = place.objects
        else:
            raise ConfigError(
                f"uri={uri!r}: give a directory such as 'runs/my-run', a URI as text, a store, or a list of these, fastest first"
            )
        where = os.path.realpath(store.root) if isinstance(store, LocalObjectStore) else store.uri.rstrip("/")
        if where in stores:
            raise ConfigError(f"uri={uri!r}: {store.uri} is named twice; each tier needs a place of its own")
        stores[where] = store
    if not stores:
        raise ConfigError(f"uri={uri!r} names no place; give a directory such as 'runs/my-run', or a URI as text")
    return tuple(stores.values())


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
