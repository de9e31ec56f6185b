"""What to keep. A policy is given every committed checkpoint of a history, oldest first, and answers which ones it wants."""

import dataclasses
import datetime as dt
import math
from collections.abc import Sequence
from typing import Protocol

from spotguard._time import parse_seconds
from spotguard.checkpoint import CheckpointId, Manifest
from spotguard.errors import ConfigError

__all__ = [
    "KeepAll",
    "KeepBest",
    "KeepNewest",
    "KeepYoungerThan",
    "RetentionPolicy",
    "as_retention_policy",
    "metrics_of",
]


class RetentionPolicy(Protocol):
    """Says which checkpoints to keep."""

    def keep(self, checkpoints: Sequence[Manifest], *, now: dt.datetime) -> set[CheckpointId]:
        """Ids to keep, of `checkpoints` (oldest first)."""
        ...


class _Composes:
    @property
    def metrics(self) -> frozenset[str]:
        """Names of the metrics that the policy reads."""
        return frozenset()

    def __and__(self: RetentionPolicy, other: RetentionPolicy) -> "_Both":
        return _Both(self, as_retention_policy(other))

    def __or__(self: RetentionPolicy, other: RetentionPolicy) -> "_AnyOf":
        return _AnyOf(self, as_retention_policy(other))


@dataclasses.dataclass(frozen=True)
class _Both(_Composes):
    left: RetentionPolicy
    right: RetentionPolicy

    @property
    def metrics(self) -> frozenset[str]:
        return metrics_of(self.left) | metrics_of(self.right)

    def keep(self, checkpoints: Sequence[Manifest], *, now: dt.datetime) -> set[CheckpointId]:
        return self.left.keep(checkpoints, now=now) & self.right.keep(checkpoints, now=now)


@dataclasses.dataclass(frozen=True)
class _AnyOf(_Composes):
    left: RetentionPolicy
    right: RetentionPolicy

    @property
    def metrics(self) -> frozenset[str]:
        return metrics_of(self.left) | metrics_of(self.right)

    def keep(self, checkpoints: Sequence[Manifest], *, now: dt.datetime) -> set[CheckpointId]:
        return self.left.keep(checkpoints, now=now) | self.right.keep(checkpoints, now=now)


@dataclasses.dataclass(frozen=True)
class KeepAll(_Composes):
    """Keep every checkpoint."""

    def keep(self, checkpoints: Sequence[Manifest], *, now: dt.datetime) -> set[CheckpointId]:  # noqa: ARG002
        """All of them."""
        return {manifest.id for manifest in checkpoints}


@dataclasses.dataclass(frozen=True)
class KeepNewest(_Composes):
    """Keep the `count` newest.

    Example:
        >>> KeepBest(5, "val_loss") & KeepYoungerThan("90d") | KeepNewest(2)  # doctest: +ELLIPSIS
        _AnyOf(left=_Both(left=KeepBest(...), right=KeepYoungerThan(age='90d')), right=KeepNewest(count=2))
    """

    count: int

    def __post_init__(self) -> None:
        _check_count(self.count, "KeepNewest")

    def keep(self, checkpoints: Sequence[Manifest], *, now: dt.datetime) -> set[CheckpointId]:  # noqa: ARG002
        """The last `count`."""
        return {manifest.id for manifest in checkpoints[-self.count :]}


@dataclasses.dataclass(frozen=True)
class KeepBest(_Composes):
    """Keep the `count` best by a metric; a checkpoint without that metric, or with NaN, is never among them.

    Args:
        count: How many.
        metric: Name in the metrics of the manifest.
        mode: ``"min"`` where lower is better, ``"max"`` where higher is.
    """

    count: int
    metric: str
    mode: str = "min"

    def __post_init__(self) -> None:
        _check_count(self.count, "KeepBest")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"KeepBest(mode={self.mode!r}): write 'min' where lower is better, 'max' where higher is")

    @property
    def metrics(self) -> frozenset[str]:
        """The one."""
        return frozenset([self.metric])

    def keep(self, checkpoints: Sequence[Manifest], *, now: dt.datetime) -> set[CheckpointId]:  # noqa: ARG002
        """The best; of equals, the newer."""
        sign = 1 if self.mode == "min" else -1
        scored = [
            (sign * manifest.metrics[self.metric], -index, manifest.id)
            for index, manifest in enumerate(checkpoints)
            if not math.isnan(manifest.metrics.get(self.metric, math.nan))
        ]
        return {identity for _, _, identity in sorted(scored)[: self.count]}


@dataclasses.dataclass(frozen=True)
class KeepYoungerThan(_Composes):
    """Keep what was committed less than `age` ago (``"90d"``, seconds or a timedelta), by the wall clock in the manifest."""

    age: str | float | dt.timedelta

    def __post_init__(self) -> None:
        parse_seconds(self.age, argument="KeepYoungerThan(age)")

    def keep(self, checkpoints: Sequence[Manifest], *, now: dt.datetime) -> set[CheckpointId]:
        """The young ones."""
        oldest = now - dt.timedelta(seconds=parse_seconds(self.age, argument="KeepYoungerThan(age)"))
        return {manifest.id for manifest in checkpoints if manifest.created_at > oldest}


def _check_count(count: int, name: str) -> None:
    if type(count) is not int or count < 1:
        raise ConfigError(f"{name}({count!r}): how many to keep must be a whole number of at least 1")


def metrics_of(policy: RetentionPolicy) -> frozenset[str]:
    """Names of the metrics that a policy reads; none for one that does not say.

    Example:
        >>> sorted(metrics_of(KeepBest(3, "val_loss") | KeepNewest(2)))
        ['val_loss']
    """
    return frozenset(getattr(policy, "metrics", ()))


def as_retention_policy(keep: RetentionPolicy | int) -> RetentionPolicy:
    """Accept the shorthand ``keep=3``.

    Raises:
        ConfigError: Neither a policy nor a whole number of at least 1.
    """
    if isinstance(keep, int):
        if type(keep) is not int or keep < 1:
            raise ConfigError(f"keep={keep!r}: how many to keep must be a whole number of at least 1")
        return KeepNewest(keep)
    if callable(getattr(keep, "keep", None)):
        return keep
    raise ConfigError(
        f"keep={keep!r} is not a retention policy; write keep=3 or KeepBest(5, 'val_loss') | KeepNewest(2)"
    )
