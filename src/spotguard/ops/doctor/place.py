"""Where we are, and how long a stop leaves us there."""

import os
from collections.abc import Mapping
from pathlib import Path

from spotguard._time import format_seconds
from spotguard.notices.platforms import Platform, reserve_of
from spotguard.ops.doctor.findings import Finding

__all__ = ["examine_grace", "examine_platform", "is_container", "least_time"]

_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))


def is_container(environment: Mapping[str, str] | None = None) -> bool:
    """Whether process 1 is that of a container."""
    env = os.environ if environment is None else environment
    return bool(env.get("KUBERNETES_SERVICE_HOST") or env.get("container")) or any(mark.exists() for mark in _MARKS)


def examine_platform(platform: Platform, *, notices: str) -> list[Finding]:
    """What the environment and the firmware say of the machine."""
    findings = []
    if platform.layers:
        findings.append(Finding("platform", "ok", f"this is {platform.title}"))
    else:
        findings.append(
            Finding(
                "platform",
                "info",
                "no platform that is known: nothing in the environment or the firmware says who could stop this process",
                "SIGTERM is heard all the same; set grace= if you know how long a stop leaves",
            )
        )
    if notices == "none":
        text = "SPOTGUARD_NOTICES=none: no metadata service is asked"
        findings.append(Finding("notices", "warning", text, "unset it, unless something else sends a signal in time"))
    elif platform.cloud is None and platform.layers:
        findings.append(Finding("notices", "info", "no metadata service to ask; notices are signals here"))
    return findings


def examine_grace(platform: Platform, given: float | None) -> list[Finding]:
    """How long each layer leaves, and which one counts.

    Args:
        platform: Where we are.
        given: What the user says we have, in seconds.
    """
    findings = []
    for layer in platform.layers:
        known = "nobody knows how long" if layer.grace_s is None else f"{format_seconds(layer.grace_s)} as a rule"
        findings.append(Finding("grace", "info", f"{layer.title} leaves {known}", layer.lengthen))
    if given is not None:
        text = f"grace is set to {format_seconds(given)}: {format_seconds(given - reserve_of(given))} are used, the rest is a reserve"
        findings.append(Finding("grace", "ok", text))
    elif platform.tightest is not None and platform.grace_s is not None:
        least = platform.grace_s - reserve_of(platform.grace_s)
        text = (
            f"{platform.tightest.title} is the tightest: {format_seconds(least)} of it are used, the rest is a reserve"
        )
        findings.append(Finding("grace", "ok", text, platform.tightest.lengthen if len(platform.layers) > 1 else ""))
    else:
        findings.append(
            Finding("grace", "info", "it is not known how long a stop leaves", "set grace= or SPOTGUARD_GRACE")
        )
    return findings


def least_time(platform: Platform, given: float | None) -> tuple[float, str] | None:
    """The shortest time that a stop may leave, in seconds with the reserve taken off, and who leaves it; None where nobody knows."""
    grace = given if given is not None else platform.grace_s
    if grace is None:
        return None
    who = (
        f"grace={format_seconds(grace)}" if given is not None or platform.tightest is None else platform.tightest.title
    )
    return grace - reserve_of(grace), who
