"""Training scripts in processes of their own, that tests talk to over pipes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from spotguard.pipeline.checkpoint_store import CheckpointStore

if TYPE_CHECKING:
    from typing_extensions import Self

PRELUDE = """
import os, signal, sys, time
import torch
from spotguard import SpotGuard, TrainState
from spotguard.events import NoticeReceived

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # whole lines, from any thread

def on_event(event):
    if isinstance(event, NoticeReceived):
        say("notice", event.detail)

def guarded(**options):
    model = torch.nn.Linear(2, 2)
    return SpotGuard(sys.argv[1], TrainState(model=model), **{"every": 10**9, "on_event": on_event, **options})
"""


class Script:
    """A training script in a process group of its own.

    Args:
        code: What comes behind the prelude.
        uri: The run.
        ignore: A signal that whoever starts it has set to be ignored.
        first: What comes before the prelude.
        under: A command that starts it.
        env: Variables of its environment.
    """

    def __init__(
        self, code: str, uri: Path, *, ignore: str = "", first: str = "", under: tuple[str, ...] = (), **env: str
    ) -> None:
        command = [*under, sys.executable, "-c", first + PRELUDE + code, str(uri)]
        if ignore:
            command = ["/bin/sh", "-c", f'trap "" {ignore}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **env},
        )

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        _, stderr = self.process.communicate()
        if error is not None:
            print(stderr)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def wait_for(self, wanted: str) -> None:
        for line in iter(self.line, ""):
            if line == wanted:
                return
        raise AssertionError(f"the script ended without {wanted!r}: {self.process.communicate()[1]}")

    def release(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def send_to_child(self, number: signal.Signals) -> None:
        """To the script itself, where a command stands in between."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(child), number)

    def end(self) -> tuple[int, list[str]]:
        """Exit status and the lines that were left."""
        stdout, _ = self.process.communicate()
        return self.process.returncode, stdout.split("\n")[:-1]


def newest_step(uri: Path) -> int | None:
    checkpoint = CheckpointStore(uri).latest()
    return None if checkpoint is None else checkpoint.step


def logged(uri: Path, kind: str) -> list[dict[str, object]]:
    lines: Iterator[str] = (
        line for path in sorted((uri / "events").iterdir()) for line in path.read_text().splitlines()
    )
    return [fields for fields in map(json.loads, lines) if fields["event"] == kind]
