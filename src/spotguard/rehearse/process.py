"""Starts the user's command, talks with the guard inside it, and delivers what is due: real signals, from outside."""

import contextlib
import dataclasses
import functools
import heapq
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spotguard.errors import ConfigError
from spotguard.rehearse.record import Message
from spotguard.rehearse.scenario import Announce, Begin, Delivery, Freeze, Kill, Signal, Target, Withdraw

__all__ = ["Answer", "Director", "End", "Gatekeeper", "tail"]

_TICK = 0.02  # seconds between looks at the process


@dataclasses.dataclass(frozen=True)
class Answer:
    """What to do with a message of the guard.

    Attributes:
        reply: Sent back, and the process goes on; None leaves it waiting, to be killed at exactly that place.
        deliveries: What happens to the process from now on.
        hold: Seconds up to the reply: time for the process to hear a signal.
    """

    reply: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)
    deliveries: tuple[Delivery, ...] = ()
    hold: float = 0.0


@dataclasses.dataclass(frozen=True)
class End:
    """How a start ended.

    Attributes:
        exit_code: As `subprocess` has it: negative for a signal.
        timed_out: It was killed by us because it did not end.
        itself: The guard was in the very process that was started.
    """

    exit_code: int
    timed_out: bool = False
    itself: bool = False


class Director(Protocol):
    """Decides what happens in a start."""

    def decide(self, message: Message) -> Answer:
        """The guard has come to a place."""

    def perform(self, act: Announce | Begin | Withdraw) -> None:
        """Let the metadata service tell of it."""

    def delivered(self, delivery: Delivery, trouble: str) -> None:
        """It has been delivered; `trouble` says why it could not come through."""


class Gatekeeper:
    """Listens where the guards of the processes under rehearsal ask for leave to go on.

    Args:
        path: Of the Unix socket, short enough for one (about 100 bytes).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(path))
        except OSError as error:
            self._listener.close()
            raise ConfigError(
                f"{path}: no socket can be made there ({error}); set TMPDIR to a short local path"
            ) from error
        self._listener.listen()
        self._listener.setblocking(False)  # noqa: FBT003

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    def run(
        self, command: Sequence[str], *, environment: Mapping[str, str], log: Path, timeout: float, director: Director
    ) -> End:
        """Start the command and see it through to its end.

        Args:
            command: Program and arguments.
            environment: Of the command.
            log: Where its output goes.
            timeout: Seconds until it is killed as hanging.
            director: Told every message of the guard, says what to do.

        Raises:
            ConfigError: The command cannot be started.
        """
        environment = {**environment, "SPOTGUARD_REHEARSAL": str(self._path), "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            try:
                # A session of its own: what it leaves behind (workers of a killed trainer) can be found and cleaned up as one group.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(f"{command[0]} cannot be started: {error.strerror or error}") from error
        with _Attendance(process.pid, director) as attendance:
            try:
                timed_out = attendance.attend(self._listener, time.monotonic() + timeout)
            finally:
                attendance.signal_all(signal.SIGKILL)  # not reaped yet, so the number of the group is still its own
                process.wait()
        return End(process.returncode, timed_out, attendance.itself)


class _Attendance(contextlib.ExitStack):
    """One start that is under way: its processes, their lines, and what is due when.

    Args:
        pid: Of the command, which leads a session and a process group.
        director: See there.
    """

    def __init__(self, pid: int, director: Director) -> None:
        super().__init__()
        self._pid, self._director = pid, director
        self._selector = self.enter_context(selectors.DefaultSelector())
        self._lines: list[_Line] = []
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    @property
    def itself(self) -> bool:
        """Whether a guard is in the process that was started, and not in a child of it."""
        return any(line.pid == self._pid for line in self._lines)

    def attend(self, listener: socket.socket, deadline: float) -> bool:
        """Answer, and deliver, until the process is gone; True when it had to be given up."""
        self._selector.register(listener, selectors.EVENT_READ)
        while os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            now = time.monotonic()
            if now > deadline:
                return True
            wait = min(_TICK, max(0.0, self._due[0][0] - now)) if self._due else _TICK
            for key, _ in self._selector.select(wait):
                if key.fileobj is listener:
                    self._welcome(listener)
                else:
                    self._hear(key.data)
            while self._due and self._due[0][0] <= time.monotonic():
                heapq.heappop(self._due)[2]()
        return False

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to every process that belongs to it.

        Those that torchrun starts lead groups of their own. A guard that is still on the line is alive, so its number is its own.
        """
        groups = {self._pid}
        for line in self._lines:
            with contextlib.suppress(ProcessLookupError):
                if line.pid is not None and line.open:
                    groups.add(os.getpgid(line.pid))
        for group in groups - {os.getpgrp()}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._count), what))

    def _welcome(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        line = _Line(self.enter_context(connection))
        self._lines.append(line)
        self._selector.register(connection, selectors.EVENT_READ, line)

    def _hear(self, line: "_Line") -> None:
        message = line.receive()
        if not line.open:
            self._selector.unregister(line.connection)
        if message is None:
            return
        answer, now = self._director.decide(message), time.monotonic()
        for delivery in answer.deliveries:
            self._at(now + delivery.at_s, functools.partial(self._deliver, line, delivery))
        if answer.reply is not None:
            self._at(now + answer.hold, functools.partial(line.reply, answer.reply))

    def _deliver(self, line: "_Line", delivery: Delivery) -> None:
        act, trouble = delivery.act, ""
        if isinstance(act, Signal):
            trouble = self._signal(act.number, act.to, line)
        elif isinstance(act, Kill):
            self.signal_all(signal.SIGKILL)
        elif isinstance(act, Freeze):
            self.signal_all(signal.SIGSTOP)
            if act.seconds is not None:
                self._at(time.monotonic() + act.seconds, functools.partial(self.signal_all, signal.SIGCONT))
        else:
            self._director.perform(act)
        self._director.delivered(delivery, trouble)

    def _signal(self, number: signal.Signals, to: Target, line: "_Line") -> str:
        pid = line.pid if to == "guard" else self._pid
        if to == "group":
            self.signal_all(number)
        elif to == "process 1" and not _handles(self._pid, number):
            return f"dropped: process 1, {_name(self._pid)}, has no handler for it"
        elif pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return ""


class _Line:
    """One guard on the line. It waits for each answer, so there is never more than one message under way.

    Attributes:
        connection: The line itself.
        pid: Of the guard's process, once it has said so.
        open: Somebody is there.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pid: int | None = None
        self.open = True
        self._received = b""

    def receive(self) -> Message | None:
        """A message, once all of it has come."""
        try:
            data = self.connection.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            self.open = False
            return None
        self._received += data
        if not self._received.endswith(b"\n"):
            return None
        message: Message = json.loads(self._received)
        self._received = b""
        self.pid = message.get("pid", self.pid)
        return message

    def reply(self, answer: Mapping[str, Any]) -> None:
        """Let it go on."""
        with contextlib.suppress(ConnectionError):
            self.connection.sendall(json.dumps(answer).encode() + b"\n")


def _handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; True where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), None)
    return caught is None or bool(int(caught, 16) >> (number - 1) & 1)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "the command"


def tail(log: Path, lines: int = 15) -> str:
    """The last lines that a start has written."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])
