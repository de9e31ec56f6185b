"""What each platform delivers when it takes a process away, and when: tables only. The figures are those of docs/explanation/notices.md."""

import dataclasses
from collections.abc import Callable, Sequence
from signal import SIGCONT, SIGTERM, SIGUSR1, Signals
from typing import Literal

from spotguard._time import format_seconds
from spotguard.errors import ConfigError

__all__ = [
    "GRACES",
    "LEAST_GRACES",
    "Act",
    "Announce",
    "Begin",
    "Delivery",
    "Freeze",
    "Kill",
    "Scenario",
    "Signal",
    "Target",
    "Withdraw",
    "in_words",
    "scenarios",
]

GRACES = {"aws": 120.0, "gcp": 30.0, "azure": 30.0, "k8s": 30.0, "slurm": 60.0, "sagemaker": 120.0, "torchrun": 30.0}
"""The platforms, and the seconds that each leaves unless it is set up otherwise."""

LEAST_GRACES = {"aws": 7.0, "azure": 2.0}
"""Shorter than that a notice may not be heard: the metadata service is asked every 5 s, or every second."""

_POWER_OFF_S = 30.0  # Compute Engine: from the press of the power button, which is a SIGTERM, to the power-off
_KILL_WAIT_S = 30.0  # SLURM: from SIGTERM at the time limit to SIGKILL
_SHUTDOWN_S = 1.0  # EC2: how long its shutdown takes nobody promises; count on nothing
_HINT_S = 6.0  # EC2: by then the recommendation has been heard, which may come with the notice or long before
_FROZEN_S = 2.0  # Azure: "a pause of a few seconds"
_AGENT_S = 5.0  # torchrun kills its workers first, and then ends by itself

Target = Literal["guard", "command", "process 1", "group"]
"""Whom a signal is sent to.

``"guard"`` is the process with the SpotGuard, ``"command"`` the one that was started, ``"process 1"`` the same one as a container has it: a
signal that it has no handler for is dropped by the kernel. ``"group"`` is all of them: a process group, a job step, a control group.
"""


@dataclasses.dataclass(frozen=True)
class Announce:
    """The metadata service tells of an event.

    Attributes:
        what: Which one, in the platform's own word.
        in_s: Seconds up to the time that it names.
    """

    what: str
    in_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Begin:
    """The event that was announced begins."""


@dataclasses.dataclass(frozen=True)
class Withdraw:
    """The metadata service tells of nothing any more: the event was taken back, or is over."""


@dataclasses.dataclass(frozen=True)
class Signal:
    """A signal."""

    number: Signals
    to: Target


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Nothing of the process runs for so many seconds; None for what ends by the kill."""

    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Kill:
    """Nothing is left of it: SIGKILL to all of its processes."""


Act = Announce | Begin | Withdraw | Signal | Freeze | Kill


@dataclasses.dataclass(frozen=True)
class Delivery:
    """One act, so many seconds after the scenario has begun."""

    at_s: float
    act: Act


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One way in which a platform interrupts.

    Attributes:
        name: In the platform's own word.
        deliveries: In the order of their times.
        asks_s: When the process is told to go, seconds from the beginning; None where it is to go on.
        lead_s: Seconds from there to the end: the grace.
        may_leave: Where it is to go on: to leave before the last delivery is no mistake either, only a pity.

    Example:
        >>> pod, _ = scenarios("k8s", 30.0)
        >>> [f"{delivery.at_s:g} s: {in_words(delivery.act)}" for delivery in pod.deliveries]
        ['0 s: SIGTERM to process 1', '30 s: SIGKILL']
    """

    name: str
    deliveries: tuple[Delivery, ...]
    asks_s: float | None = 0.0
    lead_s: float = 0.0
    may_leave: bool = False

    @property
    def asks_by_signal(self) -> bool:
        """Whether it is a signal that tells to go: then nobody trains on."""
        return any(delivery.at_s == self.asks_s and isinstance(delivery.act, Signal) for delivery in self.deliveries)

    @property
    def trains_s(self) -> float:
        """Seconds of training that it may take from its beginning on."""
        if self.asks_s is None:
            return self.deliveries[-1].at_s
        return self.asks_s + (0.0 if self.asks_by_signal else self.lead_s)


def scenarios(platform: str, grace_s: float) -> tuple[Scenario, ...]:
    """How a platform interrupts, with a grace of `grace_s` seconds.

    Raises:
        ConfigError: Nothing is known of such a platform.
    """
    if platform not in GRACES:
        raise ConfigError(f"platform={platform!r}: write one of {', '.join(GRACES)}")
    return (*_TABLES[platform](grace_s), Scenario("no notice", _deliver((0, Kill()))))


def _deliver(*acts: tuple[float, Act]) -> tuple[Delivery, ...]:
    return tuple(Delivery(at_s, act) for at_s, act in acts)


def _aws(grace_s: float) -> Sequence[Scenario]:
    def terminate(from_s: float) -> tuple[Delivery, ...]:
        return _deliver(
            (from_s, Announce("terminate", grace_s)),
            (from_s + grace_s, Signal(SIGTERM, "group")),
            (from_s + grace_s + _SHUTDOWN_S, Kill()),
        )

    hint, ahead_s = Delivery(0, Announce("rebalance")), min(grace_s / 2, _HINT_S)
    frozen = _deliver((0, Announce("hibernate")), (0, Freeze()), (_SHUTDOWN_S, Kill()))
    return (
        Scenario("terminate", terminate(0), lead_s=grace_s),
        Scenario("rebalance, terminate", (hint, *terminate(ahead_s)), asks_s=ahead_s, lead_s=grace_s),
        Scenario("hibernate", frozen),
    )


def _gcp(grace_s: float) -> Sequence[Scenario]:
    ahead_s = max(0.0, grace_s - _POWER_OFF_S)  # preemptionNoticeDuration; without it the notice comes with the signal
    preempted = _deliver(
        (0, Announce("preempted")), (ahead_s, Signal(SIGTERM, "group")), (ahead_s + min(grace_s, _POWER_OFF_S), Kill())
    )
    maintenance = _deliver((0, Announce("maintenance-event")), (grace_s / 3, Withdraw()))
    return (
        Scenario("preempted", preempted, lead_s=grace_s),
        Scenario("maintenance, withdrawn", maintenance, asks_s=None),
    )


def _azure(grace_s: float) -> Sequence[Scenario]:
    preempt = Delivery(0, Announce("Preempt", grace_s))
    others = _deliver(
        (0, Announce("Preempt of another VM", grace_s)),
        (0, Announce("Freeze", grace_s / 3)),
        (grace_s / 3, Begin()),
        (grace_s / 3, Freeze(_FROZEN_S)),
        (max(grace_s, grace_s / 3 + _FROZEN_S), Withdraw()),
    )
    return (
        Scenario("Preempt", (preempt, Delivery(grace_s, Kill())), lead_s=grace_s),
        Scenario("Preempt, withdrawn", (preempt, Delivery(grace_s / 3, Withdraw())), asks_s=None, may_leave=True),
        Scenario("Freeze, and Preempt of another VM", others, asks_s=None),
    )


def _k8s(grace_s: float) -> Sequence[Scenario]:
    deliveries = _deliver((0, Signal(SIGTERM, "process 1")), (grace_s, Kill()))
    return (Scenario("pod deleted", deliveries, lead_s=grace_s),)


def _sagemaker(grace_s: float) -> Sequence[Scenario]:
    deliveries = _deliver((0, Signal(SIGTERM, "process 1")), (grace_s, Kill()))
    return (Scenario("job stopped", deliveries, lead_s=grace_s),)


def _slurm(grace_s: float) -> Sequence[Scenario]:
    def terminate(at_s: float) -> tuple[Delivery, ...]:
        return _deliver((at_s, Signal(SIGCONT, "group")), (at_s, Signal(SIGTERM, "group")))

    end_s = grace_s + _KILL_WAIT_S
    limit = (Delivery(0, Signal(SIGUSR1, "group")), *terminate(grace_s), Delivery(end_s, Kill()))
    return (
        Scenario("time limit", limit, lead_s=end_s),
        Scenario("preempted", (*terminate(0), *terminate(grace_s), Delivery(grace_s, Kill())), lead_s=grace_s),
        Scenario("preempted without GraceTime", (*terminate(0), Delivery(0, Kill()))),
    )


def _torchrun(grace_s: float) -> Sequence[Scenario]:
    deliveries = _deliver((0, Signal(SIGTERM, "command")), (grace_s + _AGENT_S, Kill()))
    return (Scenario("torchrun stopped", deliveries, lead_s=grace_s),)


_TABLES: dict[str, Callable[[float], Sequence[Scenario]]] = {
    "aws": _aws,
    "gcp": _gcp,
    "azure": _azure,
    "k8s": _k8s,
    "slurm": _slurm,
    "sagemaker": _sagemaker,
    "torchrun": _torchrun,
}

_WHOM: dict[Target, str] = {
    "guard": "",
    "command": " to the command",
    "process 1": " to process 1",
    "group": " to all processes",
}


def in_words(act: Act) -> str:
    """What is delivered, for people."""
    if isinstance(act, Announce):
        return act.what + (f" in {format_seconds(act.in_s)}" if act.in_s else "")
    if isinstance(act, Signal):
        return f"{act.number.name}{_WHOM[act.to]}"
    if isinstance(act, Freeze):
        return "frozen" if act.seconds is None else f"frozen for {format_seconds(act.seconds)}"
    return {Begin: "begins", Withdraw: "withdrawn", Kill: "SIGKILL"}[type(act)]
