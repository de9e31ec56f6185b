"""Hear SIGTERM from the first line of a script on: ``import spotguard.early``.

The kernel drops a SIGTERM that process 1 has no handler for, and a script that begins with ``import torch`` has none for seconds. In a
container the training often is process 1: a stop in that time would be lost, and SIGKILL would follow. With this line it is recorded, and
answered by the guard as soon as there is one. Nothing has been trained by then, so nothing is saved::

    import spotguard.early  # first

    import torch

What is imported loads nothing else. Where somebody has set a handler already, and in the processes that `multiprocessing` starts, it does
nothing.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["before", "hand_over"]

_REPEAT_S = 1.0  # launchers often deliver one stop twice


class _Recorder:
    def __init__(self) -> None:
        self.number: int | None = None
        self.over = False
        self._first = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Remember it; a second one ends the process, as it does under the guard."""
        if self.over:  # somebody has put us back behind the end of a guard
            _act_by_default(number)
        if self.number is None:
            self.number, self._first = number, time.monotonic()
        elif time.monotonic() - self._first > _REPEAT_S:
            _act_by_default(number)


def hand_over() -> int | None:
    """The signal that has come, or None. From now on whoever asks hears for himself."""
    number, _recorder.number, _recorder.over = _recorder.number, None, True
    return number


def before(handler: Any) -> Any:
    """What was there before, where a handler is ours; any other one as it is."""
    return signal.SIG_DFL if handler == _recorder.handle else handler


def _act_by_default(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # process 1 survives that


def _is_ours_to_set() -> bool:
    processes = sys.modules.get("multiprocessing.process")
    process = processes.current_process() if processes is not None else None
    if process is not None and (process.name != "MainProcess" or getattr(process, "_inheriting", False)):
        return False  # a worker that imports the script again; who has started it ends it by a signal
    if threading.current_thread() is not threading.main_thread():
        return False
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# A forked child has the default again, and what comes while it is born is held back until then.


def _before_fork() -> None:
    if signal.getsignal(signal.SIGTERM) == _recorder.handle:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork_in_parent() -> None:
    if (mask := _forking.__dict__.pop("mask", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    if signal.getsignal(signal.SIGTERM) == _recorder.handle:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork_in_parent()


_recorder = _Recorder()
_forking = threading.local()
if _is_ours_to_set():
    signal.signal(signal.SIGTERM, _recorder.handle)
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
