"""Does a signal reach the training: the processes above us, handlers that are there already, and signals that are ignored or blocked."""

import dataclasses
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

from spotguard.ops.doctor.findings import Finding

__all__ = [
    "Process",
    "ancestors",
    "blocked_by_all",
    "examine_ancestors",
    "examine_ranks",
    "examine_signals",
    "read_process",
]

_PROC = Path("/proc")
_SHELLS = {"sh", "bash", "dash", "ash", "zsh", "ksh", "busybox"}
_INITS = {"systemd", "init", "tini", "docker-init", "dumb-init", "catatonit", "s6-svscan", "runit", "launchd"}
_EXEC = (
    'write \'exec python train.py\' in the script, use the exec form ENTRYPOINT ["python", "train.py"], '
    "or start the container with an init ('docker run --init')"
)


@dataclasses.dataclass(frozen=True)
class Process:
    """A process, as the kernel shows it.

    Attributes:
        pid: Its number.
        parent: That of its parent; 0 for the first.
        name: Of the program.
        command: What it was started with; empty where that may not be read.
        caught: Numbers of the signals it has handlers for.
        ignored: Those it ignores.
        blocked: Those it has blocked.
    """

    pid: int
    parent: int
    name: str
    command: tuple[str, ...] = ()
    caught: frozenset[int] = frozenset()
    ignored: frozenset[int] = frozenset()
    blocked: frozenset[int] = frozenset()

    @property
    def is_shell(self) -> bool:
        """Whether it runs commands, as other programs or from a script."""
        return self.name in _SHELLS

    @property
    def script(self) -> str:
        """What a shell was told to run; empty for one that somebody types into."""
        rest = list(self.command[1:])
        while rest and rest[0].startswith(("-", "+")):
            option = rest.pop(0)
            if not option.startswith("--") and "c" in option and rest:
                return rest[0]
        return rest[0] if rest else ""


def read_process(pid: int | str = "self", *, proc: Path = _PROC) -> Process | None:
    """Read a process; None where there is none, or no ``/proc``."""
    try:
        status = dict(
            line.split(":", 1) for line in (proc / str(pid) / "status").read_text().splitlines() if ":" in line
        )
        stat = (proc / str(pid) / "stat").read_text()
        name, rest = stat.split("(", 1)[1].rsplit(")", 1)  # a name may have spaces and parentheses: proc(5)
        parent = int(rest.split()[1])
        number = int(stat.split("(", 1)[0])
    except (OSError, ValueError, IndexError):
        return None
    try:
        command = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        command = []
    masks = [_signals(status.get(field, "0")) for field in ("SigCgt", "SigIgn", "SigBlk")]
    return Process(number, parent, name, tuple(command), *masks)


def ancestors(pid: int | str = "self", *, proc: Path = _PROC) -> list[Process]:
    """From the parent of a process, by default ours, up to process 1."""
    return list(_upward(read_process(pid, proc=proc), proc))


def blocked_by_all(pid: int, *, proc: Path = _PROC) -> frozenset[int]:
    """Numbers of the signals that every thread of a process has blocked; any other is taken by one that has not."""
    threads = [read_process(path.name, proc=path.parent) for path in (proc / str(pid) / "task").glob("*")]
    masks = [thread.blocked for thread in threads if thread is not None]
    return frozenset.intersection(*masks) if masks else frozenset()


def _upward(process: Process | None, proc: Path) -> Iterator[Process]:
    seen = set[int]()
    while process is not None and process.parent and process.parent not in seen:
        seen.add(process.parent)
        process = read_process(process.parent, proc=proc)
        if process is not None:
            yield process


def _signals(mask: str) -> frozenset[int]:
    bits = int(mask.strip(), 16)
    return frozenset(number for number in range(1, 65) if bits >> (number - 1) & 1)


def examine_ancestors(above: list[Process], first: Process | None, *, in_container: bool) -> list[Finding]:
    """Who gets the SIGTERM, and does it pass it on.

    Args:
        above: From the parent of the process in question up.
        first: Process 1, which need not be above us: ``kubectl exec`` starts beside it.
        in_container: Whether process 1 is that of a container.
    """
    findings = []
    if first is None:
        findings.append(Finding("pid-1", "info", "process 1 cannot be looked at: there is no /proc here"))
    elif first.is_shell:
        findings.append(_examine_first_shell(first))
    elif first.name in _INITS:
        findings.append(Finding("pid-1", "ok", f"process 1 is {first.name}, which passes signals on"))
    else:
        what = f"process 1 is {first.name}; in a container it alone gets the SIGTERM"
        if in_container:
            findings.append(
                Finding(
                    "pid-1",
                    "info",
                    f"{what}, and nobody clears away processes that have lost their parent",
                    "see that it passes signals on ('docker run --init' does both), or is the training itself, with "
                    "'import spotguard.early' first: the kernel drops what process 1 has no handler for",
                )
            )
        else:
            findings.append(Finding("pid-1", "ok", what))
    shells = [process for process in above if process.pid != 1 and process.is_shell and process.script]
    if shells:
        names = ", ".join(f"{process.name} ({process.pid}: {_short(process.script)})" for process in reversed(shells))
        findings.append(
            Finding(
                "parents",
                "warning",
                f"above the process is a script: {names}. A shell does not pass on a SIGTERM that is sent to it alone",
                _EXEC,
            )
        )
    else:
        findings.append(Finding("parents", "ok", "no script stands between the process and whoever stops it"))
    return findings


def _examine_first_shell(first: Process) -> Finding:
    what = f"process 1 is a shell, {first.name}, with: {_short(first.script) or 'nothing, somebody types into it'}"
    if not first.script:
        return Finding("pid-1", "warning", f"{what}. It keeps a SIGTERM to itself", _EXEC)
    if signal.SIGTERM in first.caught:
        return Finding(
            "pid-1",
            "warning",
            f"{what}. It has a trap for SIGTERM, which runs only when the command before it has ended",
            "start the training with '&', wait for it with 'wait', and have the trap pass the signal on; or use exec",
        )
    if "exec " in first.script:
        return Finding("pid-1", "info", f"{what}. See that the training is what it gives way to by exec")
    return Finding("pid-1", "problem", f"{what}. It keeps a SIGTERM to itself: the training hears nothing", _EXEC)


def _short(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def examine_signals(process: Process | None, *, wanted: tuple[str, ...] = ()) -> list[Finding]:
    """Signals that would not be heard, and handlers that are there before ours.

    Args:
        process: This one.
        wanted: Signals that the platform sends beside SIGTERM and SIGINT.
    """
    findings = []
    names = dict.fromkeys(["SIGTERM", "SIGINT", *wanted])
    for name in names:
        number = signal.Signals[name]
        if process is not None and number in process.blocked:
            findings.append(
                Finding(
                    "signals",
                    "problem",
                    f"{name} is blocked by whoever started this process: it is never delivered",
                    "unblock it before exec, or first thing in the script: "
                    f"signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.{name}])",
                )
            )
        elif process is not None and number in process.ignored:
            findings.append(_ignored(name, needed=name in wanted))
        handler = signal.getsignal(number)
        if callable(handler) and handler is not signal.default_int_handler:
            title = getattr(handler, "__qualname__", repr(handler))
            text = f"{name} has a handler already, {title}; ours is put before it, and it is called after"
            findings.append(Finding("signals", "info", text))
        elif process is not None and number in process.caught and handler is not signal.default_int_handler:
            text = f"{name} has a handler that was not set in Python; ours takes its place, and cannot call it"
            findings.append(Finding("signals", "info", text))
    if not any(finding.level in ("problem", "warning") for finding in findings):
        findings.append(Finding("signals", "ok", f"{', '.join(names)} can be heard"))
    return findings


def _ignored(name: str, *, needed: bool) -> Finding:
    if name == "SIGTERM":
        return Finding(
            "signals", "info", "SIGTERM was set to be ignored by whoever started this; it is heard all the same"
        )
    text = f"{name} was set to be ignored by whoever started this (nohup, trap, or '&' in a script), and stays so"
    fix = "remove that, and start it again" if needed else ""
    return Finding("signals", "warning" if needed else "info", text, fix)


def examine_ranks(environment: Mapping[str, str] | None = None) -> list[Finding]:
    """One process only, for now."""
    size = (os.environ if environment is None else environment).get("WORLD_SIZE", "1")
    if not size.isdigit() or int(size) < 2:
        return []
    text = f"WORLD_SIZE={size}: this release guards a single process, and SpotGuard refuses to start with several ranks"
    return [Finding("ranks", "problem", text, "start one process")]
