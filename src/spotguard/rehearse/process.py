"""Starts the user's command, talks with the guard inside it, and sends real signals from outside."""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any

from spotguard.errors import ConfigError

__all__ = ["Answer", "End", "Gatekeeper", "tail"]

Message = Mapping[str, Any]
_TICK = 0.02  # seconds between looks at the process


@dataclasses.dataclass(frozen=True)
class Answer:
    """What to do with a message of the guard.

    Attributes:
        reply: Sent back, and the process goes on; None leaves it waiting, to be killed at exactly that place.
        signal: Sent to the training process first.
        hold: Seconds between signal and reply: time for the process to hear it.
    """

    reply: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)
    signal: Signals | None = None
    hold: float = 0.0


@dataclasses.dataclass(frozen=True)
class End:
    """How a start ended.

    Attributes:
        exit_code: As `subprocess` has it: negative for a signal.
        timed_out: It was killed by us because it did not end.
    """

    exit_code: int
    timed_out: bool = False


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

    def run(self, command: Sequence[str], *, log: Path, timeout: float, decide: Callable[[Message], Answer]) -> End:
        """Start the command and see it through to its end.

        Args:
            command: Program and arguments.
            log: Where its output goes.
            timeout: Seconds until it is killed as hanging.
            decide: Told every message of the guard, says what to do.

        Raises:
            ConfigError: The command cannot be started.
        """
        environment = {**os.environ, "SPOTGUARD_REHEARSAL": str(self._path), "PYTHONUNBUFFERED": "1"}
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
        try:
            timed_out = self._attend(process.pid, time.monotonic() + timeout, decide)
        finally:
            # Not reaped yet, so the number of the group is still its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, SIGKILL)
            process.wait()
        return End(process.returncode, timed_out)

    def _attend(self, pid: int, deadline: float, decide: Callable[[Message], Answer]) -> bool:
        """Answer until the process is gone; True when it had to be given up."""
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as connections:
            selector.register(self._listener, selectors.EVENT_READ)
            while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if time.monotonic() > deadline:
                    return True
                for key, _ in selector.select(_TICK):
                    if key.fileobj is self._listener:
                        connection, _ = self._listener.accept()
                        connections.callback(connection.close)
                        selector.register(connection, selectors.EVENT_READ, _Line(connection))
                    elif not key.data.serve(decide):
                        selector.unregister(key.fileobj)
        return False


class _Line:
    """One guard on the line. It waits for each answer, so there is never more than one message under way."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pid: int | None = None
        self._received = b""

    def serve(self, decide: Callable[[Message], Answer]) -> bool:
        """Take what has come; False when the line is dead or has to stay silent."""
        try:
            data = self._connection.recv(1 << 16)
        except ConnectionError:
            return False
        if not data:
            return False
        self._received += data
        if not self._received.endswith(b"\n"):
            return True
        message, self._received = json.loads(self._received), b""
        self._pid = message.get("pid", self._pid)
        answer = decide(message)
        if answer.signal is not None and self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, answer.signal)
        if answer.hold:
            time.sleep(answer.hold)
        if answer.reply is None:
            return False
        with contextlib.suppress(ConnectionError):
            self._connection.sendall(json.dumps(answer.reply).encode() + b"\n")
        return True


def tail(log: Path, lines: int = 15) -> str:
    """The last lines that a start has written."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])
