"""A training that runs already, looked at from outside: the kernel tells what it does with a signal, whoever set it up so, Python or C."""

import datetime as dt
import os
import signal
import socket
import time
from pathlib import Path

from spotguard.checkpoint import Claim
from spotguard.errors import SpotguardError
from spotguard.ops.doctor.findings import Finding
from spotguard.ops.doctor.process import Process, blocked_by_all, read_process
from spotguard.pipeline.history import read_history
from spotguard.stores import ObjectStore

__all__ = ["examine_training", "signal_of_training", "training_of"]

_PROC = Path("/proc")
_SLACK_S = 2.0  # the kernel tells when a process began to a hundredth, and when it booted to a second
_EARLIER = "begin the script with 'import spotguard.early', and enter SpotGuard as soon as can be"


def training_of(store: ObjectStore) -> int | None:
    """Number of the process that has claimed the newest attempt, if it runs here; None otherwise."""
    try:
        history = read_history(store)
    except (SpotguardError, OSError):  # which is told of elsewhere
        return None
    claim = history.claims.get(history.newest_attempt)
    if claim is None or claim.reason != "start" or claim.host != socket.gethostname() or claim.pid == os.getpid():
        return None
    return claim.pid if _is_claimant(claim) else None


def _is_claimant(claim: Claim) -> bool:
    """Whether the process with that number was there before the claim: numbers are used again."""
    try:
        ticks = int((_PROC / str(claim.pid) / "stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float((_PROC / "uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return False
    began = time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    return dt.datetime.fromtimestamp(began - _SLACK_S, dt.timezone.utc) <= claim.created_at


def examine_training(pid: int, *, wanted: tuple[str, ...] = ()) -> list[Finding]:
    """What becomes of signals that are sent to it.

    Args:
        pid: Its number.
        wanted: Names of signals that the platform sends beside SIGTERM.
    """
    process = read_process(pid)
    if process is None:
        text = f"there is no process {pid} here"
        return [
            Finding("training", "problem", text, "give its number as it is here: a container has numbers of its own")
        ]
    command = " ".join(process.command) or process.name
    findings = [
        Finding("training", "ok", f"process {pid} is looked at: {command if len(command) < 60 else process.name}")
    ]
    blocked = blocked_by_all(pid)
    return findings + [signal_of_training(process, name, blocked) for name in dict.fromkeys(["SIGTERM", *wanted])]


def signal_of_training(process: Process, name: str, blocked: frozenset[int]) -> Finding:
    """What the process does with one signal.

    Args:
        process: As the kernel shows it.
        name: Of the signal.
        blocked: Numbers of those that none of its threads takes.
    """
    number = signal.Signals[name]
    if number in blocked:
        text = f"{name} is blocked in every thread of it: it is never delivered"
        return Finding("training", "problem", text, "unblock it before exec, or first thing in the script")
    if number in process.caught:
        text = f"{name} has a handler there; whether it is the guard's, or one that took its place, cannot be seen from outside"
        return Finding("training", "ok", text)
    if number in process.ignored:
        text = f"it ignores {name}: the guard is not there, or something has put that in the place of its handler"
        return Finding("training", "problem", text, _EARLIER)
    if process.pid == 1:
        text = f"it has no handler for {name}, and is process 1, to which the kernel then does not deliver it: a stop now would be lost"
        return Finding(
            "training", "problem", text, f"{_EARLIER}; or start the container with an init ('docker run --init')"
        )
    return Finding("training", "warning", f"it has no handler for {name}: a stop now would end it at once", _EARLIER)
