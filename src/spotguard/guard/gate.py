"""Under ``spotguard rehearse`` the guard asks at every boundary, and inside every save, whether to go on.

The rehearsal answers over a Unix socket, or kills the process instead of answering: from outside, at exactly the place its seed chose. The
protocol is one JSON line each way. Outside of a rehearsal none of this exists.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from spotguard.checkpoint import Digest
from spotguard.checkpoint.layout import CHECKPOINTS, MANIFESTS
from spotguard.errors import ConfigError
from spotguard.guard.console import say
from spotguard.stores import ObjectStore, ObjectWriter, open_store
from spotguard.stores.base import ObjectInfo, Progress, check_deadline

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Gate", "gated", "join_rehearsal", "slowed"]

_PIECES_PER_S = 20  # of a slow store: how often it looks at the deadline


class Gate:
    """The line to the rehearsal.

    Args:
        path: Its socket.
    """

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError as error:
            raise ConfigError(
                f"SPOTGUARD_REHEARSAL={path}: no rehearsal is listening there ({error}). 'spotguard rehearse' sets this variable; unset it"
            ) from error
        self._file = self._socket.makefile("rw", encoding="utf-8", newline="\n")

    def ask(self, at: str, **fields: Any) -> dict[str, Any]:
        """Say where we are, and wait for leave to go on."""
        with self._lock:
            self._file.write(json.dumps({"at": at, **fields}) + "\n")
            self._file.flush()
            answer: dict[str, Any] = json.loads(self._file.readline() or "{}")
        return answer

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()


class _GatedWriter:
    def __init__(self, writer: ObjectWriter, gate: Gate, key: str) -> None:
        self._writer, self._gate, self._key = writer, gate, key

    @property
    def info(self) -> ObjectInfo | None:
        return self._writer.info

    def write(self, data: "Buffer", /, progress: Progress | None = None, digest: Digest | None = None) -> int:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        done = self._writer.write(view[:half], progress, digest)
        self._gate.ask("write", key=self._key, done=done)
        return done + self._writer.write(view[half:], progress, digest)


class _GatedStore:
    """Everything but `create` is the store's own."""

    def __init__(self, store: ObjectStore, gate: Gate) -> None:
        self._store, self._gate = store, gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[Any]:
        watched = key.startswith((CHECKPOINTS, MANIFESTS))
        with self._store.create(key, exclusive=exclusive, deadline=deadline) as writer:
            yield _GatedWriter(writer, self._gate, key) if watched else writer
            if watched:
                self._gate.ask("publish", key=key)
        if watched:
            self._gate.ask("published", key=key)


class _SlowWriter:
    def __init__(self, writer: ObjectWriter, store: "_SlowStore", key: str, deadline: float | None) -> None:
        self._writer, self._store, self._key, self._deadline = writer, store, key, deadline

    @property
    def info(self) -> ObjectInfo | None:
        return self._writer.info

    def write(self, data: "Buffer", /, progress: Progress | None = None, digest: Digest | None = None) -> int:
        view, done = memoryview(data).cast("B"), 0
        while done < len(view):
            piece = view[done : done + self._store.piece]
            self._store.wait(len(piece), self._key, self._deadline)
            done += self._writer.write(piece, progress, digest)
        return done


class _SlowStore:
    """Everything but `create` is as fast as the store's own.

    Args:
        store: The one below.
        latency_s: Seconds that every object takes.
        bytes_per_s: What all objects together get; None for no limit.
    """

    def __init__(self, store: ObjectStore, latency_s: float, bytes_per_s: float | None) -> None:
        self._store, self._latency_s, self._bytes_per_s = store, latency_s, bytes_per_s
        self.piece = 1 << 30 if bytes_per_s is None else max(1, int(bytes_per_s / _PIECES_PER_S))
        self._lock, self._free_at = threading.Lock(), 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @contextlib.contextmanager
    def create(self, key: str, *, exclusive: bool = False, deadline: float | None = None) -> Iterator[Any]:
        with self._store.create(key, exclusive=exclusive, deadline=deadline) as writer:
            yield _SlowWriter(writer, self, key, deadline)
            self._sleep_until(time.monotonic() + self._latency_s, key, deadline)

    def wait(self, size: int, key: str, deadline: float | None) -> None:
        """The line is shared: so many bytes take their time, behind those that others are sending."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            until = self._free_at = max(self._free_at, time.monotonic()) + size / self._bytes_per_s
        self._sleep_until(until, key, deadline)

    def _sleep_until(self, until: float, key: str, deadline: float | None) -> None:
        while (left := until - time.monotonic()) > 0:
            check_deadline(deadline, key)
            time.sleep(min(left, 1 / _PIECES_PER_S))


def slowed(store: ObjectStore, *, latency_s: float = 0.0, bytes_per_s: float | None = None) -> ObjectStore:
    """The same store, which takes its time to write, and gives up at the deadline as any other."""
    return cast("ObjectStore", _SlowStore(store, latency_s, bytes_per_s))


def gated(store: ObjectStore, gate: Gate) -> ObjectStore:
    """The same store, asking in the middle of each object of a checkpoint, before it becomes visible, and once it is."""
    return cast("ObjectStore", _GatedStore(store, gate))


def join_rehearsal(path: str, store: ObjectStore) -> tuple[Gate, ObjectStore, int | None]:
    """Ask the rehearsal where to keep the run.

    Args:
        path: Its socket.
        store: Where the script wants to keep it.

    Returns:
        The line to the rehearsal, the store to use, and after how many steps to save; None to leave that to the script.
    """
    gate = Gate(path)
    answer = gate.ask("hello", pid=os.getpid(), uri=store.uri)
    store = open_store(answer["uri"])
    if answer.get("slow"):
        store = slowed(store, **answer["slow"])
    elsewhere = gated(store, gate)
    say(f"this is a rehearsal: checkpoints go to {elsewhere.uri}")
    every = answer.get("every")
    return gate, elsewhere, None if every is None else int(every)
