"""Where the script believes to be: the environment of a platform, and the metadata service that stands there."""

import contextlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from spotguard.errors import ConfigError
from spotguard.notices.platforms import Layer, detect_platform
from spotguard.rehearse.scenario import GRACES, Announce, Begin, Scenario, Withdraw, scenarios
from spotguard.testing.metadata import Exchange, FakeAws, FakeAzure, FakeGoogle

__all__ = ["MARKS", "Site"]

MARKS = (
    "AWS_BATCH_JOB_ID",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE",
    "AWS_EC2_METADATA_V1_DISABLED",
    "ECS_CONTAINER_METADATA_URI",
    "ECS_CONTAINER_METADATA_URI_V4",
    "GCE_METADATA_HOST",
    "GCE_METADATA_IP",
    "GCE_METADATA_ROOT",
    "INVOCATION_ID",
    "KUBERNETES_SERVICE_HOST",
    "NO_GCE_CHECK",
    "RUNPOD_POD_ID",
    "SLURM_JOB_ID",
    "SPOTGUARD_AZURE_ENDPOINT",
    "TORCHELASTIC_RUN_ID",
    "TRAINING_JOB_NAME",
    "VAST_CONTAINERLABEL",
)
"""Variables that tell of a platform; those of the place where the rehearsal is held must not show through."""

_SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_CLOUDS: Mapping[str, type[FakeAws] | type[FakeGoogle] | type[FakeAzure]] = {
    "aws": FakeAws,
    "gcp": FakeGoogle,
    "azure": FakeAzure,
}
_SET = {
    "k8s": {"KUBERNETES_SERVICE_HOST": "10.96.0.1"},
    "slurm": {"SLURM_JOB_ID": "17"},
    "sagemaker": {"TRAINING_JOB_NAME": "rehearsal"},
}
_AFTERWARDS: Mapping[tuple[str | None, type], str] = {
    ("gcp", Withdraw): "NONE",
    ("azure", Withdraw): '"Events": []',
    ("azure", Begin): "Started",
}


class _News(NamedTuple):
    """From when on it is told, in the answer to which path, and by what it is to be known there."""

    since: float
    path: str
    mark: str

    def is_in(self, exchange: Exchange) -> bool:
        request, reply, at = exchange
        return at >= self.since and request.path.endswith(self.path) and reply.status == 200 and self.mark in reply.text


class Site(contextlib.ExitStack):
    """A platform, as a process in it sees it. Its metadata service runs until the ``with`` block is left.

    Args:
        platform: As in ``--platform``; None for the place where we really are, as it is.
        grace_s: Seconds that the platform leaves; None for what it leaves unless it is set up otherwise.
        folder: An empty directory, in the place of what the firmware tells of the real machine.

    Attributes:
        environment: Of a process there.
        grace_s: See above; 0.0 where we really are.
        scenarios: How it interrupts.
        layer: What is known of it; None where we really are.

    Raises:
        ConfigError: Nothing is known of such a platform.

    Example:
        >>> with Site("k8s", 20.0, Path("/nowhere")) as site:
        ...     print(site.environment["KUBERNETES_SERVICE_HOST"], [one.name for one in site.scenarios])
        10.96.0.1 ['pod deleted', 'no notice']
    """

    def __init__(self, platform: str | None, grace_s: float | None, folder: Path) -> None:
        super().__init__()
        self.platform, self.grace_s = platform, 0.0
        self.environment: Mapping[str, str] = dict(os.environ)
        self.scenarios: tuple[Scenario, ...] = ()
        self.layer: Layer | None = None
        self._fake: FakeAws | FakeGoogle | FakeAzure | None = None
        self._event = ""
        self._news: list[_News] = []
        if platform is None:
            if grace_s is not None:
                raise ConfigError("--grace says how long a platform leaves; name the platform with --platform")
            return
        environment = {name: value for name, value in os.environ.items() if name not in MARKS}
        environment |= {**_SET.get(platform, {}), "SPOTGUARD_DMI": str(folder)}
        self.grace_s = grace_s if grace_s is not None else GRACES.get(platform, 0.0)
        if platform == "torchrun" and (grace_s is not None or not environment.get(_SHUTDOWN, "").isdecimal()):
            environment[_SHUTDOWN] = str(math.ceil(self.grace_s))
        if platform == "torchrun":
            self.grace_s = float(environment[_SHUTDOWN])
        self.scenarios = scenarios(platform, self.grace_s)
        if platform in _CLOUDS:
            self._fake = fake = _CLOUDS[platform]()
            self.enter_context(fake)
            environment |= fake.environment
        self.environment = environment
        inside = {"TORCHELASTIC_RUN_ID": "rehearsal"} if platform == "torchrun" else {}
        self.layer = detect_platform({**environment, **inside}).tightest

    def perform(self, act: Announce | Begin | Withdraw) -> None:
        """Let the metadata service tell of an event."""
        since = time.monotonic()
        if isinstance(act, Announce):
            path, mark = self._announce(act)
        else:
            path, mark = self._news[-1].path if self._news else "", _AFTERWARDS.get((self.platform, type(act)), "")
        if isinstance(act, Withdraw):
            self._clear()
        elif isinstance(act, Begin) and isinstance(self._fake, FakeAzure) and self._event in self._fake.events:
            self._fake.start(self._event)
        self._news.append(_News(since, path, mark))

    def refresh(self) -> None:
        """Another machine of the same kind, on which nothing is planned."""
        self._clear()
        self._news.clear()
        if self._fake is not None:
            self._fake.exchanges.clear()

    @property
    def heard(self) -> tuple[float | None, ...]:
        """When each piece of news was first told to somebody, monotonic seconds; None if it has not been."""
        exchanges = list(self._fake.exchanges) if self._fake is not None else []
        return tuple(next((one.at for one in exchanges if news.is_in(one)), None) for news in self._news)

    def _announce(self, act: Announce) -> tuple[str, str]:
        """Where it is to be seen, and by what."""
        if isinstance(self._fake, FakeGoogle):
            value = "TRUE" if act.what == "preempted" else "TERMINATE_ON_HOST_MAINTENANCE"
            self._fake.put(act.what, value)
            return f"/instance/{act.what}", value
        if isinstance(self._fake, FakeAzure):
            event_type, _, other = act.what.partition(" of ")
            self._event = self._fake.schedule(event_type, act.in_s, resources=("anothervm",) if other else ())
            return "/metadata/scheduledevents", self._event
        if isinstance(self._fake, FakeAws) and act.what == "rebalance":
            self._fake.rebalance()
            return "/rebalance", "noticeTime"
        if isinstance(self._fake, FakeAws):
            self._fake.interrupt(act.what, act.in_s)
            return "/instance-action", "action"
        return "", ""

    def _clear(self) -> None:
        if self._fake is not None:
            self._fake.clear()
