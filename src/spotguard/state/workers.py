"""Set-up of data loader workers: a stop that is delivered to the whole process group must not end them in the middle of a step."""

import contextlib
import functools
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import get_spawning_popen
from types import FrameType
from typing import Any

__all__ = ["worker_init"]

_ASKED_FOR = (signal.SIGUSR1, signal.SIGUSR2)  # SLURM sends to every process of a step what --signal names


class worker_init:  # noqa: N801 - a function with state; a closure could not be pickled for spawned workers
    """Worker set-up: hear no signal that stops a training, end with who started it, then run the user's own ``worker_init_fn``.

    A stop that is delivered to the whole process group (Ctrl-C, SLURM, ``docker stop``) would otherwise kill the workers, and with them
    the step that has to be finished before the save. What a worker starts hears signals as it would anywhere: a handler, even one that
    does nothing, is not passed on to a program, as a signal that is ignored or blocked would be.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then
        self._leash = _own_leash()

    def __call__(self, worker: int) -> None:
        """Called in the worker, with its number."""
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid == self._leash.owner:  # or nothing would end it but the signal
            self._leash.follow()
            _go_deaf()
        if self.then is not None:
            self.then(worker)


class _Leash:
    """Ends workers with the process that started them.

    That process would do it by SIGTERM, and then wait for them; but Python does not tell a worker who has sent it a signal.

    Attributes:
        owner: Number of the process that holds the near end.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._far, self._near = multiprocessing.Pipe(duplex=False)
        # A finalizer of multiprocessing runs before the workers get their SIGTERM and are waited for, however the process ends but by a
        # kill; and then the pipe is closed.
        multiprocessing.util.Finalize(None, self._near.send_bytes, args=(b"end",), exitpriority=100)

    def follow(self) -> None:
        """Called in a worker: from now on it ends when the owner does, even if it is stuck."""
        if hasattr(self, "_near"):  # it was forked
            self._near.close()
        threading.Thread(target=self._end_with_owner, name="spotguard-worker-leash", daemon=True).start()

    def _end_with_owner(self) -> None:
        with contextlib.suppress(OSError):
            self._far.poll(None)  # the message is left to the other workers
        os._exit(0)

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:  # on its way to anywhere but a worker that is just being started
            return _own_leash, ()
        return _far_leash, (self.owner, self._far)


def _far_leash(owner: int, far: "Connection[Any, Any]") -> _Leash:
    leash = _Leash.__new__(_Leash)
    leash.owner, leash._far = owner, far  # noqa: SLF001
    return leash


_held: list[_Leash] = []


def _own_leash() -> _Leash:
    """That of this process."""
    if not _held or _held[0].owner != os.getpid():
        _held[:] = [_Leash()]
    return _held[0]


def _go_deaf() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, *_ASKED_FOR):
        before = signal.getsignal(number)
        if number == signal.SIGINT and before is signal.SIG_IGN:
            continue  # by whoever started the training, and for all that it starts
        if number in _ASKED_FOR and before is not signal.SIG_DFL:
            continue  # somebody has a use for it
        signal.signal(number, _unheard)
        signal.siginterrupt(number, False)  # noqa: FBT003 - it takes no name
        os.register_at_fork(after_in_child=functools.partial(signal.signal, number, before or signal.SIG_DFL))
    # Lightning's loaders hold signals back until the workers are set up.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


def _unheard(number: int, frame: FrameType | None) -> None:
    pass
